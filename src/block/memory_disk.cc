// SPDX-License-Identifier: MIT
// Disks without a device: memory, and nothing.
//
// Two requests on the same bytes at the same time may mix, as on any disk.

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

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
    std::memcpy(to.data(), bytes_ + offset, to.size());
    co_return Result<void>();
  }

  Task<Result<void>> write(std::uint64_t offset, std::span<const iovec> from, bool) override {
    for (const iovec& piece : from) {
      std::memcpy(bytes_ + offset, piece.iov_base, piece.iov_len);
      offset += piece.iov_len;
    }
    co_return Result<void>();
  }

  Task<Result<void>> flush() override { co_return Result<void>(); }

  Task<Result<void>> discard(std::uint64_t offset, std::uint64_t length) override {
    zero(offset, length);
    co_return Result<void>();
  }

  Task<Result<void>> write_zeroes(std::uint64_t offset, std::uint64_t length,
                                  ZeroFlags flags) override {
    if (flags.may_unmap) {
      zero(offset, length);
    } else {
      std::memset(bytes_ + offset, 0, length);
    }
    co_return Result<void>();
  }

 private:
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
