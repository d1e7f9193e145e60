// SPDX-License-Identifier: MIT
#include "roost/sync/task_group.h"

#include <gtest/gtest.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "sync/test_tasks.h"

namespace roost {
namespace {

// How a join ended.
struct Outcome {
  bool ended = false;
  int error = 0;
  std::string exception;
  CoContext* at = nullptr;
};

Task<void> join(TaskGroup& group, Outcome& outcome) {
  try {
    Result<void> result = co_await group.join();
    if (!result) outcome.error = result.error().code();
  } catch (const std::runtime_error& e) {
    outcome.exception = e.what();
  }
  outcome.at = this_thread().context;
  outcome.ended = true;
}

class TaskGroups : public StructuredTest {
 protected:
  Outcome joined(TaskGroup& group) {
    Outcome outcome;
    start(join(group, outcome));
    poll_some();
    EXPECT_TRUE(outcome.ended);
    return outcome;
  }
  Log log_;
};
ROOST_ON_EACH_LOOP(TaskGroups);
using TaskGroupDeathTest = TaskGroups;
ROOST_ON_EACH_LOOP(TaskGroupDeathTest);

TEST_P(TaskGroups, JoiningAnEmptyOneDoesNotSuspend) {
  TaskGroup group;
  Outcome outcome;
  start(join(group, outcome));
  EXPECT_TRUE(outcome.ended);
  EXPECT_EQ(outcome.error, 0);
}

TEST_P(TaskGroups, AnEmptyOneNeedNoJoin) { TaskGroup group; }

TEST_P(TaskGroups, JoinWaitsForAllChildrenAndTheirFramesAreGone) {
  TaskGroup group;
  Completion<> first("first"), second("second");
  auto first_token = first.token();
  auto second_token = second.token();
  group.spawn(until_fired(first, log_));
  group.spawn(until_fired(second, log_));
  EXPECT_EQ(log_.started, 0) << "a child starts at its own turn";
  EXPECT_EQ(group.children(), 2u);
  Outcome outcome;
  start(join(group, outcome));
  poll_some();
  EXPECT_EQ(log_.started, 2);
  second_token.fire();
  poll_some();
  EXPECT_FALSE(outcome.ended);
  first_token.fire();
  poll_some();
  EXPECT_TRUE(outcome.ended);
  EXPECT_EQ(log_.ended, 2);
}

TEST_P(TaskGroups, TheFirstErrorStopsTheRestAndIsReported) {
  TaskGroup group;
  for (int i = 0; i < 3; ++i) group.spawn(until_stopped(group.stop_token(), log_));
  group.spawn(fail_at_once(EIO));
  group.spawn(until_stopped(group.stop_token(), log_));
  const Outcome outcome = joined(group);
  EXPECT_EQ(outcome.error, EIO);
  EXPECT_EQ(log_.stopped, 4);
  EXPECT_EQ(log_.frames, 0);
}

TEST_P(TaskGroups, OfTwoErrorsTheFirstCounts) {
  TaskGroup group;
  group.spawn(fail_at_once(EIO));
  group.spawn(fail_at_once(ENOSPC));
  EXPECT_EQ(joined(group).error, EIO);
}

TEST_P(TaskGroups, AnExceptionStopsTheRestAndIsRethrownByTheJoin) {
  TaskGroup group;
  group.spawn(until_stopped(group.stop_token(), log_));
  group.spawn(throw_at_once("broken"));
  const Outcome outcome = joined(group);
  EXPECT_EQ(outcome.exception, "broken");
  EXPECT_EQ(log_.stopped, 1);
}

TEST_P(TaskGroups, TheParentsTokenStopsTheChildrenAndTheJoinSaysCancelled) {
  std::stop_source parent;
  TaskGroup group({.stop = parent.get_token()});
  group.spawn(until_stopped(group.stop_token(), log_));
  poll_some();
  std::thread([&] { parent.request_stop(); }).join();
  EXPECT_EQ(joined(group).error, ECANCELED);
  EXPECT_EQ(log_.stopped, 1);
}

TEST_P(TaskGroups, ChildrenThatWereAskedToStopAreNoFailure) {
  TaskGroup group;
  group.spawn(until_stopped(group.stop_token(), log_));
  poll_some();
  group.request_stop();
  EXPECT_EQ(joined(group).error, 0);
  EXPECT_EQ(log_.stopped, 1);
}

TEST_P(TaskGroups, AnErrorAfterARequestToStopIsReported) {
  TaskGroup group;
  Completion<> go("go");
  group.spawn(until_fired(go, log_));
  auto token = go.token();
  poll_some();
  group.request_stop();
  token.fail(Error(EIO, "flushing"));
  EXPECT_EQ(joined(group).error, EIO);
}

TEST_P(TaskGroups, ADeadlineStopsTheChildrenAndTheJoinSaysSo) {
  TaskGroup group;
  group.scope().set_deadline(1'000);
  group.spawn(until_stopped(group.stop_token(), log_));
  poll_some();
  clock_.advance_ns(1'000);
  poll_some();
  EXPECT_EQ(joined(group).error, ETIMEDOUT);
}

TEST_P(TaskGroups, InAStoppedGroupATaskIsDestroyedWithoutBeingStarted) {
  std::stop_source parent;
  TaskGroup group({.stop = parent.get_token()});
  parent.request_stop();
  group.spawn(until_stopped(group.stop_token(), log_));
  EXPECT_EQ(log_.frames, 0);
  EXPECT_EQ(joined(group).error, ECANCELED);
  EXPECT_EQ(log_.started, 0);
}

TEST_P(TaskGroups, NoMoreThanMaxRunningRunAtTheSameTimeAndAllGetTheirTurnInOrder) {
  struct Child {
    static Task<void> run(Log& log, int number, std::vector<int>& order, AioContext& context) {
      order.push_back(number);
      log.begin();
      for (int i = 0; i < 3; ++i) co_await move_to(context);
      log.end();
    }
  };
  TaskGroup group({.max_running = 3});
  std::vector<int> order;
  for (int i = 0; i < 10; ++i) group.spawn(Child::run(log_, i, order, context()));
  Outcome outcome;
  start(join(group, outcome));
  while (!outcome.ended) poll_some();
  EXPECT_EQ(log_.ended, 10);
  EXPECT_EQ(log_.most, 3);
  EXPECT_EQ(order, (std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}));
}

TEST_P(TaskGroups, RoomHoldsBackALoopUntilAChildHasEnded) {
  struct Parent {
    static Task<void> run(TaskGroup& group, Completion<>* go, Log& log, int& spawned) {
      for (int i = 0; i < 4; ++i) {
        EXPECT_TRUE(co_await group.room());
        group.spawn(until_fired(go[i], log));
        ++spawned;
      }
      EXPECT_TRUE(co_await group.join());
      spawned = -1;
    }
  };
  TaskGroup group({.max_running = 2});
  Completion<> go[4];
  std::vector<CompletionToken<>> tokens;
  for (auto& each : go) tokens.push_back(each.token());
  int spawned = 0;
  start(Parent::run(group, go, log_, spawned));
  poll_some();
  EXPECT_EQ(spawned, 2);
  tokens[1].fire();
  poll_some();
  EXPECT_EQ(spawned, 3);
  tokens[0].fire();
  tokens[2].fire();
  poll_some();
  EXPECT_EQ(spawned, 4);
  tokens[3].fire();
  poll_some();
  EXPECT_EQ(spawned, -1);
  EXPECT_EQ(log_.most, 2);
}

TEST_P(TaskGroups, WhatWaitsForItsTurnWhenTheGroupIsStoppedIsNotStarted) {
  std::stop_source parent;
  TaskGroup group({.stop = parent.get_token(), .max_running = 1});
  for (int i = 0; i < 4; ++i) group.spawn(until_stopped(group.stop_token(), log_));
  poll_some();
  parent.request_stop();
  EXPECT_EQ(joined(group).error, ECANCELED);
  EXPECT_EQ(log_.started, 1);
  EXPECT_EQ(log_.frames, 0);
}

TEST_P(TaskGroups, WaitingForRoomEndsWhenTheGroupIsStopped) {
  struct Parent {
    static Task<void> run(TaskGroup& group, Log& log, int& error) {
      while (co_await group.room()) group.spawn(until_stopped(group.stop_token(), log));
      Result<void> result = co_await group.join();
      error = result ? 0 : result.error().code();
    }
  };
  std::stop_source parent;
  TaskGroup group({.stop = parent.get_token(), .max_running = 2});
  int error = -1;
  start(Parent::run(group, log_, error));
  poll_some();
  EXPECT_EQ(error, -1);
  parent.request_stop();
  poll_some();
  EXPECT_EQ(error, ECANCELED);
  EXPECT_EQ(log_.started, 2);
}

TEST_P(TaskGroups, ChildrenMaySpawnWhileTheGroupIsJoined) {
  struct Child {
    static Task<void> run(TaskGroup& group, Log& log, int depth) {
      log.begin();
      if (depth > 0) {
        group.spawn(run(group, log, depth - 1));
        group.spawn(run(group, log, depth - 1));
      }
      log.end();
      co_return;
    }
  };
  TaskGroup group;
  group.spawn(Child::run(group, log_, 5));
  Outcome outcome;
  start(join(group, outcome));
  while (!outcome.ended) poll_some();
  EXPECT_EQ(log_.ended, 63);
}

TEST_P(TaskGroups, AChildOnAnotherContextRunsThereAndTheParentResumesAtHome) {
  struct Child {
    static Task<void> note(CoContext*& at) {
      at = this_thread().context;
      co_return;
    }
  };
  auto other = AioContext::create(options("other"));
  TaskGroup group;
  CoContext* at = nullptr;
  group.spawn(*other, Child::note(at));
  Outcome outcome;
  start(join(group, outcome));
  poll_some();
  EXPECT_FALSE(outcome.ended);
  {
    ContextScope scope(*other);
    other->poll(false);
    EXPECT_EQ(at, other.get());
    EXPECT_FALSE(outcome.ended);
  }
  poll_some();
  EXPECT_TRUE(outcome.ended);
  EXPECT_EQ(outcome.at, &context());
}

TEST_P(TaskGroups, AGroupWithADeadlineMayEndElsewhere) {
  struct Parent {
    static Task<void> run(AioContext& to, bool& ended) {
      TaskGroup group;
      group.scope().set_deadline(1'000);
      group.spawn(succeed_at_once());
      co_await move_to(to);
      EXPECT_TRUE(co_await group.join());
      ended = true;
    }
  };
  auto other = AioContext::create(options("other"));
  bool ended = false;
  start(Parent::run(*other, ended));
  poll_some();
  {
    ContextScope scope(*other);
    other->poll(false);
  }
  EXPECT_TRUE(ended);
  poll_some();
}

TEST_P(TaskGroups, RunJoinsThoughItsBodyThrowsBetweenSpawns) {
  struct Parent {
    static Task<void> body(TaskGroup& group, Log& log) {
      group.spawn(until_stopped(group.stop_token(), log));
      throw std::runtime_error("between");
      co_return;
    }
    static Task<void> run(Log& log, std::string& caught) {
      TaskGroup group;
      try {
        (void)co_await group.run(body(group, log));
      } catch (const std::runtime_error& e) {
        caught = e.what();
      }
      EXPECT_EQ(log.frames, 0);
    }
  };
  std::string caught;
  start(Parent::run(log_, caught));
  poll_some();
  EXPECT_EQ(caught, "between");
}

TEST_P(TaskGroups, AnErrorOfTheBodyOfRunStopsTheChildren) {
  struct Parent {
    static Task<Result<void>> body(TaskGroup& group, Log& log) {
      group.spawn(until_stopped(group.stop_token(), log));
      co_return fail(ENOENT, "opening");
    }
    static Task<void> run(Log& log, int& error) {
      TaskGroup group;
      Result<void> result = co_await group.run(body(group, log));
      error = result ? 0 : result.error().code();
    }
  };
  int error = -1;
  start(Parent::run(log_, error));
  poll_some();
  EXPECT_EQ(error, ENOENT);
}

// The stop is requested outside of any coroutine, on the home thread, and all that it stops ends on
// it, the group included.
TEST_P(TaskGroups, AStopThatEndsTheGroupItselfIsSafe) {
  struct Parent {
    static Task<void> run(std::stop_token stop, Log& log, int& error) {
      TaskGroup group({.stop = stop});
      for (int i = 0; i < 5; ++i) group.spawn(until_stopped(group.stop_token(), log));
      Result<void> result = co_await group.join();
      error = result ? 0 : result.error().code();
    }
  };
  std::stop_source stop;
  int error = -1;
  start(Parent::run(stop.get_token(), log_, error));
  poll_some();
  stop.request_stop();
  poll_some();
  EXPECT_EQ(error, ECANCELED);
}

TEST_P(TaskGroupDeathTest, DestroyedWithoutAJoinItAbortsThoughItsChildrenHaveEnded) {
  std::unique_ptr<TaskGroup> group(new TaskGroup({.name = "the copy"}));
  group->spawn(until_stopped(group->stop_token(), log_));
  EXPECT_DEATH(group.reset(),
               "task group 'the copy', made at sync/task_group_test.cc:[0-9]+, "
               "destroyed without join\\(\\), with 1 children running");
  poll_some();
  group->request_stop();
  poll_some();
  EXPECT_EQ(group->children(), 0u);
  EXPECT_DEATH(group.reset(), "destroyed without join\\(\\), with 0 children running");
  joined(*group);
}

TEST_P(TaskGroupDeathTest, AnExceptionThatPassesARunningOneAborts) {
  struct Parent {
    static Task<void> run(Log& log) {
      TaskGroup group;
      group.spawn(until_stopped(group.stop_token(), log));
      throw std::runtime_error("passing");
      co_return;
    }
  };
  EXPECT_DEATH(start(Parent::run(log_)), "destroyed without join");
}

TEST_P(TaskGroupDeathTest, SpawningAfterTheJoinAborts) {
  TaskGroup group;
  joined(group);
  EXPECT_DEATH(
      group.spawn(succeed_at_once()),
      "a task spawned at sync/task_group_test.cc:[0-9]+ in 'task group', which has been joined");
}

TEST_P(TaskGroupDeathTest, JoiningTwiceAborts) {
  TaskGroup group;
  joined(group);
  Outcome outcome;
  EXPECT_DEATH(
      {
        start(join(group, outcome));
        poll_some();
      },
      "task group 'task group' joined twice");
}

TEST_P(TaskGroupDeathTest, SpawningOutsideOfAnyContextAborts) {
  TaskGroup group;
  scope_.reset();
  EXPECT_DEATH(group.spawn(succeed_at_once()), "outside of any context");
  scope_.emplace(context());
}

}  // namespace
}  // namespace roost
