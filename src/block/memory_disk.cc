// SPDX-License-Identifier: MIT
// Disks without a device: memory, and nothing.
//
// Requests on the same bytes at the same time may come in any order, and pieces of kLockedPiece may
// mix, as sectors do on any disk; the bytes of one piece are copied under its lock.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <utility>
#include <vector>

#include "roost/aio/aio_context.h"
#include "roost/block/block_driver.h"

namespace roost {

namespace {

// Memory that starts as zeroes, and takes room where it is written only.
class SparseMemory {
 public:
  SparseMemory() = default;
  SparseMemory(const SparseMemory&) = delete;
  SparseMemory& operator=(const SparseMemory&) = delete;
  ~SparseMemory() {
    if (bytes_) ::munmap(bytes_, size_);
  }

  std::byte* get() const noexcept { return bytes_; }

  /// 0, or an errno and nothing has changed. May move it.
  int resize(std::uint64_t size) noexcept {
    if (size == size_) return 0;
    if (size == 0) {
      ::munmap(std::exchange(bytes_, nullptr), size_);
    } else {
      // Not reserved: pages are taken as they are written.
      void* const bytes = bytes_ ? ::mremap(bytes_, size_, size, MREMAP_MAYMOVE)
                                 : ::mmap(nullptr, size, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (bytes == MAP_FAILED) return errno;
      bytes_ = static_cast<std::byte*>(bytes);
    }
    size_ = size;
    return 0;
  }

 private:
  std::byte* bytes_ = nullptr;
  std::uint64_t size_ = 0;
};

// Which pages have been written is kept in a map, since the system cannot tell: one that was
// written and is swapped out looks like one that never was. The others are zeroes, and not even
// looked at.
class MemoryDisk final : public BlockDriver {
 public:
  MemoryDisk(std::string name, bool read_only) : BlockDriver(std::move(name), 0, read_only) {}

  /// 0, or an errno. REQUIRES: no request is in flight.
  int start(std::uint64_t size) noexcept { return set_memory(size); }

  Task<Result<void>> read(std::uint64_t offset, std::span<std::byte> to) override {
    by_piece(offset, to.size(),
             [&](std::uint64_t at, std::uint64_t size, std::shared_mutex& mutex) {
               std::shared_lock lock(mutex);
               const auto read_run = [&](std::uint64_t from, std::uint64_t length, bool written) {
                 std::byte* const out = to.data() + (from - offset);
                 if (written) {
                   std::memcpy(out, memory_.get() + from, length);
                 } else {
                   std::memset(out, 0, length);
                 }
               };
               by_run(at, size, read_run);
             });
    co_return Result<void>();
  }

  Task<Result<void>> write(std::uint64_t offset, std::span<const iovec> from, bool) override {
    for (const iovec& piece : from) {
      const auto* from_bytes = static_cast<const std::byte*>(piece.iov_base);
      by_piece(offset, piece.iov_len,
               [&](std::uint64_t at, std::uint64_t size, std::shared_mutex& mutex) {
                 std::lock_guard lock(mutex);
                 mark(at / kPage, pages(at + size), true);
                 std::memcpy(memory_.get() + at, from_bytes + (at - offset), size);
               });
      offset += piece.iov_len;
    }
    co_return Result<void>();
  }

  Task<Result<void>> flush() override { co_return Result<void>(); }

  Task<Result<void>> discard(std::uint64_t offset, std::uint64_t length) override {
    return write_zeroes(offset, length, {.may_unmap = true, .fua = false, .fast = false});
  }

  Task<Result<void>> write_zeroes(std::uint64_t offset, std::uint64_t length,
                                  ZeroFlags flags) override {
    if (flags.fast && !flags.may_unmap) {
      co_return fail(ENOTSUP, "write zeroes quickly to " + name() + " at " +
                                  std::to_string(offset) + "+" + std::to_string(length));
    }
    const auto zero_piece = [&](std::uint64_t at, std::uint64_t size, std::shared_mutex& mutex) {
      std::lock_guard lock(mutex);
      if (flags.may_unmap) {
        zero(at, size);
      } else {
        mark(at / kPage, pages(at + size), true);
        std::memset(memory_.get() + at, 0, size);
      }
    };
    while (length > kZeroedPerTurn) {
      by_piece(offset, kZeroedPerTurn, zero_piece);
      offset += kZeroedPerTurn;
      length -= kZeroedPerTurn;
      // Up to 4 GiB a request: others on this context want their turn, too.
      co_await move_to(*AioContext::current());
    }
    by_piece(offset, length, zero_piece);
    co_return Result<void>();
  }

  bool can_zero_fast() const noexcept override { return !read_only(); }

  Task<Result<std::vector<Extent>>> block_status(std::uint64_t offset, std::uint64_t length,
                                                 std::size_t max_extents) override {
    std::vector<Extent> extents;
    const std::uint64_t end = offset + std::min(length, kToldAtOnce);
    bool full = false;
    const auto add = [&](std::uint64_t, std::uint64_t size, bool written) {
      if (full) return;
      if (!extents.empty() && extents.back().hole == !written) {
        extents.back().length += size;
      } else if (extents.size() < max_extents) {
        extents.push_back({.length = size, .hole = !written, .zero = !written});
      } else {
        full = true;
      }
    };
    while (offset < end && !full) {
      const std::uint64_t size = std::min(end - offset, kLockedPiece - offset % kLockedPiece);
      std::shared_lock lock(lock_of(offset));
      by_run(offset, size, add);
      offset += size;
    }
    co_return extents;
  }

  bool can_resize() const noexcept override { return !read_only(); }

  Task<Result<void>> resize(std::uint64_t new_size) override {
    const std::string what = "resize " + name() + " to " + std::to_string(new_size);
    if (read_only()) co_return fail(ENOTSUP, what + ": it is read-only");
    if (new_size < size()) {
      // What comes again when it grows again is zeroes.
      const Result<void> zeroed = co_await write_zeroes(new_size, size() - new_size, {});
      if (!zeroed) co_return zeroed;
    }
    if (const int error = set_memory(new_size); error != 0) co_return fail(error, what);
    co_return Result<void>();
  }

 private:
  static constexpr std::uint64_t kLockedPiece = 1 << 20;
  static constexpr std::uint64_t kZeroedPerTurn = 4 << 20;
  static constexpr std::uint64_t kToldAtOnce = std::uint64_t{4} << 30;  // some 100 us of locking
  static constexpr std::uint64_t kPage = 4096;
  static constexpr std::uint64_t kPagesPerWord = 64;

  static std::uint64_t pages(std::uint64_t bytes) noexcept { return (bytes + kPage - 1) / kPage; }

  std::shared_mutex& lock_of(std::uint64_t offset) noexcept {
    return locks_[offset / kLockedPiece % locks_.size()];
  }

  // Calls function(offset, size, its lock) for each piece of a range.
  template <class Function>
  void by_piece(std::uint64_t offset, std::uint64_t length, Function function) {
    while (length > 0) {
      const std::uint64_t size = std::min(length, kLockedPiece - offset % kLockedPiece);
      function(offset, size, lock_of(offset));
      offset += size;
      length -= size;
    }
  }

  // ---- Within one piece, its lock held

  // One bit a page. No word belongs to two pieces.
  std::uint64_t& word_of(std::uint64_t page) const noexcept {
    return reinterpret_cast<std::uint64_t*>(written_.get())[page / kPagesPerWord];
  }
  static_assert(kLockedPiece / kPage % kPagesPerWord == 0);

  void mark(std::uint64_t page, std::uint64_t end, bool written) noexcept {
    while (page < end) {
      const std::uint64_t bit = page % kPagesPerWord;
      const std::uint64_t count = std::min(end - page, kPagesPerWord - bit);
      const std::uint64_t bits = (~std::uint64_t{0} >> (kPagesPerWord - count)) << bit;
      std::uint64_t& word = word_of(page);
      // A map that nobody wrote takes no room, either.
      if (written) {
        word |= bits;
      } else if (word & bits) {
        word &= ~bits;
      }
      page += count;
    }
  }

  // The first page from `page` on that is not as that one is, at most `end`.
  std::uint64_t run_end(std::uint64_t page, std::uint64_t end, bool written) const noexcept {
    while (page < end) {
      const std::uint64_t bit = page % kPagesPerWord;
      const std::uint64_t others = (written ? ~word_of(page) : word_of(page)) >> bit;
      if (others != 0) return std::min(end, page + static_cast<unsigned>(std::countr_zero(others)));
      page += kPagesPerWord - bit;
    }
    return end;
  }

  // Calls function(offset, size, whether it was written) for each part of a range.
  template <class Function>
  void by_run(std::uint64_t offset, std::uint64_t size, const Function& function) const {
    const std::uint64_t end = offset + size;
    while (offset < end) {
      const std::uint64_t page = offset / kPage;
      const bool written = word_of(page) >> page % kPagesPerWord & 1;
      const std::uint64_t next = std::min(end, run_end(page, pages(end), written) * kPage);
      function(offset, next - offset, written);
      offset = next;
    }
  }

  // Gives whole pages back to the system, which then read as zeroes.
  void zero(std::uint64_t offset, std::uint64_t length) noexcept {
    const std::uint64_t end = offset + length;
    const std::uint64_t first = pages(offset);
    // Nothing is behind the end of the disk.
    const std::uint64_t last = end == size() ? pages(end) : end / kPage;
    if (first < last) {
      give_back(first * kPage, last * kPage);
      mark(first, last, false);
      zero_bytes(offset, first * kPage);
      zero_bytes(last * kPage, end);
    } else {
      zero_bytes(offset, end);
    }
  }

  // Of pages that were written; what else they hold stays.
  void zero_bytes(std::uint64_t begin, std::uint64_t end) noexcept {
    if (begin >= end) return;
    by_run(begin, end - begin, [this](std::uint64_t at, std::uint64_t size, bool written) {
      if (written) std::memset(memory_.get() + at, 0, size);
    });
  }

  void give_back(std::uint64_t begin, std::uint64_t end) noexcept {
    const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    by_run(begin, end - begin, [this, page](std::uint64_t at, std::uint64_t size, bool written) {
      if (!written) return;
      const std::uint64_t first = (at + page - 1) / page * page;
      const std::uint64_t last = (at + size) / page * page;
      const bool given =
          first < last && ::madvise(memory_.get() + first, last - first, MADV_DONTNEED) == 0;
      if (given) {
        std::memset(memory_.get() + at, 0, first - at);
        std::memset(memory_.get() + last, 0, at + size - last);
      } else {
        std::memset(memory_.get() + at, 0, size);
      }
    });
  }

  // ---- All of it

  // 0, or an errno.
  int set_memory(std::uint64_t size) noexcept {
    // Both may move: nobody may be looking at any piece.
    for (std::shared_mutex& mutex : locks_) mutex.lock();
    const std::uint64_t words = (pages(size) + kPagesPerWord - 1) / kPagesPerWord;
    const bool grows = size > this->size();
    int error = 0;
    if (grows) error = written_.resize(words * sizeof(std::uint64_t));
    if (error == 0) error = memory_.resize(size);
    if (error == 0 && !grows) error = written_.resize(words * sizeof(std::uint64_t));
    if (error == 0) set_size(size);
    for (std::shared_mutex& mutex : locks_) mutex.unlock();
    return error;
  }

  std::array<std::shared_mutex, 64> locks_;  // of the pieces, in turn
  // The contents of each piece under its lock, where they are under all of them:
  SparseMemory memory_;
  SparseMemory written_;  // a bit for each page
};

class NullDisk final : public BlockDriver {
 public:
  NullDisk(std::string name, std::uint64_t size, bool read_only)
      : BlockDriver(std::move(name), size, read_only) {}

  Task<Result<void>> read(std::uint64_t, std::span<std::byte> to) override {
    std::memset(to.data(), 0, to.size());
    co_return Result<void>();
  }
  Task<Result<void>> write(std::uint64_t, std::span<const iovec>, bool) override {
    co_return Result<void>();
  }
  Task<Result<void>> flush() override { co_return Result<void>(); }
  Task<Result<void>> discard(std::uint64_t, std::uint64_t) override { co_return Result<void>(); }
  Task<Result<void>> write_zeroes(std::uint64_t, std::uint64_t, ZeroFlags) override {
    co_return Result<void>();
  }
  bool can_zero_fast() const noexcept override { return !read_only(); }
  Task<Result<std::vector<Extent>>> block_status(std::uint64_t, std::uint64_t length,
                                                 std::size_t) override {
    std::vector<Extent> extents;
    extents.push_back({.length = length, .hole = true, .zero = true});
    co_return extents;
  }
  bool can_resize() const noexcept override { return !read_only(); }
  Task<Result<void>> resize(std::uint64_t new_size) override {
    if (read_only()) co_return fail(ENOTSUP, "resize " + name() + ": it is read-only");
    set_size(new_size);
    co_return Result<void>();
  }
};

}  // namespace

Result<std::unique_ptr<BlockDriver>> make_memory_disk(std::uint64_t size, OpenOptions options) {
  const std::string name = "mem:" + std::to_string(size);
  auto disk = std::make_unique<MemoryDisk>(name, options.read_only);
  if (const int error = disk->start(size); error != 0) return fail(error, name);
  return disk;
}

Result<std::unique_ptr<BlockDriver>> make_null_disk(std::uint64_t size, OpenOptions options) {
  return std::make_unique<NullDisk>("null:" + std::to_string(size), size, options.read_only);
}

}  // namespace roost
