// SPDX-License-Identifier: MIT
// Timers, on both back ends; mostly on a clock that the test owns.
#include "roost/aio/timer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "aio/test_loop.h"
#include "base/test_build.h"
#include "roost/aio/bottom_half.h"

namespace roost {
namespace {

class Timers : public StillLoopTest {};
ROOST_ON_EACH_LOOP(Timers);

TEST_P(Timers, FiresAtItsDeadlineAndNotBefore) {
  int fired = 0;
  Timer timer(context(), [&] { ++fired; });
  EXPECT_FALSE(timer.armed());
  timer.arm_after(100);
  EXPECT_TRUE(timer.armed());
  clock_.advance_ns(99);
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(fired, 0);
  clock_.advance_ns(1);
  EXPECT_TRUE(poll_some());
  EXPECT_EQ(fired, 1);
  EXPECT_FALSE(timer.armed());
  clock_.advance_ns(1000);
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(fired, 1);
}

TEST_P(Timers, FireInTheOrderOfTheirDeadlinesAndEqualOnesInTheOrderOfArming) {
  std::string order;
  std::vector<std::unique_ptr<Timer>> timers;
  for (char name : std::string("abcdef")) {
    timers.push_back(std::make_unique<Timer>(context(), [&, name] { order += name; }));
  }
  timers[3]->arm_at(10);
  timers[0]->arm_at(30);
  timers[5]->arm_at(20);
  timers[1]->arm_at(30);
  timers[4]->arm_at(20);
  timers[2]->arm_at(10);
  clock_.advance_ns(30);
  poll_some();
  EXPECT_EQ(order, "dcfeab");
}

TEST_P(Timers, ArmingAgainReplacesTheDeadline) {
  int fired = 0;
  Timer timer(context(), [&] { ++fired; });
  timer.arm_at(10);
  timer.arm_at(50);
  clock_.advance_ns(40);
  EXPECT_FALSE(poll_some());
  timer.arm_at(20);
  EXPECT_TRUE(poll_some());
  clock_.advance_ns(100);
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(fired, 1);
}

TEST_P(Timers, ACancelledOneDoesNotFire) {
  Timer timer(context(), [] { FAIL(); });
  timer.arm_at(10);
  timer.cancel();
  EXPECT_FALSE(timer.armed());
  timer.cancel();
  clock_.advance_ns(100);
  EXPECT_FALSE(poll_some());
}

TEST_P(Timers, ADestroyedOneDoesNotFire) {
  auto timer = std::make_unique<Timer>(context(), [] { FAIL(); });
  timer->arm_at(10);
  timer.reset();
  clock_.advance_ns(100);
  EXPECT_FALSE(poll_some());
}

TEST_P(Timers, OneDestroyedInItsOwnCallbackKeepsTheCallbackUntilItReturns) {
  auto token = std::make_shared<int>(3);
  const std::weak_ptr<int> callback = token;
  std::unique_ptr<Timer> timer;
  timer = std::make_unique<Timer>(context(), [&, token = std::move(token)] {
    timer.reset();
    EXPECT_EQ(*token, 3);
  });
  timer->arm_at(0);
  EXPECT_TRUE(poll_some());
  EXPECT_TRUE(callback.expired());
}

TEST_P(Timers, OneCancelsAnotherThatIsDueInTheSameIteration) {
  Timer second(context(), [] { FAIL(); });
  Timer first(context(), [&] { second.cancel(); });
  first.arm_at(1);
  second.arm_at(2);
  clock_.advance_ns(5);
  EXPECT_TRUE(poll_some());
}

TEST_P(Timers, ArmedAgainFromItsCallbackItFiresOncePerIteration) {
  int fired = 0;
  std::unique_ptr<Timer> timer;
  timer = std::make_unique<Timer>(context(), [&] {
    if (++fired < 5) timer->arm_at(0);  // a moment that has passed
  });
  timer->arm_at(0);
  for (int i = 1; i <= 5; ++i) {
    EXPECT_TRUE(context().poll(true));
    EXPECT_EQ(fired, i);
  }
  EXPECT_FALSE(poll_some());
}

TEST_P(Timers, OneArmedForThePastByAnotherDoesNotDelayTheRest) {
  std::string order;
  Timer past(context(), [&] { order += 'p'; });
  Timer second(context(), [&] { order += '2'; });
  Timer first(context(), [&] {
    order += '1';
    past.arm_at(0);
  });
  first.arm_at(5);
  second.arm_at(6);
  clock_.advance_ns(10);
  EXPECT_TRUE(context().poll(true));
  EXPECT_TRUE(context().poll(order.size() < 3));
  EXPECT_EQ(order.size(), 3u) << order;
}

TEST_P(Timers, OneThatArmsItselfForThePastForEverDoesNotKeepTheRestFromFiring) {
  std::string order;
  std::unique_ptr<Timer> past;
  past = std::make_unique<Timer>(context(), [&] {
    order += 'p';
    past->arm_at(clock_.now_ns() - 100);
  });
  Timer first(context(), [&] { order += '1'; });
  Timer second(context(), [&] { order += '2'; });
  past->arm_at(0);
  first.arm_at(5);
  second.arm_at(20);
  clock_.advance_ns(10);
  context().poll(true);
  context().poll(true);
  EXPECT_NE(order.find('1'), std::string::npos) << order;
  clock_.advance_ns(10);
  context().poll(true);
  context().poll(true);
  EXPECT_NE(order.find('2'), std::string::npos) << order;
  EXPECT_EQ(std::ranges::count(order, 'p'), 4) << order;
}

TEST_P(Timers, ADelayBeyondWhatTheClockCanShowIsForEver) {
  clock_.advance_ns(1000);
  Timer timer(context(), [] { FAIL(); });
  timer.arm_after(INT64_MAX);
  EXPECT_FALSE(context().poll(false));
  EXPECT_TRUE(timer.armed());
}

TEST_P(Timers, ABlockingPollWithADueTimerDoesNotWait) {
  bool fired = false;
  Timer timer(context(), [&] { fired = true; });
  timer.arm_at(-5);
  EXPECT_TRUE(context().poll(true));
  EXPECT_TRUE(fired);
}

TEST_P(Timers, ANestedPollFromACallbackFiresTheOthersThatAreDue) {
  std::string order;
  Timer first(context(), [&] {
    order += '1';
    while (order.size() < 3) context().poll(true);
    order += '!';
  });
  Timer second(context(), [&] { order += '2'; });
  Timer third(context(), [&] { order += '3'; });
  first.arm_at(1);
  second.arm_at(2);
  third.arm_at(3);
  clock_.advance_ns(10);
  poll_until([&] { return order.size() == 4; });
  EXPECT_EQ(order, "123!");
}

TEST_P(Timers, AThousandRandomOnesFireInOrder) {
  constexpr std::uint64_t kSeed = 7;
  RecordProperty("seed", static_cast<int>(kSeed));
  TestRandom random(kSeed);
  std::vector<std::int64_t> fired;
  std::vector<std::int64_t> expected;
  std::vector<std::unique_ptr<Timer>> timers;
  std::vector<std::int64_t> deadlines(1000);
  for (auto& deadline : deadlines) {
    timers.push_back(
        std::make_unique<Timer>(context(), [&fired, &deadline] { fired.push_back(deadline); }));
  }
  for (int change = 0; change < 4000; ++change) {
    const auto i = random.below(1000);
    if (random.below(4) == 0) {
      timers[i]->cancel();
    } else {
      deadlines[i] = random.below(500);
      timers[i]->arm_at(deadlines[i]);
    }
  }
  for (int i = 0; i < 1000; ++i) {
    if (timers[i]->armed()) expected.push_back(deadlines[i]);
  }
  std::ranges::sort(expected);
  ASSERT_GT(expected.size(), 500u);
  while (clock_.now_ns() < 500) {
    clock_.advance_ns(7);
    poll_some(2);
    for (const auto& timer : timers) {
      EXPECT_FALSE(timer->armed() && deadlines[&timer - timers.data()] <= clock_.now_ns());
    }
  }
  EXPECT_EQ(fired, expected);
}

TEST_P(Timers, SleepForWakesTheCoroutineAtItsDeadline) {
  int woken = 0;
  const auto body = [&](std::int64_t delay) -> Task<void> {
    co_await sleep_for(delay);
    ++woken;
  };
  Coroutine::create(body(50))->enter();
  Coroutine::create(body(70))->enter();
  Coroutine::create(body(0))->enter();
  EXPECT_EQ(woken, 1);
  clock_.advance_ns(49);
  poll_some();
  EXPECT_EQ(woken, 1);
  clock_.advance_ns(1);
  poll_some();
  EXPECT_EQ(woken, 2);
  clock_.advance_ns(20);
  poll_some();
  EXPECT_EQ(woken, 3);
}

class RealTimers : public LoopTest {};
ROOST_ON_EACH_LOOP(RealTimers);

TEST_P(RealTimers, ABlockingPollWakesForATimer) {
  bool fired = false;
  Timer timer(context(), [&] { fired = true; });
  const std::int64_t start = real_clock().now_ns();
  timer.arm_after(3'000'000);
  poll_until([&] { return fired; });
  EXPECT_GE(real_clock().now_ns() - start, 3'000'000);
}

TEST_P(RealTimers, ANearerTimerShortensTheWait) {
  bool fired = false;
  Timer far(context(), [&] { ADD_FAILURE(); });
  Timer near(context(), [&] { fired = true; });
  far.arm_after(60'000'000'000);
  near.arm_after(1'000'000);
  poll_until([&] { return fired; });
  far.cancel();
}

TEST_P(RealTimers, WithoutProgressThereAreFewIterationsUntilATimerFires) {
  bool fired = false;
  Timer timer(context(), [&] { fired = true; });
  timer.arm_after(20'000'000);
  int iterations = 0;
  while (!fired) {
    context().poll(true);
    ++iterations;
  }
  EXPECT_LE(iterations, 5);
}

TEST_P(RealTimers, ACoroutineThatAnExpiringTimerWakesMayArmOthers) {
  int steps = 0;
  const auto body = [&]() -> Task<void> {
    for (int i = 0; i < 20; ++i) {
      co_await sleep_for(100'000);
      ++steps;
    }
  };
  Coroutine::create(body())->enter();
  poll_until([&] { return steps == 20; });
}

}  // namespace
}  // namespace roost
