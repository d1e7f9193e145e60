// SPDX-License-Identifier: MIT
// BufferCache: memory for replies and for the data of writes, used again while it is warm.
//
// Both come and go by the batch. The general allocator gives a batch that was freed back to the
// system, page by page, and gets it again for the next one: a page fault for every 4 KiB sent or
// received. Here the buffer that was freed last is the first to go out again, so it is also the one
// most likely still in the CPU's cache.
//
// Threads: one: the context whose connections share it.
// Lifetime: outlives its buffers.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <new>

namespace roost {

class BufferCache {
 public:
  static constexpr std::size_t kAlignment = 64;
  /// What is kept for later, at most.
  static constexpr std::size_t kMaxKept = 16u << 20;

  BufferCache() noexcept = default;
  BufferCache(const BufferCache&) = delete;
  BufferCache& operator=(const BufferCache&) = delete;
  ~BufferCache() { clear(); }

  /// `size` bytes at a multiple of kAlignment; null if there is no memory.
  void* take(std::size_t size) noexcept;

  /// `size` as it was asked for.
  void give_back(void* buffer, std::size_t size) noexcept;

  /// Frees what is kept.
  void clear() noexcept;

  std::size_t kept() const noexcept { return kept_; }
  std::size_t taken() const noexcept { return taken_; }

 private:
  struct Free {
    Free* next;
  };

  // Eight sizes for each power of two, so that at most an eighth is wasted.
  static constexpr unsigned kStepBits = 3;
  static constexpr std::size_t kSmallest = 512;
  static constexpr unsigned kSmallestWidth = std::bit_width(kSmallest);

  struct SizeClass {
    std::size_t index;
    std::size_t bytes;
  };
  static constexpr SizeClass class_of(std::size_t size) noexcept {
    if (size < kSmallest) size = kSmallest;
    const unsigned width = std::bit_width(size - 1);
    const unsigned shift = width - 1 - kStepBits;
    const std::size_t steps = (size - 1) >> shift;  // 8 to 15, its top bit being that of the width
    return {((width - kSmallestWidth + 1) << kStepBits) + (steps & ((1u << kStepBits) - 1)),
            (steps + 1) << shift};
  }
  static constexpr std::size_t kClasses = (std::bit_width(kMaxKept - 1) - kSmallestWidth + 2)
                                          << kStepBits;  // up to kMaxKept

  std::array<Free*, kClasses> free_{};
  std::size_t kept_ = 0;   // bytes in free_
  std::size_t taken_ = 0;  // buffers
};

/// For std::allocate_shared and the like. REQUIRES: T's alignment is at most kAlignment.
template <class T>
struct BufferCacheAllocator {
  using value_type = T;

  explicit BufferCacheAllocator(BufferCache& c) noexcept : cache(&c) {}
  template <class U>
  BufferCacheAllocator(const BufferCacheAllocator<U>& other) noexcept : cache(other.cache) {}

  T* allocate(std::size_t count) {
    static_assert(alignof(T) <= BufferCache::kAlignment);
    void* const memory = cache->take(count * sizeof(T));
    if (!memory) throw std::bad_alloc();
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, std::size_t count) noexcept {
    cache->give_back(memory, count * sizeof(T));
  }
  template <class U>
  bool operator==(const BufferCacheAllocator<U>& other) const noexcept {
    return cache == other.cache;
  }

  BufferCache* cache;
};

}  // namespace roost
