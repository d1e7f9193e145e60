// SPDX-License-Identifier: MIT
// What the awaiters of locks and queues have in common: a suspension that a stop token can end.
//
// Threads: await_*() on the coroutine's home thread. start() from the publish step there; stop() on
// whichever thread requests the stop, at any moment from await_suspend() to await_resume().
// Lifetime: lives in the coroutine's frame. The stop callback is set before the waiter can be seen
// by anybody, and destroyed first thing in await_resume(), which waits for one that is running; so
// the frame stays while stop() is at it.
#pragma once

#include <coroutine>
#include <memory>
#include <optional>
#include <stop_token>
#include <tuple>
#include <type_traits>
#include <utility>

#include "roost/coro/coroutine.h"
#include "roost/coro/may_wait.h"

namespace roost::detail {

/// What an operation returns: co_await makes the Awaiter of it, in the frame. Others come to hold
/// the address of an awaiter, so it cannot be moved; but what passes through await_transform() GCC
/// 12 moves.
template <class Awaiter, class... Args>
class [[nodiscard]] Wait {
 public:
  Wait(Args... args) noexcept : args_(std::forward<Args>(args)...) {}

  Awaiter operator co_await() && noexcept {
    return std::apply([](auto&... args) { return Awaiter(std::forward<Args>(args)...); }, args_);
  }

 private:
  std::tuple<Args...> args_;
};

/// Derived has
///
///     const char* waits_for()             for messages
///     kThreadLocksReleased                how many ThreadMutexes start() lets go of; 0 if absent
///     void prepare(Coroutine&) noexcept   about to suspend: make the waiter
///     void start() noexcept               suspended: grant the wait, or enqueue
///     void stop() noexcept                take the waiter off the list and wake it, if it is
///     there,
///                                         without entering it: a stop callback's stack is
///                                         anybody's
///
/// Nothing is written before it is clear that the coroutine waits.
template <class Derived, bool kCancellable>
class WaitAwaiter {
 public:
  WaitAwaiter() noexcept requires(!kCancellable) {}
  explicit WaitAwaiter(std::stop_token stop) noexcept requires(kCancellable)
      : stop_{std::move(stop), std::nullopt} {}
  WaitAwaiter(const WaitAwaiter&) = delete;
  WaitAwaiter& operator=(const WaitAwaiter&) = delete;

  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) {
    static_assert(std::is_base_of_v<PromiseBase, Promise>, "await this inside a roost::Task");
    Derived& self = static_cast<Derived&>(*this);
    Coroutine& co = *frame.promise().co;
    check_may_wait(co, self.waits_for(), Derived::kThreadLocksReleased);
    self.prepare(co);
    if constexpr (kCancellable) {
      if (stop_.token.stop_possible()) stop_.callback.emplace(stop_.token, OnStop{&self});
    }
    std::construct_at(&suspension_, self.waits_for(), Publish{&self});
    suspension_.await_suspend(frame);
  }

 protected:
  static constexpr unsigned kThreadLocksReleased = 0;

  ~WaitAwaiter() = default;

  bool stop_requested() const noexcept {
    if constexpr (kCancellable) return stop_.token.stop_requested();
    return false;
  }

  void end_of_wait() noexcept {
    if constexpr (kCancellable) stop_.callback.reset();
  }

 private:
  struct Publish {
    Derived* self;
    void operator()(Coroutine&) const noexcept { self->start(); }
  };
  struct OnStop {
    Derived* self;
    void operator()() const noexcept { self->stop(); }
  };
  struct Stop {
    std::stop_token token;
    std::optional<std::stop_callback<OnStop>> callback;
  };
  struct NoStop {};

  union {
    SuspendAwaiter<Publish> suspension_;  // once it waits; trivially destructible
  };
  [[no_unique_address]] std::conditional_t<kCancellable, Stop, NoStop> stop_;
};

}  // namespace roost::detail
