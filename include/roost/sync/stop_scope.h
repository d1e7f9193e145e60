// SPDX-License-Identifier: MIT
// StopScope: a stop token of one's own, which is also stopped by a parent's token and by a
// deadline. with_deadline(): lets a task run until a moment in time.
//
//   Task<Result<void>> copy(Disk& from, Disk& to, std::stop_token stop) {
//     StopScope scope(stop);
//     co_return co_await with_deadline(in_a_minute, scope, copy_all(from, to, scope.token()));
//   }
//
// Nothing is ever left running: stopping asks, and whoever asked still awaits the end.
//
// Threads: request_stop(), token(), reason() from any thread; the rest by one owner at a time, on
// any. A deadline belongs to the context it is set on, and is met there; it may be cleared, and the
// scope destroyed, elsewhere, by a coroutine that has moved, say.
// Lifetime: destroy it after everything that was given its token has ended, or at least does not
// count on being stopped any more. It may be destroyed by what request_stop() sets off. The context
// of a deadline outlives it, and the message that clears it from elsewhere.
#pragma once

#include <atomic>
#include <cstdint>
#include <stop_token>
#include <utility>

#include "roost/base/result.h"
#include "roost/coro/task.h"

namespace roost {

/// A stop source with a parent and a deadline.
class StopScope {
 public:
  enum class Reason : std::uint8_t {
    kNone,       // not stopped
    kRequested,  // by request_stop()
    kParent,     // the parent's token
    kDeadline,
  };

  /// Stopped together with `parent`, if that has a source.
  explicit StopScope(std::stop_token parent = {}) : on_parent_(std::move(parent), OnParent{this}) {}
  ~StopScope() { clear_deadline(); }
  StopScope(const StopScope&) = delete;
  StopScope& operator=(const StopScope&) = delete;

  /// For what is to be stopped with it.
  std::stop_token token() const noexcept { return source_.get_token(); }

  /// Asks. Stop callbacks run on the calling thread.
  void request_stop() noexcept { stop(Reason::kRequested); }

  /// Stops at, or after, `deadline_ns` of the current context's clock; at once if that has passed.
  /// Aborts outside of any context, and if there is a deadline already.
  void set_deadline(std::int64_t deadline_ns);
  /// The deadline does not count any more, unless it has passed.
  void clear_deadline() noexcept {
    if (deadline_) forget_deadline();
  }

  bool stopped() const noexcept { return reason() != Reason::kNone; }

  /// What stopped it first.
  Reason reason() const noexcept {
    // Acquire pairs with the release in stop(): what the one who stopped did before is visible.
    return reason_.load(std::memory_order_acquire);
  }

 private:
  struct OnParent {
    StopScope* scope;
    void operator()() const noexcept { scope->stop(Reason::kParent); }
  };

  class Deadline;

  void stop(Reason reason) noexcept;
  bool claim(Reason reason) noexcept;
  void forget_deadline() noexcept;

  std::stop_source source_;
  std::atomic<Reason> reason_{Reason::kNone};  // any thread, once, from kNone to another
  Deadline* deadline_ = nullptr;               // owner
  // Last: it may be called while it is made, and keeps its callback from running on once it goes.
  std::stop_callback<OnParent> on_parent_;
};

/// Runs `task`, which was given `scope`'s token, and stops the scope at `deadline_ns` of the
/// current context's clock. Returns when the task has ended, wherever that was, with its result;
/// where that is ECANCELED because of the deadline, with ETIMEDOUT. What was stopped is what the
/// task's own operations say.
template <class T>
Task<Result<T>> with_deadline(std::int64_t deadline_ns, StopScope& scope, Task<Result<T>> task) {
  struct Clear {
    StopScope& scope;
    ~Clear() { scope.clear_deadline(); }
  };
  Result<T> result = std::unexpected(Error(0, ""));
  {
    scope.set_deadline(deadline_ns);
    const Clear clear{scope};
    result = co_await std::move(task);
  }
  if (!result && result.error().code() == ECANCELED &&
      scope.reason() == StopScope::Reason::kDeadline) {
    co_return fail(ETIMEDOUT, result.error().doing());
  }
  co_return result;
}

}  // namespace roost
