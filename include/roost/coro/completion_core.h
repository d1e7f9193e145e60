// SPDX-License-Identifier: MIT
// The word that decides between the one who fires a completion, the one who waits for it, and the
// one who stops the wait.
//
// Two sides own the block that this word stands in: the waiting side (Completion) and the firing
// side (CompletionToken). The word also says which of them frees the block, so nothing is counted.
// docs/lockfree/completion.md argues for it.
//
// Threads: fire() on the firing side, any thread; stop() on any thread, while a wait that may be
// stopped is under way; everything else on the waiting side, one thread at a time.
// Lifetime: the block is freed by the side whose fire() or abandon() says so; after its fire() a
// firing side that need not free touches the block no more.
#pragma once

#include <cstdint>

#include "roost/base/platform.h"

namespace roost {

/// `Waiter` is only pointed at; its address is a multiple of four, and not null.
template <Platform P, class Waiter>
class CompletionCore {
 public:
  enum class Wait : std::uint8_t {
    kWaiting,    // the waiter is visible: fire() or stop() wakes it, and may have done so by now
    kNotNeeded,  // fired or stopped before: the caller wakes the waiter itself
    kOccupied,   // misuse: another waits
  };

  /// What fire() leaves to its caller.
  enum class Fire : std::uint8_t {
    kNothing,  // nobody waits yet; the block is the waiting side's
    kWake,     // wake `waiter`; the block is the waiting side's
    kFree,     // the waiting side is gone: free the block
    kTwice,    // misuse: fired before
  };
  struct Fired {
    Fire todo;
    Waiter* waiter;
  };

  /// Waiting side. Whether the result is there to be read.
  bool fired() const noexcept {
    // Acquire pairs with the release of fire(): the result is visible.
    return word_.load(std::memory_order_acquire) == kFired;
  }

  /// Waiting side, once the waiter is suspended: empty -> waiter.
  Wait wait(Waiter& waiter) noexcept {
    std::uint64_t expected = kEmpty;
    // Release pairs with the acquire of fire() and stop(): they find the waiter suspended.
    // Relaxed on failure: the waiter looks at the word again when it runs, in end_wait().
    if (word_.compare_exchange_strong(expected, to_word(waiter), std::memory_order_release,
                                      std::memory_order_relaxed)) {
      return Wait::kWaiting;
    }
    return is_waiter(expected) ? Wait::kOccupied : Wait::kNotNeeded;
  }

  /// Any thread, at most once in a wait: waiter -> stopped, or empty -> stopped where the waiter is
  /// still on its way to wait(). Returns the waiter if the caller has to wake it, else null.
  Waiter* stop() noexcept {
    // Relaxed: a stale value fails the compare-and-swap below.
    std::uint64_t seen = word_.load(std::memory_order_relaxed);
    while (seen != kFired) {
      // Acquire pairs with the release of wait(), for the caller who wakes the waiter. Nothing is
      // published: the waiter that finds `stopped` learns that and no more.
      if (word_.compare_exchange_weak(seen, kStopped, std::memory_order_acquire,
                                      std::memory_order_relaxed)) {
        return is_waiter(seen) ? to_waiter(seen) : nullptr;
      }
    }
    return nullptr;
  }

  /// Waiting side, after the wait and after stop() can come no more: stopped -> empty, so that one
  /// may wait again. True: it was fired, the result is there (a fire after the stop counts as
  /// well).
  bool end_wait() noexcept {
    std::uint64_t expected = kStopped;
    // Acquire, for the failure, as in fired(). The success needs none: stop() published nothing.
    return !word_.compare_exchange_strong(expected, kEmpty, std::memory_order_acquire,
                                          std::memory_order_acquire);
  }

  /// Firing side, once, after the result was written.
  Fired fire() noexcept {
    // Release publishes the result to fired() and end_wait(). Acquire pairs with wait(), for the
    // caller who wakes, and with abandon(), for the caller who frees.
    const std::uint64_t before = word_.exchange(kFired, std::memory_order_acq_rel);
    if (is_waiter(before)) return {Fire::kWake, to_waiter(before)};
    if (before == kAbandoned) return {Fire::kFree, nullptr};
    return {before == kFired ? Fire::kTwice : Fire::kNothing, nullptr};
  }

  /// What abandon() leaves to its caller.
  enum class Abandon : std::uint8_t {
    kNothing,   // the block is the firing side's
    kFree,      // fired: free the block
    kOccupied,  // misuse: somebody waits
  };

  /// The waiting side goes, and does not touch the block any more unless it has to free it.
  Abandon abandon() noexcept {
    // Acquire pairs with the release of fire(): everything the firing side did with the block comes
    // before it is freed. Release pairs with the acquire of fire(), for the same reason.
    const std::uint64_t before = word_.exchange(kAbandoned, std::memory_order_acq_rel);
    if (is_waiter(before)) return Abandon::kOccupied;
    return before == kFired ? Abandon::kFree : Abandon::kNothing;
  }

 private:
  static constexpr std::uint64_t kEmpty = 0;
  static constexpr std::uint64_t kStopped = 1;
  static constexpr std::uint64_t kFired = 2;
  static constexpr std::uint64_t kAbandoned = 3;

  static bool is_waiter(std::uint64_t word) noexcept { return word > kAbandoned; }
  static Waiter* to_waiter(std::uint64_t word) noexcept { return reinterpret_cast<Waiter*>(word); }
  static std::uint64_t to_word(Waiter& waiter) noexcept {
    return reinterpret_cast<std::uint64_t>(&waiter);
  }

  // empty      not fired, nobody waits             set at birth, and by end_wait()
  // waiter     not fired, that one is suspended    set by wait()
  // stopped    not fired, the wait is over         set by stop()
  // fired      the result is written; the block    set by fire(), the last step of the firing side
  //            belongs to the waiting side
  // abandoned  the waiting side is gone; the block set by abandon(), the last step of the waiting
  //            belongs to the firing side          side
  typename P::template Atomic<std::uint64_t> word_{kEmpty};
};

}  // namespace roost
