// SPDX-License-Identifier: MIT
#include "roost/sync/stop_scope.h"

#include <gtest/gtest.h>

#include <memory>
#include <thread>

#include "sync/test_tasks.h"

namespace roost {
namespace {

using Reason = StopScope::Reason;

class StopScopes : public StructuredTest {
 protected:
  static Task<void> timed(std::int64_t deadline_ns, StopScope& scope, Task<Result<void>> task,
                          int& error) {
    Result<void> result = co_await with_deadline(deadline_ns, scope, std::move(task));
    error = result ? 0 : result.error().code();
  }
  Log log_;
  int error_ = -1;
};
ROOST_ON_EACH_LOOP(StopScopes);
using StopScopeDeathTest = StopScopes;
ROOST_ON_EACH_LOOP(StopScopeDeathTest);

TEST_P(StopScopes, ARequestStopsItOnce) {
  StopScope scope;
  EXPECT_FALSE(scope.stopped());
  EXPECT_FALSE(scope.token().stop_requested());
  scope.request_stop();
  EXPECT_EQ(scope.reason(), Reason::kRequested);
  EXPECT_TRUE(scope.token().stop_requested());
}

TEST_P(StopScopes, TheParentStopsItButItDoesNotStopTheParent) {
  std::stop_source parent;
  StopScope first(parent.get_token());
  StopScope second(parent.get_token());
  first.request_stop();
  EXPECT_FALSE(parent.stop_requested());
  parent.request_stop();
  EXPECT_EQ(first.reason(), Reason::kRequested);
  EXPECT_EQ(second.reason(), Reason::kParent);
  StopScope late(parent.get_token());
  EXPECT_EQ(late.reason(), Reason::kParent);
}

TEST_P(StopScopes, TheDeadlineStopsItOnTheClockOfTheContext) {
  StopScope scope;
  scope.set_deadline(1'000);
  clock_.advance_ns(999);
  poll_some();
  EXPECT_FALSE(scope.stopped());
  clock_.advance_ns(1);
  poll_some();
  EXPECT_EQ(scope.reason(), Reason::kDeadline);
}

TEST_P(StopScopes, AClearedDeadlineDoesNotStopIt) {
  StopScope scope;
  scope.set_deadline(1'000);
  scope.clear_deadline();
  clock_.advance_ns(2'000);
  poll_some();
  EXPECT_FALSE(scope.stopped());
  scope.set_deadline(3'000);
  clock_.advance_ns(1'000);
  poll_some();
  EXPECT_TRUE(scope.stopped());
}

TEST_P(StopScopes, ADeadlineThatHasPassedStopsItAtOnce) {
  clock_.advance_ns(10);
  StopScope scope;
  scope.set_deadline(10);
  EXPECT_EQ(scope.reason(), Reason::kDeadline);
}

TEST_P(StopScopes, ItMayBeDestroyedByWhatItStops) {
  auto scope = std::make_unique<StopScope>();
  int calls = 0;
  const auto destroy = [&] {
    ++calls;
    scope.reset();
  };
  const auto count = [&] { ++calls; };
  std::stop_callback second(scope->token(), count);
  std::stop_callback first(scope->token(), destroy);
  scope->request_stop();
  EXPECT_EQ(calls, 2);
}

TEST_P(StopScopes, ItMayBeDestroyedByWhatItsDeadlineStops) {
  auto scope = std::make_unique<StopScope>();
  const auto destroy = [&] { scope.reset(); };
  std::stop_callback callback(scope->token(), destroy);
  scope->set_deadline(1);
  clock_.advance_ns(1);
  poll_some();
  EXPECT_FALSE(scope);
}

TEST_P(StopScopes, WithDeadlineGivesETIMEDOUTWhereTheDeadlineStoppedTheTask) {
  StopScope scope;
  start(timed(1'000, scope, until_stopped(scope.token(), log_), error_));
  poll_some();
  EXPECT_EQ(log_.ended, 0);
  clock_.advance_ns(1'000);
  poll_some();
  EXPECT_EQ(error_, ETIMEDOUT);
  EXPECT_EQ(log_.stopped, 1);
}

TEST_P(StopScopes, WithDeadlineGivesECANCELEDWhereTheParentStoppedTheTask) {
  std::stop_source parent;
  StopScope scope(parent.get_token());
  start(timed(1'000, scope, until_stopped(scope.token(), log_), error_));
  std::thread([&] { parent.request_stop(); }).join();
  poll_some();
  EXPECT_EQ(error_, ECANCELED);
}

TEST_P(StopScopes, WithDeadlineGivesTheResultOfATaskThatIsInTime) {
  StopScope scope;
  start(timed(1'000, scope, fail_at_once(EIO), error_));
  EXPECT_EQ(error_, EIO);
  clock_.advance_ns(5'000);
  poll_some();
  EXPECT_FALSE(scope.stopped());
}

TEST_P(StopScopes, WithDeadlineAwaitsATaskThatDoesNotHeedIt) {
  StopScope scope;
  Completion<> go("a stubborn operation");
  auto token = go.token();
  start(timed(1'000, scope, until_fired(go, log_), error_));
  clock_.advance_ns(1'000);
  poll_some();
  EXPECT_TRUE(scope.stopped());
  EXPECT_EQ(error_, -1);
  token.fire();
  poll_some();
  EXPECT_EQ(error_, 0);
}

TEST_P(StopScopes, AnExceptionClearsTheDeadline) {
  struct Thrower {
    static Task<Result<void>> fail() {
      throw std::runtime_error("broken");
      co_return Result<void>();
    }
    static Task<void> run(StopScope& scope, bool& caught) {
      try {
        (void)co_await with_deadline(1'000, scope, fail());
      } catch (const std::runtime_error&) {
        caught = true;
      }
    }
  };
  StopScope scope;
  bool caught = false;
  start(Thrower::run(scope, caught));
  EXPECT_TRUE(caught);
  clock_.advance_ns(5'000);
  poll_some();
  EXPECT_FALSE(scope.stopped());
}

// The deadline's timer stays where it was set: it is cleared from where the task ended.
TEST_P(StopScopes, ATaskUnderADeadlineMayEndElsewhere) {
  struct Wanderer {
    static Task<Result<void>> go(AioContext& to) {
      co_await move_to(to);
      co_return Result<void>();
    }
  };
  auto other = AioContext::create(options("other"));
  StopScope scope;
  start(timed(1'000, scope, Wanderer::go(*other), error_));
  {
    ContextScope there(*other);
    other->poll(false);
    EXPECT_EQ(error_, 0);
  }
  // The time comes, and in the same iteration the message that clears the deadline, which goes
  // first.
  clock_.advance_ns(5'000);
  poll_some();
  EXPECT_FALSE(scope.stopped());
  scope.set_deadline(6'000);  // there is none any more
}

TEST_P(StopScopes, AScopeMayBeDestroyedWhereItsDeadlineWasNotSet) {
  auto scope = std::make_unique<StopScope>();
  scope->set_deadline(1'000);
  const std::stop_token token = scope->token();
  std::thread([&] { scope.reset(); }).join();
  // Heard of at once, not only when the time has come.
  EXPECT_FALSE(context().timers().empty());
  poll_some();
  EXPECT_TRUE(context().timers().empty());
  EXPECT_FALSE(token.stop_requested());
}

TEST_P(StopScopeDeathTest, ASecondDeadlineAborts) {
  StopScope scope;
  scope.set_deadline(1'000);
  EXPECT_DEATH(scope.set_deadline(2'000), "a second deadline set on a StopScope");
}

}  // namespace
}  // namespace roost
