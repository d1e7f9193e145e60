// SPDX-License-Identifier: MIT
// Waiting in line to be admitted: what a semaphore, an event and a read-write lock have in common.
//
// Whoever asks is admitted at once if nobody waits and the State agrees; otherwise it waits. Those
// who wait are admitted in their order, each as soon as it is the first and the State agrees.
//
// Threads: any; a short thread lock guards the State and the line, and is not held over a wake-up.
// Lifetime: outlives its waiters; the destructor aborts if there are any. Nothing of it is touched
// once the last waiter of a change is woken, so that one may destroy it.
#pragma once

#include <cstdint>
#include <mutex>
#include <stop_token>
#include <utility>

#include "roost/base/check.h"
#include "roost/base/platform.h"
#include "roost/coro/coroutine.h"
#include "roost/sync/wait_awaiter.h"
#include "roost/sync/wait_list.h"

namespace roost::detail {

/// State has `bool admit(std::uint64_t what)`: takes what is asked for, if it is to be had. It may
/// have `void refused(std::uint64_t what, const char* name)`, which is told of those who come and
/// have to wait, and of the first in line when it has to wait on: a place to abort where that would
/// be for ever.
template <class State>
class AdmissionQueue {
 public:
  struct Waiter : WaitNode<RealPlatform> {
    Waiter(Coroutine& c, std::uint64_t w) noexcept : co(&c), what(w) {}
    Coroutine* const co;
    const std::uint64_t what;
    bool admitted = false;  // set before it is woken
  };

  AdmissionQueue(const char* name, State state) noexcept : name_(name), state_(std::move(state)) {}
  ~AdmissionQueue() {
    ROOST_CHECK(line_.empty(), "{} ({}) destroyed while coroutine '{}' waits for it", name_,
                static_cast<const void*>(this), line_.front()->co->name());
  }
  AdmissionQueue(const AdmissionQueue&) = delete;
  AdmissionQueue& operator=(const AdmissionQueue&) = delete;

  bool try_enter(std::uint64_t what) noexcept {
    std::lock_guard guard(lock_);
    return line_.empty() && state_.admit(what);
  }

  /// `waiter` has suspended. `first`: it goes before all others.
  void start(Waiter& waiter, bool first) noexcept {
    Coroutine& co = *waiter.co;
    {
      std::lock_guard guard(lock_);
      if (!waiter.cancelled.get()) {
        if ((first || line_.empty()) && state_.admit(waiter.what)) {
          waiter.admitted = true;
        } else {
          refused(waiter);
          if (first) {
            line_.push_front(waiter);
          } else {
            line_.push_back(waiter);
          }
          return;
        }
      }
    }
    wake_waiter(co);
  }

  /// From a stop callback: enters nobody on its stack.
  void cancel(Waiter& waiter) noexcept {
    Waiter* admitted = nullptr;
    {
      std::lock_guard guard(lock_);
      waiter.cancelled.set(1);
      if (!waiter.linked.get()) return;
      line_.remove(waiter);
      // Those behind it may be content with less.
      admitted = admit_first();
    }
    Coroutine& co = *waiter.co;
    wake<&wake_waiter_later>(admitted);
    wake_waiter_later(co);
  }

  /// Calls `function(state)` and admits those who can be admitted then.
  template <class Function>
  void change(Function function) noexcept {
    Waiter* admitted = nullptr;
    {
      std::lock_guard guard(lock_);
      function(state_);
      admitted = admit_first();
    }
    wake<&wake_waiter>(admitted);
  }

  /// Calls `function(state)` and returns what it returns.
  template <class Function>
  auto ask(Function function) const noexcept {
    std::lock_guard guard(lock_);
    return function(state_);
  }

  const char* name() const noexcept { return name_; }

 private:
  void refused(const Waiter& waiter) const noexcept {
    if constexpr (requires { state_.refused(waiter.what, name_); }) {
      state_.refused(waiter.what, name_);
    }
  }

  // Takes those off the line that are admitted now; the first of a list linked by later.
  Waiter* admit_first() noexcept {
    Waiter* first = nullptr;
    Waiter* last = nullptr;
    while (Waiter* waiter = line_.front()) {
      if (!state_.admit(waiter->what)) {
        refused(*waiter);
        break;
      }
      line_.remove(*waiter);
      waiter->admitted = true;
      if (last) {
        last->later.set(waiter);
      } else {
        first = waiter;
      }
      last = waiter;
    }
    return first;
  }

  template <void (*kWakeOne)(Coroutine&, Coroutine::Place)>
  static void wake(Waiter* waiter) noexcept {
    while (waiter) {
      // Once it is woken it may be gone.
      Coroutine& co = *waiter->co;
      waiter = static_cast<Waiter*>(waiter->later.get());
      kWakeOne(co, Coroutine::Place::current());
    }
  }

  const char* const name_;
  mutable RealPlatform::Mutex lock_;
  State state_;                          // guarded by lock_
  WaitList<RealPlatform, Waiter> line_;  // guarded by lock_
};

/// Waits to be admitted; await_resume() is for the deriving class.
template <class State, bool kCancellable>
class AdmissionAwaiter : public WaitAwaiter<AdmissionAwaiter<State, kCancellable>, kCancellable> {
  using Base = WaitAwaiter<AdmissionAwaiter, kCancellable>;
  using Queue = AdmissionQueue<State>;

 public:
  AdmissionAwaiter(Queue& queue, std::uint64_t what, bool first = false) noexcept
      requires(!kCancellable)
      : queue_(queue), what_(what), first_(first) {}
  AdmissionAwaiter(Queue& queue, std::uint64_t what, std::stop_token stop,
                   bool first = false) noexcept requires(kCancellable)
      : Base(std::move(stop)), queue_(queue), what_(what), first_(first) {}

  bool await_ready() noexcept {
    if (this->stop_requested()) return true;
    return admitted_ = !first_ && queue_.try_enter(what_);
  }

 protected:
  /// First thing in await_resume(): whether it was admitted; otherwise it was cancelled.
  bool end_of_wait() noexcept {
    Base::end_of_wait();
    return admitted_ || (waited_ && waiter_.admitted);
  }

  const char* waits_for() const noexcept { return queue_.name(); }

 private:
  friend Base;

  void prepare(Coroutine& co) noexcept {
    std::construct_at(&waiter_, co, what_);
    waited_ = true;
  }
  void start() noexcept { queue_.start(waiter_, first_); }
  void stop() noexcept { queue_.cancel(waiter_); }

  Queue& queue_;
  const std::uint64_t what_;
  const bool first_;
  bool admitted_ = false;
  bool waited_ = false;
  union {
    typename Queue::Waiter waiter_;  // once it waits; trivially destructible
  };
};

}  // namespace roost::detail
