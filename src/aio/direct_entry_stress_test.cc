// SPDX-License-Identifier: MIT
// The scenario of test_direct_entry.h on threads, and stale entries by the thousand on one context.
#include <gtest/gtest.h>

#include <cstdio>

#include "aio/test_direct_entry.h"
#include "aio/test_loop.h"

namespace roost {
namespace {

constexpr int kRoundsEach = 40;
constexpr int kDirectEntrySeed = 99;

class DirectEntryStress : public OnEachLoop {};
ROOST_ON_EACH_LOOP(DirectEntryStress);

TEST_P(DirectEntryStress, RacingWithAPendingScheduleExactlyOneWins) {
  const int coroutines = rounds(500);
  RealMachine machine(options());
  DirectEntryRace race(machine, kDirectEntrySeed);
  for (int n = 0; n < coroutines; ++n) race.run(kRoundsEach);
  race.finish();
  std::printf(
      "seed %d: won by the queue %lu, by a rival %lu; scheduled again with a stale entry queued "
      "%lu, ended with one %lu\n",
      kDirectEntrySeed, race.won_by_queue, race.won_by_rival, race.rescheduled_with_stale_entry,
      race.ended_with_stale_entry);
  EXPECT_EQ(race.errors(), 0);
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
