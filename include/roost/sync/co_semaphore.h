// SPDX-License-Identifier: MIT
// CoSemaphore: a number of units that coroutines take and wait for.
//
//   auto units = co_await semaphore.hold(2);        // given back when `units` goes
//
// First in, first out, by the request: one that wants much is not overtaken by those that want
// little.
//
// Threads: hold(), acquire() and try_acquire() in coroutines, on any context; release() and
// available() on any thread, in a coroutine or not. A waiter resumes at home.
// Lifetime: outlives its guards and waiters; one that was granted its units may destroy it.
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
  class Guard;
  template <bool kCancellable>
  class HoldAwaiter;

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

  /// co_await gives a Guard with `units`, once there are that many and it is the oldest request.
  auto hold(std::uint64_t units = 1) noexcept {
    return detail::Wait<HoldAwaiter<false>, CoSemaphore&, std::uint64_t>(*this, units);
  }
  /// co_await gives a Result<Guard>. ECANCELED: nothing was taken.
  auto hold(std::uint64_t units, std::stop_token stop) noexcept {
    return detail::Wait<HoldAwaiter<true>, CoSemaphore&, std::uint64_t, std::stop_token>(
        *this, units, std::move(stop));
  }

  /// As hold(), for units that somebody gives back by release().
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

/// Holds units of a CoSemaphore for as long as it lives. May be moved, to other coroutines, too.
class [[nodiscard]] CoSemaphore::Guard {
 public:
  Guard() noexcept = default;
  Guard(Guard&& other) noexcept : semaphore_(other.semaphore_), units_(other.release()) {}
  Guard& operator=(Guard&& other) noexcept {
    Guard old(std::move(*this));
    semaphore_ = other.semaphore_;
    units_ = other.release();
    return *this;
  }
  ~Guard() { give_back(); }

  /// How many; 0: it is empty.
  std::uint64_t units() const noexcept { return units_; }

  /// Gives them back before it goes; nothing if it is empty. As CoSemaphore::release().
  void give_back() noexcept {
    if (const std::uint64_t units = release()) semaphore_->release(units);
  }

  /// Lets go of them without giving them back, and returns how many that are.
  std::uint64_t release() noexcept { return std::exchange(units_, 0); }

 private:
  friend class CoSemaphore;
  Guard(CoSemaphore& semaphore, std::uint64_t units) noexcept
      : semaphore_(&semaphore), units_(units) {}

  CoSemaphore* semaphore_ = nullptr;
  std::uint64_t units_ = 0;
};

template <bool kCancellable>
class CoSemaphore::HoldAwaiter : public detail::AdmissionAwaiter<State, kCancellable> {
  using Base = detail::AdmissionAwaiter<State, kCancellable>;

 public:
  template <class... Stop>
  HoldAwaiter(CoSemaphore& semaphore, std::uint64_t units, Stop... stop) noexcept
      : Base(semaphore.queue_, units, std::move(stop)...), semaphore_(semaphore), units_(units) {}

  auto await_resume() {
    const bool acquired = this->end_of_wait();
    if constexpr (kCancellable) {
      if (!acquired) return Result<Guard>(fail(ECANCELED, this->waits_for()));
      return Result<Guard>(Guard(semaphore_, units_));
    } else {
      return Guard(semaphore_, units_);
    }
  }

 private:
  CoSemaphore& semaphore_;
  const std::uint64_t units_;
};

}  // namespace roost
