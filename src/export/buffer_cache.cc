// SPDX-License-Identifier: MIT
#include "export/buffer_cache.h"

#include <cstdlib>
#include <new>
#include <utility>

namespace roost {

namespace {

// AddressSanitizer sees a use after free only of what was really freed.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeep = false;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
constexpr bool kKeep = false;
#else
constexpr bool kKeep = true;
#endif
#else
constexpr bool kKeep = true;
#endif

}  // namespace

void* BufferCache::take(std::size_t size) noexcept {
  const SizeClass which = class_of(size);
  void* buffer = nullptr;
  if (which.index < kClasses && free_[which.index]) {
    Free* const first = free_[which.index];
    free_[which.index] = first->next;
    kept_ -= which.bytes;
    buffer = first;
  } else {
    buffer = std::aligned_alloc(kAlignment, which.bytes);
    if (!buffer) return nullptr;
  }
  ++taken_;
  return buffer;
}

void BufferCache::give_back(void* buffer, std::size_t size) noexcept {
  --taken_;
  const SizeClass which = class_of(size);
  if (!kKeep || kept_ + which.bytes > kMaxKept) {
    std::free(buffer);
    return;
  }
  free_[which.index] = ::new (buffer) Free{free_[which.index]};
  kept_ += which.bytes;
}

void BufferCache::clear() noexcept {
  for (Free*& list : free_) {
    while (list) std::free(std::exchange(list, list->next));
  }
  kept_ = 0;
}

}  // namespace roost
