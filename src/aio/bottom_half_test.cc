// SPDX-License-Identifier: MIT
// Bottom halves, on both back ends.
#include "roost/aio/bottom_half.h"

#include <gtest/gtest.h>
#include <time.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "aio/test_loop.h"
#include "roost/aio/timer.h"

namespace roost {
namespace {

class BottomHalves : public StillLoopTest {
 protected:
  // An iteration that makes progress with its entries ends before idle bottom halves run, but after
  // their entries have had their turn.
  void make_idle_ones_wait() {
    schedule_oneshot(context(), [] {});
    EXPECT_TRUE(context().poll(false));
  }
};
ROOST_ON_EACH_LOOP(BottomHalves);

TEST_P(BottomHalves, ScheduledItRunsOnceInTheNextIteration) {
  int runs = 0;
  BottomHalf bh(context(), [&] { ++runs; });
  EXPECT_FALSE(context().poll(false));
  bh.schedule();
  EXPECT_EQ(runs, 0);
  EXPECT_TRUE(context().poll(true));
  EXPECT_EQ(runs, 1);
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(runs, 1);
}

TEST_P(BottomHalves, SchedulesBeforeItsTurnAreCoalesced) {
  int runs = 0;
  BottomHalf bh(context(), [&] { ++runs; });
  for (int i = 0; i < 10; ++i) bh.schedule();
  EXPECT_TRUE(context().poll(false));
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(runs, 1);
}

TEST_P(BottomHalves, TheyRunInTheOrderOfScheduling) {
  std::string order;
  BottomHalf a(context(), [&] { order += 'a'; });
  BottomHalf b(context(), [&] { order += 'b'; });
  BottomHalf c(context(), [&] { order += 'c'; });
  b.schedule();
  c.schedule();
  a.schedule();
  b.schedule();  // coalesced: keeps its place
  poll_some();
  EXPECT_EQ(order, "bca");
}

TEST_P(BottomHalves, RescheduledFromItsCallbackItRunsInTheNextIterationOnly) {
  int runs = 0;
  std::unique_ptr<BottomHalf> bh;
  bh = std::make_unique<BottomHalf>(context(), [&] {
    if (++runs < 5) bh->schedule();
  });
  bh->schedule();
  for (int i = 1; i <= 5; ++i) {
    EXPECT_TRUE(context().poll(true));
    EXPECT_EQ(runs, i);
  }
  EXPECT_FALSE(poll_some());
}

TEST_P(BottomHalves, WhatIsScheduledWhileDispatchingRunsInTheNextIteration) {
  std::string order;
  BottomHalf late(context(), [&] { order += 'l'; });
  BottomHalf early(context(), [&] {
    order += 'e';
    late.schedule();
  });
  BottomHalf middle(context(), [&] { order += 'm'; });
  early.schedule();
  middle.schedule();
  EXPECT_TRUE(context().poll(false));
  EXPECT_EQ(order, "em");
  EXPECT_TRUE(context().poll(false));
  EXPECT_EQ(order, "eml");
}

TEST_P(BottomHalves, ACancelledOneDoesNotRunAndIsNoProgress) {
  BottomHalf bh(context(), [] { FAIL(); });
  bh.schedule();
  bh.cancel();
  EXPECT_FALSE(poll_some());
}

TEST_P(BottomHalves, ACancelledOneCanBeScheduledAgain) {
  int runs = 0;
  BottomHalf bh(context(), [&] { ++runs; });
  bh.schedule();
  bh.cancel();
  bh.schedule();
  poll_some();
  EXPECT_EQ(runs, 1);
}

TEST_P(BottomHalves, OneCancelsAnotherOfTheSameBatch) {
  BottomHalf second(context(), [] { FAIL(); });
  BottomHalf first(context(), [&] { second.cancel(); });
  first.schedule();
  second.schedule();
  poll_some();
}

TEST_P(BottomHalves, OneCancelledWhileIdleDoesNotRun) {
  BottomHalf bh(context(), [] { FAIL(); });
  bh.schedule_idle();
  make_idle_ones_wait();
  bh.cancel();
  poll_some();
}

TEST_P(BottomHalves, DeletedWhileScheduledItDoesNotRun) {
  auto token = std::make_shared<int>(0);
  const std::weak_ptr<int> callback = token;
  auto bh = std::make_unique<BottomHalf>(context(), [token = std::move(token)] { FAIL(); });
  bh->schedule();
  bh.reset();
  EXPECT_FALSE(poll_some());
  EXPECT_TRUE(callback.expired());
}

TEST_P(BottomHalves, DeletedWhileIdleItDoesNotRun) {
  auto token = std::make_shared<int>(0);
  const std::weak_ptr<int> callback = token;
  auto bh = std::make_unique<BottomHalf>(context(), [token = std::move(token)] { FAIL(); });
  bh->schedule_idle();
  make_idle_ones_wait();
  bh.reset();
  poll_some();
  EXPECT_TRUE(callback.expired());
}

TEST_P(BottomHalves, DeletedFromItsOwnCallbackTheCallbackSurvivesUntilItReturns) {
  auto token = std::make_shared<int>(7);
  const std::weak_ptr<int> callback = token;
  std::unique_ptr<BottomHalf> bh;
  int runs = 0;
  bh = std::make_unique<BottomHalf>(context(), [&, token = std::move(token)] {
    ++runs;
    bh.reset();
    EXPECT_EQ(*token, 7);
  });
  bh->schedule();
  EXPECT_TRUE(context().poll(true));
  poll_some();
  EXPECT_EQ(runs, 1);
  EXPECT_TRUE(callback.expired());
}

TEST_P(BottomHalves, RescheduledAndThenDeletedFromItsOwnCallbackItIsGone) {
  std::unique_ptr<BottomHalf> bh;
  int runs = 0;
  bh = std::make_unique<BottomHalf>(context(), [&] {
    ++runs;
    bh->schedule();
    bh.reset();
  });
  bh->schedule();
  poll_some();
  EXPECT_EQ(runs, 1);
}

TEST_P(BottomHalves, DeletedWithinANestedPollOfItsOwnCallbackItSurvivesTheCallback) {
  auto token = std::make_shared<int>(7);
  std::unique_ptr<BottomHalf> bh;
  int runs = 0;
  bh = std::make_unique<BottomHalf>(context(), [&, token = std::move(token)] {
    ++runs;
    bh.reset();
    poll_some();  // the turn of the deleted entry comes here
    if (runs == 1) {
      EXPECT_EQ(*token, 7);
    }
  });
  bh->schedule();
  poll_some();
  EXPECT_EQ(runs, 1);
}

TEST_P(BottomHalves, OneDeletesAnotherOfTheSameBatch) {
  std::unique_ptr<BottomHalf> second = std::make_unique<BottomHalf>(context(), [] { FAIL(); });
  BottomHalf first(context(), [&] { second.reset(); });
  first.schedule();
  second->schedule();
  poll_some();
}

TEST_P(BottomHalves, AnIdleOneIsNoProgress) {
  int runs = 0;
  BottomHalf bh(context(), [&] { ++runs; });
  bh.schedule_idle();
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(runs, 1);
}

TEST_P(BottomHalves, AnIdleOneThatReschedulesItselfDoesNotSpin) {
  int runs = 0;
  std::unique_ptr<BottomHalf> bh;
  bh = std::make_unique<BottomHalf>(context(), [&] {
    ++runs;
    bh->schedule_idle();
  });
  bh->schedule_idle();
  const std::int64_t start = real_clock().now_ns();
  timespec cpu_before, cpu_after;
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &cpu_before);
  while (runs < 5) EXPECT_FALSE(context().poll(true));
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &cpu_after);
  // The first may come at once; the others wait for 10 ms each.
  EXPECT_GE(real_clock().now_ns() - start, 30'000'000);
  const std::int64_t cpu_ns = (cpu_after.tv_sec - cpu_before.tv_sec) * 1'000'000'000 +
                              cpu_after.tv_nsec - cpu_before.tv_nsec;
  EXPECT_LT(cpu_ns, 20'000'000);
  bh.reset();
  poll_some();
}

TEST_P(BottomHalves, AnIdleOneIsNotKeptFromRunningByOtherWork) {
  int idle_runs = 0;
  BottomHalf idle(context(), [&] { ++idle_runs; });
  idle.schedule_idle();
  int others = 0;
  std::function<void()> again = [&] {
    if (++others < 1000) schedule_oneshot(context(), again);
  };
  again();
  while (others < 1000) context().poll(true);
  EXPECT_EQ(idle_runs, 1);
}

TEST_P(BottomHalves, ScheduledWhileItWaitsAsAnIdleOneItRunsWithoutTheWait) {
  int runs = 0;
  BottomHalf bh(context(), [&] { ++runs; });
  int before_wait = 0;
  for (int i = 0; i < 20; ++i) {
    bh.schedule_idle();
    bh.schedule();
    const std::int64_t start = real_clock().now_ns();
    poll_until([&] { return runs > i; });
    before_wait += real_clock().now_ns() - start < 5'000'000;
  }
  EXPECT_GE(before_wait, 18) << "it waited as if it were idle";
}

// While an idle bottom half runs, others whose turn has come stand behind it. A poll from within
// its callback has to see them, or it would sleep for ever.
TEST_P(BottomHalves, ANestedPollInAnIdleOneRunsTheIdleOnesBehindIt) {
  bool second_ran = false;
  BottomHalf first(context(), [&] {
    while (!second_ran) context().poll(true);
  });
  BottomHalf second(context(), [&] { second_ran = true; });
  first.schedule_idle();
  second.schedule_idle();
  poll_until([&] { return second_ran; });
}

TEST_P(BottomHalves, AOneShotRunsOnceAndDestroysItsCallback) {
  auto token = std::make_shared<int>(0);
  const std::weak_ptr<int> callback = token;
  int runs = 0;
  schedule_oneshot(context(), [&, token = std::move(token)] { ++runs; });
  EXPECT_FALSE(callback.expired());
  EXPECT_TRUE(context().poll(true));
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(runs, 1);
  EXPECT_TRUE(callback.expired());
}

TEST_P(BottomHalves, OneShotsKeepTheirOrder) {
  std::vector<int> order;
  for (int i = 0; i < 300; ++i) schedule_oneshot(context(), [&, i] { order.push_back(i); });
  poll_until([&] { return order.size() == 300; });
  for (int i = 0; i < 300; ++i) EXPECT_EQ(order[i], i);
}

TEST_P(BottomHalves, AnIterationRunsAtMostSixtyFourBeforeItServesDescriptors) {
  int runs = 0;
  for (int i = 0; i < 200; ++i) schedule_oneshot(context(), [&] { ++runs; });
  context().poll(false);
  EXPECT_LE(runs, 64);
  EXPECT_GE(runs, 1);
  poll_until([&] { return runs == 200; });
}

TEST_P(BottomHalves, ManyInABatchRunOnceEach) {
  constexpr int kMany = 500;
  std::vector<int> runs(kMany);
  std::vector<std::unique_ptr<BottomHalf>> all;
  for (int i = 0; i < kMany; ++i) {
    all.push_back(std::make_unique<BottomHalf>(context(), [&, i] { ++runs[i]; }));
    all.back()->schedule();
  }
  poll_until([&] { return runs.back() == 1; });
  poll_some();
  EXPECT_EQ(runs, std::vector<int>(kMany, 1));
}

TEST_P(BottomHalves, ANestedPollGoesOnWithTheBatchAndNothingRunsTwice) {
  constexpr int kMany = 20;
  std::vector<int> order;
  bool nested_saw_all = false;
  for (int i = 0; i < kMany; ++i) {
    schedule_oneshot(context(), [&, i] {
      order.push_back(i);
      if (i == 3) {
        while (order.size() < kMany) context().poll(true);
        nested_saw_all = true;
      }
    });
  }
  poll_until([&] { return nested_saw_all; });
  EXPECT_FALSE(poll_some());
  ASSERT_EQ(order.size(), static_cast<std::size_t>(kMany));
  for (int i = 0; i < kMany; ++i) EXPECT_EQ(order[i], i);
}

TEST_P(BottomHalves, ScheduledOnAnotherThreadItWakesASleepingContext) {
  std::atomic<int> runs{0};
  BottomHalf bh(context(), [&] { ++runs; });
  std::thread thread([&] { bh.schedule(); });
  poll_until([&] { return runs == 1; });
  thread.join();
}

TEST_P(BottomHalves, ScheduledCancelledAndDeletedOnAnotherThread) {
  int runs = 0;
  auto cancelled = std::make_unique<BottomHalf>(context(), [&] { FAIL(); });
  auto deleted = std::make_unique<BottomHalf>(context(), [&] { FAIL(); });
  auto kept = std::make_unique<BottomHalf>(context(), [&] { ++runs; });
  std::thread([&] {
    cancelled->schedule();
    cancelled->cancel();
    deleted->schedule();
    deleted.reset();
    kept->schedule();
    kept->schedule();
  }).join();
  poll_some();
  EXPECT_EQ(runs, 1);
}

TEST_P(BottomHalves, TheCallbackSeesWhatACoalescedSchedulerWroteBefore) {
  int value = 0;  // plain: ThreadSanitizer checks the order too
  int seen = 0;
  BottomHalf bh(context(), [&] { seen = value; });
  bh.schedule();
  std::thread([&] {
    value = 5;
    bh.schedule();
  }).join();
  poll_some();
  EXPECT_EQ(seen, 5);
}

TEST_P(BottomHalves, ACallbackRunsOutsideOfAnyCoroutine) {
  Coroutine* self = nullptr;
  bool ran = false;
  const auto body = [&]() -> Task<void> {
    schedule_oneshot(context(), [&] {
      self = Coroutine::self();
      ran = true;
    });
    co_return;
  };
  Coroutine::create(body())->enter();
  poll_until([&] { return ran; });
  EXPECT_EQ(self, nullptr);
}

}  // namespace
}  // namespace roost
