// SPDX-License-Identifier: MIT
#include "roost/block/copy_disk.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "roost/aio/aio_context.h"
#include "roost/base/check.h"
#include "roost/sync/co_mutex.h"
#include "roost/sync/task_group.h"

namespace roost {

namespace {

constexpr std::size_t kUnit = 4096;  // in which zeroes are looked for
constexpr std::size_t kAlignment = 4096;
constexpr std::uint64_t kWindow = 1ull << 30;         // of one question for extents
constexpr std::size_t kMaxExtents = 4096;             // of one answer
constexpr std::uint64_t kMaxZeroPiece = 64ull << 20;  // made zero by one request

bool is_zero(std::span<const std::byte> bytes) noexcept {
  return bytes.empty() || (bytes[0] == std::byte{0} &&
                           std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0);
}

using Buffer = std::unique_ptr<std::byte, decltype(&std::free)>;

Buffer make_buffer(std::size_t size) {
  Buffer buffer(static_cast<std::byte*>(std::aligned_alloc(kAlignment, size)), &std::free);
  if (!buffer) throw std::bad_alloc();
  return buffer;
}

struct Piece {
  std::uint64_t offset;
  std::uint64_t length;  // 0: there are no more
  bool zero;
};

// Hands out one disk in pieces, from front to back, to whoever asks.
class Pieces {
 public:
  Pieces(BlockDriver& disk, std::size_t request_size)
      : disk_(disk), size_(disk.size()), request_size_(request_size) {}

  Task<Result<Piece>> next() {
    const CoMutex::Guard guard = co_await mutex_.lock();
    if (position_ == size_) co_return Piece{position_, 0, false};
    if (next_extent_ == extents_.size()) {
      Result<std::vector<Extent>> extents =
          co_await disk_.block_status(position_, std::min(size_ - position_, kWindow), kMaxExtents);
      if (!extents) co_return std::unexpected(extents.error());
      extents_ = std::move(*extents);
      next_extent_ = 0;
    }
    Extent& extent = extents_[next_extent_];
    // Data up to a multiple of the request size, so that requests are aligned.
    const std::uint64_t most =
        extent.zero ? kMaxZeroPiece : request_size_ - position_ % request_size_;
    const Piece piece{position_, std::min(extent.length, most), extent.zero};
    position_ += piece.length;
    extent.length -= piece.length;
    if (extent.length == 0) ++next_extent_;
    co_return piece;
  }

 private:
  BlockDriver& disk_;
  const std::uint64_t size_;
  const std::size_t request_size_;
  CoMutex mutex_{"the next piece to copy"};
  // Under the mutex.
  std::uint64_t position_ = 0;
  std::vector<Extent> extents_;  // from position_ on
  std::size_t next_extent_ = 0;
};

// What workers share.
struct Job {
  Job(BlockDriver& a, BlockDriver& b, const CopyOptions& o)
      : from(a), to(b), options(o), pieces(a, o.request_size) {}

  void done_with(std::uint64_t bytes) noexcept {
    if (options.progress) options.progress->fetch_add(bytes, std::memory_order_relaxed);
  }

  BlockDriver& from;
  BlockDriver& to;
  const CopyOptions& options;
  Pieces pieces;
  // Relaxed counters; read when all workers have ended.
  std::atomic<std::uint64_t> written{0};
  std::atomic<std::uint64_t> zeroed{0};
  std::atomic<std::uint64_t> skipped{0};
  std::atomic<std::uint64_t> differs_at{~std::uint64_t{0}};
};

Task<Result<void>> make_zero(Job& job, std::uint64_t offset, std::uint64_t length) {
  if (job.options.target_is_zero) {
    job.skipped.fetch_add(length, std::memory_order_relaxed);
    co_return Result<void>();
  }
  Result<void> zeroed = co_await job.to.write_zeroes(offset, length, ZeroFlags{});
  if (zeroed) job.zeroed.fetch_add(length, std::memory_order_relaxed);
  co_return zeroed;
}

Task<Result<void>> copy_data(Job& job, std::uint64_t offset, std::span<std::byte> buffer) {
  Result<void> done = co_await job.from.read(offset, buffer);
  while (done && !buffer.empty()) {
    // A run of units that are all zero, or that all are not.
    const auto unit = [&](std::size_t at) {
      return buffer.subspan(at, std::min(kUnit, buffer.size() - at));
    };
    const bool zero = job.options.detect_zeroes && is_zero(unit(0));
    std::size_t length = unit(0).size();
    while (length < buffer.size() && (job.options.detect_zeroes && is_zero(unit(length))) == zero) {
      length += unit(length).size();
    }
    if (zero) {
      done = co_await make_zero(job, offset, length);
    } else {
      const iovec piece{buffer.data(), length};
      done = co_await job.to.write(offset, std::span(&piece, 1), false);
      if (done) job.written.fetch_add(length, std::memory_order_relaxed);
    }
    buffer = buffer.subspan(length);
    offset += length;
  }
  co_return done;
}

Task<Result<void>> copy_worker(Job& job, std::stop_token stop) {
  const Buffer buffer = make_buffer(job.options.request_size);
  while (!stop.stop_requested()) {
    const Result<Piece> piece = co_await job.pieces.next();
    if (!piece) co_return std::unexpected(piece.error());
    if (piece->length == 0) co_return Result<void>();
    Result<void> done;
    if (piece->zero) {
      done = co_await make_zero(job, piece->offset, piece->length);
    } else {
      done = co_await copy_data(job, piece->offset, {buffer.get(), piece->length});
    }
    if (!done) co_return done;
    job.done_with(piece->length);
  }
  co_return fail(ECANCELED, "copy " + job.from.name());
}

Task<Result<void>> compare_worker(Job& job, std::stop_token stop) {
  const std::size_t size = job.options.request_size;
  const Buffer one = make_buffer(size);
  const Buffer other = make_buffer(size);
  while (!stop.stop_requested()) {
    const Result<Piece> piece = co_await job.pieces.next();
    if (!piece) co_return std::unexpected(piece.error());
    // What comes later than a difference is of no interest.
    if (piece->length == 0 || piece->offset > job.differs_at.load(std::memory_order_relaxed)) {
      co_return Result<void>();
    }
    for (std::uint64_t at = 0; at < piece->length; at += size) {
      const std::uint64_t offset = piece->offset + at;
      const std::size_t length = std::min<std::uint64_t>(size, piece->length - at);
      const std::span<std::byte> left(one.get(), length);
      const std::span<std::byte> right(other.get(), length);
      Result<void> read;
      if (piece->zero) {
        std::ranges::fill(left, std::byte{0});
      } else {
        read = co_await job.from.read(offset, left);
      }
      if (read) read = co_await job.to.read(offset, right);
      if (!read) co_return read;
      const auto differ = std::ranges::mismatch(left, right);
      if (differ.in1 != left.end()) {
        const std::uint64_t where =
            offset + static_cast<std::uint64_t>(differ.in1 - left.begin()) / kUnit * kUnit;
        std::uint64_t lowest = job.differs_at.load(std::memory_order_relaxed);
        while (where < lowest &&
               !job.differs_at.compare_exchange_weak(lowest, where, std::memory_order_relaxed)) {
        }
        break;
      }
    }
    job.done_with(piece->length);
  }
  co_return fail(ECANCELED, "compare " + job.from.name());
}

using Worker = Task<Result<void>> (*)(Job&, std::stop_token);

Task<void> start_workers(TaskGroup& group, Job& job, Worker worker) {
  for (unsigned i = 0; i < job.options.depth; ++i) {
    for (AioContext* context : job.options.contexts) {
      group.spawn(*context, worker(job, group.stop_token()));
    }
  }
  co_return;
}

Task<Result<void>> run_workers(Job& job, const char* name, Worker worker) {
  const CopyOptions& options = job.options;
  ROOST_CHECK(!options.contexts.empty() && options.depth > 0, "a copy needs somebody to do it");
  ROOST_CHECK(std::has_single_bit(options.request_size) && options.request_size >= kUnit,
              "requests of {} bytes", options.request_size);
  ROOST_CHECK(job.to.size() >= job.from.size(), "{} does not fit into {}", job.from.name(),
              job.to.name());
  TaskGroup group({.name = name, .stop = options.stop});
  co_return co_await group.run(start_workers(group, job, worker));
}

}  // namespace

Task<Result<CopyReport>> copy_disk(BlockDriver& from, BlockDriver& to, CopyOptions options) {
  Job job(from, to, options);
  const Result<void> done = co_await run_workers(job, "copy", &copy_worker);
  if (!done) co_return std::unexpected(done.error());
  co_return CopyReport{job.written, job.zeroed, job.skipped};
}

Task<Result<std::optional<std::uint64_t>>> compare_disks(BlockDriver& one, BlockDriver& other,
                                                         CopyOptions options) {
  Job job(one, other, options);
  const Result<void> done = co_await run_workers(job, "compare", &compare_worker);
  if (!done) co_return std::unexpected(done.error());
  const std::uint64_t where = job.differs_at;
  if (where == ~std::uint64_t{0}) co_return std::nullopt;
  co_return std::optional(where);
}

}  // namespace roost
