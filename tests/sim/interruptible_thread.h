// SPDX-License-Identifier: MIT
// What roost_sim_test puts in the place of the threads of a ThreadPool, and of what they wait with:
// simulated threads, in simulated time.
//
// Threads: one, the simulation's.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <utility>

#include "interruptible_atomic.h"

namespace roost {

/// As std::thread.
class InterruptibleThread {
 public:
  InterruptibleThread() noexcept = default;
  template <class F>
  explicit InterruptibleThread(F body) : over_(std::make_shared<bool>(false)) {
    if (!interrupt_hooks.start_thread) std::abort();  // nobody would run it
    interrupt_hooks.start_thread([over = over_, body = std::move(body)] {
      body();
      *over = true;
    });
  }
  InterruptibleThread(InterruptibleThread&&) noexcept = default;
  InterruptibleThread& operator=(InterruptibleThread&& other) noexcept {
    if (over_) std::abort();  // not joined
    over_ = std::move(other.over_);
    return *this;
  }
  ~InterruptibleThread() {
    if (over_) std::abort();
  }

  void join() noexcept {
    const std::shared_ptr<bool> over = std::exchange(over_, nullptr);
    wait_until("the end of a thread", *over);
  }

 private:
  std::shared_ptr<bool> over_;  // null: none
};

/// As std::condition_variable, for one thread that waits, and that is called only once its
/// predicate is true.
class InterruptibleCondition {
 public:
  void notify_one() noexcept {
    if (called_) *called_ = true;
  }

  template <class Lock, class Predicate>
  void wait(Lock& lock, Predicate done) {
    if (done()) return;
    called_ = std::make_shared<bool>(false);
    wait_for_call(lock);
  }

  template <class Lock, class Predicate>
  bool wait_for(Lock& lock, std::chrono::nanoseconds timeout, Predicate done) {
    if (done()) return true;
    called_ = std::make_shared<bool>(false);
    // It may come when the wait is over, and this is gone.
    interrupt_hooks.call_after(timeout.count(), [called = called_] { *called = true; });
    wait_for_call(lock);
    return done();
  }

 private:
  template <class Lock>
  void wait_for_call(Lock& lock) {
    const std::shared_ptr<bool> called = called_;
    lock.unlock();
    wait_until("a condition", *called);
    lock.lock();
  }

  std::shared_ptr<bool> called_;  // of the last wait
};

}  // namespace roost
