// SPDX-License-Identifier: MIT
// KeptWrites: the writes that a server has acknowledged and may still lose, since no flush has
// covered them. They are what it is sent again when it may have been restarted.
//
//   kept.add(request, kept.copy(request, data));          // a write was acknowledged
//   const KeptWrites::Mark mark = kept.mark();            // a flush begins
//   kept.flushed(mark);                                   // it has succeeded
//   for (const KeptWrites::Piece& piece : kept.pieces())  // the server may have been restarted
//
// The rule:
//
// - A flush covers what was acknowledged before it began.
// - Of the kept writes, only what no later one has written over is sent again, the oldest first. So
//   what is there never goes back to what was there before, wherever the sending breaks off, and on
//   a server that has lost nothing it changes nothing.
// - A write that is durable (FUA) needs not be sent again. It is kept, without data, where an older
//   one would otherwise be sent over it.
// - What there is no room for counts as unkept until a flush covers it, or somebody was told
//   (settle()). It takes with it what was kept and overlaps, and what overlaps that.
//
// RemoteExport, which this is a part of, says when they are sent.
//
// Threads: one at a time (RemoteExport's mutex); copy() from any.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <vector>

#include "roost/nbd/client_transmission.h"

namespace roost::nbd {

/// Whether two requests have bytes in common.
constexpr bool overlap(const ClientRequest& a, const ClientRequest& b) {
  return a.offset < b.offset + b.length && b.offset < a.offset + a.length;
}

class KeptWrites {
 public:
  /// What a write takes besides its data.
  static constexpr std::uint64_t kOverhead = 64;

  using Data = std::optional<std::vector<std::byte>>;

  struct Write {
    std::uint64_t number;  // of its acknowledgement
    ClientRequest what;
    std::vector<std::byte> data;  // of a WRITE that is not durable
    bool dropped = false;
  };

  /// What has to be sent again of one. It stays good until a write is added, or a flush covers it.
  struct Piece {
    const Write* of;
    std::uint64_t offset;
    std::uint64_t length;

    /// Of a WRITE.
    std::span<const std::byte> data() const {
      return std::span(of->data).subspan(offset - of->what.offset, length);
    }
  };

  /// What was acknowledged, and what of it was not kept, up to a moment.
  struct Mark {
    std::uint64_t acknowledged = 0;
    std::uint64_t unkept = 0;
  };

  /// Keeps `most_bytes` at most, overhead included.
  explicit KeptWrites(std::uint64_t most_bytes) : most_bytes_(most_bytes) {}
  KeptWrites(const KeptWrites&) = delete;
  KeptWrites& operator=(const KeptWrites&) = delete;

  /// Of what a write has written, as far as it has to be kept. Nothing: it cannot be.
  Data copy(const ClientRequest& what, std::span<const iovec> data) const;

  /// A write was acknowledged. `data` is what copy() has made of it.
  void add(const ClientRequest& what, Data data);

  Mark mark() const { return {acknowledged_, unkept_ever_}; }

  /// A flush that began at `mark` has succeeded.
  void flushed(const Mark& mark);

  /// What has to be sent again, in this order.
  std::vector<Piece> pieces() const;

  std::uint64_t bytes() const { return bytes_; }
  std::uint64_t unkept_bytes() const { return unkept_ever_ - unkept_settled_; }

  /// What was not kept is of no concern any more.
  void settle() { unkept_settled_ = unkept_ever_; }

 private:
  void drop_older(std::uint64_t offset, std::uint64_t length);

  const std::uint64_t most_bytes_;
  std::deque<Write> writes_;  // in the order of their acknowledgements
  std::uint64_t bytes_ = 0;
  std::uint64_t acknowledged_ = 0;  // writes, so far: their numbers
  // Bytes that were not kept, since ever, and how many of these are of no concern any more.
  std::uint64_t unkept_ever_ = 0;
  std::uint64_t unkept_settled_ = 0;
};

}  // namespace roost::nbd
