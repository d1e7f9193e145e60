// SPDX-License-Identifier: MIT
// The epoll loop, for kernels and containers that refuse io_uring: sockets are tried first and
// waited for where that would block; files are read without waiting where the page cache has the
// data, and everything else goes to a thread pool.
//
// Threads: home thread; workers touch only the Job they were given.
// Lifetime: a descriptor has either a handler (FdWatch) or requests waiting on it, never both.

#include <poll.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <system_error>
#include <unordered_map>
#include <vector>

#include "roost/aio/aio_context.h"
#include "roost/aio/back_end.h"
#include "roost/aio/thread_pool.h"
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

class EpollBackEnd final : public BackEnd {
 public:
  EpollBackEnd(AioContext& context, int wake_fd, std::shared_ptr<ThreadPool> pool)
      : context_(context), wake_fd_(wake_fd), pool_(std::move(pool)) {
    epoll_fd_ = UniqueFd(::epoll_create1(EPOLL_CLOEXEC));
    if (!epoll_fd_) throw std::system_error(errno, std::generic_category(), "epoll_create1");
    epoll_event event{.events = EPOLLIN, .data = {.u64 = key(wake_fd, kWake)}};
    if (::epoll_ctl(epoll_fd_.get(), EPOLL_CTL_ADD, wake_fd, &event) < 0) {
      throw std::system_error(errno, std::generic_category(), "epoll_ctl");
    }
  }

  ~EpollBackEnd() override {
    ROOST_CHECK(requests_in_flight_ == 0,
                "context '{}' gives up its descriptors with {} requests in flight", context_.name(),
                requests_in_flight_);
  }

  const char* name() const noexcept override { return "epoll"; }

  bool poll(std::int64_t timeout_ns) override {
    immediate_ = 0;
    if (deferred_head_ || next_ready_ < ready_count_) {
      // There is no wait, and the context must not be left asleep nor waited with awake.
      context_.wait_ended();
      timeout_ns = 0;
    }
    bool progress = complete_deferred();
    if (next_ready_ == ready_count_) gather(timeout_ns);
    // A nested poll continues after the event whose callback it was called from.
    while (next_ready_ < ready_count_) {
      const epoll_event event = ready_[next_ready_++];
      progress |= dispatch(static_cast<int>(event.data.u64 >> 2),
                           static_cast<Kind>(event.data.u64 & 3), event.events);
    }
    return progress;
  }

  void flush() override {}

  bool ready() noexcept override {
    return next_ready_ < ready_count_ || deferred_head_ || gather(0);
  }

  bool try_now(IoRequest& request) override {
    if (immediate_ >= kMaxImmediate) return false;
    request.result = request.execute(true);
    if (request.result == -EAGAIN || request.result == -EOPNOTSUPP) return false;
    ++immediate_;
    return true;
  }

  void start(IoRequest& request) override {
    ++requests_in_flight_;
    const bool socket = request.op == IoRequest::Op::kRecv || request.op == IoRequest::Op::kSendMsg;
    if (immediate_ >= kMaxImmediate && socket) {
      // It was not tried: try it when its turn comes in the next iteration.
      request.next = nullptr;
      (deferred_tail_ ? deferred_tail_->next : deferred_head_) = &request;
      deferred_tail_ = &request;
      ++deferred_count_;
    } else if (socket) {
      wait_for_socket(request);
    } else {
      hand_to_pool(request);
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
    const int operation = watch.armed_events ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    ROOST_CHECK(::epoll_ctl(epoll_fd_.get(), operation, watch.fd, &event) == 0,
                "descriptor {} of context '{}' cannot be waited for: errno {}", watch.fd,
                context_.name(), errno);
    watch.armed_events = wanted;
  }

 private:
  enum Kind : std::uint64_t { kWake = 0, kWatch = 1, kSocket = 2 };
  static std::uint64_t key(int fd, Kind kind) noexcept {
    return static_cast<std::uint64_t>(fd) << 2 | kind;
  }

  // The requests that wait on one socket: one for each direction.
  struct SocketWait {
    IoRequest* recv = nullptr;
    IoRequest* send = nullptr;
  };

  struct Job : ThreadPool::Work, CallbackEntry {
    Job(EpollBackEnd& owner, IoRequest& r)
        : CallbackEntry(&deliver), back_end(owner), context(owner.context_), request(r) {
      ThreadPool::Work::run = &execute;
    }
    static void execute(ThreadPool::Work& work) noexcept {
      auto& job = static_cast<Job&>(work);
      job.request.result = job.request.execute(false);
      // After the post the job belongs to the context.
      ROOST_CHECK(job.context.post(job), "I/O finished after its context '{}' was closed",
                  job.context.name());
    }
    static bool deliver(CallbackEntry& entry) noexcept {
      auto& job = static_cast<Job&>(entry);
      IoRequest& r = job.request;
      --job.back_end.requests_in_flight_;
      delete &job;
      r.complete(r);
      return true;
    }
    EpollBackEnd& back_end;
    AioContext& context;
    IoRequest& request;
  };

  // A request that failed before it was waited for; completed, as all are, from a later iteration.
  struct Refusal : CallbackEntry {
    Refusal(EpollBackEnd& owner, IoRequest& r)
        : CallbackEntry(&deliver), back_end(owner), request(r) {}
    static bool deliver(CallbackEntry& entry) noexcept {
      auto& refusal = static_cast<Refusal&>(entry);
      IoRequest& r = refusal.request;
      --refusal.back_end.requests_in_flight_;
      delete &refusal;
      r.complete(r);
      return true;
    }
    EpollBackEnd& back_end;
    IoRequest& request;
  };

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
      case kSocket:
        return dispatch_socket(fd, events);
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

  bool dispatch_socket(int fd, std::uint32_t events) {
    constexpr std::uint32_t kBoth = EPOLLERR | EPOLLHUP;
    bool progress = false;
    if (events & (EPOLLIN | kBoth)) progress |= retry_direction(fd, &SocketWait::recv);
    if (events & (EPOLLOUT | kBoth)) progress |= retry_direction(fd, &SocketWait::send);
    return progress;
  }

  // What is not tried stays in the table, armed, where a nested poll finds it.
  bool retry_direction(int fd, IoRequest* SocketWait::*direction) {
    const auto found = sockets_.find(fd);
    if (found == sockets_.end()) return false;
    IoRequest* const request = std::exchange(found->second.*direction, nullptr);
    if (found->second.recv || found->second.send) {
      ROOST_CHECK(arm_socket(fd, found->second), "descriptor {} of context '{}' got lost: errno {}",
                  fd, context_.name(), errno);
    } else {
      sockets_.erase(found);
    }
    return request && retry(*request);
  }

  bool retry(IoRequest& request) {
    request.result = request.execute(true);
    if (request.result == -EAGAIN) {
      wait_for_socket(request);
      return false;
    }
    --requests_in_flight_;
    request.complete(request);
    return true;
  }

  bool complete_deferred() {
    bool progress = false;
    // Only those that are there now; a nested poll may take some of them.
    for (unsigned count = deferred_count_; count > 0 && deferred_head_; --count) {
      IoRequest& request = *deferred_head_;
      deferred_head_ = request.next;
      if (!deferred_head_) deferred_tail_ = nullptr;
      --deferred_count_;
      progress |= retry(request);
    }
    return progress;
  }

  void wait_for_socket(IoRequest& request) {
    SocketWait& wait = sockets_[request.fd];
    IoRequest*& slot = request.op == IoRequest::Op::kRecv ? wait.recv : wait.send;
    ROOST_CHECK(!slot, "two coroutines wait on one direction of descriptor {}", request.fd);
    slot = &request;
    if (arm_socket(request.fd, wait)) return;
    // Too many descriptors are being waited for, or there is no memory: that is the request's loss.
    const int error = errno;
    slot = nullptr;
    if (!wait.recv && !wait.send) sockets_.erase(request.fd);
    request.result = -error;
    context_.post_here(*new Refusal(*this, request));
  }

  // One-shot: the descriptor may be closed and its number used again without our being told, so
  // nothing is assumed about what the kernel still knows.
  bool arm_socket(int fd, const SocketWait& wait) {
    epoll_event event{
        .events = EPOLLONESHOT | (wait.recv ? EPOLLIN : 0u) | (wait.send ? EPOLLOUT : 0u),
        .data = {.u64 = key(fd, kSocket)}};
    return ::epoll_ctl(epoll_fd_.get(), EPOLL_CTL_MOD, fd, &event) == 0 ||
           (errno == ENOENT && ::epoll_ctl(epoll_fd_.get(), EPOLL_CTL_ADD, fd, &event) == 0);
  }

  void hand_to_pool(IoRequest& request) {
    if (!pool_) pool_ = std::make_shared<ThreadPool>();
    pool_->submit(*new Job(*this, request));
  }

  AioContext& context_;
  const int wake_fd_;
  std::shared_ptr<ThreadPool> pool_;
  UniqueFd epoll_fd_;
  std::array<epoll_event, 128> ready_;
  unsigned ready_count_ = 0;
  unsigned next_ready_ = 0;
  std::unordered_map<int, FdWatch*> watches_;
  std::unordered_map<int, SocketWait> sockets_;
  IoRequest* deferred_head_ = nullptr;  // sockets whose operation was not tried yet
  IoRequest* deferred_tail_ = nullptr;
  unsigned deferred_count_ = 0;
  unsigned immediate_ = 0;
  unsigned requests_in_flight_ = 0;
  bool coarse_ = false;  // the kernel has no epoll_pwait2
};

}  // namespace

std::unique_ptr<BackEnd> make_epoll_back_end(AioContext& context, int wake_fd,
                                             std::shared_ptr<ThreadPool> pool) {
  return std::make_unique<EpollBackEnd>(context, wake_fd, std::move(pool));
}

}  // namespace roost
