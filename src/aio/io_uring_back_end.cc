// SPDX-License-Identifier: MIT
// The io_uring loop: one io_uring_enter(2) an iteration hands over polls, file and socket I/O,
// waits with a time-out, and brings completions back.
//
// Threads: the home thread makes the ring and nobody else touches it (IORING_SETUP_SINGLE_ISSUER),
// so the kernel may leave completion work to that thread's own calls (IORING_SETUP_DEFER_TASKRUN),
// and sets a flag in the submission ring when there is some.
// Lifetime: what a completion's user_data points at stays until that completion was reaped.

#include <liburing.h>
#include <poll.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <system_error>
#include <utility>

#include "aio/file_engine.h"
#include "aio/requests.h"
#include "aio/ring_end.h"
#include "roost/aio/aio_context.h"
#include "roost/aio/back_end.h"
#include "roost/base/check.h"

namespace roost {

namespace {

constexpr unsigned kSubmissions = 256;
constexpr unsigned kCompletions = 4096;
constexpr unsigned kMaxReaped = 256;

// Sends and receives that one iteration may make at once before they have to queue, so that a
// coroutine whose sends never block does not keep the loop to itself.
constexpr unsigned kMaxImmediateInRow = 64;

// Iterations that a held receive may wait for the busy wait that was expected.
constexpr unsigned kMaxHeldPolls = 2;

// Linux 6.1, and what Linux 5.19 has of it. (Also from 5.19: cancelling everything at once.)
constexpr unsigned kSetupFlags[] = {
    IORING_SETUP_CQSIZE | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
        IORING_SETUP_TASKRUN_FLAG,
    IORING_SETUP_CQSIZE | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
};

int set_up_ring(io_uring& ring, unsigned submissions) noexcept {
  int error = 0;
  for (unsigned flags : kSetupFlags) {
    io_uring_params params{};
    params.flags = flags;
    params.cq_entries = kCompletions;
    error = io_uring_queue_init_params(submissions, &ring, &params);
    if (error != -EINVAL) return error;
  }
  return error;
}

// The low bits of user_data tell what it points at.
enum Tag : std::uint64_t { kRequest = 0, kWatch = 1, kWake = 2, kCancel = 3, kNobody = 4 };
constexpr std::uint64_t kTagMask = 7;

class IoUringBackEnd final : public BackEnd {
 public:
  IoUringBackEnd(AioContext& context, int wake_fd, FileIo file_io, std::shared_ptr<ThreadPool> pool)
      : context_(context),
        wake_fd_(wake_fd),
        files_in_ring_(file_io == FileIo::kAuto || file_io == FileIo::kIoUring) {
    if (const int error = set_up_ring(ring_, kSubmissions); error < 0) {
      throw std::system_error(-error, std::generic_category(), "io_uring_queue_init");
    }
    watch_wake_fd();
    // What the ring does not take goes to the pool, whoever executes the rest.
    files_.emplace(context, requests_, *this, files_in_ring_ ? FileIo::kPool : file_io,
                   std::move(pool));
  }

  ~IoUringBackEnd() override {
    ROOST_CHECK(requests_.in_flight() == 0,
                "context '{}' gives up its ring with {} requests in flight", context_.name(),
                requests_.in_flight());
    files_.reset();
    closing_ = true;
    io_uring_sqe* sqe = next_sqe();
    io_uring_prep_cancel64(sqe, 0, IORING_ASYNC_CANCEL_ANY | IORING_ASYNC_CANCEL_ALL);
    io_uring_sqe_set_data64(sqe, kNobody);
    while (outstanding_ > 0) {
      ROOST_CHECK(io_uring_submit_and_wait(&ring_, 1) != -EEXIST,
                  "the ring of context '{}' goes on another thread than the one that polled it",
                  context_.name());
      reap();
    }
    io_uring_queue_exit(&ring_);
  }

  const char* name() const noexcept override { return "io_uring"; }

  bool poll(std::int64_t timeout_ns) override {
    immediate_ = 0;
    if (held_ && (timeout_ns != 0 || ++held_polls_ > kMaxHeldPolls)) {
      put_into_ring(*std::exchange(held_, nullptr));
    }
    files_->flush();
    if (timeout_ns == 0 || io_uring_cq_ready(&ring_) > 0 || requests_.some_have_ended()) {
      flush();
    } else if (timeout_ns < 0) {
      io_uring_submit_and_wait(&ring_, 1);
    } else {
      __kernel_timespec limit{.tv_sec = timeout_ns / 1'000'000'000,
                              .tv_nsec = timeout_ns % 1'000'000'000};
      io_uring_cqe* first = nullptr;
      io_uring_submit_and_wait_timeout(&ring_, &first, 1, &limit, nullptr);
    }
    context_.wait_ended();
    const bool reaped = reap();
    return requests_.end_those_that_have() || reaped;
  }

  void flush() override {
    files_->flush();
    // The kernel runs deferred completion work only in a call that asks for events.
    if (io_uring_sq_ready(&ring_) > 0) {
      io_uring_submit_and_get_events(&ring_);
    } else if (kernel_flags() & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)) {
      io_uring_get_events(&ring_);
    }
  }

  bool ready() noexcept override {
    return io_uring_cq_ready(&ring_) > 0 || requests_.some_have_ended() ||
           (kernel_flags() & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW));
  }

  // While the context busily waits for one message after the other, the next is received by a call
  // that is made again and again: the kernel need not watch the socket, nor the sender wake
  // anybody, nor this thread ask what came of it.
  bool try_held() noexcept override {
    if (!held_) return false;
    const std::int64_t result = held_->execute(true);
    if (result == -EAGAIN) return false;
    requests_.end_later(*std::exchange(held_, nullptr), result);
    return true;
  }

  // A send most often finds room, and is alone: tried at once it costs one system call, as it would
  // through the ring, and neither a submission nor a completion nor a turn of the loop. So does a
  // receive of what is there. Reads share one call: those of what is in the page cache complete
  // within the call that submits them.
  bool try_now(IoRequest& request) override {
    if (request.op != IoRequest::Op::kSendMsg && !request.likely) return false;
    if (immediate_ >= kMaxImmediateInRow) return false;
    request.result = request.execute(true);
    if (request.result == -EAGAIN) return false;
    ++immediate_;
    return true;
  }

  void start(IoRequest& request) override {
    requests_.started();
    if (request.op == IoRequest::Op::kRecv && request.flags == 0 && !held_ &&
        context_.waits_busily()) {
      request.stage = kHeld;
      held_ = &request;
      held_polls_ = 0;
      return;
    }
    if (files_in_ring_ ? request.for_pool_only() : request.on_file()) {
      files_->start(request);
    } else {
      put_into_ring(request);
    }
  }

  // Whether the kernel could end it early is told by its own completion.
  void cancel(IoRequest& request) override {
    if (std::exchange(request.cancelled, true)) return;
    if (request.stage == kInRing || request.stage == kPolledInRing) {
      cancelling_.push(request);
      cancel_in_ring(reinterpret_cast<std::uint64_t>(&request));
    } else if (request.stage == kHeld) {
      held_ = nullptr;
      requests_.end_later(request, -ECANCELED);
    } else if (request.stage == kInPool || request.stage == kInLinuxAio) {
      files_->cancel(request);
    }
  }

  void watch_changed(FdWatch& watch) override {
    if (watch.armed_events == 0) {
      if (watch.removed) {
        delete &watch;
      } else {
        arm(watch);
      }
    } else if (watch.removed || watch.armed_events != watch.wanted_events()) {
      // The poll's completion, cancelled or not, frees the watch or arms it anew.
      io_uring_sqe* sqe = next_sqe();
      io_uring_prep_poll_remove(sqe, reinterpret_cast<std::uint64_t>(&watch) | kWatch);
      io_uring_sqe_set_data64(sqe, kNobody);
    }
  }

 private:
  unsigned kernel_flags() const noexcept {
    return std::atomic_ref<unsigned>(*ring_.sq.kflags).load(std::memory_order_relaxed);
  }

  io_uring_sqe* next_sqe() {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    while (!sqe) {
      // Full: hand over what there is. Busy (the completion ring overflows): completions are
      // pending that the kernel keeps for us, and asking for events moves them in.
      if (io_uring_submit(&ring_) < 0) io_uring_get_events(&ring_);
      sqe = io_uring_get_sqe(&ring_);
    }
    ++outstanding_;
    return sqe;
  }

  void cancel_in_ring(std::uint64_t request) {
    io_uring_sqe* sqe = next_sqe();
    io_uring_prep_cancel64(sqe, request | kRequest, 0);
    io_uring_sqe_set_data64(sqe, request | kCancel);
  }

  // The kernel finds no request that goes from one of its places to another just then: that has
  // been woken and not run yet, say, and will wait again. `request` may be gone: its address is
  // looked up among those that are there.
  void cancel_ended(std::uint64_t request, int result) {
    if (result != -ENOENT) return;
    for (const IoRequest* one = cancelling_.first(); one; one = one->next) {
      if (reinterpret_cast<std::uint64_t>(one) != request) continue;
      cancel_in_ring(request);
      return;
    }
  }

  void put_into_ring(IoRequest& request) {
    request.stage = kInRing;
    io_uring_sqe* sqe = next_sqe();
    prepare(*sqe, request);
    io_uring_sqe_set_data64(sqe, reinterpret_cast<std::uint64_t>(&request) | kRequest);
  }

  static void prepare(io_uring_sqe& sqe, const IoRequest& r) noexcept {
    switch (r.op) {
      case IoRequest::Op::kRead:
        io_uring_prep_read(&sqe, r.fd, r.address, r.length, r.offset);
        break;
      case IoRequest::Op::kWritev:
        if (r.length == 1) {
          // One piece: nothing for the kernel to copy where a worker has to do it.
          const iovec& piece = *static_cast<const iovec*>(r.address);
          io_uring_prep_write(&sqe, r.fd, piece.iov_base, detail::io_length(piece.iov_len),
                              r.offset);
          sqe.rw_flags = r.flags;
          break;
        }
        io_uring_prep_writev2(&sqe, r.fd, static_cast<const iovec*>(r.address), r.length, r.offset,
                              r.flags);
        break;
      case IoRequest::Op::kDataSync:
        io_uring_prep_fsync(&sqe, r.fd, IORING_FSYNC_DATASYNC);
        break;
      case IoRequest::Op::kAllocate:
        io_uring_prep_fallocate(&sqe, r.fd, r.flags, static_cast<off_t>(r.offset),
                                static_cast<off_t>(r.size));
        break;
      case IoRequest::Op::kTruncate:
      case IoRequest::Op::kReadAhead:
      case IoRequest::Op::kFindExtents:
        ROOST_CHECK(false, "an operation for the thread pool went to the ring");
        break;
      case IoRequest::Op::kRecv:
        io_uring_prep_recv(&sqe, r.fd, r.address, r.length, r.flags);
        // Who waits for the next message has most often just been given the last one, so trying
        // first would find nothing. Who wants so many bytes knows that they are on their way.
        if (!(r.flags & MSG_WAITALL) && !r.tried) sqe.ioprio |= IORING_RECVSEND_POLL_FIRST;
        break;
      case IoRequest::Op::kRecvMsg:
        io_uring_prep_recvmsg(&sqe, r.fd, static_cast<msghdr*>(r.address),
                              static_cast<unsigned>(r.flags));
        if (!(r.flags & MSG_WAITALL) && !r.tried) sqe.ioprio |= IORING_RECVSEND_POLL_FIRST;
        break;
      case IoRequest::Op::kSendMsg:
        io_uring_prep_sendmsg(&sqe, r.fd, static_cast<const msghdr*>(r.address),
                              static_cast<unsigned>(r.flags));
        break;
      case IoRequest::Op::kAccept:
        io_uring_prep_accept(&sqe, r.fd, nullptr, nullptr, r.flags);
        break;
      case IoRequest::Op::kConnect:
        io_uring_prep_connect(&sqe, r.fd, static_cast<const sockaddr*>(r.address), r.length);
        break;
      case IoRequest::Op::kPoll:
        io_uring_prep_poll_add(&sqe, r.fd, static_cast<unsigned>(r.flags));
        break;
    }
  }

  void arm(FdWatch& watch) {
    watch.armed_events = watch.wanted_events();
    io_uring_sqe* sqe = next_sqe();
    io_uring_prep_poll_add(sqe, watch.fd, watch.armed_events);
    io_uring_sqe_set_data64(sqe, reinterpret_cast<std::uint64_t>(&watch) | kWatch);
  }

  // Multishot: every write to the eventfd completes once more, and nobody has to read it or arm
  // anything anew. Its count grows until the context closes.
  void watch_wake_fd() {
    io_uring_sqe* sqe = next_sqe();
    io_uring_prep_poll_multishot(sqe, wake_fd_, POLLIN);
    io_uring_sqe_set_data64(sqe, kWake);
  }

  // Dispatches what has completed. Each completion leaves the ring before its callback runs, so a
  // nested poll goes on with the next one. Bounded, so that entries get their turn.
  bool reap() {
    bool progress = false;
    io_uring_cqe* cqe = nullptr;
    for (unsigned i = 0; i < kMaxReaped && io_uring_peek_cqe(&ring_, &cqe) == 0; ++i) {
      const std::uint64_t data = cqe->user_data;
      const int result = cqe->res;
      const bool last = !(cqe->flags & IORING_CQE_F_MORE);
      io_uring_cqe_seen(&ring_, cqe);
      if (last) --outstanding_;
      progress |= dispatch(data, result, last);
    }
    return progress;
  }

  bool dispatch(std::uint64_t data, int result, bool last) {
    switch (static_cast<Tag>(data & kTagMask)) {
      case kRequest:
        return ended(*reinterpret_cast<IoRequest*>(data), result);
      case kWatch:
        return watch_fired(*reinterpret_cast<FdWatch*>(data & ~kTagMask), result);
      case kWake:
        if (last && !closing_) watch_wake_fd();
        return false;
      case kCancel:
        cancel_ended(data & ~kTagMask, result);
        return false;
      case kNobody:
        return false;
    }
    return false;
  }

  bool ended(IoRequest& request, int result) {
    switch (const RingEnd end = after_completion(request, result); end.next) {
      case RingEnd::Next::kAgain:
        put_into_ring(request);
        return false;
      case RingEnd::Next::kWithoutPoll:
        request.tried = true;
        put_into_ring(request);
        return false;
      case RingEnd::Next::kPoll: {
        request.stage = kPolledInRing;
        io_uring_sqe* sqe = next_sqe();
        io_uring_prep_poll_add(sqe, request.fd, POLLIN);
        io_uring_sqe_set_data64(sqe, reinterpret_cast<std::uint64_t>(&request) | kRequest);
        return false;
      }
      case RingEnd::Next::kEnd:
        if (request.cancelled) cancelling_.remove(request);
        request.result = end.result;
        requests_.end(request);
        return true;
    }
    return false;
  }

  bool watch_fired(FdWatch& watch, int result) {
    if (watch.removed) {
      delete &watch;
      return false;
    }
    if (closing_) {
      watch.armed_events = 0;
      return false;
    }
    bool progress = false;
    if (result != -ECANCELED) {
      // While armed_events stands, a change or removal in the callback leaves the watch to us.
      const auto events = result < 0 ? POLLERR : static_cast<std::uint32_t>(result);
      const std::uint32_t wanted = events & (watch.wanted_events() | POLLERR | POLLHUP | POLLNVAL);
      if (wanted) watch.dispatch(wanted);
      progress = wanted != 0;
    }
    watch.armed_events = 0;
    if (watch.removed) {
      delete &watch;
    } else if (watch.wanted_events()) {
      arm(watch);
    }
    return progress;
  }

  AioContext& context_;
  const int wake_fd_;
  io_uring ring_{};
  unsigned outstanding_ = 0;  // completions to come, for the destructor
  Requests requests_;
  RequestList cancelling_;     // in the ring, cancelled, and not ended yet
  IoRequest* held_ = nullptr;  // a receive
  unsigned held_polls_ = 0;    // iterations since it came
  unsigned immediate_ = 0;     // sends and receives that this iteration has made at once
  bool closing_ = false;
  const bool files_in_ring_;
  std::optional<FileEngines> files_;  // null once the back end goes
};

}  // namespace

bool io_uring_available() noexcept {
  static const bool available = [] {
    io_uring ring{};
    if (set_up_ring(ring, 1) < 0) return false;
    io_uring_queue_exit(&ring);
    return true;
  }();
  return available;
}

std::unique_ptr<BackEnd> make_io_uring_back_end(AioContext& context, int wake_fd, FileIo file_io,
                                                std::shared_ptr<ThreadPool> pool) {
  return std::make_unique<IoUringBackEnd>(context, wake_fd, file_io, std::move(pool));
}

}  // namespace roost
