// SPDX-License-Identifier: MIT
// The frame allocator: recycling, its bound, other threads, and threads that end.
#include "roost/coro/frame_allocator.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <set>
#include <thread>
#include <vector>

#include "base/test_build.h"
#include "coro/test_context.h"

namespace roost {
namespace {

TEST(FrameAllocator, BlocksOfAllSizesAreWritableAlignedAndDistinct) {
  std::vector<std::pair<char*, std::size_t>> blocks;
  for (std::size_t size = 1; size < 3 * kLargestCachedFrame; size += 37) {
    auto* block = static_cast<char*>(allocate_frame(size));
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(block) % __STDCPP_DEFAULT_NEW_ALIGNMENT__, 0u);
    std::memset(block, static_cast<int>(size), size);
    blocks.emplace_back(block, size);
  }
  for (auto [block, size] : blocks) {
    for (std::size_t i = 0; i < size; ++i) ASSERT_EQ(block[i], static_cast<char>(size));
  }
  for (auto [block, size] : blocks) free_frame(block, size);
}

TEST(FrameAllocator, AFreedBlockIsUsedAgainForTheSameSize) {
  if (kAddressSanitizer) GTEST_SKIP() << "nothing is cached under AddressSanitizer";
  void* block = allocate_frame(200);
  free_frame(block, 200);
  EXPECT_EQ(allocate_frame(200), block);
  void* other = allocate_frame(1500);
  EXPECT_NE(other, block);
  free_frame(block, 200);
  free_frame(other, 1500);
}

TEST(FrameAllocator, RecyclingDoesNotGrow) {
  if (kSanitized) GTEST_SKIP() << "a sanitizer keeps memory of its own";
  const auto run = [] {
    std::vector<void*> blocks(100);
    for (int round = 0; round < 1000; ++round) {
      for (auto& block : blocks) block = allocate_frame(300);
      for (auto& block : blocks) free_frame(block, 300);
    }
  };
  run();
  const std::size_t before = resident_bytes();
  for (int i = 0; i < 10; ++i) run();
  EXPECT_LT(resident_bytes(), before + (256 << 10));
}

TEST(FrameAllocator, WhatIsKeptAfterABurstIsBounded) {
  if (kSanitized) GTEST_SKIP() << "a sanitizer keeps memory of its own";
  constexpr std::size_t kSize = 512;
  constexpr std::size_t kMany = (128 << 20) / kSize;
  std::vector<void*> blocks(kMany);
  std::memset(blocks.data(), 1, kMany * sizeof(void*));
  const std::size_t before = resident_bytes();
  for (void*& block : blocks) std::memset(block = allocate_frame(kSize), 1, kSize);
  EXPECT_GT(resident_bytes(), before + kMany * kSize / 2);
  for (void* block : blocks) free_frame(block, kSize);
  // The cache, the regions that its blocks keep from going, and the spare ones.
  EXPECT_LT(resident_bytes(), before + (16 << 20));
}

TEST(FrameAllocator, WhatAContextFreesGoesBackOnceItIsIdle) {
  if (kSanitized) GTEST_SKIP() << "a sanitizer keeps memory of its own";
  constexpr std::size_t kSize = 512;
  constexpr std::size_t kMany = (128 << 20) / kSize;
  std::vector<void*> blocks(kMany);
  std::memset(blocks.data(), 1, kMany * sizeof(void*));
  while (release_frame_memory()) {
  }
  const std::size_t before = resident_bytes();
  for (void*& block : blocks) std::memset(block = allocate_frame(kSize), 1, kSize);
  {
    TestContext context(0);
    TestScope scope(context);
    for (void* block : blocks) free_frame(block, kSize);
  }
  EXPECT_GT(resident_bytes(), before + kMany * kSize / 2) << "returned while the loop was busy";
  int pieces = 0;
  while (release_frame_memory()) ++pieces;
  EXPECT_GT(pieces, 1);
  EXPECT_LT(resident_bytes(), before + (16 << 20));
}

TEST(FrameAllocator, ABusyContextKeepsSoMuchAndNoMore) {
  if (kSanitized) GTEST_SKIP() << "a sanitizer keeps memory of its own";
  constexpr std::size_t kSize = 2048;
  constexpr std::size_t kMany = (400 << 20) / kSize;
  std::vector<void*> blocks(kMany);
  std::memset(blocks.data(), 1, kMany * sizeof(void*));
  const std::size_t before = resident_bytes();
  for (void*& block : blocks) std::memset(block = allocate_frame(kSize), 1, kSize);
  {
    TestContext context(0);
    TestScope scope(context);
    for (void* block : blocks) free_frame(block, kSize);
  }
  EXPECT_LT(resident_bytes(), before + (272 << 20));
  while (release_frame_memory()) {
  }
}

TEST(FrameAllocator, ABlockMayBeFreedOnAnotherThread) {
  constexpr int kBlocks = 10'000;
  std::vector<void*> blocks;
  for (int i = 0; i < kBlocks; ++i) blocks.push_back(allocate_frame(128));
  std::thread([&] {
    for (void* block : blocks) free_frame(block, 128);
    // They serve this thread now.
    std::set<void*> distinct;
    for (void*& block : blocks) distinct.insert(block = allocate_frame(128));
    EXPECT_EQ(distinct.size(), blocks.size());
  }).join();
  for (void* block : blocks) free_frame(block, 128);
}

TEST(FrameAllocator, BlocksWanderBetweenThreadsForLong) {
  // One allocates, the other frees: nothing may pile up, neither here nor there.
  const std::size_t before = resident_bytes();
  std::atomic<void*> slot{nullptr};
  const int blocks = rounds(500'000);
  std::thread consumer([&] {
    for (int i = 0; i < blocks; ++i) {
      void* block;
      while (!(block = slot.exchange(nullptr))) std::this_thread::yield();
      free_frame(block, 256);
    }
  });
  for (int i = 0; i < blocks; ++i) {
    auto* block = static_cast<char*>(allocate_frame(256));
    std::memset(block, i, 256);
    while (slot.load()) std::this_thread::yield();
    slot.store(block);
  }
  consumer.join();
  // Half a million blocks are 128 MB.
  if (!kSanitized) {
    EXPECT_LT(resident_bytes(), before + (8 << 20));
  }
}

TEST(FrameAllocator, ThreadsThatEndLeaveNothingBehind) {
  if (kSanitized) GTEST_SKIP() << "a sanitizer keeps memory of its own";
  const auto use = [] {
    std::vector<void*> blocks;
    for (int i = 0; i < 1000; ++i) blocks.push_back(allocate_frame(256));
    for (void* block : blocks) free_frame(block, 256);
  };
  for (int i = 0; i < 5; ++i) std::thread(use).join();
  const std::size_t before = resident_bytes();
  for (int i = 0; i < 200; ++i) std::thread(use).join();
  // 200 threads have had 256 KB each.
  EXPECT_LT(resident_bytes(), before + (4 << 20));
}

// Objects of the thread that go after its cache use it when the cache has gone.
struct LateUser {
  ~LateUser() {
    for (auto& block : held) free_frame(block, 96);
    void* first = allocate_frame(96);
    void* second = allocate_frame(96);
    if (first == second) *same = true;
    std::memset(first, 1, 96);
    std::memset(second, 2, 96);
    free_frame(first, 96);
    free_frame(second, 96);
  }
  std::vector<void*> held;
  bool* same = nullptr;
};

TEST(FrameAllocator, FramesAreFreedAndMadeWhileTheThreadIsEnding) {
  const auto run = [] {
    bool same = false;
    std::thread([&] {
      static thread_local LateUser late;  // made before the cache is first used: goes after it
      late.same = &same;
      for (int i = 0; i < 2000; ++i) late.held.push_back(allocate_frame(96));
    }).join();
    EXPECT_FALSE(same);
  };
  for (int i = 0; i < 5; ++i) run();
  const std::size_t before = resident_bytes();
  for (int i = 0; i < 200; ++i) run();
  if (!kSanitized) {
    // 200 threads have had 190 KB each.
    EXPECT_LT(resident_bytes(), before + (4 << 20))
        << "blocks went into a cache that nobody empties any more";
  }
}

}  // namespace
}  // namespace roost
