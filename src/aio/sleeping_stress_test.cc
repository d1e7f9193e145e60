// SPDX-License-Identifier: MIT
// The scenarios of test_sleeping.h on threads, and wake-ups of several kinds at once.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "aio/test_loop.h"
#include "aio/test_sleeping.h"
#include "base/test_build.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/event_notifier.h"
#include "roost/aio/iothread.h"
#include "roost/aio/poll_budget.h"

namespace roost {
namespace {

constexpr int kSleepSeed = 11;

class SleepingStress : public OnEachLoop {
 protected:
  void ping_pong_on_threads(const AioContextOptions& o, int hops, const char* name) {
    RealMachine machine(o);
    IOThread a(o);
    IOThread b(o);
    const int wrong_context = ping_pong(machine, a.context(), b.context(), hops, kSleepSeed);
    const auto of_a = a.context().run([&] { return a.context().statistics(); });
    const auto of_b = b.context().run([&] { return b.context().statistics(); });
    std::printf("%s: %d hops, %lu sleeps, %lu spins paid, %lu in vain\n", name, hops,
                of_a.sleeps + of_b.sleeps, of_a.spins_paid + of_b.spins_paid,
                of_a.spins_in_vain + of_b.spins_in_vain);
    EXPECT_EQ(wrong_context, 0);
    EXPECT_GT(of_a.sleeps + of_b.sleeps, 0u);
    if (o.poll_max_ns == 0) {
      EXPECT_EQ(of_a.spins_paid + of_b.spins_paid, 0u);
    } else if (o.poll_max_ns >= 100'000) {
      EXPECT_GT(of_a.spins_paid + of_b.spins_paid, 0u);
    }
  }
};
ROOST_ON_EACH_LOOP(SleepingStress);

TEST_P(SleepingStress, PingPongThatSleepsEachTime) {
  auto o = options("sleeper");
  o.poll_max_ns = 0;
  ping_pong_on_threads(o, rounds(50'000), "sleeping");
}

TEST_P(SleepingStress, PingPongThatSpins) {
  PollBudget budget(1000);
  auto o = options("spinner");
  o.poll_budget = &budget;
  ping_pong_on_threads(o, rounds(50'000), "spinning");
}

TEST_P(SleepingStress, PingPongOnTheEdgeOfSpinning) {
  PollBudget budget(1000);
  auto o = options("edge");
  o.poll_budget = &budget;
  o.poll_max_ns = 5'000;
  ping_pong_on_threads(o, rounds(50'000), "edge");
}

// Pushes, notifies and descriptors all at once, from several threads, to a context that sleeps
// whenever it can; each waits for its own answer.
TEST_P(SleepingStress, SeveralKindsOfWakeUpsAtOnce) {
  auto o = options("target");
  o.poll_max_ns = 0;
  IOThread target(o);
  const int each = rounds(10'000);
  EventNotifier notifier;
  std::atomic<int> from_descriptor{0};
  std::atomic<int> from_bottom_half{0};
  target.context().run([&] {
    target.context().set_event_notifier(notifier, [&] { from_descriptor.fetch_add(1); });
  });
  BottomHalf bh(target.context(), [&] { from_bottom_half.fetch_add(1); });
  std::thread by_descriptor([&] {
    for (int i = 0; i < each; ++i) {
      const int before = from_descriptor.load();
      notifier.set();
      while (from_descriptor.load() == before) std::this_thread::yield();
    }
  });
  std::thread by_bottom_half([&] {
    for (int i = 0; i < each; ++i) {
      const int before = from_bottom_half.load();
      bh.schedule();
      while (from_bottom_half.load() == before) std::this_thread::yield();
    }
  });
  for (int i = 0; i < each; ++i) {
    target.context().notify();
    ASSERT_EQ(target.context().run([i] { return i; }), i);
  }
  by_descriptor.join();
  by_bottom_half.join();
  const auto statistics = target.context().run([&] {
    target.context().remove_event_notifier(notifier);
    return target.context().statistics();
  });
  std::printf("%d rounds of each kind, %lu sleeps\n", each, statistics.sleeps);
  EXPECT_GT(statistics.sleeps, 100u);
}

// Two threads without a context, 20,000 wake-ups each, and more until the home has slept in
// between.
TEST_P(SleepingStress, ForeignThreadsWakeCoroutinesAtHomeWhileItFallsAsleep) {
  const int wakes = rounds(20'000);
  const auto start = std::chrono::steady_clock::now();
  int wakes_in_all = 0;
  std::uint64_t sleeps = 0;
  do {
    RealMachine machine(options());
    const WakeCounts counts = wake_from_outside(machine, 2, wakes, /*may_spin=*/false);
    ASSERT_EQ(counts.resumed, 2 * wakes);
    ASSERT_EQ(counts.elsewhere, 0);
    wakes_in_all += 2 * wakes;
    sleeps += counts.sleeps;
  } while (sleeps < 100 && std::chrono::steady_clock::now() - start < std::chrono::seconds(30));
  std::printf("%d wake-ups, %lu sleeps\n", wakes_in_all, sleeps);
  EXPECT_GE(sleeps, 100u);
}

}  // namespace
}  // namespace roost
