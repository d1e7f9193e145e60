// SPDX-License-Identifier: MIT
// What O_DIRECT asks of offsets, lengths and memory, and memory that satisfies it.
//
// Threads: values.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>

#include "roost/base/result.h"

namespace roost {

/// Powers of two.
struct DirectAlignment {
  std::uint32_t offset = 1;  // of offsets and lengths
  std::uint32_t memory = 1;

  std::uint64_t down(std::uint64_t at) const noexcept { return at & ~std::uint64_t{offset - 1}; }
  std::uint64_t up(std::uint64_t at) const noexcept { return down(at + offset - 1); }

  bool fits(std::uint64_t at) const noexcept { return (at & (offset - 1)) == 0; }
  bool fits(const void* address) const noexcept {
    return (reinterpret_cast<std::uintptr_t>(address) & (memory - 1)) == 0;
  }
  bool fits(std::uint64_t at, std::span<const std::byte> bytes) const noexcept {
    return fits(at) && fits(bytes.size()) && fits(bytes.data());
  }
  bool fits(std::uint64_t at, std::span<const iovec> pieces) const noexcept {
    bool all = fits(at);
    for (const iovec& piece : pieces) all = all && fits(piece.iov_len) && fits(piece.iov_base);
    return all;
  }
};

/// What the file that was opened with O_DIRECT asks for.
Result<DirectAlignment> direct_alignment(int fd, const std::string& path);

/// Aligned for any disk; a failed allocation is false.
class BounceBuffer {
 public:
  explicit BounceBuffer(std::size_t size)
      : size_(size),
        bytes_(static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded(size)))) {}

  explicit operator bool() const noexcept { return bytes_ != nullptr; }
  std::span<std::byte> get() const noexcept { return {bytes_.get(), size_}; }

 private:
  static constexpr std::size_t kAlignment = 4096;
  static std::size_t rounded(std::size_t size) noexcept {
    return (size + kAlignment - 1) / kAlignment * kAlignment;
  }
  struct Free {
    void operator()(std::byte* bytes) const noexcept { std::free(bytes); }
  };

  std::size_t size_;
  std::unique_ptr<std::byte, Free> bytes_;
};

/// Takes the bytes of some buffers one after the other.
class GatherCursor {
 public:
  explicit GatherCursor(std::span<const iovec> from) noexcept : from_(from) {}

  /// REQUIRES: so many are left.
  void copy_to(std::span<std::byte> to) noexcept;

 private:
  std::span<const iovec> from_;
  std::size_t done_ = 0;  // of the first
};

}  // namespace roost
