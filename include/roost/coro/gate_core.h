// SPDX-License-Identifier: MIT
// A count of what is in flight, and who waits for it to be none: the part of Gate that threads race
// for.
//
// One word holds the count, the number of closes and whether somebody waits. Entering and leaving
// are one compare-and-swap on it; only the last to leave while somebody waits takes the mutex that
// guards the list of waiters, and it does so *before* it leaves. docs/lockfree/gate.md argues for
// it.
//
// Threads: any, but for Waiter: see there.
// Lifetime: a gate outlives everybody inside and every waiter. Whoever left, or was refused,
// touches it no more.
#pragma once

#include <cstdint>
#include <mutex>

#include "roost/base/platform.h"

namespace roost {

/// `Mutex` has lock() and unlock(); a parameter for the sake of model checkers.
template <Platform P, class Mutex>
class GateCore {
  template <class T>
  using Shared = typename P::template Shared<T>;

 public:
  /// One wait. Belongs to the waiter before wait() and after its wake-up, in between to the gate.
  class Waiter {
   public:
    /// After the wake-up: the wait ended because of stop().
    bool stopped() const noexcept { return state_.get() == kStopped; }

    /// After leave() gave it: the next to wake. Read it before waking this one, which may go then.
    Waiter* next() const noexcept { return next_.get(); }

   private:
    friend GateCore;
    static constexpr std::uint64_t kNew = 0;      // not listed yet
    static constexpr std::uint64_t kListed = 1;   // leave() or stop() will take it
    static constexpr std::uint64_t kIdle = 2;     // taken: nothing was in flight
    static constexpr std::uint64_t kStopped = 3;  // taken, or never listed: stop() was first

    // Guarded by the gate's mutex.
    Shared<std::uint64_t> state_{kNew};
    Shared<Waiter*> next_;
    Shared<Waiter*> previous_;
  };

  static constexpr std::uint32_t kMaxInFlight = ~std::uint32_t{0};

  enum class Enter : std::uint8_t { kEntered, kClosed, kTooMany };

  /// One more in flight, unless the gate is closed.
  Enter try_enter() noexcept {
    // Relaxed: a stale value fails the compare-and-swap, or refuses one who came when it was true.
    std::uint64_t seen = word_.load(std::memory_order_relaxed);
    do {
      if (closes(seen)) return Enter::kClosed;
      if (in_flight(seen) == kMaxInFlight) return Enter::kTooMany;
      // Acquire pairs with the release of open(): who enters sees what was done behind closed
      // gates.
    } while (!word_.compare_exchange_weak(seen, seen + kOneInFlight, std::memory_order_acquire,
                                          std::memory_order_relaxed));
    return Enter::kEntered;
  }

  /// One more in flight, even if the gate is closed. False: too many are.
  /// REQUIRES: the caller is in flight itself.
  bool enter_inside() noexcept {
    // Acquire for uniformity with try_enter(); the caller has seen what its own entry showed.
    const std::uint64_t before = word_.fetch_add(kOneInFlight, std::memory_order_acquire);
    return in_flight(before) != kMaxInFlight;
  }

  struct Left {
    bool was_inside;  // false: misuse, nothing was in flight
    Waiter* wake;     // the caller wakes this one and those behind it
  };

  /// One less in flight.
  Left leave() noexcept {
    // Relaxed: a stale value fails a compare-and-swap.
    std::uint64_t seen = word_.load(std::memory_order_relaxed);
    for (;;) {
      if (in_flight(seen) == 0) return {false, nullptr};
      if (in_flight(seen) != 1 || !has_waiters(seen)) {
        // Release pairs with the acquire of wait(), idle() and the last to leave: what the one in
        // flight did comes before idleness.
        if (word_.compare_exchange_weak(seen, seen - kOneInFlight, std::memory_order_release,
                                        std::memory_order_relaxed)) {
          return {true, nullptr};
        }
        continue;
      }
      // Still inside, so the gate stands. From the swap to the unlock it stands because of those in
      // the list, who can be neither woken nor stopped before. So nobody may leave under the mutex
      // unless there are some: where that has changed, try again without it.
      std::lock_guard lock(mutex_);
      seen = word_.load(std::memory_order_relaxed);
      if (in_flight(seen) != 1 || !has_waiters(seen)) continue;
      // Acquire pairs with the release of all who left before, on behalf of those woken.
      if (word_.compare_exchange_strong(seen, (seen - kOneInFlight) & ~kWaiters,
                                        std::memory_order_acq_rel, std::memory_order_relaxed)) {
        return {true, take_all()};
      }
    }
  }

  /// Lists `waiter`, which is suspended. False: nothing is in flight, or stop() was first; the
  /// caller wakes it. Otherwise leave() or stop() wakes it, and may have done so by now.
  bool wait(Waiter& waiter) noexcept {
    std::lock_guard lock(mutex_);
    if (waiter.state_.get() == Waiter::kStopped) return false;
    // Acquire pairs with the release of leave(): the waiter goes on after all who left.
    std::uint64_t seen = word_.load(std::memory_order_acquire);
    do {
      if (in_flight(seen) == 0) {
        waiter.state_.set(Waiter::kIdle);
        return false;
      }
      // Acquire for the failure, as above. The flag publishes nothing: who sees it takes the mutex
      // before it looks at the list.
    } while (!word_.compare_exchange_weak(seen, seen | kWaiters, std::memory_order_acquire,
                                          std::memory_order_acquire));
    waiter.state_.set(Waiter::kListed);
    waiter.next_.set(nullptr);
    waiter.previous_.set(newest_.get());
    (newest_.get() ? newest_.get()->next_ : oldest_).set(&waiter);
    newest_.set(&waiter);
    return true;
  }

  /// Ends the wait of `waiter`, which may not be listed yet. True: the caller wakes it.
  bool stop(Waiter& waiter) noexcept {
    std::lock_guard lock(mutex_);
    const std::uint64_t state = waiter.state_.get();
    if (state == Waiter::kIdle) return false;
    waiter.state_.set(Waiter::kStopped);
    if (state == Waiter::kNew) return false;
    Waiter* const before = waiter.previous_.get();
    Waiter* const after = waiter.next_.get();
    (before ? before->next_ : oldest_).set(after);
    (after ? after->previous_ : newest_).set(before);
    if (!oldest_.get()) {
      // Relaxed: nothing but the flag changes, and a stale one costs a leaver a look at the list.
      word_.fetch_and(~kWaiters, std::memory_order_relaxed);
    }
    return true;
  }

  /// Whether nothing is in flight, for those who need not wait.
  bool idle() const noexcept {
    // Acquire, as in wait().
    return in_flight(word_.load(std::memory_order_acquire)) == 0;
  }

  /// Lets nobody in until open() was called as many times. Who entered before stays in flight.
  void close() noexcept {
    // Relaxed: that this word changes decides; what those inside do is acquired by wait().
    word_.fetch_add(kOneClose, std::memory_order_relaxed);
  }

  /// False: misuse, it was not closed.
  bool open() noexcept {
    // Release pairs with the acquire of try_enter().
    return closes(word_.fetch_sub(kOneClose, std::memory_order_release)) != 0;
  }

  // Snapshots, for messages and tests.
  std::uint32_t in_flight() const noexcept {
    return in_flight(word_.load(std::memory_order_relaxed));
  }
  bool closed() const noexcept { return closes(word_.load(std::memory_order_relaxed)) != 0; }
  bool has_waiters() const noexcept { return has_waiters(word_.load(std::memory_order_relaxed)); }

 private:
  // Bits 0..31: in flight. Bits 32..62: closes. Bit 63: the list is not empty.
  static constexpr std::uint64_t kOneInFlight = 1;
  static constexpr std::uint64_t kOneClose = std::uint64_t{1} << 32;
  static constexpr std::uint64_t kWaiters = std::uint64_t{1} << 63;

  static std::uint32_t in_flight(std::uint64_t word) noexcept {
    return static_cast<std::uint32_t>(word);
  }
  static std::uint64_t closes(std::uint64_t word) noexcept { return (word & ~kWaiters) >> 32; }
  static bool has_waiters(std::uint64_t word) noexcept { return (word & kWaiters) != 0; }

  Waiter* take_all() noexcept {
    Waiter* const first = oldest_.get();
    for (Waiter* waiter = first; waiter; waiter = waiter->next_.get()) {
      waiter->state_.set(Waiter::kIdle);
    }
    oldest_.set(nullptr);
    newest_.set(nullptr);
    return first;
  }

  // The count changes by try_enter() and leave(), the closes by close() and open(), all on any
  // thread. The flag changes under the mutex only; while it is set, only a leave() under the mutex
  // takes the count to 0.
  typename P::template Atomic<std::uint64_t> word_{0};
  Mutex mutex_;  // guards the list and the state and links of the waiters in it
  Shared<Waiter*> oldest_;
  Shared<Waiter*> newest_;
};

}  // namespace roost
