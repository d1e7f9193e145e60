// SPDX-License-Identifier: MIT
// The scenario of test_hop.h on five contexts with threads of their own.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdio>
#include <thread>

#include "aio/test_hop.h"
#include "aio/test_loop.h"

namespace roost {
namespace {

constexpr int kHopSeed = 20'240;

class MultiContextStress : public OnEachLoop {};
ROOST_ON_EACH_LOOP(MultiContextStress);

TEST_P(MultiContextStress, EachScheduleResumesOnceOnItsContextAndInOrder) {
  RealMachine machine(options());
  HopWorld world(machine, HopWorld::kMaxContexts, HopWorld::kMaxHoppers, kHopSeed);
  world.start();
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  world.finish();
  const HopCounts sum = world.counts();
  std::printf(
      "seed %d: scheduled elsewhere %lu, scheduled here %lu, retried %lu, displaced %lu, "
      "taken from another context %lu\n",
      kHopSeed, sum.elsewhere, sum.here, sum.retried, sum.displaced, sum.stolen);
  EXPECT_EQ(world.errors(), 0);
  EXPECT_EQ(sum.resumed, sum.elsewhere + sum.here);
  EXPECT_GT(sum.elsewhere, 1000u);
  EXPECT_GT(sum.here, 100u);
  EXPECT_GT(sum.retried, 100u);
  EXPECT_GT(sum.displaced, 100u);
  EXPECT_GT(sum.stolen, 100u);
}

}  // namespace
}  // namespace roost
