// SPDX-License-Identifier: MIT
// The word and the wait list of a CoMutex: who holds it, and who is to have it next.
//
// Threads: any. The caller of try_lock, unlock and wait is a coroutine, known by a token (its
// address), or somebody who acts for a suspended one.
// Lifetime: whoever let go of the lock in the fast path, or got nobody to wake, touches nothing of
// the core afterwards; otherwise the waiter it is to wake keeps the core alive. So the next holder
// may destroy it.
// docs/lockfree/co-mutex.md draws the states and argues for the orders.
//
// The one atomic, word_, holds the token of the holder, 0 if there is none, and three bits:
//
//   bit      meaning                                    set by / cleared by
//   queued   the list is not empty                      a waiter that enqueues / whoever empties it
//   awake    a waiter was taken off the list to         the unlock that took it off / that waiter:
//            compete for the lock, and is under way     it takes the lock, enqueues again, or gives
//                                                       up
//   handoff  the oldest waiter has lost too often:      that waiter, at the front of the list / the
//            the unlock makes it the holder             unlock that does so; emptying the list
//
// The holder changes by compare-and-swap, from 0 by anybody, to 0 by the holder. The bits change
// only under list_lock_. Hence
//
//   (1) free and queued => awake     nobody sleeps while the lock is to be had
//   (2) handoff => held, queued and not awake
//
//        holder                                        waiter (after it has suspended)
//        ------                                        -------------------------------
//        CAS word: me -> 0                             lock list
//          won: nobody was queued                      CAS word: X -> X | queued, X held
//          lost to `queued`: lock the list,              lost to free: CAS word: free -> me
//            take the oldest off,                        won: link itself
//            word := free | awake, wake it             unlock list
//
// Both change the same word. If the waiter's compare-and-swap comes first, the holder's fails, and
// it waits for the list; if the holder's comes first, the waiter finds the lock free.
//
// To wake one and let it compete, instead of giving it the lock, keeps a lock usable while its next
// waiter is still on the way; to give it the lock after kPatience defeats bounds the wait. The idea
// is that of Go's sync.Mutex, which counts milliseconds instead.
#pragma once

#include <cstdint>
#include <mutex>

#include "roost/base/platform.h"
#include "roost/sync/wait_list.h"

namespace roost {

/// `kPatience`: defeats of the oldest waiter before the lock is handed to it. A parameter for the
/// sake of model checkers, which cannot wait so long.
template <Platform P, std::uint64_t kPatience = 4>
class CoMutexCore {
 public:
  static constexpr std::uint64_t kFlags = 7;

  struct Waiter : WaitNode<P> {
    explicit Waiter(std::uint64_t of) noexcept : token(of) {}

    const std::uint64_t token;
    typename P::template Shared<std::uint64_t> awake{0};    // 1: the bit `awake` is for it
    typename P::template Shared<std::uint64_t> defeats{0};  // how often it competed in vain
  };

  CoMutexCore() noexcept = default;
  CoMutexCore(const CoMutexCore&) = delete;
  CoMutexCore& operator=(const CoMutexCore&) = delete;

  /// The token of the holder, or 0. Exact for the question whether oneself is the holder.
  std::uint64_t holder() const noexcept {
    // Relaxed: one's own token was put there, and is taken away, by oneself.
    return word_.load(std::memory_order_relaxed) & ~kFlags;
  }

  /// Nobody holds it and nobody waits.
  bool unused() const noexcept { return word_.load(std::memory_order_relaxed) == 0; }

  /// For busy waiting: whether an attempt to take it can succeed, and whether it may soon.
  enum class Look : std::uint8_t { kFree, kHeld, kHandedOn };
  Look look() const noexcept {
    // Relaxed: a hint.
    const std::uint64_t seen = word_.load(std::memory_order_relaxed);
    return !(seen & ~kFlags) ? Look::kFree : seen & kHandoff ? Look::kHandedOn : Look::kHeld;
  }

  /// Takes the lock if nobody holds it, whoever waits.
  bool try_lock(std::uint64_t me) noexcept {
    std::uint64_t seen = 0;
    // Acquire pairs with the release of the unlock before; the changes of bits between the two are
    // read-modify-writes, which carry it on.
    while (!word_.compare_exchange_strong(seen, seen | me, std::memory_order_acquire,
                                          std::memory_order_relaxed)) {
      if (seen & ~kFlags) return false;
    }
    return true;
  }

  /// Lets go of the lock if nobody waits. REQUIRES: `me` is not 0.
  bool try_unlock(std::uint64_t me) noexcept {
    // Release: what the holder did is seen by the next one.
    return word_.compare_exchange_strong(me, 0, std::memory_order_release,
                                         std::memory_order_relaxed);
  }

  struct Next {
    Waiter* waiter = nullptr;  // to be woken, if not null
    bool owns = false;  // it is the holder now; otherwise it calls wait() when its turn comes
  };

  /// Lets go of the lock, or hands it on. REQUIRES: the caller is the holder.
  Next unlock() noexcept {
    for (;;) {
      std::uint64_t seen = word_.load(std::memory_order_relaxed);
      if (!(seen & kQueued) || (seen & kAwake)) {
        // Nobody is to be woken: there is no waiter, or one is under way, and its wait() comes
        // after this in the order of the word. Release as in try_unlock().
        if (word_.compare_exchange_weak(seen, seen & kFlags, std::memory_order_release,
                                        std::memory_order_relaxed)) {
          return {};
        }
        continue;
      }
      std::lock_guard guard(list_lock_);
      Waiter* const waiter = list_.pop_front();
      if (!waiter)
        continue;  // cancelled meanwhile; let go without the list, as it may be gone then
      // The bits do not change while the list is locked, nor the holder while that is oneself: a
      // store suffices. Release as in try_unlock().
      seen = word_.load(std::memory_order_relaxed);
      const std::uint64_t queued = list_.empty() ? 0 : kQueued;
      if (seen & kHandoff) {
        word_.store(waiter->token | queued, std::memory_order_release);
        return {waiter, true};
      }
      waiter->awake.set(1);
      word_.store(kAwake | queued, std::memory_order_release);
      return {waiter, false};
    }
  }

  enum class Outcome : std::uint8_t {
    kTaken,      // the waiter holds the lock now
    kQueued,     // it stands in the list; nothing of it may be touched any more
    kCancelled,  // neither, and never will
  };

  /// The coroutine of `waiter` is suspended: takes the lock for it or enqueues it. Also for a
  /// waiter that an unlock() has told to compete; where that finds the lock held it goes to the
  /// front.
  Outcome wait(Waiter& waiter) noexcept {
    std::lock_guard guard(list_lock_);
    const bool again = waiter.awake.get();
    const std::uint64_t mine = again ? kAwake : 0;
    const bool cancelled = waiter.cancelled.get();
    const std::uint64_t defeats = waiter.defeats.get() + again;
    std::uint64_t added = cancelled ? 0 : kQueued;
    if (!cancelled && again && defeats >= kPatience) added |= kHandoff;
    std::uint64_t seen = word_.load(std::memory_order_relaxed);
    for (;;) {
      const bool take = !(seen & ~kFlags);
      const std::uint64_t next = (seen & ~mine) | (take ? waiter.token : added);
      // Acquire for the taking, as in try_lock(). What enqueueing publishes is under list_lock_.
      if (!word_.compare_exchange_weak(seen, next, std::memory_order_acquire,
                                       std::memory_order_relaxed)) {
        continue;
      }
      waiter.awake.set(0);
      if (take) return Outcome::kTaken;
      if (cancelled) return Outcome::kCancelled;
      waiter.defeats.set(defeats);
      if (again) {
        list_.push_front(waiter);
      } else {
        list_.push_back(waiter);
      }
      return Outcome::kQueued;
    }
  }

  /// True: `waiter` was enqueued and is not any more; the caller wakes it. False: it is about to
  /// call wait(), which will tell, or has got the lock.
  bool cancel(Waiter& waiter) noexcept {
    std::lock_guard guard(list_lock_);
    waiter.cancelled.set(1);
    if (!waiter.linked.get()) return false;
    list_.remove(waiter);
    // The holder may let go at the same time. Relaxed: it publishes nothing, and the release of an
    // unlock goes on in a read-modify-write. A hand-off meant for this waiter goes to the next.
    if (list_.empty()) word_.fetch_and(~(kQueued | kHandoff), std::memory_order_relaxed);
    return true;
  }

 private:
  static constexpr std::uint64_t kQueued = 1;
  static constexpr std::uint64_t kAwake = 2;
  static constexpr std::uint64_t kHandoff = 4;

  typename P::template Atomic<std::uint64_t> word_{0};
  typename P::Mutex list_lock_;
  WaitList<P, Waiter> list_;  // guarded by list_lock_
};

}  // namespace roost
