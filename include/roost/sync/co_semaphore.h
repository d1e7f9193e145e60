// SPDX-License-Identifier: MIT
// CoSemaphore: a number of units that coroutines take and wait for.
//
// First in, first out, by the request: one that wants much is not overtaken by those that want
// little.
//
// Threads: acquire() and try_acquire() in coroutines, on any context; release() and available() on
// any thread, in a coroutine or not. A waiter resumes at home.
// Lifetime: outlives its waiters; one that was granted its units may destroy it.
#pragma once

#include <cerrno>
#include <cstdint>
#include <stop_token>
#include <utility>

#include "roost/base/result.h"
#include "roost/sync/admission_queue.h"

namespace roost {

/// A number of units to be had.
class CoSemaphore {
  struct State {
    bool admit(std::uint64_t units) noexcept {
      if (units > available) return false;
      available -= units;
      return true;
    }
    std::uint64_t available;
  };
  using Queue = detail::AdmissionQueue<State>;

 public:
  template <bool kCancellable>
  class AcquireAwaiter : public detail::AdmissionAwaiter<State, kCancellable> {
   public:
    using detail::AdmissionAwaiter<State, kCancellable>::AdmissionAwaiter;
    auto await_resume() {
      const bool acquired = this->end_of_wait();
      if constexpr (kCancellable) {
        return acquired ? Result<void>() : Result<void>(fail(ECANCELED, this->waits_for()));
      }
    }
  };

  /// `name`, a literal, is what a waiting coroutine is said to wait for.
  explicit CoSemaphore(std::uint64_t units, const char* name = "a semaphore") noexcept
      : queue_(name, State{units}) {}

  /// co_await takes `units`, once there are that many and it is the oldest request.
  auto acquire(std::uint64_t units = 1) noexcept {
    return detail::Wait<AcquireAwaiter<false>, Queue&, std::uint64_t>(queue_, units);
  }
  /// co_await gives a Result<void>. ECANCELED: nothing was taken.
  auto acquire(std::uint64_t units, std::stop_token stop) noexcept {
    return detail::Wait<AcquireAwaiter<true>, Queue&, std::uint64_t, std::stop_token>(
        queue_, units, std::move(stop));
  }

  /// Takes them if they are there and nobody waits.
  [[nodiscard]] bool try_acquire(std::uint64_t units = 1) noexcept {
    return queue_.try_enter(units);
  }

  /// Gives units back, or adds some, and admits those who wait for them.
  /// Not while a thread lock is held: a waiter at home may be entered at once.
  void release(std::uint64_t units = 1) noexcept {
    queue_.change([units](State& state) { state.available += units; });
  }

  /// A snapshot.
  std::uint64_t available() const noexcept {
    return queue_.ask([](const State& state) { return state.available; });
  }

 private:
  Queue queue_;
};

}  // namespace roost
