// SPDX-License-Identifier: MIT
// CoQueue: coroutines that wait for a condition which a lock guards; a condition variable.
//
//   auto guard = co_await mutex.lock();
//   while (!ready) co_await queue.wait(guard);
//
// The lock is a CoMutex, or a thread lock (std::mutex, ThreadMutex) that is held for short. wait()
// enqueues the coroutine and then lets go of the lock, after it has suspended; it holds the lock
// again when it returns. Who is woken with a CoMutex is moved to the end of the mutex's own line,
// and resumes once it holds that: waking all makes nobody fight. First in, first out.
//
// Threads: wait() in coroutines, on any context; wake_one() and wake_all() on any thread, in a
// coroutine or not, with the lock, or any thread lock, held or not: they never enter a waiter on
// the caller's stack. A waiter resumes at home. Lifetime: outlives its waiters; the destructor
// aborts if there are any. A thread lock outlives the wait.
#pragma once

#include <cerrno>
#include <cstddef>
#include <mutex>
#include <stop_token>
#include <utility>

#include "roost/base/check.h"
#include "roost/base/result.h"
#include "roost/sync/co_mutex.h"
#include "roost/sync/thread_mutex.h"

namespace roost {

/// A condition variable for coroutines.
class CoQueue {
 public:
  template <class Lock, bool kCancellable>
  class WaitAwaiter;

  // Stop is std::stop_token, or nothing.
  template <class Lock, class... Stop>
  using Wait = detail::Wait<WaitAwaiter<Lock, (sizeof...(Stop) > 0)>, CoQueue&, Lock&, Stop...>;

  /// `name`, a literal, is what a waiting coroutine is said to wait for.
  explicit CoQueue(const char* name = "a queue") noexcept : name_(name) {}
  ~CoQueue();
  CoQueue(const CoQueue&) = delete;
  CoQueue& operator=(const CoQueue&) = delete;

  /// REQUIRES: the coroutine holds the mutex of `guard`.
  auto wait(CoMutex::Guard& guard) noexcept { return Wait<CoMutex::Guard>(*this, guard); }
  /// co_await gives a Result<void>. ECANCELED: it was not woken, no wake-up was used up for it. It
  /// holds the lock again in either case.
  auto wait(CoMutex::Guard& guard, std::stop_token stop) noexcept {
    return Wait<CoMutex::Guard, std::stop_token>(*this, guard, std::move(stop));
  }

  /// The same with a thread lock, which is taken and let go of on the coroutine's home thread.
  /// REQUIRES: `lock` holds it.
  template <class M>
  auto wait(std::unique_lock<M>& lock) noexcept {
    return Wait<std::unique_lock<M>>(*this, lock);
  }
  template <class M>
  auto wait(std::unique_lock<M>& lock, std::stop_token stop) noexcept {
    return Wait<std::unique_lock<M>, std::stop_token>(*this, lock, std::move(stop));
  }

  /// Wakes who has waited longest. False: nobody waits.
  bool wake_one() noexcept;

  /// Wakes everybody who waits now, and returns how many.
  std::size_t wake_all() noexcept;

  /// A snapshot: nobody waits. Any thread.
  bool empty() const noexcept;
  const char* name() const noexcept { return name_; }

 private:
  using Waiter = CoMutex::Waiter;  // its mutex is null where it waits with a thread lock

  bool enqueue(Waiter& waiter) noexcept;
  void cancel(Waiter& waiter, bool& cancelled) noexcept;
  static void wake(Waiter& waiter) noexcept;
  static bool take_turn(CallbackEntry& entry) noexcept;
  void check_holder(const CoMutex::Guard& guard) const;

  // The two kinds of lock.
  static CoMutex* mutex_of(CoMutex::Guard& guard) noexcept { return guard.mutex(); }
  template <class M>
  static CoMutex* mutex_of(std::unique_lock<M>&) noexcept {
    return nullptr;
  }
  void check_before_wait(CoMutex::Guard& guard) const { check_holder(guard); }
  template <class M>
  void check_before_wait(std::unique_lock<M>& lock) const {
    ROOST_CHECK(lock.owns_lock(), "wait for {} by coroutine '{}' without the lock", name_,
                Coroutine::self()->name());
  }

  const char* const name_;
  mutable RealPlatform::Mutex lock_;
  WaitList<RealPlatform, Waiter> line_;  // guarded by lock_
};

template <class Lock, bool kCancellable>
class CoQueue::WaitAwaiter
    : public detail::WaitAwaiter<CoQueue::WaitAwaiter<Lock, kCancellable>, kCancellable> {
  using Base = detail::WaitAwaiter<WaitAwaiter, kCancellable>;
  static constexpr bool kThreadLock = !std::is_same_v<Lock, CoMutex::Guard>;

 public:
  template <class... Stop>
  WaitAwaiter(CoQueue& queue, Lock& lock, Stop... stop) noexcept
      : Base(std::move(stop)...), queue_(queue), lock_(lock) {}

  bool await_ready() noexcept {
    queue_.check_before_wait(lock_);
    return cancelled_ = this->stop_requested();
  }

  auto await_resume() {
    this->end_of_wait();
    // A CoMutex was taken by whoever woke this.
    if constexpr (kThreadLock) {
      if (!lock_.owns_lock()) lock_.lock();
    }
    if constexpr (kCancellable) {
      return cancelled_ ? Result<void>(fail(ECANCELED, queue_.name())) : Result<void>();
    }
  }

 private:
  friend Base;

  const char* waits_for() const noexcept { return queue_.name(); }

  // A thread lock that the wait itself lets go of does not count as held across the suspension.
  static constexpr unsigned kThreadLocksReleased =
      std::is_same_v<Lock, std::unique_lock<ThreadMutex>> ? 1 : 0;

  void prepare(Coroutine& co) noexcept {
    std::construct_at(&waiter_, mutex_of(lock_), co);
    if constexpr (kThreadLock) {
      waiter_.run = &take_turn;
    } else {
      co.lock_released();
    }
  }

  // Once it is in the line it is woken through the queue of its home, whose thread is here: so it
  // does not run, and its frame stays, until this returns.
  void start() noexcept {
    const bool enqueued = queue_.enqueue(waiter_);
    if constexpr (kThreadLock) {
      // Whatever runs next on this thread may want it.
      lock_.unlock();
    } else if (enqueued) {
      waiter_.mutex->hand_on();
    } else {
      waiter_.co->lock_taken();  // that it never let go of
    }
    if (!enqueued) wake_waiter(*waiter_.co);  // stopped before
  }

  void stop() noexcept { queue_.cancel(waiter_, cancelled_); }

  CoQueue& queue_;
  Lock& lock_;
  bool cancelled_ = false;  // guarded by the queue's lock during the wait
  union {
    Waiter waiter_;  // once it waits; trivially destructible
  };
};

}  // namespace roost
