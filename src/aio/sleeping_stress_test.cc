// SPDX-License-Identifier: MIT
// Pushes that meet a context at the very moment it goes to sleep.
//
// Invariant: no push is lost: the receiver always wakes up and answers. A lost one shows as a test
// that does not end.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "aio/test_loop.h"
#include "base/test_build.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/event_notifier.h"
#include "roost/aio/iothread.h"
#include "roost/aio/poll_budget.h"

namespace roost {
namespace {

constexpr int kSeed = 11;

class SleepingStress : public OnEachLoop {
 protected:
  // One coroutine goes to and fro; before each hop it works for a random while, so that the hop
  // meets the other side in every phase of falling asleep.
  void ping_pong(const AioContextOptions& o, int hops, const char* name) {
    IOThread a(o);
    IOThread b(o);
    std::atomic<bool> done{false};
    int wrong_context = 0;
    const auto body = [&]() -> Task<void> {
      TestRandom random(kSeed);
      for (int i = 0; i < hops; ++i) {
        IOThread& next = i % 2 ? a : b;
        for (auto n = random.below(i % 64 ? 64 : 4096); n > 0; --n) RealPlatform::cpu_relax();
        co_await move_to(next.context());
        wrong_context += AioContext::current() != &next.context();
      }
      done = true;
    };
    spawn(a.context(), body());
    while (!done.load()) std::this_thread::yield();
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
  ping_pong(o, rounds(50'000), "sleeping");
}

TEST_P(SleepingStress, PingPongThatSpins) {
  PollBudget budget(1000);
  auto o = options("spinner");
  o.poll_budget = &budget;
  ping_pong(o, rounds(50'000), "spinning");
}

TEST_P(SleepingStress, PingPongOnTheEdgeOfSpinning) {
  PollBudget budget(1000);
  auto o = options("edge");
  o.poll_budget = &budget;
  o.poll_max_ns = 5'000;
  ping_pong(o, rounds(50'000), "edge");
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

// A wake-up at home from a foreign thread, a million times over: co_wake races with everything.
TEST_P(SleepingStress, ForeignThreadsWakeManyCoroutinesAtHome) {
  constexpr int kCoroutines = 16;
  const int wakes = rounds(20'000);
  IOThread home(options("home"));
  struct Sleeper {
    std::atomic<Coroutine*> parked{nullptr};
    int resumed = 0;
    bool stop = false;
    std::atomic<bool> ended{false};
  };
  std::array<Sleeper, kCoroutines> sleepers;
  std::atomic<int> elsewhere{0};
  const auto body = [&](Sleeper& s) -> Task<void> {
    while (!s.stop) {
      co_await suspend([&at = s.parked](Coroutine& co) noexcept { at.store(&co); });
      ++s.resumed;
      if (AioContext::current() != &home.context()) ++elsewhere;
    }
    s.ended = true;
  };
  for (Sleeper& s : sleepers) spawn(home.context(), body(s));
  std::vector<std::thread> wakers;
  for (int w = 0; w < 2; ++w) {
    wakers.emplace_back([&, w] {
      for (int i = 0; i < wakes; ++i) {
        Sleeper& s = sleepers[(i * 2 + w) % kCoroutines];
        Coroutine* co;
        while (!(co = s.parked.exchange(nullptr))) std::this_thread::yield();
        co_wake(*co);
      }
    });
  }
  for (auto& waker : wakers) waker.join();
  int resumed = 0;
  for (Sleeper& s : sleepers) {
    Coroutine* co;
    while (!(co = s.parked.exchange(nullptr))) std::this_thread::yield();
    s.stop = true;
    co_wake(*co);
    while (!s.ended.load()) std::this_thread::yield();
    resumed += s.resumed - 1;
  }
  EXPECT_EQ(resumed, 2 * wakes);
  EXPECT_EQ(elsewhere, 0);
}

}  // namespace
}  // namespace roost
