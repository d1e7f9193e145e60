// SPDX-License-Identifier: MIT
// I/O that a coroutine awaits: `std::int64_t n = co_await io_read(fd, ...)`.
//
// Each gives the bytes transferred (possibly fewer than asked for), 0, or a negative errno, and
// runs on the context the coroutine is on, through that context's back end.
//
// Threads: within a coroutine.
// Lifetime: buffers, iovecs and msghdrs stay untouched until the await returns. Descriptors are
// closed after every operation on them has returned (shutdown(2) makes socket operations return).
#pragma once

#include <sys/socket.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "roost/aio/io_request.h"
#include "roost/coro/coroutine.h"

namespace roost {

class [[nodiscard]] IoAwaiter {
 public:
  IoAwaiter(IoRequest::Op op, int fd) noexcept : request_(op, fd) {}

  bool await_ready() { return request_.try_now(); }

  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) noexcept {
    request_.co = frame.promise().co;
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

/// Reads at `offset` of a file.
inline IoAwaiter io_read(int fd, std::span<std::byte> buffer, std::uint64_t offset) noexcept {
  IoAwaiter io(IoRequest::Op::kRead, fd);
  io.request().address = buffer.data();
  io.request().length = static_cast<std::uint32_t>(buffer.size());
  io.request().offset = offset;
  return io;
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

/// fdatasync(2).
inline IoAwaiter io_data_sync(int fd) noexcept { return IoAwaiter(IoRequest::Op::kDataSync, fd); }

/// fallocate(2) with `mode`.
inline IoAwaiter io_allocate(int fd, int mode, std::uint64_t offset, std::uint64_t size) noexcept {
  IoAwaiter io(IoRequest::Op::kAllocate, fd);
  io.request().flags = mode;
  io.request().offset = offset;
  io.request().size = size;
  return io;
}

/// recv(2): returns once there is something, 0 at the end of the stream.
inline IoAwaiter io_recv(int fd, std::span<std::byte> buffer, int flags = 0) noexcept {
  IoAwaiter io(IoRequest::Op::kRecv, fd);
  io.request().address = buffer.data();
  io.request().length = static_cast<std::uint32_t>(buffer.size());
  io.request().flags = flags;
  return io;
}

/// sendmsg(2), without SIGPIPE.
inline IoAwaiter io_sendmsg(int fd, const msghdr& message, int flags = 0) noexcept {
  IoAwaiter io(IoRequest::Op::kSendMsg, fd);
  io.request().address = const_cast<msghdr*>(&message);
  io.request().flags = flags | MSG_NOSIGNAL;
  return io;
}

}  // namespace roost
