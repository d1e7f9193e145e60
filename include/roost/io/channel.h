// SPDX-License-Identifier: MIT
// Channel: a byte stream that coroutines read and write: a socket, a pipe, a file, a command, TLS,
// or memory.
//
//   Result<std::size_t> n = co_await channel.read(buffer);     // some bytes; 0: the end
//   Result<void> sent = co_await channel.write_full(message);  // all of them
//
// One coroutine may read while another writes. A second reader, or a second writer, would get parts
// of a message that was not for it: it aborts, and both are named.
//
// A channel is attached to one context at a time, and its operations run there. An operation that
// begins while nothing else is under way attaches the channel to its coroutine's context: it
// follows its coroutine. Where the other direction is in use on another context, the coroutine goes
// there. move_to() attaches the channel to another context although it is in use: coroutines that
// wait for it are taken along, their operations go on there, and nothing of the stream is lost.
//
// Every wait ends when its stop is requested (a StopScope adds deadlines). ECANCELED says:
//
//   read, readv            nothing was taken from the stream
//   read_full, readv_full  nothing either: what had arrived stays in the channel for the next read
//   write, writev          nothing was sent
//   write_full,            the error's words, and *sent, say how many bytes were: what follows has
//   writev_full            to be the rest of them
//
// An error names the channel, what was done with it and why it failed. After an error other than
// ECANCELED a stream is of no more use.
//
// Threads: operations in coroutines, on any context; context() from any thread.
// Lifetime: outlives its operations (the destructor aborts otherwise: shut down, or stop, and await
// them first). Buffers stay untouched until the await returns.
#pragma once

#include <sys/uio.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stop_token>
#include <string>
#include <utility>
#include <vector>

#include "roost/base/platform.h"
#include "roost/base/result.h"
#include "roost/coro/task.h"

namespace roost {

class AioContext;

/// The part of a stream that shutdown() ends.
enum class StreamEnd : std::uint8_t { kRead, kWrite, kBoth };

/// A part of a file. The descriptor belongs to somebody else.
struct FilePart {
  int fd;
  std::uint64_t offset;
  std::uint64_t length;  // in bytes
};

/// A byte stream. The file's head says who may use it, and how it moves.
class Channel {
 public:
  virtual ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  /// What it is, for messages: "unix:/run/disk.sock". Constant.
  const std::string& name() const noexcept { return name_; }

  /// Where it is attached; null before its first operation. Out of date at once, but for who waits
  /// for it.
  AioContext* context() const noexcept { return context_.load(std::memory_order_acquire); }

  // ---- Reading

  /// Gives some bytes, at least one unless there is no room for any; 0: the end of the stream.
  Task<Result<std::size_t>> read(std::span<std::byte> to, std::stop_token stop = {});
  Task<Result<std::size_t>> readv(std::span<const iovec> to, std::stop_token stop = {});

  /// Fills all of it. ECONNRESET: the stream ended before.
  Task<Result<void>> read_full(std::span<std::byte> to, std::stop_token stop = {});
  Task<Result<void>> readv_full(std::span<const iovec> to, std::stop_token stop = {});

  // ---- Writing

  /// Writes some bytes, at least one unless there are none, and says how many.
  Task<Result<std::size_t>> write(std::span<const std::byte> from, std::stop_token stop = {});
  Task<Result<std::size_t>> writev(std::span<const iovec> from, std::stop_token stop = {});

  /// Writes all of it. `sent`, if not null, gets the number of bytes that were written, however it
  /// ends.
  Task<Result<void>> write_full(std::span<const std::byte> from, std::stop_token stop = {},
                                std::size_t* sent = nullptr);
  Task<Result<void>> writev_full(std::span<const iovec> from, std::stop_token stop = {},
                                 std::size_t* sent = nullptr);
  /// The same, for who does not need the pieces any more: they are used up.
  Task<Result<void>> writev_in_place(std::span<iovec> from, std::stop_token stop = {},
                                     std::size_t* sent = nullptr);

  /// Whether send_file() hands the pages of a file over without copying them. Constant.
  virtual bool can_send_files() const noexcept { return false; }

  /// Writes a part of a file to the stream, as write_full() otherwise. The peer gets what the file
  /// holds at some moment from now until it has read it. What of it is not in the page cache is
  /// waited for: the caller knows that it is there, or has the time. ENODATA: the file ended
  /// before; what had been sent is sent. REQUIRES: can_send_files().
  Task<Result<void>> send_file(FilePart part, std::stop_token stop = {},
                               std::size_t* sent = nullptr);

  /// Ends a direction. kWrite is a last operation of the writer: the peer reads to the end of what
  /// was written, and then gets the end of the stream. kRead and kBoth may come while others wait,
  /// on the context that the channel is attached to: what waits returns, reads with the end of the
  /// stream. kBoth is abort().
  Task<Result<void>> shutdown(StreamEnd end, std::stop_token stop = {});

  /// Ends both directions at once: what waits returns, and so does what begins from now on; what
  /// the peer has not got it may never get. On the context that the channel is attached to.
  virtual void abort() noexcept = 0;

  /// The last operation of a channel on which everything was written: waits, for at most
  /// `limit_ns`, until the peer has got it, as far as that can be told, and drops what still comes
  /// from it. (Closing a TCP socket that holds unread data, or gets more, takes from the peer what
  /// it has not read.)
  virtual Task<void> linger(std::int64_t limit_ns, std::stop_token stop = {});

  /// Attaches the channel to `to`, with the operations that wait for it and their coroutines; and
  /// returns, on the context it was awaited on, when they have arrived. EBUSY: another move is
  /// under way, and nothing was done. Not from a coroutine that has an operation of the channel
  /// under way. It takes a turn of either loop and cannot be stopped.
  Task<Result<void>> move_to(AioContext& to);

 protected:
  enum class Direction : std::uint8_t { kRead, kWrite };

  explicit Channel(std::string name) : name_(std::move(name)) {}

  // What a kind of channel does. Each runs on the context that the channel is attached to, one of
  // each direction at a time. `to` and `from` hold at least one byte. With `all`, the caller asks
  // again until all is transferred: so it may be waited for in one piece. `end` is not kBoth.
  virtual Task<Result<std::size_t>> do_readv(std::span<const iovec> to, bool all,
                                             std::stop_token stop) = 0;
  virtual Task<Result<std::size_t>> do_writev(std::span<const iovec> from, bool all,
                                              std::stop_token stop) = 0;
  virtual Task<Result<void>> do_shutdown(StreamEnd end, std::stop_token stop) = 0;
  // Some of the part, at least one byte. Where can_send_files() is true.
  virtual Task<Result<std::size_t>> do_send_file(FilePart part, std::stop_token stop);

  /// Makes what waits return to its loop, which awaits arrive() and tries again. On the context it
  /// waits on, which the channel is not attached to any more.
  virtual void interrupt(AioContext& to) = 0;

  /// Whether the operation of that direction has to await arrive() before it waits again: it was
  /// taken along by a move. For the operation.
  bool in_transit(Direction direction) const noexcept { return use(direction).in_transit; }

  /// Goes to where the channel was moved.
  Task<void> arrive();

  /// For a channel over another one: attaches `lower` to `to`, and makes what waits in it go there.
  void redirect_lower(Channel& lower, AioContext& to) {
    lower.upper_ = this;
    lower.redirect(to);
  }

  /// "read from NAME: ...", as an error.
  std::unexpected<Error> failure(const char* what, int error) const;
  std::unexpected<Error> cancelled(const char* what, const char* done) const;

 private:
  class Using;

  // Who is at one direction.
  struct Use {
    bool busy = false;
    bool in_transit = false;  // the channel was moved, its operation has not arrived
    Coroutine* by = nullptr;  // while it is busy
  };
  const Use& use(Direction d) const noexcept { return uses_[static_cast<std::size_t>(d)]; }
  Use& use(Direction d) noexcept { return uses_[static_cast<std::size_t>(d)]; }

  bool try_begin(Direction direction);
  void end(Direction direction) noexcept;
  void redirect(AioContext& to);
  void has_arrived(const Coroutine& co);
  template <class Send>
  Task<Result<void>> send_all(std::uint64_t all, Send send, std::stop_token stop,
                              std::size_t* sent);
  std::size_t take_unread(std::span<const iovec> to) noexcept;
  void put_back(std::span<const iovec> from, std::size_t size);

  const std::string name_;

  mutable RealPlatform::Mutex mutex_;          // guards what begins, ends and moves
  std::atomic<AioContext*> context_{nullptr};  // written under mutex_
  std::array<Use, 2> uses_;  // in_transit is also read, without the mutex, by the operation
  bool moving_ = false;
  Coroutine* mover_ = nullptr;  // waits for operations in transit

  // While the channel above is moved: what arrives here has arrived there, too.
  Channel* upper_ = nullptr;

  // The operation of direction kRead.
  std::vector<std::byte> unread_;  // what a cancelled read_full had taken
  std::size_t unread_begin_ = 0;
};

/// Bytes in all pieces.
std::size_t total_size(std::span<const iovec> pieces) noexcept;

/// Takes `count` bytes off the front of `pieces`.
/// REQUIRES: they have as many.
void drop_front(std::span<iovec>& pieces, std::size_t count) noexcept;

/// One piece.
inline iovec as_iovec(std::span<const std::byte> bytes) noexcept {
  return {const_cast<std::byte*>(bytes.data()), bytes.size()};
}

}  // namespace roost
