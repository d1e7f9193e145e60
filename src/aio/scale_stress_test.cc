// SPDX-License-Identifier: MIT
// Large numbers: awaits in a row, and coroutines at once.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "aio/test_loop.h"
#include "base/test_build.h"
#include "roost/aio/iothread.h"

namespace roost {
namespace {

// How far the stack has reached, seen from where frames are resumed.
struct StackExtent {
  std::uintptr_t lowest = UINTPTR_MAX;
  std::uintptr_t highest = 0;
  [[gnu::noinline]] void look() {
    const auto here = reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0));
    lowest = std::min(lowest, here);
    highest = std::max(highest, here);
  }
  std::uintptr_t bytes() const { return highest - lowest; }
};

Task<int> leaf(StackExtent& stack, int i) {
  stack.look();
  co_return i & 1;
}

TEST(ScaleStress, TenMillionSynchronousAwaitsDoNotGrowTheStack) {
  constexpr int kAwaits = 10'000'000;
  auto context = AioContext::create();
  ContextScope scope(*context);
  StackExtent stack;
  std::int64_t sum = 0;
  const auto body = [&]() -> Task<void> {
    for (int i = 0; i < kAwaits; ++i) sum += co_await leaf(stack, i);
  };
  const std::int64_t start = real_clock().now_ns();
  Coroutine::create(body())->enter();
  std::printf("%d awaits, %.1f ns each, stack extent %lu bytes\n", kAwaits,
              static_cast<double>(real_clock().now_ns() - start) / kAwaits, stack.bytes());
  EXPECT_EQ(sum, kAwaits / 2);
  EXPECT_EQ(stack.bytes(), 0u);
}

// Neither do waits that are over before they begin, nor a deep chain of children.
Task<int> depth(StackExtent& stack, int levels) {
  stack.look();
  if (levels == 0) co_return 0;
  const int below = co_await depth(stack, levels - 1);
  stack.look();
  co_return below + 1;
}

TEST(ScaleStress, AHundredThousandNestedAwaitsDoNotGrowTheStack) {
  auto context = AioContext::create();
  ContextScope scope(*context);
  StackExtent stack;
  int reached = 0;
  const auto body = [&]() -> Task<void> { reached = co_await depth(stack, 100'000); };
  Coroutine::create(body())->enter();
  EXPECT_EQ(reached, 100'000);
  EXPECT_EQ(stack.bytes(), 0u);
}

// Two coroutines that wake each other for ever: the wake list is a list, not a recursion.
TEST(ScaleStress, AMillionMutualWakeUpsDoNotGrowTheStack) {
  const int kWakes = rounds(1'000'000);
  auto context = AioContext::create();
  ContextScope scope(*context);
  StackExtent stack;
  Coroutine* parked[2] = {};
  int wakes = 0;
  bool stop = false;
  const auto body = [&](int me) -> Task<void> {
    while (!stop) {
      stack.look();
      if (Coroutine* other = std::exchange(parked[1 - me], nullptr)) {
        stop = ++wakes >= kWakes;
        co_wake(*other);
        if (stop) break;
      }
      co_await suspend([at = &parked[me]](Coroutine& co) noexcept { *at = &co; });
    }
  };
  Coroutine::create(body(0))->enter();
  Coroutine::create(body(1))->enter();
  while (wakes < kWakes) context->poll(false);
  while (context->poll(false)) {
  }
  EXPECT_EQ(wakes, kWakes);
  // From enter() on this stack, or from a poll: two depths, however many wake-ups there were.
  EXPECT_LT(stack.bytes(), 16u * 1024);
}

TEST(ScaleStress, AHundredThousandCoroutinesSuspendedAtOnce) {
  constexpr int kCoroutines = 100'000;
  IOThread thread;
  std::vector<Coroutine*> all;
  all.reserve(kCoroutines);
  std::atomic<int> ended{0};
  const auto body = [&ended]() -> Task<void> {
    co_await yield();
    ended.fetch_add(1);
  };
  const std::size_t before = resident_bytes();
  {
    auto context = AioContext::create();
    ContextScope scope(*context);
    for (int i = 0; i < kCoroutines; ++i) {
      all.push_back(Coroutine::create(body()));
      all.back()->enter();
    }
  }
  const std::size_t bytes = (resident_bytes() - before) / kCoroutines;
  EXPECT_EQ(ended, 0);
  if (!kSanitized) {
    std::printf("%lu bytes for each suspended coroutine\n", bytes);
    EXPECT_GT(bytes, 100u);
    EXPECT_LT(bytes, 512u);
  }
  for (Coroutine* co : all) co_schedule(thread.context(), *co);
  while (ended.load() < kCoroutines) std::this_thread::yield();
}

}  // namespace
}  // namespace roost
