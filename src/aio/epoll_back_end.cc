// SPDX-License-Identifier: MIT
// The epoll loop, for kernels and containers that refuse io_uring: sockets are tried first and
// waited for where that would block; files are read without waiting where the page cache has the
// data, and everything else goes to a thread pool or, where the file is read and written directly,
// to Linux AIO.
//
// Threads: home thread.
// Lifetime: a descriptor has either a handler (FdWatch) or requests waiting on it, never both.

#include <poll.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <optional>
#include <system_error>
#include <unordered_map>
#include <vector>

#include "aio/file_engine.h"
#include "aio/requests.h"
#include "roost/aio/aio_context.h"
#include "roost/aio/back_end.h"
#include "roost/aio/timer.h"
#include "roost/aio/unique_fd.h"
#include "roost/base/check.h"

namespace roost {

namespace {

static_assert(POLLIN == EPOLLIN && POLLOUT == EPOLLOUT && POLLERR == EPOLLERR &&
                  POLLHUP == EPOLLHUP,
              "events are passed through");

// Requests that one iteration may complete at once before they have to queue, so that a coroutine
// whose I/O never blocks does not keep the loop to itself.
constexpr unsigned kMaxImmediate = 64;

// A unix socket that listens and whose queue is full tells nobody when there is room in it again:
// who connects tries again after a while, at first soon.
constexpr std::int64_t kFirstRetryNs = 200'000;
constexpr std::int64_t kLastRetryNs = 50'000'000;

class EpollBackEnd final : public BackEnd {
 public:
  EpollBackEnd(AioContext& context, int wake_fd, FileIo file_io, std::shared_ptr<ThreadPool> pool)
      : context_(context), wake_fd_(wake_fd), retry_(context, [this] { retry_connects(); }) {
    epoll_fd_ = UniqueFd(::epoll_create1(EPOLL_CLOEXEC));
    if (!epoll_fd_) throw std::system_error(errno, std::generic_category(), "epoll_create1");
    epoll_event event{.events = EPOLLIN, .data = {.u64 = key(wake_fd, kWake)}};
    if (::epoll_ctl(epoll_fd_.get(), EPOLL_CTL_ADD, wake_fd, &event) < 0) {
      throw std::system_error(errno, std::generic_category(), "epoll_ctl");
    }
    files_.emplace(context, requests_, *this, file_io, std::move(pool));
  }

  ~EpollBackEnd() override {
    ROOST_CHECK(requests_.in_flight() == 0,
                "context '{}' gives up its descriptors with {} requests in flight", context_.name(),
                requests_.in_flight());
    files_.reset();  // while there is something to take its descriptor away from
  }

  const char* name() const noexcept override { return "epoll"; }

  bool poll(std::int64_t timeout_ns) override {
    immediate_ = 0;
    files_->flush();
    if (!not_tried_.empty() || requests_.some_have_ended() || next_ready_ < ready_count_) {
      // There is no wait, and the context must not be left asleep nor waited with awake.
      context_.wait_ended();
      timeout_ns = 0;
    }
    bool progress = try_those_put_off();
    progress |= requests_.end_those_that_have();
    if (next_ready_ == ready_count_) gather(timeout_ns);
    // A nested poll continues after the event whose callback it was called from.
    while (next_ready_ < ready_count_) {
      const epoll_event event = ready_[next_ready_++];
      progress |= dispatch(static_cast<int>(event.data.u64 >> 2),
                           static_cast<Kind>(event.data.u64 & 3), event.events);
    }
    return requests_.end_those_that_have() || progress;
  }

  void flush() override { files_->flush(); }

  bool ready() noexcept override {
    return next_ready_ < ready_count_ || !not_tried_.empty() || requests_.some_have_ended() ||
           gather(0);
  }

  bool try_now(IoRequest& request) override {
    if (immediate_ >= kMaxImmediate || request.direct) return false;
    if (!attempt(request)) return false;
    ++immediate_;
    return true;
  }

  void start(IoRequest& request) override {
    requests_.started();
    if (request.op == IoRequest::Op::kPoll) {
      ROOST_CHECK(request.flags & (POLLIN | POLLOUT), "a poll of descriptor {} for no event",
                  request.fd);
    }
    if (request.on_file()) {
      files_->start(request);
    } else if (request.tried) {
      wait(request);
    } else {
      // Its turn comes in the next iteration.
      request.stage = kNotTried;
      not_tried_.push(request);
      ++not_tried_count_;
    }
  }

  void cancel(IoRequest& request) override {
    if (std::exchange(request.cancelled, true)) return;
    switch (static_cast<Stage>(request.stage)) {
      case kWaiting:
        stop_waiting(request);
        requests_.end_later(request, -ECANCELED);
        break;
      case kQueueFull:
        queue_full_.remove(request);
        if (queue_full_.empty()) retry_.cancel();
        requests_.end_later(request, -ECANCELED);
        break;
      case kInPool:
      case kInLinuxAio:
        files_->cancel(request);
        break;
      case kNotTried:  // it is told when its turn comes
      case kHasEnded:
      case kHeld:
      case kInRing:
      case kPolledInRing:
        break;
    }
  }

  void watch_changed(FdWatch& watch) override {
    const std::uint32_t wanted = watch.wanted_events();
    if (watch.removed) {
      if (watch.armed_events) ::epoll_ctl(epoll_fd_.get(), EPOLL_CTL_DEL, watch.fd, nullptr);
      watches_.erase(watch.fd);
      // What this batch still holds of it must not reach a later handler of the same number.
      for (unsigned i = next_ready_; i < ready_count_; ++i) {
        if (ready_[i].data.u64 == key(watch.fd, kWatch)) ready_[i].events = 0;
      }
      if (watch.in_callback) {
        watch.armed_events = 0;  // the dispatch frees it
      } else {
        delete &watch;
      }
      return;
    }
    watches_[watch.fd] = &watch;
    if (wanted == watch.armed_events) return;
    epoll_event event{.events = wanted, .data = {.u64 = key(watch.fd, kWatch)}};
    // The kernel may still know a descriptor on which requests have waited.
    const bool changed = (!watch.armed_events &&
                          ::epoll_ctl(epoll_fd_.get(), EPOLL_CTL_ADD, watch.fd, &event) == 0) ||
                         ((watch.armed_events || errno == EEXIST) &&
                          ::epoll_ctl(epoll_fd_.get(), EPOLL_CTL_MOD, watch.fd, &event) == 0);
    ROOST_CHECK(changed, "descriptor {} of context '{}' cannot be waited for: errno {}", watch.fd,
                context_.name(), errno);
    watch.armed_events = wanted;
  }

 private:
  enum Kind : std::uint64_t { kWake = 0, kWatch = 1, kDescriptor = 2 };
  static std::uint64_t key(int fd, Kind kind) noexcept {
    return static_cast<std::uint64_t>(fd) << 2 | kind;
  }

  static bool waits_for_input(const IoRequest& r) noexcept {
    return r.op == IoRequest::Op::kRecv || r.op == IoRequest::Op::kRecvMsg ||
           r.op == IoRequest::Op::kAccept || (r.op == IoRequest::Op::kPoll && (r.flags & POLLIN));
  }
  static bool waits_for_output(const IoRequest& r) noexcept {
    return r.op == IoRequest::Op::kSendMsg || r.op == IoRequest::Op::kConnect ||
           (r.op == IoRequest::Op::kPoll && (r.flags & POLLOUT));
  }

  static bool queue_is_full(const IoRequest& r) noexcept {
    return r.op == IoRequest::Op::kConnect && r.tried && r.result == -EAGAIN;
  }

  // Asks the kernel what is ready; true if something is. REQUIRES: all of ready_ is dispatched.
  bool gather(std::int64_t timeout_ns) noexcept {
    next_ready_ = ready_count_ = 0;
    int count = -1;
    if (!coarse_) {
      timespec limit{.tv_sec = timeout_ns / 1'000'000'000, .tv_nsec = timeout_ns % 1'000'000'000};
      count = ::epoll_pwait2(epoll_fd_.get(), ready_.data(), static_cast<int>(ready_.size()),
                             timeout_ns < 0 ? nullptr : &limit, nullptr);
      // Linux before 5.11, or a sandbox from before then: milliseconds have to do.
      coarse_ = count < 0 && (errno == ENOSYS || errno == EPERM);
    }
    if (coarse_) {
      const std::int64_t ms = std::min<std::int64_t>((timeout_ns + 999'999) / 1'000'000, 1 << 30);
      count = ::epoll_wait(epoll_fd_.get(), ready_.data(), static_cast<int>(ready_.size()),
                           timeout_ns < 0 ? -1 : static_cast<int>(ms));
    }
    ROOST_CHECK(count >= 0 || errno == EINTR, "epoll of context '{}' fails: errno {}",
                context_.name(), errno);
    if (count > 0) ready_count_ = static_cast<unsigned>(count);
    context_.wait_ended();
    return ready_count_ > 0;
  }

  bool dispatch(int fd, Kind kind, std::uint32_t events) {
    switch (kind) {
      case kWake: {
        std::uint64_t count = 0;
        if (::read(wake_fd_, &count, sizeof count) == sizeof count) context_.signalled(count);
        return false;
      }
      case kWatch:
        return dispatch_watch(fd, events);
      case kDescriptor:
        return dispatch_descriptor(fd, events);
    }
    return false;
  }

  bool dispatch_watch(int fd, std::uint32_t events) {
    // Gone if an earlier callback of this batch removed it.
    const auto found = watches_.find(fd);
    if (found == watches_.end()) return false;
    FdWatch& watch = *found->second;
    if (!(events & (watch.wanted_events() | EPOLLERR | EPOLLHUP))) return false;
    const bool outer = std::exchange(watch.in_callback, true);
    watch.dispatch(events);
    watch.in_callback = outer;
    if (watch.removed && !outer) delete &watch;
    return true;
  }

  bool dispatch_descriptor(int fd, std::uint32_t events) {
    constexpr std::uint32_t kBoth = EPOLLERR | EPOLLHUP;
    bool progress = false;
    if (events & (EPOLLIN | kBoth)) progress |= retry_first(fd, &waits_for_input);
    if (events & (EPOLLOUT | kBoth)) progress |= retry_first(fd, &waits_for_output);
    return progress;
  }

  // Tries the first that waits for that direction. What is not tried stays in the table, armed,
  // where the next iteration finds it, or a nested poll.
  bool retry_first(int fd, bool (*waits)(const IoRequest&) noexcept) {
    const auto found = waiters_.find(fd);
    if (found == waiters_.end()) return false;
    IoRequest* request = found->second.first();
    while (request && !waits(*request)) request = request->next;
    if (request) stop_waiting(*request);
    if (const auto others = waiters_.find(fd); others != waiters_.end()) {
      ROOST_CHECK(arm(fd, others->second), "descriptor {} of context '{}' got lost: errno {}", fd,
                  context_.name(), errno);
    }
    return request && retry(*request);
  }

  // True: it was done, or has failed, without waiting.
  static bool attempt(IoRequest& request) noexcept {
    request.result = request.execute(true);
    request.tried = true;
    if (request.result == -EAGAIN) return false;
    if (request.op == IoRequest::Op::kConnect) return request.result != -EINPROGRESS;
    // A file system that cannot tell beforehand whether it would wait.
    return !(request.on_file() && request.result == -EOPNOTSUPP);
  }

  bool retry(IoRequest& request) {
    if (request.cancelled) {
      request.result = -ECANCELED;
    } else if (!attempt(request)) {
      wait(request);
      return false;
    }
    requests_.end(request);
    return true;
  }

  bool try_those_put_off() {
    bool progress = false;
    // Only those that are there now; a nested poll may take some of them.
    for (unsigned count = not_tried_count_; count > 0 && not_tried_count_ > 0; --count) {
      --not_tried_count_;
      progress |= retry(*not_tried_.pop());
    }
    return progress;
  }

  void wait(IoRequest& request) {
    if (!queue_is_full(request)) {
      wait_for_descriptor(request);
      return;
    }
    request.stage = kQueueFull;
    queue_full_.push(request);
    if (!retry_.armed()) retry_.arm_after(retry_delay_ns_ = kFirstRetryNs);
  }

  void retry_connects() {
    RequestList some = std::exchange(queue_full_, {});
    while (IoRequest* const request = some.pop()) {
      request->tried = false;
      if (attempt(*request)) {
        requests_.end_later(*request, request->result);
      } else if (!queue_is_full(*request)) {
        wait_for_descriptor(*request);
      } else {
        queue_full_.push(*request);
      }
    }
    if (queue_full_.empty()) return;
    retry_delay_ns_ = std::min(2 * retry_delay_ns_, kLastRetryNs);
    retry_.arm_after(retry_delay_ns_);
  }

  void wait_for_descriptor(IoRequest& request) {
    RequestList& waiters = waiters_[request.fd];
    waiters.push(request);
    request.stage = kWaiting;
    if (arm(request.fd, waiters)) return;
    // Too many descriptors are being waited for, or there is no memory: that is the request's loss.
    const int error = errno;
    stop_waiting(request);
    requests_.end_later(request, -error);
  }

  // The kernel may tell of the descriptor once more; nobody will be found to wait for it.
  void stop_waiting(IoRequest& request) noexcept {
    const auto found = waiters_.find(request.fd);
    found->second.remove(request);
    if (found->second.empty()) waiters_.erase(found);
  }

  // One-shot: the descriptor may be closed and its number used again without our being told, so
  // nothing is assumed about what the kernel still knows.
  bool arm(int fd, const RequestList& waiters) {
    epoll_event event{.events = EPOLLONESHOT, .data = {.u64 = key(fd, kDescriptor)}};
    for (const IoRequest* one = waiters.first(); one; one = one->next) {
      if (waits_for_input(*one)) event.events |= EPOLLIN;
      if (waits_for_output(*one)) event.events |= EPOLLOUT;
    }
    return ::epoll_ctl(epoll_fd_.get(), EPOLL_CTL_MOD, fd, &event) == 0 ||
           (errno == ENOENT && ::epoll_ctl(epoll_fd_.get(), EPOLL_CTL_ADD, fd, &event) == 0);
  }

  AioContext& context_;
  const int wake_fd_;
  UniqueFd epoll_fd_;
  std::array<epoll_event, 128> ready_;
  unsigned ready_count_ = 0;
  unsigned next_ready_ = 0;
  std::unordered_map<int, FdWatch*> watches_;
  std::unordered_map<int, RequestList> waiters_;  // by descriptor; the oldest first
  Requests requests_;
  RequestList not_tried_;
  unsigned not_tried_count_ = 0;
  RequestList queue_full_;
  std::int64_t retry_delay_ns_ = kFirstRetryNs;
  Timer retry_;  // armed while queue_full_ is not empty
  unsigned immediate_ = 0;
  bool coarse_ = false;  // the kernel has no epoll_pwait2
  std::optional<FileEngines> files_;
};

}  // namespace

std::unique_ptr<BackEnd> make_epoll_back_end(AioContext& context, int wake_fd, FileIo file_io,
                                             std::shared_ptr<ThreadPool> pool) {
  return std::make_unique<EpollBackEnd>(context, wake_fd, file_io, std::move(pool));
}

}  // namespace roost
