// SPDX-License-Identifier: MIT
#include "export/buffer_cache.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace roost {
namespace {

TEST(BufferCache, BuffersAreAlignedAndAsLargeAsAskedFor) {
  BufferCache cache;
  // Freed and taken again, larger and smaller sizes in turn: a buffer of a class that is too small
  // would be written beyond its end.
  for (int round = 0; round < 2; ++round) {
    std::vector<void*> buffers;
    std::vector<std::size_t> sizes;
    for (std::size_t power = 1; power <= (2u << 20); power *= 2) {
      for (std::size_t size : {power - 1, power, power + 1, power + power / 2, power + power / 8}) {
        void* buffer = cache.take(size);
        ASSERT_NE(buffer, nullptr);
        EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer) % BufferCache::kAlignment, 0u);
        std::memset(buffer, static_cast<int>(power), size);
        buffers.push_back(buffer);
        sizes.push_back(size);
      }
    }
    EXPECT_EQ(cache.taken(), buffers.size());
    for (std::size_t i = 0; i < buffers.size(); ++i) cache.give_back(buffers[i], sizes[i]);
    EXPECT_EQ(cache.taken(), 0u);
    EXPECT_LE(cache.kept(), BufferCache::kMaxKept);
  }
}

TEST(BufferCache, TheLastBufferGoesOutFirst) {
  BufferCache cache;
  void* first = cache.take(4160);
  void* second = cache.take(4160);
  cache.give_back(first, 4160);
  cache.give_back(second, 4160);
  if (cache.kept() == 0) GTEST_SKIP() << "nothing is kept in this build";
  EXPECT_EQ(cache.take(4160), second);
  EXPECT_EQ(cache.take(4160), first);
  EXPECT_EQ(cache.kept(), 0u);
  cache.give_back(first, 4160);
  cache.give_back(second, 4160);
  cache.clear();
  EXPECT_EQ(cache.kept(), 0u);
}

TEST(BufferCache, KeepsNoMoreThanItsLimit) {
  BufferCache cache;
  constexpr std::size_t kSize = 1u << 20;
  std::vector<void*> buffers;
  for (std::size_t i = 0; i < 2 * BufferCache::kMaxKept / kSize; ++i) {
    buffers.push_back(cache.take(kSize));
  }
  for (void* buffer : buffers) cache.give_back(buffer, kSize);
  EXPECT_LE(cache.kept(), BufferCache::kMaxKept);
  // Larger than all that may be kept.
  void* huge = cache.take(BufferCache::kMaxKept + 1);
  ASSERT_NE(huge, nullptr);
  const std::size_t kept = cache.kept();
  cache.give_back(huge, BufferCache::kMaxKept + 1);
  EXPECT_EQ(cache.kept(), kept);
}

}  // namespace
}  // namespace roost
