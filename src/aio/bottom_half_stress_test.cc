// SPDX-License-Identifier: MIT
// The scenarios of test_bottom_halves.h on threads.
#include <gtest/gtest.h>

#include <cstdio>

#include "aio/test_bottom_halves.h"
#include "aio/test_loop.h"

namespace roost {
namespace {

constexpr int kSchedulers = 3;
constexpr int kBottomHalfSeed = 4;

class BottomHalfStress : public OnEachLoop {};
ROOST_ON_EACH_LOOP(BottomHalfStress);

TEST_P(BottomHalfStress, SchedulesFromManyThreadsAreCoalescedButNeverLost) {
  RealMachine machine(options());
  const auto counts =
      coalesce_bottom_halves(machine, kSchedulers, rounds(100'000), kBottomHalfSeed);
  std::printf("seed %d: %lu schedules, %lu runs, %lu coalesced\n", kBottomHalfSeed,
              counts.schedules, counts.runs, counts.schedules - counts.runs);
  EXPECT_LE(counts.runs, counts.schedules);
  EXPECT_LT(counts.runs, counts.schedules) << "nothing was coalesced";
}

TEST_P(BottomHalfStress, OneShotsFromManyThreadsRunOnceEach) {
  RealMachine machine(options());
  const auto counts = run_oneshots(machine, kSchedulers, rounds(50'000));
  EXPECT_EQ(counts.runs, counts.schedules);
  EXPECT_EQ(counts.alive, 0);
}

TEST_P(BottomHalfStress, SchedulesCancelsAndDeletesFromManyThreads) {
  RealMachine machine(options());
  const auto counts =
      mix_bottom_halves(machine, kSchedulers, rounds(100'000), kBottomHalfSeed * 10);
  std::printf("seed %d: %lu schedules, %lu runs, %lu deleted while scheduled, %lu by themselves\n",
              kBottomHalfSeed, counts.schedules, counts.runs, counts.deleted_while_scheduled,
              counts.deleted_in_callback);
  EXPECT_LE(counts.runs, counts.schedules);
  EXPECT_GT(counts.runs, 0u);
  EXPECT_GT(counts.deleted_while_scheduled, 0u);
  EXPECT_GT(counts.deleted_in_callback, 0u);
  EXPECT_EQ(counts.alive, 0);
}

}  // namespace
}  // namespace roost
