// SPDX-License-Identifier: MIT
// What TaskGroup, when_all() and when_any() have in common: coroutines that somebody started and
// waits for, and the first failure among them.
//
// Threads: start() and idle() for the owner's coroutine, start() for the children too; fail() and
// leave() for a child, on whatever thread it runs.
// Lifetime: destroyed by its owner, after idle().
#pragma once

#include <exception>
#include <mutex>
#include <optional>
#include <utility>

#include "roost/base/result.h"
#include "roost/coro/gate.h"
#include "roost/coro/task.h"
#include "roost/sync/stop_scope.h"

namespace roost::detail {

class ChildSet {
 public:
  /// `scope` is stopped by the first failure; null: nothing is.
  ChildSet(const char* name, StopScope* scope) noexcept : scope_(scope), gate_(name) {}
  ChildSet(const ChildSet&) = delete;
  ChildSet& operator=(const ChildSet&) = delete;

  const char* name() const noexcept { return gate_.name(); }
  std::uint32_t running() const noexcept { return gate_.in_flight(); }

  /// Makes the coroutine of a child, which counts from here on. `body` catches what is thrown and
  /// ends with leave(), after which it touches nothing but its own frame.
  Coroutine* create(Task<void> body, Coroutine::Place place);

  /// create(), and schedules it on `context`.
  void start(CoContext& context, Task<void> body,
             Coroutine::Place place = Coroutine::Place::current()) {
    co_schedule(context, *create(std::move(body), place), place);
  }

  /// A child failed, or could not be started. The first one counts.
  void fail(Error error) noexcept;
  void fail(std::exception_ptr exception) noexcept;

  void leave() noexcept { gate_.leave(); }

  /// Nobody starts any more.
  void close() noexcept { gate_.close(); }
  Gate::IdleWait idle() noexcept { return gate_.idle(); }

  /// After idle(): rethrows if the first failure was an exception; else returns it, or success.
  Result<void> outcome();

 private:
  StopScope* const scope_;
  Gate gate_;

  std::mutex mutex_;  // guards what follows, until idle
  std::optional<Error> error_;
  std::exception_ptr exception_;
};

/// The body of a child: awaits `task`, gives its result to `take`, and leaves `set`, which is a
/// ChildSet or hides some of its functions.
template <class Set, class T, class Take>
Task<void> run_child(Set& set, Task<T> task, Take take) {
  try {
    // Its frame, and with it its arguments, go before the child counts as ended.
    Task<T> running = std::move(task);
    if constexpr (std::is_void_v<T>) {
      co_await std::move(running);
      take();
    } else {
      take(co_await std::move(running));
    }
  } catch (...) {
    set.fail(std::current_exception());
  }
  set.leave();
}

}  // namespace roost::detail
