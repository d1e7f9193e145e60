// SPDX-License-Identifier: MIT
#include "roost/coro/frame_allocator.h"

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define ROOST_CACHE_FRAMES 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ROOST_CACHE_FRAMES 0
#endif
#endif
#ifndef ROOST_CACHE_FRAMES
#define ROOST_CACHE_FRAMES 1
#endif

namespace roost {

#if ROOST_CACHE_FRAMES

namespace {

constexpr std::size_t kGranule = 16;  // the allocator's below: finer would save nothing
constexpr std::size_t kClasses = kLargestCachedFrame / kGranule;

struct FreeBlock {
  FreeBlock* next;
};

struct FrameCache {
  FreeBlock* free[kClasses] = {};
  std::size_t bytes = 0;
  bool ended = false;  // the thread is ending: blocks freed after this go straight back

  ~FrameCache() {
    for (FreeBlock*& list : free) {
      while (FreeBlock* block = list) {
        list = block->next;
        ::operator delete(block);
      }
    }
    ended = true;
    bytes = 0;
  }
};

thread_local constinit FrameCache cache;

constexpr std::size_t size_class(std::size_t size) { return (size - 1) / kGranule; }

}  // namespace

void* allocate_frame(std::size_t size) {
  if (size == 0 || size > kLargestCachedFrame) return ::operator new(size);
  const std::size_t index = size_class(size);
  FrameCache& mine = cache;
  if (FreeBlock* block = mine.free[index]) {
    mine.free[index] = block->next;
    mine.bytes -= (index + 1) * kGranule;
    return block;
  }
  return ::operator new((index + 1) * kGranule);
}

void free_frame(void* block, std::size_t size) noexcept {
  if (size != 0 && size <= kLargestCachedFrame) {
    const std::size_t index = size_class(size);
    const std::size_t rounded = (index + 1) * kGranule;
    FrameCache& mine = cache;
    if (mine.bytes + rounded <= kFrameCacheBytes && !mine.ended) {
      auto* freed = static_cast<FreeBlock*>(block);
      freed->next = mine.free[index];
      mine.free[index] = freed;
      mine.bytes += rounded;
      return;
    }
  }
  ::operator delete(block);
}

#else

void* allocate_frame(std::size_t size) { return ::operator new(size); }
void free_frame(void* block, std::size_t) noexcept { ::operator delete(block); }

#endif

}  // namespace roost
