// SPDX-License-Identifier: MIT
// CoMutex: a lock that coroutines wait for without blocking their threads.
//
//   auto guard = co_await mutex.lock();
//
// It may be held across suspensions and by coroutines of any context; a waiter resumes at home.
// While the lock is free, taking and releasing it is one compare-and-swap each. A coroutine that
// finds it held by one that may be running on another CPU waits busily for some microseconds, as
// long as that pays and no other thread needs the CPU, and then suspends. Waiters are served first
// in, first out; a running coroutine may go before one that is still being woken, but only a few
// times in a row. docs/lockfree/co-mutex.md says how.
//
// Threads: lock(), try_lock(), unlock() in coroutines, on any context; a stop may be requested on
// any thread. Lifetime: outlives its holder and its waiters; the next holder may destroy it after
// unlocking. The destructor aborts if it is held or waited for.
//
// Aborts, with the name of the coroutine: locking what one holds oneself, unlocking what one does
// not hold, ending while holding it, waiting while the thread holds a ThreadMutex.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <stop_token>
#include <utility>

#include "roost/base/result.h"
#include "roost/coro/coroutine.h"
#include "roost/sync/co_mutex_core.h"
#include "roost/sync/wait_awaiter.h"

namespace roost {

/// A lock for coroutines; the file's head says how it is used, and what aborts.
class CoMutex {
 public:
  using Place = Coroutine::Place;
  class Guard;
  template <bool kCancellable>
  class LockAwaiter;

  /// `name`, a literal, is what a waiting coroutine is said to wait for.
  explicit CoMutex(const char* name = "a mutex") noexcept : name_(name) {}
  ~CoMutex();
  CoMutex(const CoMutex&) = delete;
  CoMutex& operator=(const CoMutex&) = delete;

  /// co_await gives a Guard.
  detail::Wait<LockAwaiter<false>, CoMutex&> lock() noexcept { return {*this}; }

  /// co_await gives a Result<Guard>. ECANCELED: the coroutine does not hold the lock and never did;
  /// also if a stop was requested before and the lock is free.
  detail::Wait<LockAwaiter<true>, CoMutex&, std::stop_token> lock(std::stop_token stop) noexcept {
    return {*this, std::move(stop)};
  }

  /// An empty guard if it is held, or outside of any coroutine.
  [[nodiscard]] Guard try_lock() noexcept;

  /// A guard again for a lock whose guard was released. Aborts unless this coroutine holds it.
  [[nodiscard]] Guard adopt(Place place = Place::current());

  /// For a lock whose guard was released.
  [[gnu::always_inline]] void unlock(Place place = Place::current()) {
    Coroutine* const me = Coroutine::self();
    if (me && core_.try_unlock(token_of(*me))) [[likely]] {
      me->lock_released();
    } else {
      unlock_contended(me, place);
    }
  }

  /// How often the rare things happened, for tests and statistics.
  struct Statistics {
    std::uint64_t spins_paid = 0;      // busy waits that ended with the lock free
    std::uint64_t spins_in_vain = 0;   // and those that did not
    std::uint64_t defeats = 0;         // waiters that were woken and found the lock held again
    std::uint64_t handoffs = 0;        // to a waiter that had lost too often
    std::uint64_t cancelled_late = 0;  // waiters cancelled after they were woken to compete
  };
  /// A snapshot. Any thread.
  Statistics statistics() const noexcept;

  const char* name() const noexcept { return name_; }

 private:
  friend class CoQueue;

  using Core = CoMutexCore<RealPlatform>;

  // A coroutine in the wait list, or on its way to compete for the lock. The competition takes
  // place in a callback on its home: one that loses has cost no resumption.
  struct Waiter : Core::Waiter, CallbackEntry {
    Waiter(CoMutex* m, Coroutine& c) noexcept
        : Core::Waiter(token_of(c)), CallbackEntry(&take_turn), mutex(m), co(&c) {}
    CoMutex* const mutex;
    Coroutine* const co;
    bool taken_off = false;  // guarded by a CoQueue's lock: woken or cancelled there
  };

  static std::uint64_t token_of(const Coroutine& co) noexcept {
    return reinterpret_cast<std::uint64_t>(&co);
  }

  // `co`, which runs or is about to be woken by the caller, has got the lock.
  void taken_by(Coroutine& co) noexcept {
    note_holder_home(co.home());
    co.lock_taken();
  }

  // Relaxed: a hint for busy waiting. Most often the same as before: a store would hold up the
  // compare-and-swap that comes next.
  void note_holder_home(const CoContext* home) noexcept {
    if (holder_home_.load(std::memory_order_relaxed) != home) {
      holder_home_.store(home, std::memory_order_relaxed);
    }
  }

  void check_not_holder(const Coroutine& me) const;
  bool lock_contended(Coroutine& me) noexcept;
  void unlock_contended(Coroutine* me, Place place);
  void hand_on() noexcept;
  void start(Waiter& waiter) noexcept;
  void cancel(Waiter& waiter) noexcept;
  bool spin_until_free(const CoContext* here) noexcept;
  static void post_turn(Waiter& waiter) noexcept;
  static bool take_turn(CallbackEntry& entry) noexcept;

  // Where the last holder ran when it took the lock, or was to be woken with it; null: the lock was
  // handed to one that does not run yet. Only compared, never followed. (Beside the core's word:
  // whoever takes the lock has that cache line.)
  std::atomic<const CoContext*> holder_home_{nullptr};
  Core core_;

  // Whether busy waiting pays here. Any thread; races only lose a count.
  std::atomic<std::uint32_t> spin_holdoff_{0};  // contended locks until it is tried again
  std::atomic<std::uint32_t> spin_penalty_{0};  // what the holdoff will be after the next failure

  struct Counters {
    std::atomic<std::uint32_t> spins_paid{0};
    std::atomic<std::uint32_t> spins_in_vain{0};
    std::atomic<std::uint32_t> defeats{0};
    std::atomic<std::uint32_t> handoffs{0};
    std::atomic<std::uint32_t> cancelled_late{0};
  };
  Counters counters_;
  const char* const name_;
};

/// Holds a CoMutex for as long as it lives. May be moved within the coroutine.
class [[nodiscard]] CoMutex::Guard {
 public:
  Guard() noexcept = default;
  Guard(Guard&& other) noexcept : mutex_(other.release()) {}
  Guard& operator=(Guard&& other) {
    Guard old(std::move(*this));
    mutex_ = other.release();
    return *this;
  }
  [[gnu::always_inline]] ~Guard() {
    if (mutex_) mutex_->unlock();
  }

  explicit operator bool() const noexcept { return mutex_; }
  /// Null: empty.
  CoMutex* mutex() const noexcept { return mutex_; }

  /// Unlocks before it goes; nothing if it is empty.
  void unlock(Place place = Place::current()) {
    if (CoMutex* mutex = release()) mutex->unlock(place);
  }

  /// Lets go of the mutex without unlocking it.
  CoMutex* release() noexcept { return std::exchange(mutex_, nullptr); }

 private:
  friend class CoMutex;
  explicit Guard(CoMutex& mutex) noexcept : mutex_(&mutex) {}

  CoMutex* mutex_ = nullptr;
};

template <bool kCancellable>
class CoMutex::LockAwaiter
    : public detail::WaitAwaiter<CoMutex::LockAwaiter<kCancellable>, kCancellable> {
  using Base = detail::WaitAwaiter<LockAwaiter, kCancellable>;

 public:
  explicit LockAwaiter(CoMutex& mutex) noexcept : mutex_(mutex) {}
  LockAwaiter(CoMutex& mutex, std::stop_token stop) noexcept
      : Base(std::move(stop)), mutex_(mutex) {}

  [[gnu::always_inline]] bool await_ready() noexcept {
    if (this->stop_requested()) [[unlikely]] {
      mutex_.check_not_holder(*Coroutine::self());
      return true;
    }
    // What is read after the compare-and-swap waits for it: hence in registers.
    CoMutex& mutex = mutex_;
    Coroutine& me = *Coroutine::self();
    if (!mutex.core_.try_lock(token_of(me)) && !mutex.lock_contended(me)) return false;
    mutex.taken_by(me);
    return true;
  }

  auto await_resume() {
    if constexpr (kCancellable) {
      this->end_of_wait();
      // The word says who holds the lock, and whether that is oneself, nobody else changes.
      if (mutex_.core_.holder() != token_of(*Coroutine::self()))
        return Result<Guard>(fail(ECANCELED, mutex_.name_));
      return Result<Guard>(Guard(mutex_));
    } else {
      return Guard(mutex_);
    }
  }

 private:
  friend Base;

  const char* waits_for() const noexcept { return mutex_.name_; }
  void prepare(Coroutine& co) noexcept { std::construct_at(&waiter_, &mutex_, co); }
  void start() noexcept { mutex_.start(waiter_); }
  void stop() noexcept { mutex_.cancel(waiter_); }

  CoMutex& mutex_;
  union {
    Waiter waiter_;  // once it waits; trivially destructible
  };
};

inline CoMutex::Guard CoMutex::try_lock() noexcept {
  Coroutine* const me = Coroutine::self();
  if (!me || !core_.try_lock(token_of(*me))) return {};
  taken_by(*me);
  return Guard(*this);
}

}  // namespace roost
