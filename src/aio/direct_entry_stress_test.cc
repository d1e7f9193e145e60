// SPDX-License-Identifier: MIT
// Direct entry, through CoroutineRef::try_enter, races with the turn of a pending schedule on
// another thread.
//
// Each round: the coroutine suspends; its publish step schedules it on a queue context and then
// tells two rivals, on contexts of their own, that they may try to enter it directly. Invariant:
// exactly one of the three resumes it. When a rival wins, its entry stays queued and is stale: the
// coroutine is scheduled again at once, on the same or another context, and may end, with stale
// entries queued.
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
#include "roost/aio/iothread.h"

namespace roost {
namespace {

constexpr int kRivals = 2;
constexpr int kQueues = 2;
constexpr int kRoundsEach = 40;
constexpr int kSeed = 99;

struct Rival {
  std::unique_ptr<IOThread> thread;
  std::atomic<int> round{0};     // set by the publish step before it schedules the attempt
  std::atomic<int> has_lost{0};  // the round, set by the rival
  CoroutineRef ref;              // its own, on its own thread
  std::unique_ptr<BottomHalf> attempt;
};

struct Race {
  std::array<Rival, kRivals> rivals;
  std::array<std::unique_ptr<IOThread>, kQueues> queues;
  TestRandom random{kSeed};  // the coroutine's, while it runs or publishes

  std::atomic<bool> running{false};
  std::atomic<int> errors{0};
  std::atomic<bool> ended{false};
  // The coroutine's.
  std::uint64_t won_by_queue = 0;
  std::uint64_t won_by_rival = 0;
  std::uint64_t rescheduled_with_stale_entry = 0;
  std::uint64_t ended_with_stale_entry = 0;

  int rival_here() const {
    for (int i = 0; i < kRivals; ++i) {
      if (AioContext::current() == &rivals[i].thread->context()) return i;
    }
    return -1;
  }
};

Task<void> racer(Race& race) {
  for (int round = 1; round <= kRoundsEach; ++round) {
    const int queue = static_cast<int>(race.random.below(kQueues));
    co_await suspend([r = &race, queue, round](Coroutine& co) noexcept {
      Race& world = *r;
      if (!world.running.exchange(false)) ++world.errors;
      // The queue's turn may win at once: from here on the coroutine is not ours.
      co_schedule(world.queues[queue]->context(), co);
      for (Rival& rival : world.rivals) {
        rival.round.store(round);
        rival.attempt->schedule();
      }
    });
    if (race.running.exchange(true)) ++race.errors;  // two resumed it
    const int here = race.rival_here();
    // A rival that has not tried yet could meet the coroutine in a later suspension, before it is
    // scheduled again; that would be a wrong use, so this round waits for the losers.
    for (int i = 0; i < kRivals; ++i) {
      while (i != here && race.rivals[i].has_lost.load() < round) std::this_thread::yield();
    }
    if (here >= 0) {
      ++race.won_by_rival;
      ++(round == kRoundsEach ? race.ended_with_stale_entry : race.rescheduled_with_stale_entry);
    } else {
      ++race.won_by_queue;
    }
  }
  race.running = false;
  race.ended = true;
}

class DirectEntryStress : public OnEachLoop {};
ROOST_ON_EACH_LOOP(DirectEntryStress);

TEST_P(DirectEntryStress, RacingWithAPendingScheduleExactlyOneWins) {
  const int coroutines = rounds(500);
  Race race;
  for (auto& queue : race.queues) queue = std::make_unique<IOThread>(options("queue"));
  for (Rival& rival : race.rivals) {
    rival.thread = std::make_unique<IOThread>(options("rival"));
    rival.attempt = std::make_unique<BottomHalf>(rival.thread->context(), [&rival] {
      // Read before: where it wins, the coroutine's next round begins within the call.
      const int round = rival.round.load();
      if (!rival.ref.try_enter()) rival.has_lost.store(round);
    });
  }

  for (int n = 0; n < coroutines; ++n) {
    race.ended = false;
    race.running = true;
    Coroutine* co = Coroutine::create(racer(race), "racer");
    for (int i = 0; i < kRivals; ++i) {
      Rival& rival = race.rivals[i];
      rival.thread->context().run([&] {
        rival.ref = CoroutineRef(*co);
        rival.has_lost = 0;
      });
    }
    co_schedule(race.queues[0]->context(), *co);
    while (!race.ended.load()) std::this_thread::yield();
    for (Rival& rival : race.rivals) {
      rival.thread->context().run([&] { rival.ref = CoroutineRef(); });
    }
  }
  for (auto& rival : race.rivals) {
    rival.attempt.reset();
    rival.thread.reset();
  }
  for (auto& queue : race.queues) queue.reset();
  std::printf(
      "seed %d: won by the queue %lu, by a rival %lu; scheduled again with a stale entry queued "
      "%lu, ended with one %lu\n",
      kSeed, race.won_by_queue, race.won_by_rival, race.rescheduled_with_stale_entry,
      race.ended_with_stale_entry);
  EXPECT_EQ(race.errors, 0);
  EXPECT_EQ(race.won_by_queue + race.won_by_rival,
            static_cast<std::uint64_t>(coroutines) * kRoundsEach);
  EXPECT_GT(race.won_by_queue, 100u);
  EXPECT_GT(race.won_by_rival, 100u);
  EXPECT_GT(race.ended_with_stale_entry, 0u);
}

// On one context, without a race: many stale entries per coroutine, dropped in bulk after the
// coroutine has ended.
TEST_P(DirectEntryStress, ManyStaleEntriesOutliveTheirCoroutines) {
  auto context = AioContext::create(options());
  ContextScope scope(*context);
  int steps = 0;
  const auto body = [&]() -> Task<void> {
    for (int i = 0; i < 100; ++i) {
      ++steps;
      co_await yield();
    }
  };
  const int coroutines = rounds(500);
  for (int n = 0; n < coroutines; ++n) {
    Coroutine* co = Coroutine::create(body());
    for (int i = 0; i <= 100; ++i) {
      co_schedule(*context, *co);
      co->enter();
    }
    if (n % 10 == 0) {
      while (context->poll(false)) {
      }
    }
  }
  EXPECT_EQ(steps, coroutines * 100);
  for (int i = 0; i < coroutines * 101; ++i) EXPECT_FALSE(context->poll(false));
}

}  // namespace
}  // namespace roost
