// SPDX-License-Identifier: MIT
// CoEvent: something that happens, and that coroutines wait for. It stays set until it is reset.
//
// Threads: wait() in coroutines, on any context; set(), reset() and is_set() on any thread, in a
// coroutine or not. A waiter resumes at home, and sees what was done before the set().
// Lifetime: outlives its waiters; one that was woken may destroy it if it is the only one.
#pragma once

#include <cerrno>
#include <concepts>
#include <cstdint>
#include <stop_token>
#include <utility>

#include "roost/base/result.h"
#include "roost/sync/admission_queue.h"

namespace roost {

/// A flag that coroutines wait for.
class CoEvent {
  struct State {
    bool admit(std::uint64_t) const noexcept { return set; }
    bool set;
  };
  using Queue = detail::AdmissionQueue<State>;

 public:
  template <bool kCancellable>
  class WaitAwaiter : public detail::AdmissionAwaiter<State, kCancellable> {
   public:
    using detail::AdmissionAwaiter<State, kCancellable>::AdmissionAwaiter;
    auto await_resume() {
      const bool happened = this->end_of_wait();
      if constexpr (kCancellable) {
        return happened ? Result<void>() : Result<void>(fail(ECANCELED, this->waits_for()));
      }
    }
  };

  /// `name`, a literal, is what a waiting coroutine is said to wait for.
  explicit CoEvent(const char* name = "an event") noexcept : CoEvent(name, false) {}
  /// One that may be set from the beginning. (A pointer is no bool here.)
  CoEvent(const char* name, std::same_as<bool> auto set) noexcept : queue_(name, State{set}) {}

  /// co_await returns once the event is set. Whoever waited when it was set returns, even if it is
  /// reset before its turn.
  auto wait() noexcept {
    return detail::Wait<WaitAwaiter<false>, Queue&, std::uint64_t>(queue_, 0);
  }
  /// co_await gives a Result<void>. ECANCELED: the stop came first.
  auto wait(std::stop_token stop) noexcept {
    return detail::Wait<WaitAwaiter<true>, Queue&, std::uint64_t, std::stop_token>(queue_, 0,
                                                                                   std::move(stop));
  }

  /// Wakes all who wait. Not while a thread lock is held: a waiter at home may be entered at once.
  void set() noexcept {
    queue_.change([](State& state) { state.set = true; });
  }
  /// Who waits from now on waits for the next set().
  void reset() noexcept {
    queue_.change([](State& state) { state.set = false; });
  }
  /// A snapshot.
  bool is_set() const noexcept {
    return queue_.ask([](const State& state) { return state.set; });
  }

 private:
  Queue queue_;
};

}  // namespace roost
