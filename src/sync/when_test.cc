// SPDX-License-Identifier: MIT
#include "roost/sync/when.h"

#include <gtest/gtest.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <variant>
#include <vector>

#include "sync/test_tasks.h"

namespace roost {
namespace {

Task<int> number(int value) { co_return value; }
Task<Result<int>> number_or_error(int value) { co_return value; }
Task<std::unique_ptr<std::string>> word(std::string value) {
  co_return std::make_unique<std::string>(std::move(value));
}
Task<Result<int>> refuse(int code) { co_return fail(code, "refusing"); }
Task<void> nothing() { co_return; }
Task<int> blow_up() {
  throw std::runtime_error("broken");
  co_return 0;
}
Task<Result<int>> number_until_stopped(std::stop_token stop, Log& log) {
  Result<void> result = co_await until_stopped(stop, log);
  if (!result) co_return std::unexpected(result.error());
  co_return 0;
}

class When : public StructuredTest {
 protected:
  /// Runs `task` to its end.
  void run(Task<void> task) {
    bool ended = false;
    start(note_end(std::move(task), ended));
    poll_some();
    EXPECT_TRUE(ended);
  }
  static Task<void> note_end(Task<void> task, bool& ended) {
    co_await std::move(task);
    ended = true;
  }
  Log log_;
};
ROOST_ON_EACH_LOOP(When);
using WhenDeathTest = When;
ROOST_ON_EACH_LOOP(WhenDeathTest);

TEST_P(When, AllGivesTheValuesOfDifferentTasksInTheirOrder) {
  struct Body {
    static Task<void> run() {
      auto [a, b, c] = co_await when_all(number(1), word("two"), nothing());
      static_assert(std::is_same_v<decltype(c), std::monostate>);
      EXPECT_EQ(a, 1);
      EXPECT_EQ(*b, "two");
    }
  };
  run(Body::run());
}

TEST_P(When, AllGivesTheValuesOfAVectorInItsOrder) {
  struct Body {
    static Task<void> run() {
      std::vector<Task<int>> tasks;
      for (int i = 0; i < 100; ++i) tasks.push_back(number(i));
      const std::vector<int> values = co_await when_all(std::move(tasks));
      EXPECT_EQ(values.size(), 100u);
      for (int i = 0; i < 100; ++i) EXPECT_EQ(values[i], i);
    }
  };
  run(Body::run());
}

TEST_P(When, AllOfNoTasksIsNothing) {
  struct Body {
    static Task<void> run() {
      EXPECT_TRUE((co_await when_all(std::vector<Task<int>>())).empty());
      co_await when_all(std::vector<Task<void>>());
    }
  };
  run(Body::run());
}

TEST_P(When, AllRunAtTheSameTime) {
  struct Body {
    static Task<void> run(Completion<int>& a, Completion<int>& b, Log& log, int& sum) {
      auto both = co_await when_all(until_fired(a, log), until_fired(b, log));
      sum = std::get<0>(*both) + std::get<1>(*both);
    }
  };
  Completion<int> a, b;
  auto a_token = a.token();
  auto b_token = b.token();
  int sum = 0;
  start(Body::run(a, b, log_, sum));
  poll_some();
  EXPECT_EQ(log_.most, 2);
  b_token.fire(20);
  poll_some();
  EXPECT_EQ(sum, 0);
  a_token.fire(1);
  poll_some();
  EXPECT_EQ(sum, 21);
}

TEST_P(When, AllStopsTheOthersAtTheFirstErrorAwaitsThemAndGivesIt) {
  struct Body {
    static Task<void> run(Log& log) {
      StopScope scope;
      auto result = co_await when_all(scope, number_until_stopped(scope.token(), log),
                                      refuse(ENOENT), word("lost"));
      EXPECT_EQ(result.error().code(), ENOENT);
      EXPECT_EQ(log.frames, 0);
      EXPECT_EQ(log.stopped, 1);
      StopScope again;
      std::vector<Task<Result<int>>> tasks;
      tasks.push_back(number_until_stopped(again.token(), log));
      tasks.push_back(refuse(EIO));
      auto results = co_await when_all(again, std::move(tasks));
      EXPECT_EQ(results.error().code(), EIO);
      EXPECT_EQ(log.stopped, 2);
    }
  };
  run(Body::run(log_));
}

TEST_P(When, AllRethrowsTheFirstExceptionAfterTheOthersHaveEnded) {
  struct Body {
    static Task<void> run(Log& log, std::string& caught) {
      StopScope scope;
      try {
        (void)co_await when_all(scope, blow_up(), number_until_stopped(scope.token(), log));
      } catch (const std::runtime_error& e) {
        caught = e.what();
      }
      EXPECT_EQ(log.stopped, 1);
      EXPECT_EQ(log.frames, 0);
    }
  };
  std::string caught;
  run(Body::run(log_, caught));
  EXPECT_EQ(caught, "broken");
}

TEST_P(When, AllSucceedsWithoutValuesWhereTheTasksHaveNone) {
  struct Body {
    static Task<void> run() {
      co_await when_all(nothing(), nothing());
      Result<void> mixed = co_await when_all(nothing(), succeed_at_once());
      EXPECT_TRUE(mixed);
      std::vector<Task<Result<void>>> tasks;
      tasks.push_back(succeed_at_once());
      tasks.push_back(fail_at_once(EIO));
      Result<void> failed = co_await when_all(std::move(tasks));
      EXPECT_EQ(failed.error().code(), EIO);
      auto numbers = co_await when_all(number_or_error(3), number(4));
      EXPECT_EQ(*numbers, std::tuple(3, 4));
    }
  };
  run(Body::run());
}

TEST_P(When, AnyGivesTheFirstResultAndReturnsAfterTheOthersWereStoppedAndHaveEnded) {
  struct Body {
    static Task<void> run(Log& log) {
      StopScope scope;
      auto first = co_await when_any(scope, until_stopped(scope.token(), log), word("first"),
                                     number_until_stopped(scope.token(), log));
      EXPECT_EQ(first.index(), 1u);
      EXPECT_EQ(*std::get<1>(first), "first");
      EXPECT_EQ(log.stopped, 2);
      EXPECT_EQ(log.frames, 0);
    }
  };
  run(Body::run(log_));
}

TEST_P(When, AnyOfAVectorSaysWhichOneItWas) {
  struct Body {
    static Task<void> run(Log& log) {
      StopScope scope;
      std::vector<Task<Result<int>>> tasks;
      tasks.push_back(number_until_stopped(scope.token(), log));
      tasks.push_back(number_until_stopped(scope.token(), log));
      tasks.push_back(number_or_error(7));
      auto first = co_await when_any(scope, std::move(tasks));
      EXPECT_EQ(first.index(), 2u);
      EXPECT_EQ(first.value(), 7);
      EXPECT_EQ(log.stopped, 2);
      StopScope again;
      std::vector<Task<void>> plain;
      plain.push_back(nothing());
      plain.push_back(nothing());
      EXPECT_EQ((co_await when_any(again, std::move(plain))).index(), 0u);
    }
  };
  run(Body::run(log_));
}

struct NoDefault {
  explicit NoDefault(int v) : value(v) {}
  int value;
};
Task<NoDefault> no_default(int value) { co_return NoDefault(value); }
static_assert(!std::is_default_constructible_v<NoDefault>);

TEST_P(When, AValueNeedsNoDefaultConstructor) {
  struct Body {
    static Task<void> run() {
      StopScope scope;
      std::vector<Task<NoDefault>> tasks;
      tasks.push_back(no_default(8));
      auto first = co_await when_any(scope, std::move(tasks));
      EXPECT_EQ(first.value().value, 8);
      StopScope again;
      auto other = co_await when_any(again, no_default(9), nothing());
      EXPECT_EQ(std::get<0>(other).value, 9);
      std::vector<Task<NoDefault>> all;
      all.push_back(no_default(10));
      EXPECT_EQ((co_await when_all(std::move(all))).front().value, 10);
      EXPECT_EQ(std::get<0>(co_await when_all(no_default(11), nothing())).value, 11);
    }
  };
  run(Body::run());
}

// Throws at the move that brings `moves_left` to 0.
struct Fragile {
  explicit Fragile(int* left) : moves_left(left) {}
  Fragile(Fragile&& other) : moves_left(other.moves_left) {
    if (--*moves_left == 0) throw std::runtime_error("broken on the way");
  }
  int* moves_left;
};
Task<Fragile> fragile(int* moves_left) { co_return Fragile(moves_left); }

TEST_P(When, AWinnerWhoseResultCannotBeMovedIsAnExceptionThatStopsTheOthers) {
  struct Body {
    static Task<void> run(bool vector, int throw_at, Log& log, bool& caught) {
      StopScope scope;
      int moves_left = throw_at;
      try {
        if (vector) {
          std::vector<Task<Fragile>> tasks;
          tasks.push_back(fragile(&moves_left));
          auto first = co_await when_any(scope, std::move(tasks));
          EXPECT_EQ(first.value().moves_left, &moves_left);
        } else {
          auto first =
              co_await when_any(scope, fragile(&moves_left), until_stopped(scope.token(), log));
          EXPECT_EQ(std::get<0>(first).moves_left, &moves_left);
        }
      } catch (const std::runtime_error&) {
        caught = true;
      }
      EXPECT_EQ(caught, moves_left <= 0);
      EXPECT_TRUE(scope.stopped());
      EXPECT_EQ(log.frames, 0);
    }
  };
  for (const bool vector : {false, true}) {
    int throw_at = 0;
    for (bool caught = true; caught;) {
      caught = false;
      run(Body::run(vector, ++throw_at, log_, caught));
    }
    // Before it has won, when it has, and on the way to the caller.
    EXPECT_GT(throw_at, 3);
  }
}

TEST_P(When, AnyWaitsForALoserThatDoesNotHeedTheStop) {
  struct Body {
    static Task<void> run(Completion<>& go, Log& log, bool& ended) {
      StopScope scope;
      auto first = co_await when_any(scope, until_fired(go, log), number(1));
      EXPECT_EQ(first.index(), 1u);
      ended = true;
    }
  };
  Completion<> go;
  auto token = go.token();
  bool ended = false;
  start(Body::run(go, log_, ended));
  poll_some();
  EXPECT_FALSE(ended);
  token.fire();
  poll_some();
  EXPECT_TRUE(ended);
}

TEST_P(When, AnyRethrowsAnExceptionThatCameFirstAndForgetsALaterOne) {
  struct Body {
    static Task<void> run(Log& log, int& caught) {
      StopScope scope;
      try {
        (void)co_await when_any(scope, blow_up(), until_stopped(scope.token(), log));
      } catch (const std::runtime_error&) {
        ++caught;
      }
      StopScope again;
      auto first = co_await when_any(again, number(1), blow_up());
      EXPECT_EQ(first.index(), 0u);
    }
  };
  int caught = 0;
  run(Body::run(log_, caught));
  EXPECT_EQ(caught, 1);
  EXPECT_EQ(log_.stopped, 1);
}

TEST_P(When, AnyIsATimeoutTogetherWithATimer) {
  struct Body {
    static Task<void> run(Log& log, std::size_t& index) {
      StopScope scope;
      auto first = co_await when_any(scope, until_stopped(scope.token(), log), sleep_for(1'000));
      index = first.index();
    }
  };
  std::size_t index = 9;
  start(Body::run(log_, index));
  poll_some();
  clock_.advance_ns(1'000);
  poll_some();
  EXPECT_EQ(index, 1u);
  EXPECT_EQ(log_.stopped, 1);
}

TEST_P(When, TheParentsStopReachesTheTasksOfAllAndAny) {
  struct Body {
    static Task<void> run(std::stop_token stop, Log& log, int& ended) {
      StopScope scope(stop);
      auto all = co_await when_all(scope, number_until_stopped(scope.token(), log),
                                   until_stopped(scope.token(), log));
      EXPECT_EQ(all.error().code(), ECANCELED);
      StopScope again(stop);
      auto any = co_await when_any(again, until_stopped(again.token(), log));
      EXPECT_EQ(std::get<0>(any).error().code(), ECANCELED);
      ++ended;
    }
  };
  std::stop_source stop;
  int ended = 0;
  start(Body::run(stop.get_token(), log_, ended));
  poll_some();
  stop.request_stop();
  poll_some();
  EXPECT_EQ(ended, 1);
  EXPECT_EQ(log_.stopped, 3);
}

TEST_P(WhenDeathTest, AnyOfNoTasksAborts) {
  struct Body {
    static Task<void> run() {
      StopScope scope;
      (void)co_await when_any(scope, std::vector<Task<int>>());
    }
  };
  EXPECT_DEATH(start(Body::run()), "of no tasks");
}

}  // namespace
}  // namespace roost
