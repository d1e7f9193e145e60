// SPDX-License-Identifier: MIT
// I/O that a coroutine awaits: `std::int64_t n = co_await io_read(fd, ...)`.
//
// Each gives the bytes transferred (possibly fewer than asked for), 0, or a negative errno, and
// runs on the context the coroutine is on, through that context's back end.
//
// Each has an overload with a stop token, as last argument. When its stop is requested, the
// operation is asked to end early; the await returns once it has ended, with what it did, or with
// -ECANCELED where the kernel, or the thread pool, gave it up. What -ECANCELED means:
//
//   io_read, io_recv, io_recvmsg,           not started: nothing was taken; bytes and connections
//   io_accept, io_poll                      stay where they are (a buffer may have been scribbled)
//   io_writev, io_sendmsg                   not started: nothing was written or sent
//   io_truncate, io_read_ahead,             not started
//   io_find_extents
//   io_data_sync, io_allocate, and          unknown, on io_uring; not started otherwise
//   io_writev with RWF_DSYNC or RWF_SYNC
//   io_connect                              unknown: the socket may get connected; close it
//
// What was transferred before the stop is never lost: it is the result. A stop that was requested
// beforehand gives -ECANCELED without a try. File operations that have begun are seldom given up.
//
// Several may wait for one descriptor, in one direction, too (accepts of several coroutines, say);
// the order they are served in is the kernel's.
//
// Threads: within a coroutine; a stop may be requested from any thread at any time.
// Lifetime: buffers, iovecs and msghdrs stay untouched until the await returns. Descriptors are
// closed after every operation on them has returned (shutdown(2) makes socket operations return).
#pragma once

#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stop_token>
#include <utility>

#include "roost/aio/io_request.h"
#include "roost/aio/stop_relay.h"
#include "roost/coro/coroutine.h"
#include "roost/coro/may_wait.h"

namespace roost {

/// What the functions below return: co_await gives their std::int64_t.
class [[nodiscard]] IoAwaiter {
 public:
  IoAwaiter(IoRequest::Op op, int fd) noexcept : request_(op, fd) {}

  bool await_ready() { return request_.try_now(); }

  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) noexcept {
    request_.co = frame.promise().co;
    detail::check_may_wait(*request_.co, "I/O");
    start_ = suspend_waiting("I/O", Start{&request_});
    start_.await_suspend(frame);
  }

  std::int64_t await_resume() const noexcept { return request_.result; }

  IoRequest& request() noexcept { return request_; }

 private:
  struct Request : IoRequest {
    Request(Op o, int f) noexcept : IoRequest(o, f) {}
    bool try_now();
    void start() noexcept;
    Coroutine* co = nullptr;
  };
  struct Start {
    Request* request;
    void operator()(Coroutine&) const noexcept { request->start(); }
  };

  Request request_;
  SuspendAwaiter<Start> start_ = suspend_waiting("I/O", Start{nullptr});
};

/// Where somebody on the same thread finds an operation while it waits, to end it early: a channel
/// that is moved, say. One operation at a time.
/// Threads: the home thread of the context that the operation was started on. Lifetime: outlives
/// the operation.
class IoSlot {
 public:
  IoSlot() noexcept = default;
  IoSlot(const IoSlot&) = delete;
  IoSlot& operator=(const IoSlot&) = delete;

  /// Asks the operation to end early, as a stop would; nothing if none waits.
  void interrupt() noexcept;

 private:
  friend class CancellableIoAwaiter;
  IoRequest* request_ = nullptr;  // from its start to its completion
};

/// What the overloads with a stop token return.
class [[nodiscard]] CancellableIoAwaiter {
 public:
  /// `slot`, if not null, is where it can be found; then -ECANCELED may come of that, too.
  CancellableIoAwaiter(const IoRequest& what, std::stop_token stop,
                       IoSlot* slot = nullptr) noexcept;
  CancellableIoAwaiter(const CancellableIoAwaiter&) = delete;
  CancellableIoAwaiter& operator=(const CancellableIoAwaiter&) = delete;

  AwaitInPlace<CancellableIoAwaiter> operator co_await() && noexcept { return AwaitInPlace(*this); }

  bool await_ready();

  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) noexcept {
    request_.co = frame.promise().co;
    detail::check_may_wait(*request_.co, "I/O");
    start_.await_suspend(frame);
  }

  std::int64_t await_resume() noexcept {
    if (relay_) relay_->forget();
    return request_.result;
  }

 private:
  struct Request : IoRequest {
    explicit Request(const IoRequest& what) noexcept : IoRequest(what) {}
    CancellableIoAwaiter* awaiter = nullptr;
    Coroutine* co = nullptr;
  };
  struct Relay : StopRelay {
    explicit Relay(CancellableIoAwaiter& a) noexcept;
    CancellableIoAwaiter& awaiter;
  };
  struct Start {
    CancellableIoAwaiter* awaiter;
    void operator()(Coroutine&) const noexcept { awaiter->start(); }
  };

  void start() noexcept;

  Request request_;
  const std::stop_token stop_;
  IoSlot* const slot_;
  std::optional<Relay> relay_;  // only where a stop is possible
  bool started_ = false;
  SuspendAwaiter<Start> start_ = suspend_waiting("I/O", Start{this});
};

/// Reads at `offset`, in bytes, of a file; 0 at its end.
inline IoAwaiter io_read(int fd, std::span<std::byte> buffer, std::uint64_t offset) noexcept {
  IoAwaiter io(IoRequest::Op::kRead, fd);
  io.request().address = buffer.data();
  io.request().length = detail::io_length(buffer.size());
  io.request().offset = offset;
  return io;
}
inline CancellableIoAwaiter io_read(int fd, std::span<std::byte> buffer, std::uint64_t offset,
                                    std::stop_token stop) noexcept {
  return {io_read(fd, buffer, offset).request(), std::move(stop)};
}

/// Writes at `offset` of a file. `rw_flags` as for pwritev2(2): RWF_DSYNC makes it durable.
inline IoAwaiter io_writev(int fd, std::span<const iovec> buffers, std::uint64_t offset,
                           int rw_flags = 0) noexcept {
  IoAwaiter io(IoRequest::Op::kWritev, fd);
  io.request().address = const_cast<iovec*>(buffers.data());
  io.request().length = static_cast<std::uint32_t>(buffers.size());
  io.request().offset = offset;
  io.request().flags = rw_flags;
  return io;
}
inline CancellableIoAwaiter io_writev(int fd, std::span<const iovec> buffers, std::uint64_t offset,
                                      int rw_flags, std::stop_token stop) noexcept {
  return {io_writev(fd, buffers, offset, rw_flags).request(), std::move(stop)};
}

/// fdatasync(2): 0, or a negative errno.
inline IoAwaiter io_data_sync(int fd) noexcept { return IoAwaiter(IoRequest::Op::kDataSync, fd); }
inline CancellableIoAwaiter io_data_sync(int fd, std::stop_token stop) noexcept {
  return {io_data_sync(fd).request(), std::move(stop)};
}

/// fallocate(2) with `mode`, of `size` bytes from `offset`: 0, or a negative errno.
inline IoAwaiter io_allocate(int fd, int mode, std::uint64_t offset, std::uint64_t size) noexcept {
  IoAwaiter io(IoRequest::Op::kAllocate, fd);
  io.request().flags = mode;
  io.request().offset = offset;
  io.request().size = size;
  return io;
}
inline CancellableIoAwaiter io_allocate(int fd, int mode, std::uint64_t offset, std::uint64_t size,
                                        std::stop_token stop) noexcept {
  return {io_allocate(fd, mode, offset, size).request(), std::move(stop)};
}

/// ftruncate(2): 0, or a negative errno.
inline IoAwaiter io_truncate(int fd, std::uint64_t size) noexcept {
  IoAwaiter io(IoRequest::Op::kTruncate, fd);
  io.request().size = size;
  return io;
}
inline CancellableIoAwaiter io_truncate(int fd, std::uint64_t size, std::stop_token stop) noexcept {
  return {io_truncate(fd, size).request(), std::move(stop)};
}

/// Has `size` bytes of a file from `offset` read into the page cache, as POSIX_FADV_WILLNEED of
/// posix_fadvise(2) does, but all of them: 0 when that is under way, or a negative errno.
inline IoAwaiter io_read_ahead(int fd, std::uint64_t offset, std::uint64_t size) noexcept {
  IoAwaiter io(IoRequest::Op::kReadAhead, fd);
  io.request().offset = offset;
  io.request().size = size;
  return io;
}
inline CancellableIoAwaiter io_read_ahead(int fd, std::uint64_t offset, std::uint64_t size,
                                          std::stop_token stop) noexcept {
  return {io_read_ahead(fd, offset, size).request(), std::move(stop)};
}

/// What `size` bytes of a file from `offset` are, data or holes by turns, as SEEK_DATA and
/// SEEK_HOLE of lseek(2) tell: how many of `to` were filled, fewer only at the end of the range,
/// beyond which the last may reach, or of the file. -ENXIO: the file ends before `offset`. The
/// file's position is nobody's any more.
inline IoAwaiter io_find_extents(int fd, std::span<FileExtent> to, std::uint64_t offset,
                                 std::uint64_t size) noexcept {
  IoAwaiter io(IoRequest::Op::kFindExtents, fd);
  io.request().address = to.data();
  io.request().length = static_cast<std::uint32_t>(to.size());
  io.request().offset = offset;
  io.request().size = size;
  return io;
}
inline CancellableIoAwaiter io_find_extents(int fd, std::span<FileExtent> to, std::uint64_t offset,
                                            std::uint64_t size, std::stop_token stop) noexcept {
  return {io_find_extents(fd, to, offset, size).request(), std::move(stop)};
}

/// recv(2): returns once there is something, 0 at the end of the stream.
inline IoAwaiter io_recv(int fd, std::span<std::byte> buffer, int flags = 0) noexcept {
  IoAwaiter io(IoRequest::Op::kRecv, fd);
  io.request().address = buffer.data();
  io.request().length = detail::io_length(buffer.size());
  io.request().flags = flags;
  return io;
}
inline CancellableIoAwaiter io_recv(int fd, std::span<std::byte> buffer, int flags,
                                    std::stop_token stop) noexcept {
  return {io_recv(fd, buffer, flags).request(), std::move(stop)};
}

/// recvmsg(2): as io_recv(), into several buffers, and with what comes beside the data.
inline IoAwaiter io_recvmsg(int fd, msghdr& message, int flags = 0) noexcept {
  IoAwaiter io(IoRequest::Op::kRecvMsg, fd);
  io.request().address = &message;
  io.request().flags = flags;
  return io;
}
inline CancellableIoAwaiter io_recvmsg(int fd, msghdr& message, int flags,
                                       std::stop_token stop) noexcept {
  return {io_recvmsg(fd, message, flags).request(), std::move(stop)};
}

/// sendmsg(2), without SIGPIPE.
inline IoAwaiter io_sendmsg(int fd, const msghdr& message, int flags = 0) noexcept {
  IoAwaiter io(IoRequest::Op::kSendMsg, fd);
  io.request().address = const_cast<msghdr*>(&message);
  io.request().flags = flags | MSG_NOSIGNAL;
  return io;
}
inline CancellableIoAwaiter io_sendmsg(int fd, const msghdr& message, int flags,
                                       std::stop_token stop) noexcept {
  return {io_sendmsg(fd, message, flags).request(), std::move(stop)};
}

/// accept4(2) with `flags` (SOCK_*) and SOCK_CLOEXEC: the descriptor of the next connection. The
/// listening socket may be made non-blocking.
inline IoAwaiter io_accept(int fd, int flags = 0) noexcept {
  IoAwaiter io(IoRequest::Op::kAccept, fd);
  io.request().flags = flags | SOCK_CLOEXEC;
  return io;
}
inline CancellableIoAwaiter io_accept(int fd, int flags, std::stop_token stop) noexcept {
  return {io_accept(fd, flags).request(), std::move(stop)};
}

/// connect(2): returns once the socket is connected (0) or that has failed. The socket may be made
/// non-blocking, or blocking.
inline IoAwaiter io_connect(int fd, const sockaddr* address, socklen_t length) noexcept {
  IoAwaiter io(IoRequest::Op::kConnect, fd);
  io.request().address = const_cast<sockaddr*>(address);
  io.request().length = length;
  return io;
}
inline CancellableIoAwaiter io_connect(int fd, const sockaddr* address, socklen_t length,
                                       std::stop_token stop) noexcept {
  return {io_connect(fd, address, length).request(), std::move(stop)};
}

/// Waits until `fd` is ready for one of `events`, POLLIN and POLLOUT, and gives what poll(2) calls
/// revents: errors and hang-ups count, too. A descriptor has either a handler or operations.
inline IoAwaiter io_poll(int fd, int events) noexcept {
  IoAwaiter io(IoRequest::Op::kPoll, fd);
  io.request().flags = events;
  return io;
}
inline CancellableIoAwaiter io_poll(int fd, int events, std::stop_token stop) noexcept {
  return {io_poll(fd, events).request(), std::move(stop)};
}

}  // namespace roost
