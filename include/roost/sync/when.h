// SPDX-License-Identifier: MIT
// when_all(): runs tasks at the same time and gives all their results, or the first failure.
// when_any(): runs tasks at the same time and gives the result of the first that ends.
//
//   StopScope scope(stop);
//   Result<std::tuple<Header, Footer>> both = co_await when_all(
//       scope, read_header(file, scope.token()), read_footer(file, scope.token()));
//
// Both return after *all* of the tasks have ended, so what the tasks refer to may live in the
// caller's frame. Those that are not needed any more are stopped through `scope`, whose token they
// were made with; the scope stays stopped. Each task runs as a coroutine of its own on the current
// context; it may move.
//
// A task fails by an exception, which is rethrown, or, for a Task<Result<T>>, by an error.
//
// Threads: within a coroutine, which resumes at home.
// Lifetime: the tasks, and their frames, are gone when the await returns.
#pragma once

#include <atomic>
#include <cstddef>
#include <exception>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "roost/base/check.h"
#include "roost/base/result.h"
#include "roost/coro/task.h"
#include "roost/sync/child_set.h"
#include "roost/sync/stop_scope.h"

namespace roost {

namespace detail {

// What a task is good for: U of Result<U>, else T; std::monostate for void.
template <class T>
struct ValueOf {
  using type = T;
};
template <>
struct ValueOf<void> {
  using type = std::monostate;
};
template <class T>
struct ValueOf<Result<T>> : ValueOf<T> {};
template <class T>
using Value = typename ValueOf<T>::type;

template <class T>
using NotVoid = std::conditional_t<std::is_void_v<T>, std::monostate, T>;

template <class T>
inline constexpr bool kNoValue = std::is_same_v<Value<T>, std::monostate>;

/// `Values`, or Result<Values> where the tasks may fail by an error, or without values where they
/// have none.
template <bool kFallible, bool kNone, class Values>
using Together =
    std::conditional_t<kFallible, std::conditional_t<kNone, Result<void>, Result<Values>>,
                       std::conditional_t<kNone, void, Values>>;

/// Puts a child's result into its slot.
template <class T>
struct Keep {
  ChildSet* set;
  std::optional<Value<T>>* slot;

  template <class U>
  void operator()(U&& result) const {
    if constexpr (kIsResult<T>) {
      if (!result) {
        set->fail(std::move(result.error()));
      } else if constexpr (kNoValue<T>) {
        slot->emplace();
      } else {
        slot->emplace(std::move(*result));
      }
    } else {
      slot->emplace(std::forward<U>(result));
    }
  }
  void operator()() const { slot->emplace(); }
};

/// The context that a coroutine's children run on, unless it says otherwise.
inline CoContext& here() { return *this_thread().context; }

template <class T>
Task<Together<kIsResult<T>, kNoValue<T>, std::vector<Value<T>>>> when_all(
    StopScope* scope, std::vector<Task<T>> tasks) {
  std::vector<std::optional<Value<T>>> slots(tasks.size());
  ChildSet set("when_all", scope);
  try {
    for (std::size_t i = 0; i < tasks.size(); ++i) {
      set.start(here(), run_child(set, std::move(tasks[i]), Keep<T>{&set, &slots[i]}));
    }
  } catch (...) {
    set.fail(std::current_exception());
  }
  co_await set.idle();
  Result<void> outcome = set.outcome();
  if constexpr (kIsResult<T> && kNoValue<T>) {
    co_return outcome;
  } else if constexpr (!kNoValue<T>) {
    if constexpr (kIsResult<T>) {
      if (!outcome) co_return std::unexpected(std::move(outcome.error()));
    }
    std::vector<Value<T>> values;
    values.reserve(slots.size());
    for (auto& slot : slots) values.push_back(std::move(*slot));
    co_return values;
  }
}

template <class... T>
Task<Together<(kIsResult<T> || ...), (kNoValue<T> && ...), std::tuple<Value<T>...>>> when_all_of(
    StopScope* scope, Task<T>... tasks) {
  constexpr bool kFallible = (kIsResult<T> || ...);
  constexpr bool kNone = (kNoValue<T> && ...);
  std::tuple<std::optional<Value<T>>...> slots;
  ChildSet set("when_all", scope);
  try {
    std::apply(
        [&](auto&... slot) {
          (set.start(here(), run_child(set, std::move(tasks), Keep<T>{&set, &slot})), ...);
        },
        slots);
  } catch (...) {
    set.fail(std::current_exception());
  }
  co_await set.idle();
  Result<void> outcome = set.outcome();
  if constexpr (kFallible && kNone) {
    co_return outcome;
  } else if constexpr (!kNone) {
    if constexpr (kFallible) {
      if (!outcome) co_return std::unexpected(std::move(outcome.error()));
    }
    co_return std::apply([](auto&... slot) { return std::tuple<Value<T>...>(std::move(*slot)...); },
                         slots);
  }
}

/// The children of when_any(): the first to end, well or badly, stops the others.
class Race : public ChildSet {
 public:
  explicit Race(StopScope& scope) noexcept : ChildSet("when_any", &scope), stop_(scope) {}

  /// True for the first only.
  bool win() noexcept {
    // Relaxed: it only decides; what the winner leaves is published by leave().
    return !decided_.exchange(true, std::memory_order_relaxed);
  }
  void stop_others() noexcept { stop_.request_stop(); }

  // For run_child(): hides that of ChildSet.
  void fail(std::exception_ptr exception) noexcept {
    if (win()) winner_failed(std::move(exception));
  }
  /// The one that has won, whose result cannot be kept.
  void winner_failed(std::exception_ptr exception) noexcept {
    ChildSet::fail(std::move(exception));
  }

 private:
  StopScope& stop_;
  std::atomic<bool> decided_{false};  // false until the first has ended
};

/// Keeps the winner's result. `At` says which one it is, to the constructor of Winner.
template <class Winner, class At>
struct KeepFirst {
  Race* race;
  std::optional<Winner>* winner;
  At at;

  template <class... U>
  void operator()(U&&... result) const {
    if (!race->win()) return;
    try {
      winner->emplace(at, std::forward<U>(result)...);
    } catch (...) {
      // Nobody else wins any more.
      race->winner_failed(std::current_exception());
      return;
    }
    race->stop_others();
  }
};

}  // namespace detail

/// The results of all tasks, in their order: of Task<Result<T>> a Result<std::vector<T>>, of
/// Task<T> a std::vector<T>, without a vector where T is void. The first failure stops `scope`.
template <class T>
auto when_all(StopScope& scope, std::vector<Task<T>> tasks) {
  return detail::when_all(&scope, std::move(tasks));
}
/// Likewise; after a failure the others run to their end.
template <class T>
auto when_all(std::vector<Task<T>> tasks) {
  return detail::when_all<T>(nullptr, std::move(tasks));
}

/// The results of all tasks as a std::tuple (std::monostate for those that have none), in a Result
/// if one of the tasks gives a Result; no tuple where none has any. The first failure stops
/// `scope`.
template <class... T>
requires(sizeof...(T) > 0) auto when_all(StopScope& scope, Task<T>... tasks) {
  return detail::when_all_of(&scope, std::move(tasks)...);
}
/// Likewise; after a failure the others run to their end.
template <class... T>
requires(sizeof...(T) > 0) auto when_all(Task<T>... tasks) {
  return detail::when_all_of<T...>(nullptr, std::move(tasks)...);
}

/// What when_any() gives for a vector of tasks: which one, and its result (std::monostate for
/// void).
template <class T>
class First {
 public:
  template <class... U>
  requires std::is_constructible_v<T, U...> First(std::size_t index, U&&... value)
      : index_(index), value_(std::forward<U>(value)...) {}
  std::size_t index() const noexcept { return index_; }
  T& value() noexcept { return value_; }

 private:
  std::size_t index_;
  T value_;
};

/// The result of the first task to end, be it a success, an error or an exception (thrown by moving
/// the result, too). It stops `scope`, and the others are awaited; what they give is lost. So a
/// task for when_any() either leaves nothing behind, or says what it did where it can be seen.
/// REQUIRES: at least one task.
template <class T>
Task<First<detail::NotVoid<T>>> when_any(StopScope& scope, std::vector<Task<T>> tasks) {
  using Winner = First<detail::NotVoid<T>>;
  using Keep = detail::KeepFirst<Winner, std::size_t>;
  ROOST_CHECK(!tasks.empty(), "when_any() of no tasks");
  std::optional<Winner> winner;
  detail::Race race(scope);
  try {
    for (std::size_t i = 0; i < tasks.size(); ++i) {
      race.start(detail::here(),
                 detail::run_child(race, std::move(tasks[i]), Keep{&race, &winner, i}));
    }
  } catch (...) {
    race.fail(std::current_exception());
  }
  co_await race.idle();
  (void)race.outcome();
  co_return std::move(*winner);
}

/// Likewise for tasks of different types; the variant's index says which one it was.
template <class... T>
requires(sizeof...(T) > 0) Task<std::variant<detail::NotVoid<T>...>> when_any(StopScope& scope,
                                                                              Task<T>... tasks) {
  using Winner = std::variant<detail::NotVoid<T>...>;
  std::optional<Winner> winner;
  detail::Race race(scope);
  try {
    [&]<std::size_t... kIndex>(std::index_sequence<kIndex...>) {
      (race.start(detail::here(),
                  detail::run_child(race, std::move(tasks),
                                    detail::KeepFirst<Winner, std::in_place_index_t<kIndex>>{
                                        &race, &winner, std::in_place_index<kIndex>})),
       ...);
    }
    (std::index_sequence_for<T...>());
  } catch (...) {
    race.fail(std::current_exception());
  }
  co_await race.idle();
  (void)race.outcome();
  co_return std::move(*winner);
}

}  // namespace roost
