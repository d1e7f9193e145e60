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
#include <optional>
#include <stop_token>
#include <utility>

#include "roost/coro/coroutine.h"

namespace roost::detail {

/// Aborts if the thread holds a ThreadMutex: it would be held across a suspension.
void check_may_wait(const Coroutine& co, const char* waits_for);

/// Derived has
///   void start(Coroutine&) noexcept   suspended: grant the wait, or enqueue
///   void stop() noexcept              take the waiter off the list and wake it, if it is there
template <class Derived, bool kCancellable>
class WaitAwaiter {
 public:
  explicit WaitAwaiter(const char* waits_for) noexcept
      : suspension_(waits_for, Publish{static_cast<Derived*>(this)}), waits_for_(waits_for) {}
  WaitAwaiter(const char* waits_for, std::stop_token stop) noexcept requires(kCancellable)
      : WaitAwaiter(waits_for) {
    stop_.token = std::move(stop);
  }
  WaitAwaiter(const WaitAwaiter&) = delete;
  WaitAwaiter& operator=(const WaitAwaiter&) = delete;

  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) {
    static_assert(std::is_base_of_v<PromiseBase, Promise>, "await this inside a roost::Task");
    Coroutine& co = *frame.promise().co;
    check_may_wait(co, waits_for_);
    Derived& self = static_cast<Derived&>(*this);
    self.prepare(co);
    if constexpr (kCancellable) {
      if (stop_.token.stop_possible()) stop_.callback.emplace(stop_.token, OnStop{&self});
    }
    suspension_.await_suspend(frame);
  }

 protected:
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
    void operator()(Coroutine& co) const noexcept { self->start(co); }
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

  SuspendAwaiter<Publish> suspension_;
  const char* const waits_for_;
  [[no_unique_address]] std::conditional_t<kCancellable, Stop, NoStop> stop_;
};

}  // namespace roost::detail
