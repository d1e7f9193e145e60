// SPDX-License-Identifier: MIT
// Disks without a device: memory, and nothing.
//
// Requests on the same bytes at the same time may come in any order, and pieces of kLockedPiece may
// mix, as sectors do on any disk; the bytes of one piece are copied under its lock.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <shared_mutex>

#include "roost/aio/aio_context.h"
#include "roost/block/block_driver.h"

namespace roost {

namespace {

class MemoryDisk final : public BlockDriver {
 public:
  MemoryDisk(std::string name, std::uint64_t size, bool read_only, std::byte* bytes)
      : BlockDriver(std::move(name), size, read_only), bytes_(bytes) {}

  ~MemoryDisk() override {
    if (bytes_) ::munmap(bytes_, size());
  }

  Task<Result<void>> read(std::uint64_t offset, std::span<std::byte> to) override {
    by_piece(offset, to.size(), [&](std::uint64_t at, std::size_t size, std::shared_mutex& mutex) {
      std::shared_lock lock(mutex);
      std::memcpy(to.data() + (at - offset), bytes_ + at, size);
    });
    co_return Result<void>();
  }

  Task<Result<void>> write(std::uint64_t offset, std::span<const iovec> from, bool) override {
    for (const iovec& piece : from) {
      const auto* from_bytes = static_cast<const std::byte*>(piece.iov_base);
      by_piece(offset, piece.iov_len,
               [&](std::uint64_t at, std::size_t size, std::shared_mutex& mutex) {
                 std::lock_guard lock(mutex);
                 std::memcpy(bytes_ + at, from_bytes + (at - offset), size);
               });
      offset += piece.iov_len;
    }
    co_return Result<void>();
  }

  Task<Result<void>> flush() override { co_return Result<void>(); }

  Task<Result<void>> discard(std::uint64_t offset, std::uint64_t length) override {
    return write_zeroes(offset, length, {.may_unmap = true, .fua = false});
  }

  Task<Result<void>> write_zeroes(std::uint64_t offset, std::uint64_t length,
                                  ZeroFlags flags) override {
    const auto zero_piece = [&](std::uint64_t at, std::size_t size, std::shared_mutex& mutex) {
      std::lock_guard lock(mutex);
      if (flags.may_unmap) {
        zero(at, size);
      } else {
        std::memset(bytes_ + at, 0, size);
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

 private:
  static constexpr std::uint64_t kLockedPiece = 1 << 20;
  static constexpr std::uint64_t kZeroedPerTurn = 4 << 20;

  // Calls function(offset, size, its lock) for each piece of a range.
  template <class Function>
  void by_piece(std::uint64_t offset, std::uint64_t length, Function function) {
    while (length > 0) {
      const std::uint64_t size = std::min(length, kLockedPiece - offset % kLockedPiece);
      function(offset, size, locks_[offset / kLockedPiece % locks_.size()]);
      offset += size;
      length -= size;
    }
  }

  // Gives whole pages back to the system, which then read as zeroes.
  void zero(std::uint64_t offset, std::uint64_t length) noexcept {
    const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    const std::uint64_t end = offset + length;
    const std::uint64_t first = (offset + page - 1) / page * page;
    const std::uint64_t last = end / page * page;
    if (first < last && ::madvise(bytes_ + first, last - first, MADV_DONTNEED) == 0) {
      std::memset(bytes_ + offset, 0, first - offset);
      std::memset(bytes_ + last, 0, end - last);
    } else {
      std::memset(bytes_ + offset, 0, length);
    }
  }

  std::byte* const bytes_;
  std::array<std::shared_mutex, 64> locks_;  // of the pieces, in turn
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
};

}  // namespace

Result<std::unique_ptr<BlockDriver>> make_memory_disk(std::uint64_t size, OpenOptions options) {
  const std::string name = "mem:" + std::to_string(size);
  void* bytes = nullptr;
  if (size > 0) {
    // Not reserved: pages are taken as they are written.
    bytes = ::mmap(nullptr, size, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (bytes == MAP_FAILED) return fail(errno, name);
  }
  return std::make_unique<MemoryDisk>(name, size, options.read_only,
                                      static_cast<std::byte*>(bytes));
}

Result<std::unique_ptr<BlockDriver>> make_null_disk(std::uint64_t size, OpenOptions options) {
  return std::make_unique<NullDisk>("null:" + std::to_string(size), size, options.read_only);
}

}  // namespace roost
