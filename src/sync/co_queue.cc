// SPDX-License-Identifier: MIT
#include "roost/sync/co_queue.h"

#include <fmt/format.h>

namespace roost {

CoQueue::~CoQueue() {
  ROOST_CHECK(line_.empty(), "{} ({}) destroyed while coroutine '{}' waits for it", name_,
              fmt::ptr(this), line_.front()->co->name());
}

void CoQueue::check_holder(const CoMutex::Guard& guard) const {
  const Coroutine& me = *Coroutine::self();
  ROOST_CHECK(guard && guard.mutex()->core_.holder() == CoMutex::token_of(me),
              "wait for {} by coroutine '{}', which does not hold the mutex", name_, me.name());
}

// False: a stop was requested before.
bool CoQueue::enqueue(Waiter& waiter) noexcept {
  std::lock_guard guard(lock_);
  if (waiter.cancelled.get()) return false;
  line_.push_back(waiter);
  return true;
}

void CoQueue::cancel(Waiter& waiter, bool& cancelled) noexcept {
  {
    std::lock_guard guard(lock_);
    if (waiter.taken_off) return;  // a wake-up came first
    cancelled = true;
    if (!waiter.linked.get()) {
      waiter.cancelled.set(1);  // not enqueued yet
      return;
    }
    line_.remove(waiter);
    waiter.taken_off = true;
  }
  wake(waiter);
}

// It is off the line. With a CoMutex it resumes once it holds that.
void CoQueue::wake(Waiter& waiter) noexcept {
  if (waiter.mutex) {
    waiter.mutex->start(waiter);
  } else {
    // By way of the home's queue even from there: the caller may hold the thread lock.
    CoMutex::post_turn(waiter);
  }
}

bool CoQueue::take_turn(CallbackEntry& entry) noexcept {
  wake_waiter(*static_cast<Waiter&>(entry).co);
  return true;
}

bool CoQueue::wake_one() noexcept {
  Waiter* waiter = nullptr;
  {
    std::lock_guard guard(lock_);
    waiter = line_.pop_front();
    if (!waiter) return false;
    waiter->taken_off = true;
  }
  wake(*waiter);
  return true;
}

std::size_t CoQueue::wake_all() noexcept {
  Waiter* first = nullptr;
  {
    std::lock_guard guard(lock_);
    Waiter* last = nullptr;
    while (Waiter* waiter = line_.pop_front()) {
      waiter->taken_off = true;
      if (last) {
        last->later.set(waiter);
      } else {
        first = waiter;
      }
      last = waiter;
    }
  }
  std::size_t woken = 0;
  for (Waiter* waiter = first; waiter; ++woken) {
    // Once it is woken it may be gone; in the mutex's line it has another `later`.
    Waiter& next_to_wake = *waiter;
    waiter = static_cast<Waiter*>(waiter->later.get());
    next_to_wake.later.set(nullptr);
    wake(next_to_wake);
  }
  return woken;
}

bool CoQueue::empty() const noexcept {
  std::lock_guard guard(lock_);
  return line_.empty();
}

}  // namespace roost
