// SPDX-License-Identifier: MIT
#include "roost/coro/gate.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "coro/test_context.h"
#include "roost/coro/task.h"

namespace roost {
namespace {

struct Seen {
  int ended = 0;
  int error = 0;
  CoContext* at = nullptr;
};

Task<void> wait_idle(Gate& gate, Seen& seen) {
  co_await gate.idle();
  seen.at = this_thread().context;
  ++seen.ended;
}

Task<void> wait_idle(Gate& gate, std::stop_token stop, Seen& seen) {
  Result<void> result = co_await gate.idle(stop);
  if (!result) seen.error = result.error().code();
  seen.at = this_thread().context;
  ++seen.ended;
}

class Gates : public testing::Test {
 protected:
  void start(Task<void> task) {
    TestScope scope(home_);
    Coroutine::create(std::move(task), "drain")->enter();
  }
  TestContext home_{1, "home"};
  TestContext other_{2, "other"};
  Gate gate_{"the disk's requests"};
  Seen seen_;
};
using GateDeathTest = Gates;

TEST_F(Gates, ItCountsWhatIsInFlight) {
  EXPECT_TRUE(gate_.try_enter());
  EXPECT_TRUE(gate_.try_enter());
  EXPECT_EQ(gate_.in_flight(), 2u);
  gate_.leave();
  gate_.leave();
  EXPECT_EQ(gate_.in_flight(), 0u);
}

TEST_F(Gates, AClosedOneLetsNobodyInAndReopenedItDoes) {
  gate_.close();
  EXPECT_TRUE(gate_.closed());
  EXPECT_FALSE(gate_.try_enter());
  EXPECT_FALSE(gate_.try_pass());
  EXPECT_EQ(gate_.in_flight(), 0u);
  gate_.open();
  EXPECT_TRUE(gate_.try_pass());
}

TEST_F(Gates, NestedClosesCount) {
  gate_.close();
  gate_.close();
  gate_.open();
  EXPECT_FALSE(gate_.try_enter());
  gate_.open();
  EXPECT_TRUE(gate_.try_enter());
  gate_.leave();
}

TEST_F(Gates, WhatIsInsideMayBringMoreInThroughAClosedOne) {
  EXPECT_TRUE(gate_.try_enter());
  gate_.close();
  gate_.enter_inside();
  start(wait_idle(gate_, seen_));
  gate_.leave();
  EXPECT_EQ(home_.run(), 0);
  gate_.leave();
  EXPECT_EQ(home_.run(), 1);
  gate_.open();
}

TEST_F(Gates, APassLeavesWhenItGoes) {
  {
    Gate::Pass pass = gate_.try_pass();
    EXPECT_TRUE(pass);
    Gate::Pass moved = std::move(pass);
    EXPECT_FALSE(pass);
    EXPECT_EQ(gate_.in_flight(), 1u);
  }
  EXPECT_EQ(gate_.in_flight(), 0u);
  Gate::Pass pass = gate_.try_pass();
  pass.release();
  gate_.leave();
}

TEST_F(Gates, APassThatIsAssignedToLeavesWithItsOldOneAtOnce) {
  Gate::Pass to = gate_.try_pass();
  Gate::Pass from = gate_.try_pass();
  to = std::move(from);
  EXPECT_TRUE(to);
  EXPECT_FALSE(from);
  EXPECT_EQ(gate_.in_flight(), 1u);
  Gate::Pass& itself = to;
  to = std::move(itself);
  EXPECT_EQ(gate_.in_flight(), 1u);
}

TEST_F(Gates, WaitingForAnIdleOneDoesNotSuspend) {
  gate_.close();
  start(wait_idle(gate_, seen_));
  EXPECT_EQ(seen_.ended, 1);
  gate_.open();
}

TEST_F(Gates, TheLastToLeaveWakesTheWaiterAtHome) {
  Gate::Pass first = gate_.try_pass();
  Gate::Pass second = gate_.try_pass();
  gate_.close();
  start(wait_idle(gate_, seen_));
  first.leave();
  EXPECT_EQ(home_.run(), 0);
  std::thread([&] { second.leave(); }).join();
  EXPECT_EQ(seen_.ended, 0);
  EXPECT_EQ(home_.run(), 1);
  EXPECT_EQ(seen_.ended, 1);
  EXPECT_EQ(seen_.at, &home_);
  gate_.open();
}

TEST_F(Gates, LeavingAtHomeDoesNotRunTheWaiterOnTheStack) {
  Gate::Pass pass = gate_.try_pass();
  start(wait_idle(gate_, seen_));
  TestScope scope(home_);
  pass.leave();
  EXPECT_EQ(seen_.ended, 0);
  EXPECT_EQ(home_.run(), 1);
}

TEST_F(Gates, AllWhoWaitAreWokenInTheirOrder) {
  Seen others[3];
  Gate::Pass pass = gate_.try_pass();
  for (Seen& other : others) start(wait_idle(gate_, other));
  pass.leave();
  EXPECT_EQ(home_.run(), 3);
  for (Seen& other : others) EXPECT_EQ(other.ended, 1);
}

TEST_F(Gates, TwoDrainsInARowEachWaitForThemselves) {
  for (int i = 1; i <= 2; ++i) {
    Gate::Pass pass = gate_.try_pass();
    gate_.close();
    start(wait_idle(gate_, seen_));
    pass.leave();
    EXPECT_EQ(home_.run(), 1);
    EXPECT_EQ(seen_.ended, i);
    gate_.open();
  }
  EXPECT_EQ(home_.run(), 0);
}

TEST_F(Gates, AStoppedWaitEndsAtHomeAndTheGateStaysClosed) {
  std::stop_source stop;
  Gate::Pass pass = gate_.try_pass();
  gate_.close();
  start(wait_idle(gate_, stop.get_token(), seen_));
  std::thread([&] { stop.request_stop(); }).join();
  EXPECT_EQ(home_.run(), 1);
  EXPECT_EQ(seen_.error, ECANCELED);
  EXPECT_EQ(seen_.at, &home_);
  EXPECT_TRUE(gate_.closed());
  pass.leave();
  EXPECT_EQ(home_.run(), 0);
  gate_.open();
}

TEST_F(Gates, OneOfSeveralWaitsIsStoppedAndTheOthersGoOn) {
  std::stop_source stop;
  Seen first, stopped, last;
  Gate::Pass pass = gate_.try_pass();
  start(wait_idle(gate_, first));
  start(wait_idle(gate_, stop.get_token(), stopped));
  start(wait_idle(gate_, last));
  stop.request_stop();
  EXPECT_EQ(home_.run(), 1);
  EXPECT_EQ(stopped.error, ECANCELED);
  pass.leave();
  EXPECT_EQ(home_.run(), 2);
  EXPECT_EQ(first.ended + last.ended, 2);
}

TEST_F(Gates, AStopRequestedBeforeTheWaitEndsItAtOnce) {
  std::stop_source stop;
  stop.request_stop();
  Gate::Pass pass = gate_.try_pass();
  start(wait_idle(gate_, stop.get_token(), seen_));
  EXPECT_EQ(seen_.ended, 1);
  EXPECT_EQ(seen_.error, ECANCELED);
}

TEST_F(Gates, AStopThatComesAfterTheLastLeftDoesNothing) {
  std::stop_source stop;
  Gate::Pass pass = gate_.try_pass();
  start(wait_idle(gate_, stop.get_token(), seen_));
  pass.leave();
  stop.request_stop();
  EXPECT_EQ(home_.run(), 1);
  EXPECT_EQ(seen_.error, 0);
}

TEST_F(Gates, ItMayGoAsSoonAsItIsIdle) {
  struct Owner {
    static Task<void> own(Gate*& shown, int& ended) {
      auto gate = std::make_unique<Gate>("a short-lived gate");
      (void)gate->try_enter();
      shown = gate.get();
      co_await gate->idle();
      gate.reset();
      ++ended;
    }
  };
  Gate* gate = nullptr;
  int ended = 0;
  start(Owner::own(gate, ended));
  gate->leave();
  EXPECT_EQ(home_.run(), 1);
  EXPECT_EQ(ended, 1);
}

TEST_F(GateDeathTest, LeavingAnEmptyOneAborts) {
  EXPECT_DEATH(gate_.leave(), "gate 'the disk's requests' left by one who was not inside");
}

TEST_F(GateDeathTest, OpeningOneThatIsNotClosedAborts) {
  EXPECT_DEATH(gate_.open(), "gate 'the disk's requests' opened more often than it was closed");
}

TEST_F(GateDeathTest, DestroyingOneWithSomethingInFlightAborts) {
  auto gate = std::make_unique<Gate>("a gate");
  EXPECT_TRUE(gate->try_enter());
  EXPECT_TRUE(gate->try_enter());
  EXPECT_DEATH(gate.reset(), "gate 'a gate' destroyed with 2 in flight");
  start(wait_idle(*gate, seen_));
  EXPECT_DEATH(gate.reset(), "destroyed with 2 in flight and somebody waiting for idleness");
  gate->leave();
  gate->leave();
  home_.run();
}

TEST_F(GateDeathTest, WakingTheWaiterByHandAbortsAndNamesTheWait) {
  struct Waiter {
    static Task<void> wait(Gate& gate, Coroutine*& co) {
      co = Coroutine::self();
      co_await gate.idle();
    }
  };
  Coroutine* co = nullptr;
  Gate::Pass pass = gate_.try_pass();
  start(Waiter::wait(gate_, co));
  EXPECT_DEATH(co_wake(*co), "it is waiting for the disk's requests");
  pass.leave();
  home_.run();
}

}  // namespace
}  // namespace roost
