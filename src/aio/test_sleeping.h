// SPDX-License-Identifier: MIT
// Scenarios for TestMachine: pushes that meet a context at the very moment it goes to sleep.
//
// Invariant: no push is lost: the receiver always wakes up and answers. A lost one shows as a run
// that does not end.
#pragma once

#include <array>
#include <atomic>
#include <memory>

#include "aio/test_machine.h"
#include "base/test_build.h"
#include "roost/aio/bottom_half.h"

namespace roost {

/// One coroutine goes to and fro; before each hop it works for a random while, so that the hop
/// meets the other side in every phase of falling asleep. Returns how often it was in the wrong
/// place.
inline int ping_pong(TestMachine& machine, AioContext& a, AioContext& b, int hops,
                     std::uint64_t seed) {
  std::atomic<bool> done{false};
  int wrong_context = 0;
  const auto body = [&]() -> Task<void> {
    TestRandom random(seed);
    for (int i = 0; i < hops; ++i) {
      AioContext& next = i % 2 ? a : b;
      for (auto n = random.below(i % 64 ? 64 : 4096); n > 0; --n) RealPlatform::cpu_relax();
      machine.interrupt();
      co_await move_to(next);
      wrong_context += AioContext::current() != &next;
      machine.note("hop", static_cast<std::uint64_t>(i));
    }
    done = true;
  };
  spawn(a, body(), "ping-pong");
  machine.wait_until([&] { return done.load(); });
  return wrong_context;
}

struct WakeCounts {
  int resumed = 0;
  int elsewhere = 0;         // not at home
  std::uint64_t sleeps = 0;  // of the home
};

/// Foreign threads wake coroutines at home: co_wake races with everything.
inline WakeCounts wake_from_outside(TestMachine& machine, int wakers, int wakes_each,
                                    bool may_spin = true) {
  constexpr int kCoroutines = 16;
  auto home = machine.add_context("home", may_spin);
  struct Sleeper {
    std::atomic<Coroutine*> parked{nullptr};
    int resumed = 0;
    bool stop = false;
    std::atomic<bool> ended{false};
  };
  std::array<Sleeper, kCoroutines> sleepers;
  std::atomic<int> elsewhere{0};
  std::uint64_t sleeps = 0;  // home thread, until the last one has ended
  const auto body = [&](Sleeper& s) -> Task<void> {
    while (!s.stop) {
      co_await suspend([&at = s.parked](Coroutine& co) noexcept { at.store(&co); });
      ++s.resumed;
      if (AioContext::current() != home.get()) ++elsewhere;
      machine.note("resumed", static_cast<std::uint64_t>(&s - sleepers.data()));
    }
    sleeps = home->statistics().sleeps;
    s.ended = true;
  };
  for (Sleeper& s : sleepers) spawn(*home, body(s), "sleeper");
  const auto wake = [&](Sleeper& s) {
    Coroutine* co;
    while (!(co = s.parked.exchange(nullptr))) machine.relax();
    co_wake(*co);
  };
  for (int w = 0; w < wakers; ++w) {
    machine.add_thread("waker", [&, w] {
      for (int i = 0; i < wakes_each; ++i) wake(sleepers[(i * wakers + w) % kCoroutines]);
    });
  }
  machine.join_threads();
  WakeCounts counts;
  machine.add_thread("last waker", [&] {
    for (Sleeper& s : sleepers) {
      Coroutine* co;
      while (!(co = s.parked.exchange(nullptr))) machine.relax();
      s.stop = true;
      co_wake(*co);
      while (!s.ended.load()) machine.relax();
      counts.resumed += s.resumed - 1;
    }
  });
  machine.join_threads();
  counts.elsewhere = elsewhere;
  counts.sleeps = sleeps;
  return counts;
}

}  // namespace roost
