// SPDX-License-Identifier: MIT
// Coroutines: entering, yielding, waking, moving, ending; and the abort of every misuse.
#include "roost/coro/coroutine.h"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "coro/test_context.h"
#include "roost/coro/task.h"

namespace roost {
namespace {

class Coroutines : public testing::Test {
 protected:
  TestContext context_{1, "one"};
  TestContext other_{2, "two"};
  TestScope scope_{context_};
};

TEST_F(Coroutines, ACreatedOneIsIdleAndHasNotRun) {
  bool ran = false;
  const auto body = [&]() -> Task<void> {
    ran = true;
    co_return;
  };
  Coroutine* co = Coroutine::create(body(), "fresh");
  EXPECT_FALSE(ran);
  EXPECT_EQ(co->state(), CoState::kIdle);
  EXPECT_STREQ(co->name(), "fresh");
  EXPECT_EQ(co->home(), &context_);
  co->enter();
  EXPECT_TRUE(ran);
}

TEST_F(Coroutines, EnterRunsUntilTheYieldAndGoesOnThere) {
  std::string order;
  const auto body = [&]() -> Task<void> {
    order += 'a';
    co_await yield();
    order += 'b';
    co_await yield();
    order += 'c';
  };
  Coroutine* co = Coroutine::create(body());
  for (const char* expected : {"a", "ab", "abc"}) {
    co->enter();
    EXPECT_EQ(order, expected);
  }
}

TEST_F(Coroutines, YieldInAChildSuspendsTheWholeAndGoesOnInTheChild) {
  std::string order;
  const auto child = [&]() -> Task<int> {
    order += 'c';
    co_await yield();
    order += 'C';
    co_return 1;
  };
  const auto body = [&]() -> Task<void> {
    order += 'p';
    co_await child();
    order += 'P';
  };
  Coroutine* co = Coroutine::create(body());
  co->enter();
  EXPECT_EQ(order, "pc");
  co->enter();
  EXPECT_EQ(order, "pcCP");
}

TEST_F(Coroutines, SelfIsTheRunningOneAndNullOutside) {
  Coroutine* seen = nullptr;
  const auto body = [&]() -> Task<void> {
    seen = Coroutine::self();
    co_await yield();
  };
  EXPECT_EQ(Coroutine::self(), nullptr);
  Coroutine* co = Coroutine::create(body());
  co->enter();
  EXPECT_EQ(seen, co);
  EXPECT_EQ(Coroutine::self(), nullptr);
  co->enter();
}

TEST_F(Coroutines, AEntersBAndSelfComesBack) {
  std::string order;
  Coroutine* a = nullptr;
  Coroutine* b = nullptr;
  const auto b_body = [&]() -> Task<void> {
    EXPECT_EQ(Coroutine::self(), b);
    order += '1';
    co_await yield();
    EXPECT_EQ(Coroutine::self(), b);
    order += '3';
  };
  const auto a_body = [&]() -> Task<void> {
    b->enter();
    EXPECT_EQ(Coroutine::self(), a);
    order += '2';
    b->enter();
    EXPECT_EQ(Coroutine::self(), a);
    order += '4';
    co_return;
  };
  b = Coroutine::create(b_body(), "b");
  a = Coroutine::create(a_body(), "a");
  a->enter();
  EXPECT_EQ(order, "1234");
}

TEST_F(Coroutines, ThePublishStepRunsAfterTheSuspensionOutsideOfAnyCoroutine) {
  struct Published {
    bool ran = false;
    Coroutine* self = nullptr;
    CoState state = CoState::kRunning;
    Coroutine* argument = nullptr;
  } seen;
  const auto body = [&]() -> Task<void> {
    co_await suspend([s = &seen](Coroutine& co) noexcept {
      *s = {true, Coroutine::self(), co.state(), &co};
    });
  };
  Coroutine* co = Coroutine::create(body());
  co->enter();
  EXPECT_TRUE(seen.ran);
  EXPECT_EQ(seen.self, nullptr);
  EXPECT_EQ(seen.state, CoState::kIdle);
  EXPECT_EQ(seen.argument, co);
  co->enter();
}

TEST_F(Coroutines, WokenBeforeItYieldedThePublishStepMayWakeItsOwnCoroutine) {
  int resumed = 0;
  const auto body = [&]() -> Task<void> {
    for (int i = 0; i < 10; ++i) {
      co_await suspend([](Coroutine& co) noexcept { co_wake(co); });
      ++resumed;
    }
  };
  Coroutine::create(body())->enter();
  EXPECT_EQ(resumed, 10);
}

TEST_F(Coroutines, ThePublishStepMayScheduleEnterOrDestroyItsCoroutine) {
  int steps = 0;
  const auto body = [&]() -> Task<void> {
    co_await suspend([to = &other_](Coroutine& co) noexcept { co_schedule(*to, co); });
    ++steps;
    co_await suspend([](Coroutine& co) noexcept { co.enter(); });
    ++steps;
    co_await suspend([](Coroutine& co) noexcept { Coroutine::destroy(&co); });
    ADD_FAILURE() << "resumed after its destruction";
  };
  Coroutine::create(body())->enter();
  EXPECT_EQ(other_.run(), 1);
  EXPECT_EQ(steps, 2);
}

TEST_F(Coroutines, WakeUpsAreQueuedUntilTheCurrentOneYieldsAndRunInOrder) {
  std::string order;
  std::vector<Coroutine*> sleepers;
  const auto sleeper = [&](char name) -> Task<void> {
    co_await yield();
    order += name;
  };
  for (char name : {'a', 'b', 'c'}) {
    sleepers.push_back(Coroutine::create(sleeper(name)));
    sleepers.back()->enter();
  }
  const auto waker = [&]() -> Task<void> {
    for (Coroutine* co : sleepers) {
      co_wake(*co);
      EXPECT_EQ(co->state(), CoState::kListed);
    }
    order += '|';
    co_await yield();
    order += '!';
  };
  Coroutine* co = Coroutine::create(waker());
  co->enter();
  EXPECT_EQ(order, "|abc");
  co->enter();
  EXPECT_EQ(order, "|abc!");
}

TEST_F(Coroutines, WakeUpsAreRunWhenTheCurrentOneEnds) {
  bool woken = false;
  const auto sleeper = [&]() -> Task<void> {
    co_await yield();
    woken = true;
  };
  Coroutine* co = Coroutine::create(sleeper());
  co->enter();
  const auto waker = [&]() -> Task<void> {
    co_wake(*co);
    EXPECT_FALSE(woken);
    co_return;
  };
  Coroutine::create(waker())->enter();
  EXPECT_TRUE(woken);
}

TEST_F(Coroutines, AWakeOutsideOfADriverEntersAtOnce) {
  bool woken = false;
  const auto body = [&]() -> Task<void> {
    co_await yield();
    woken = true;
  };
  Coroutine* co = Coroutine::create(body());
  co->enter();
  co_wake(*co);
  EXPECT_TRUE(woken);
}

TEST_F(Coroutines, WakeUpsBeyondSixtyFourSpillToTheContextAndKeepTheirOrder) {
  constexpr int kSleepers = 200;
  std::vector<int> order;
  std::vector<Coroutine*> sleepers;
  const auto sleeper = [&](int i) -> Task<void> {
    co_await yield();
    order.push_back(i);
  };
  for (int i = 0; i < kSleepers; ++i) {
    sleepers.push_back(Coroutine::create(sleeper(i)));
    sleepers.back()->enter();
  }
  const auto waker = [&]() -> Task<void> {
    for (Coroutine* co : sleepers) co_wake(*co);
    co_return;
  };
  Coroutine::create(waker())->enter();
  EXPECT_EQ(order.size(), 64u);
  EXPECT_EQ(context_.run(), kSleepers - 64);
  ASSERT_EQ(order.size(), static_cast<std::size_t>(kSleepers));
  for (int i = 0; i < kSleepers; ++i) EXPECT_EQ(order[i], i);
}

TEST_F(Coroutines, TwoThatWakeEachOtherForEverGiveTheContextItsTurn) {
  CoroutineRef pair[2];
  int wakes = 0;
  bool stop = false;
  const auto body = [&](int me) -> Task<void> {
    while (!stop) {
      ++wakes;
      Coroutine* const other = pair[1 - me].get();
      if (other && other->state() == CoState::kIdle) co_wake(*other);
      co_await yield();
    }
  };
  for (int i : {0, 1}) {
    Coroutine* co = Coroutine::create(body(i));
    pair[i] = CoroutineRef(*co);
    co->enter();  // returns, although there is always one to wake
  }
  EXPECT_GT(wakes, 60);
  EXPECT_LT(wakes, 100);
  const int before = wakes;
  EXPECT_EQ(context_.run(), 1);
  EXPECT_GT(wakes, before);
  stop = true;
  context_.run();
  for (const CoroutineRef& ref : pair) {
    if (!ref.ended()) Coroutine::destroy(ref.get());
  }
}

TEST_F(Coroutines, AWaitIsEndedByItsPrimitive) {
  bool woken = false;
  const auto body = [&]() -> Task<void> {
    co_await suspend_waiting("the lock", PublishNothing{});
    woken = true;
  };
  Coroutine* co = Coroutine::create(body());
  co->enter();
  EXPECT_EQ(co->state(), CoState::kWaiting);
  wake_waiter(*co);
  EXPECT_TRUE(woken);
}

TEST_F(Coroutines, ScheduleMovesTheHomeAndWakeBringsItBackThere) {
  std::vector<CoContext*> homes;
  const auto body = [&]() -> Task<void> {
    for (int i = 0; i < 3; ++i) {
      homes.push_back(this_thread().context);
      EXPECT_EQ(Coroutine::self()->home(), this_thread().context);
      co_await yield();
    }
  };
  Coroutine* co = Coroutine::create(body());
  co->enter();
  co_schedule(other_, *co);
  EXPECT_EQ(co->home(), &context_) << "it changes only by running elsewhere";
  EXPECT_EQ(other_.run(), 1);
  EXPECT_EQ(co->home(), &other_);
  co_wake(*co);  // from context one: through the queue of two
  EXPECT_EQ(homes.size(), 2u);
  EXPECT_EQ(other_.run(), 1);
  EXPECT_EQ(homes, (std::vector<CoContext*>{&context_, &other_, &other_}));
  Coroutine::destroy(co);
}

TEST_F(Coroutines, AnEntryCancelsAPendingSchedule) {
  int runs = 0;
  const auto body = [&]() -> Task<void> {
    ++runs;
    co_await yield();
    ++runs;
  };
  Coroutine* co = Coroutine::create(body());
  co_schedule(other_, *co);
  co->enter();
  EXPECT_EQ(runs, 1);
  EXPECT_EQ(other_.run(), 0);
  EXPECT_EQ(runs, 1);
  co->enter();
}

TEST_F(Coroutines, OneMadeOutsideOfAnyContextGetsItsHomeByRunning) {
  Coroutine* co = nullptr;
  const auto body = []() -> Task<void> { co_return; };
  std::thread([&] { co = Coroutine::create(body()); }).join();
  EXPECT_EQ(co->home(), nullptr);
  co_schedule(other_, *co);
  EXPECT_EQ(other_.run(), 1);
}

struct Witness {
  explicit Witness(int& count) : alive(&count) { ++*alive; }
  Witness(const Witness&) = delete;
  Witness& operator=(const Witness&) = delete;
  ~Witness() { --*alive; }
  int* alive;
};

TEST_F(Coroutines, DestroyingAYieldedOneDestroysTheLocalsOfAllItsFrames) {
  int alive = 0;
  const auto child = [&]() -> Task<int> {
    const Witness local(alive);
    co_await yield();
    co_return 1;
  };
  const auto body = [&]() -> Task<void> {
    const Witness local(alive);
    co_await child();
  };
  Coroutine* co = Coroutine::create(body());
  co->enter();
  EXPECT_EQ(alive, 2);
  Coroutine::destroy(co);
  EXPECT_EQ(alive, 0);
}

TEST_F(Coroutines, DestroyingOneThatNeverRanDestroysItsArguments) {
  const auto shared = std::make_shared<int>(1);
  const auto body = [](std::shared_ptr<int>) -> Task<void> { co_return; };
  Coroutine* co = Coroutine::create(body(shared));
  EXPECT_EQ(shared.use_count(), 2);
  Coroutine::destroy(co);
  EXPECT_EQ(shared.use_count(), 1);
}

TEST_F(Coroutines, DestroyedWithStaleEntriesQueuedTheyAreDroppedLater) {
  const auto body = []() -> Task<void> { co_await yield(); };
  Coroutine* co = Coroutine::create(body());
  co_schedule(other_, *co);
  co->enter();
  Coroutine::destroy(co);
  EXPECT_EQ(other_.run(), 0);
}

// ---- CoroutineRef

TEST_F(Coroutines, TryEnterWinsOnIdleAndScheduledOnes) {
  int steps = 0;
  const auto body = [&]() -> Task<void> {
    for (;;) {
      ++steps;
      co_await yield();
    }
  };
  Coroutine* co = Coroutine::create(body());
  CoroutineRef ref(*co);
  EXPECT_TRUE(ref.try_enter());
  co_schedule(other_, *co);
  EXPECT_TRUE(ref.try_enter());
  EXPECT_EQ(steps, 2);
  EXPECT_EQ(other_.run(), 0);
  EXPECT_FALSE(ref.ended());
  Coroutine::destroy(co);
  EXPECT_TRUE(ref.ended());
}

TEST_F(Coroutines, TryEnterLosesOnRunningListedWaitingAndEndedOnes) {
  CoroutineRef ref;
  const auto body = [&]() -> Task<void> {
    EXPECT_FALSE(ref.try_enter()) << "running";
    co_await suspend_waiting("something", PublishNothing{});
    co_await yield();
  };
  Coroutine* co = Coroutine::create(body());
  ref = CoroutineRef(*co);
  co->enter();
  EXPECT_FALSE(ref.try_enter()) << "waiting";
  {
    TestScope elsewhere(other_);
    wake_waiter(*co);
  }
  EXPECT_FALSE(ref.try_enter()) << "the wake-up belongs to the primitive";
  EXPECT_EQ(context_.run(), 1);
  const auto waker = [&]() -> Task<void> {
    co_wake(*co);
    EXPECT_FALSE(ref.try_enter()) << "listed";
    co_return;
  };
  Coroutine::create(waker())->enter();
  EXPECT_TRUE(ref.ended());
  EXPECT_FALSE(ref.try_enter()) << "ended";
  const CoroutineRef copy = ref;
  ref = CoroutineRef();
  EXPECT_TRUE(copy.ended());
}

// ---- Misuse

using CoroutinesDeathTest = Coroutines;

// Each message names the coroutine and both places.
#define BOTH_PLACES "at coro/coroutine_test.cc:[0-9]+: it is .* by coro/coroutine_test.cc:[0-9]+"

Task<void> yields() {
  for (;;) co_await yield();
}
Task<void> waits() { co_await suspend_waiting("the moon", PublishNothing{}); }

TEST_F(CoroutinesDeathTest, SchedulingTwice) {
  Coroutine* co = Coroutine::create(yields(), "eager");
  co_schedule(other_, *co);
  EXPECT_DEATH(co_schedule(context_, *co), "co_schedule of coroutine 'eager' .*" BOTH_PLACES);
  EXPECT_DEATH(co_schedule(context_, *co), "it is scheduled, on context 2");
  EXPECT_DEATH(co_wake(*co), "co_wake of coroutine 'eager' .*" BOTH_PLACES);
  other_.run();
  Coroutine::destroy(co);
}

TEST_F(CoroutinesDeathTest, EnteringARunningOne) {
  const auto body = []() -> Task<void> {
    EXPECT_DEATH(Coroutine::self()->enter(), "enter of coroutine 'narcissus' .*" BOTH_PLACES);
    EXPECT_DEATH(co_wake(*Coroutine::self()), "co_wake of coroutine 'narcissus' .*it is running");
    EXPECT_DEATH(Coroutine::destroy(Coroutine::self()), "destroy of coroutine 'narcissus'");
    co_return;
  };
  Coroutine::create(body(), "narcissus")->enter();
}

TEST_F(CoroutinesDeathTest, WakingAListedOneAgain) {
  Coroutine* co = Coroutine::create(yields(), "sleepy");
  co->enter();
  const auto body = [&]() -> Task<void> {
    co_wake(*co);
    EXPECT_DEATH(co_wake(*co), "co_wake of coroutine 'sleepy' .*about to be woken");
    EXPECT_DEATH(co_wake(*co), BOTH_PLACES);
    co_return;
  };
  Coroutine::create(body())->enter();
  Coroutine::destroy(co);
}

TEST_F(CoroutinesDeathTest, EndingTheWaitOfAPrimitive) {
  Coroutine* co = Coroutine::create(waits(), "patient");
  co->enter();
  EXPECT_DEATH(co_wake(*co), "co_wake of coroutine 'patient' .*it is waiting for the moon");
  EXPECT_DEATH(co_schedule(other_, *co), "co_schedule of coroutine 'patient' .*" BOTH_PLACES);
  EXPECT_DEATH(co->enter(), "enter of coroutine 'patient' .*waiting for the moon");
  EXPECT_DEATH(Coroutine::destroy(co), "destroy of coroutine 'patient' .*waiting for the moon");
  wake_waiter(*co);
}

TEST_F(CoroutinesDeathTest, ThePrimitiveWakesOneThatDoesNotWait) {
  Coroutine* co = Coroutine::create(yields(), "idler");
  co->enter();
  EXPECT_DEATH(wake_waiter(*co), "wake-up of the waiting of coroutine 'idler' .*" BOTH_PLACES);
  Coroutine::destroy(co);
}

TEST_F(CoroutinesDeathTest, EnteringOneWhoseWakeUpBelongsToAPrimitive) {
  Coroutine* co = Coroutine::create(waits(), "patient");
  co->enter();
  {
    TestScope elsewhere(other_);
    wake_waiter(*co);
  }
  EXPECT_DEATH(co->enter(), "enter of coroutine 'patient' .*it is scheduled for the moon");
  context_.run();
}

TEST_F(CoroutinesDeathTest, EnteringOutsideOfAnyContext) {
  Coroutine* co = Coroutine::create(yields(), "homeless");
  EXPECT_DEATH(
      {
        this_thread().context = nullptr;
        co->enter();
      },
      "enter of coroutine 'homeless' at coro/coroutine_test.cc:[0-9]+ outside of any context");
  Coroutine::destroy(co);
}

TEST_F(CoroutinesDeathTest, WakingOneWithoutAHome) {
  Coroutine* co = nullptr;
  std::thread([&] { co = Coroutine::create(yields(), "unborn"); }).join();
  EXPECT_DEATH(co_wake(*co), "co_wake of coroutine 'unborn' at .*: it has no home yet");
  Coroutine::destroy(co);
}

TEST_F(CoroutinesDeathTest, AnExceptionLeavingARoot) {
  const auto body = [](bool standard) -> Task<void> {
    if (standard) throw std::runtime_error("out of luck");
    throw 5;
    co_return;
  };
  EXPECT_DEATH(Coroutine::create(body(true), "thrower")->enter(),
               "coroutine 'thrower' ended with an exception: out of luck");
  EXPECT_DEATH(Coroutine::create(body(false), "thrower")->enter(), "of unknown type");
}

TEST_F(CoroutinesDeathTest, SchedulingOnAClosedContext) {
  Coroutine* co = Coroutine::create(yields(), "late");
  other_.close();
  EXPECT_DEATH(co_schedule(other_, *co),
               "coroutine 'late' scheduled on the closed context 'two' by "
               "coro/coroutine_test.cc:[0-9]+");
  Coroutine::destroy(co);
}

TEST_F(CoroutinesDeathTest, ATaskThatWasMovedFrom) {
  EXPECT_DEATH(Coroutine::create(Task<void>(), "hollow"),
               "coroutine 'hollow' made of a task that was moved from");
}

}  // namespace
}  // namespace roost
