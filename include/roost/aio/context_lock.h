// SPDX-License-Identifier: MIT
// The lock of a context: a queue lock that its home thread keeps from one iteration to the next.
//
// The lock itself is fair: whoever finds it taken queues, and each holder passes it to the one that
// has waited longest. What makes it biased is how the home uses it: it keeps the lock while it
// polls, looks with one relaxed load an iteration whether somebody waits, and gives it up only then
// and around a blocking wait. So the home pays one compare-and-swap before and one after a sleep.
//
// Threads: lock(), try_lock() and acquire() from any; the rest as each says.
// Lifetime: outlives every call. A thread that waits keeps what it waits with on its stack; whoever
// passes the lock on touches nothing of the lock, and nothing of the waiter but the address of its
// word, after the one atomic operation that does so.
// docs/lockfree/context-lock.md draws the hand-over and argues for the orders.
//
// The one atomic that decides, state_, holds:
//
//   value    meaning                                      who may change it
//   free     nobody holds it                              anybody -> held
//   held     taken, nobody queued since the holder        a newcomer (or the holder, to be served
//            last took the list                           behind others) -> waiter,
//                                                         the holder -> free
//   waiter   taken; the newest of a list linked by next,  a newcomer -> itself,
//            each a waiter that came since                the holder -> held (takes the list)
//
// Those that queued earlier are in first_, oldest first, which belongs to the holder and goes with
// the lock.
#pragma once

#include <atomic>
#include <cstdint>

#include "roost/base/platform.h"

namespace roost {

/// How a thread sleeps until a word changes.
struct FutexPark {
  /// Busy-waits before a thread sleeps: a few microseconds, in which most iterations end.
  static constexpr unsigned kSpins = 128;

  /// Returns once `word` is not `value` any more, or earlier.
  static void wait(const RealPlatform::Atomic<std::uint64_t>& word, std::uint64_t value) noexcept;
  /// Wakes who waits for `word`, which may be gone: only its address counts.
  static void wake(const RealPlatform::Atomic<std::uint64_t>* word) noexcept;
};

/// `Park` has the members of FutexPark, for P::Atomic<std::uint64_t>.
template <Platform P, class Park>
class ContextLock {
 public:
  /// Of a thread, as long as it lives; not 0.
  using ThreadId = std::uint64_t;

  ContextLock() noexcept = default;
  ContextLock(const ContextLock&) = delete;
  ContextLock& operator=(const ContextLock&) = delete;

  bool try_lock() noexcept {
    std::uint64_t expected = kFree;
    // Acquire pairs with the release of unlock(): what earlier holders did is seen.
    return state_.compare_exchange_strong(expected, kHeld, std::memory_order_acquire,
                                          std::memory_order_relaxed);
  }

  /// Waits for its turn behind those who came before. Not recursive.
  void lock() noexcept {
    Waiter waiter;
    if (!take_or_queue(waiter)) wait_for_turn(waiter);
  }

  /// The holder gives it up, to the one that has waited longest if there is one; true if so.
  bool unlock() noexcept {
    Waiter* next = first_.get();
    if (!next) {
      std::uint64_t expected = kHeld;
      // Release pairs with the acquire of whoever takes it next.
      if (state_.compare_exchange_strong(expected, kFree, std::memory_order_release,
                                         std::memory_order_relaxed)) {
        return false;
      }
      // Only the holder takes waiters away, so there are some still. Acquire pairs with the release
      // of each push.
      next = oldest_first(to_waiter(state_.exchange(kHeld, std::memory_order_acquire)));
    }
    first_.set(next->next.get());
    pass_to(next);
    return true;
  }

  /// The holder lets those who wait go first and has it again when it returns; true if there were
  /// any. It queues before it passes the lock on: though it may be kept from running as soon as
  /// another runs, it stands in front of all who come later.
  bool let_others() noexcept {
    if (!wanted()) return false;
    Waiter waiter;
    take_or_queue(waiter);  // queues, since it is held
    unlock();
    wait_for_turn(waiter);
    return true;
  }

  /// For the holder: whether somebody waits. Where nobody does it costs a load.
  bool wanted() const noexcept {
    // Relaxed: a waiter that is not seen now is seen at the next look, or by unlock().
    return state_.load(std::memory_order_relaxed) != kHeld || first_.get();
  }

  /// A hint, for any thread.
  bool is_free() const noexcept { return state_.load(std::memory_order_relaxed) == kFree; }

  // The same for threads that come as they like: recursive, and it knows its owner.

  /// True if the thread did not hold it before.
  bool acquire(ThreadId me) noexcept {
    if (owned_by(me)) {
      depth_.set(depth_.get() + 1);
      return false;
    }
    lock();
    depth_.set(1);
    // Relaxed: a thread looks only for its own id, which no other thread writes.
    owner_.store(me, std::memory_order_relaxed);
    return true;
  }

  /// Undoes one acquire(); true if it was the outermost.
  /// REQUIRES: owned_by() the caller.
  bool release() noexcept {
    depth_.set(depth_.get() - 1);
    if (depth_.get() > 0) return false;
    owner_.store(kNobody, std::memory_order_relaxed);
    unlock();
    return true;
  }

  /// Whether the calling thread, `me`, has acquired it.
  bool owned_by(ThreadId me) const noexcept { return owner_.load(std::memory_order_relaxed) == me; }

 private:
  // A thread in the queue; on its stack. Its word, turn:
  //
  //   value     meaning                       who may change it
  //   waiting   awake, and looks now and then its thread -> sleeping, the holder -> granted
  //   sleeping  in Park::wait, or about to    the holder -> granted, and owes Park::wake
  //   granted   it holds the lock             nobody: its thread may be gone with it
  struct Waiter {
    typename P::template Shared<Waiter*> next;  // older; once taken by the holder, newer
    typename P::template Atomic<std::uint64_t> turn{kWaiting};
  };

  static constexpr std::uint64_t kWaiting = 0;
  static constexpr std::uint64_t kSleeping = 1;
  static constexpr std::uint64_t kGranted = 2;

  // Waiters are aligned, so no waiter has these addresses.
  static constexpr std::uint64_t kFree = 0;
  static constexpr std::uint64_t kHeld = 1;

  static constexpr ThreadId kNobody = 0;

  static Waiter* to_waiter(std::uint64_t word) noexcept { return reinterpret_cast<Waiter*>(word); }
  static std::uint64_t to_word(Waiter& waiter) noexcept {
    return reinterpret_cast<std::uint64_t>(&waiter);
  }

  // True: it was free and is taken; false: the waiter stands in the queue.
  bool take_or_queue(Waiter& waiter) noexcept {
    // Relaxed: only a hint for the compare-and-swap, which reads again.
    std::uint64_t seen = state_.load(std::memory_order_relaxed);
    for (;;) {
      if (seen == kFree) {
        // Acquire: as in try_lock().
        if (state_.compare_exchange_weak(seen, kHeld, std::memory_order_acquire,
                                         std::memory_order_relaxed)) {
          return true;
        }
        continue;
      }
      waiter.next.set(seen == kHeld ? nullptr : to_waiter(seen));
      // Release publishes the waiter and its link to the acquire of the holder's exchange in
      // unlock(). Waiters below were published by their own; the release sequence carries them.
      if (state_.compare_exchange_weak(seen, to_word(waiter), std::memory_order_release,
                                       std::memory_order_relaxed)) {
        return false;
      }
    }
  }

  static void wait_for_turn(Waiter& waiter) noexcept {
    // Acquire pairs with the release in pass_to(): the waiter sees what earlier holders did, the
    // rest of the queue among it.
    for (unsigned i = 0; i < Park::kSpins; ++i) {
      if (waiter.turn.load(std::memory_order_acquire) == kGranted) return;
      P::cpu_relax();
    }
    std::uint64_t expected = kWaiting;
    // Relaxed: it publishes nothing, and the loads below acquire.
    waiter.turn.compare_exchange_strong(expected, kSleeping, std::memory_order_relaxed,
                                        std::memory_order_relaxed);
    while (waiter.turn.load(std::memory_order_acquire) != kGranted) {
      Park::wait(waiter.turn, kSleeping);
    }
  }

  static void pass_to(Waiter* waiter) noexcept {
    auto* const word = &waiter->turn;
    // Release publishes what the holders up to now did, and first_. From here on the waiter may run
    // and its stack be another's.
    if (word->exchange(kGranted, std::memory_order_release) == kSleeping) Park::wake(word);
  }

  static Waiter* oldest_first(Waiter* newest) noexcept {
    Waiter* first = nullptr;
    while (newest) {
      Waiter* const older = newest->next.get();
      newest->next.set(first);
      first = newest;
      newest = older;
    }
    return first;
  }

  typename P::template Atomic<std::uint64_t> state_{kFree};
  typename P::template Shared<Waiter*> first_;  // the holder
  // 0, or the thread that holds it by acquire(). Only that thread changes it.
  typename P::template Atomic<std::uint64_t> owner_{kNobody};
  typename P::template Shared<std::uint64_t> depth_;  // its acquires; the holder
};

}  // namespace roost
