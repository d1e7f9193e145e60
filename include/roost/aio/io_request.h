// SPDX-License-Identifier: MIT
// One I/O operation on a descriptor, as a context's back end executes it.
//
// Threads: made, started and completed on the home thread of one context.
// Lifetime: the request, and the memory it names, stay where they are until complete() is called.
#pragma once

#include <cstddef>
#include <cstdint>

#include "roost/coro/queue_entry.h"

namespace roost {

class AioContext;

namespace detail {
// As much as the kernel transfers at a time: 2 GiB less a page.
inline constexpr std::size_t kMaxIoLength = 0x7fff'f000;
constexpr std::uint32_t io_length(std::size_t bytes) noexcept {
  return static_cast<std::uint32_t>(bytes < kMaxIoLength ? bytes : kMaxIoLength);
}
}  // namespace detail

/// A piece of a file, as lseek(2) tells data from holes.
struct FileExtent {
  std::uint64_t length;
  bool hole;
};

/// What io.h's functions fill in. A back end executes it, and calls `complete`.
struct IoRequest {
  enum class Op : std::uint8_t {
    kRead,      // address, length, offset
    kWritev,    // address: iovec[length], offset, flags (RWF_*)
    kDataSync,  // fdatasync
    kAllocate,  // fallocate: flags (FALLOC_FL_*), offset, size
    // What always goes to the thread pool, since no other way is known not to block the loop:
    kTruncate,     // ftruncate: size
    kReadAhead,    // into the page cache: offset, size
    kFindExtents,  // address: FileExtent[length], offset, size; the result is how many are filled
    // On sockets, and any descriptor that can be polled:
    kRecv,     // address, length, flags (MSG_*)
    kRecvMsg,  // address: msghdr, which is filled in, flags (MSG_*)
    kSendMsg,  // address: msghdr, flags (MSG_*)
    kAccept,   // flags (SOCK_*); the result is the new descriptor
    kConnect,  // address: sockaddr, length
    kPoll,     // flags: POLLIN | POLLOUT; the result is what poll(2) calls revents
  };
  /// Whether it is an operation on a file: those have an offset, and may block.
  bool on_file() const noexcept { return op <= Op::kFindExtents; }
  bool for_pool_only() const noexcept { return op >= Op::kTruncate && op <= Op::kFindExtents; }

  // The operation's arguments, as Op says which it has. Sizes and offsets are in bytes.
  Op op;
  int fd;
  void* address = nullptr;
  std::uint32_t length = 0;
  int flags = 0;
  std::uint64_t offset = 0;
  std::uint64_t size = 0;

  /// Bytes transferred (possibly fewer than asked for), 0, or a negative errno.
  std::int64_t result = 0;

  /// Called on the home thread, outside of the call that started the request.
  void (*complete)(IoRequest&) noexcept = nullptr;

  /// For files: opened with O_DIRECT. Such a request is not tried in place, where it would wait for
  /// the disk, and Linux AIO takes it.
  bool direct = false;

  /// For receives: there is most likely something to receive, so it is tried before it waits.
  bool likely = false;

  // For the back end while the request is in flight.
  bool tried = false;
  bool cancelled = false;  // BackEnd::cancel() was called
  std::uint8_t stage = 0;  // where the back end keeps it
  AioContext* context = nullptr;
  IoRequest* next = nullptr;
  void* job = nullptr;

  /// Executes the operation with a plain system call; for worker threads, and with `dont_wait` for
  /// an attempt that must not block (result -EAGAIN: it would have; -EINPROGRESS: the socket is
  /// being connected, and it is `tried` again once it is writable). A connect never blocks.
  std::int64_t execute(bool dont_wait) const noexcept;

  IoRequest(Op o, int f) noexcept : op(o), fd(f) {}
};

}  // namespace roost
