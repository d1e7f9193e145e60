// SPDX-License-Identifier: MIT
#include "roost/sync/co_mutex.h"

#include <fmt/format.h>

#include <algorithm>

#include "roost/aio/aio_context.h"
#include "roost/base/check.h"
#include "roost/base/probe.h"
#include "roost/coro/census.h"

namespace roost {

namespace {

// Busy waiting looks at the lock once in about half a microsecond. Looking more often would take
// the cache line away from the holder, who may go through the lock dozens of times meanwhile.
constexpr int kLooks = 8;
constexpr int kPausesPerLook = 64;
constexpr std::uint32_t kMaxSpinPenalty = 64;

}  // namespace

CoMutex::~CoMutex() {
  ROOST_CHECK(core_.unused(), "{} ({}) destroyed while it is held or waited for", name_,
              fmt::ptr(this));
}

CoMutex::Statistics CoMutex::statistics() const noexcept {
  // Relaxed: counts that publish nothing.
  constexpr auto relaxed = std::memory_order_relaxed;
  return {.spins_paid = counters_.spins_paid.load(relaxed),
          .spins_in_vain = counters_.spins_in_vain.load(relaxed),
          .defeats = counters_.defeats.load(relaxed),
          .handoffs = counters_.handoffs.load(relaxed),
          .cancelled_late = counters_.cancelled_late.load(relaxed)};
}

namespace {

void count(std::atomic<std::uint32_t>& counter) noexcept {
  counter.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

// ---- Locking

void CoMutex::check_not_holder(const Coroutine& me) const {
  if (core_.holder() != token_of(me)) return;
  Place place;
  own_await_chain(&place, 1);
  panicf("{} ({}) locked by coroutine '{}' at {}, which holds it", name_, fmt::ptr(this), me.name(),
         describe(place));
}

// True: the lock is taken after all, without suspending.
bool CoMutex::lock_contended(Coroutine& me) noexcept {
  check_not_holder(me);
  ROOST_PROBE(co_mutex_lock_entry, this, &me);
  if (!spin_until_free(me.home()) || !core_.try_lock(token_of(me))) return false;
  ROOST_PROBE(co_mutex_lock_return, this, &me);
  return true;
}

// Waits busily while the lock is held by a coroutine that may be running on another CPU. True: it
// was free a moment ago.
bool CoMutex::spin_until_free(const CoContext* here) noexcept {
  if (core_.look() == Core::Look::kFree) return true;
  const std::uint32_t holdoff = spin_holdoff_.load(std::memory_order_relaxed);
  if (holdoff > 0) {
    spin_holdoff_.store(holdoff - 1, std::memory_order_relaxed);
    return false;
  }
  const AioContext& context = *static_cast<const AioContext*>(here);
  for (int looks = 0; looks < kLooks; ++looks) {
    const CoContext* const there = holder_home_.load(std::memory_order_relaxed);
    if (!there || there == here || !context.may_wait_busily()) return false;
    for (int i = 0; i < kPausesPerLook; ++i) RealPlatform::cpu_relax();
    switch (core_.look()) {
      case Core::Look::kFree:
        spin_penalty_.store(0, std::memory_order_relaxed);
        count(counters_.spins_paid);
        return true;
      case Core::Look::kHeld:
        break;
      case Core::Look::kHandedOn:
        return false;
    }
  }
  const std::uint32_t penalty =
      std::min(2 * spin_penalty_.load(std::memory_order_relaxed) + 1, kMaxSpinPenalty);
  spin_penalty_.store(penalty, std::memory_order_relaxed);
  spin_holdoff_.store(penalty, std::memory_order_relaxed);
  count(counters_.spins_in_vain);
  return false;
}

// From the publish step, or from whoever moves a suspended coroutine here from a CoQueue: by a stop
// or a wake-up, whose stack it is not to be entered on.
void CoMutex::start(Waiter& waiter) noexcept {
  Coroutine& co = *waiter.co;
  switch (core_.wait(waiter)) {
    case Core::Outcome::kQueued:
      return;
    case Core::Outcome::kTaken:
      taken_by(co);
      ROOST_PROBE(co_mutex_lock_return, this, &co);
      wake_waiter_later(co);
      return;
    case Core::Outcome::kCancelled:
      wake_waiter_later(co);
      return;
  }
}

void CoMutex::cancel(Waiter& waiter) noexcept {
  if (core_.cancel(waiter)) wake_waiter_later(*waiter.co);
}

CoMutex::Guard CoMutex::adopt(Place place) {
  const Coroutine* const me = Coroutine::self();
  ROOST_CHECK(me && core_.holder() == token_of(*me),
              "{} adopted by {}{}{} at {}, which does not hold it", name_,
              me ? "coroutine '" : "nobody", me ? me->name() : "", me ? "'" : "", describe(place));
  return Guard(*this);
}

// ---- Unlocking

void CoMutex::unlock_contended(Coroutine* me, Place place) {
  if (!me || core_.holder() != token_of(*me)) {
    panicf("{} ({}) unlocked by {}{}{} at {}, which does not hold it; the holder is {:#x}", name_,
           fmt::ptr(this), me ? "coroutine '" : "nobody", me ? me->name() : "", me ? "'" : "",
           describe(place), core_.holder());
  }
  ROOST_PROBE(co_mutex_unlock_entry, this, me);
  me->lock_released();
  hand_on();
  ROOST_PROBE(co_mutex_unlock_return, this, me);
}

// REQUIRES: whoever is acted for holds the lock.
void CoMutex::hand_on() noexcept {
  const Core::Next next = core_.unlock();
  if (!next.waiter) return;
  Waiter& waiter = *static_cast<Waiter*>(next.waiter);
  if (next.owns) {
    note_holder_home(nullptr);
    waiter.co->lock_taken();
    count(counters_.handoffs);
    ROOST_PROBE(co_mutex_lock_return, this, waiter.co);
    wake_waiter(*waiter.co);
  } else {
    post_turn(waiter);
  }
}

void CoMutex::post_turn(Waiter& waiter) noexcept {
  CoContext& home = *waiter.co->home();
  ROOST_CHECK(home.post(waiter), "coroutine '{}' woken on the closed context '{}'",
              waiter.co->name(), home.name());
}

// On the waiter's home: it competes for the lock.
bool CoMutex::take_turn(CallbackEntry& entry) noexcept {
  auto& waiter = static_cast<Waiter&>(entry);
  CoMutex& mutex = *waiter.mutex;
  Coroutine& co = *waiter.co;
  mutex.spin_until_free(co.home());
  switch (mutex.core_.wait(waiter)) {
    case Core::Outcome::kQueued:
      count(mutex.counters_.defeats);
      return true;
    case Core::Outcome::kCancelled:
      count(mutex.counters_.cancelled_late);
      break;
    case Core::Outcome::kTaken:
      mutex.taken_by(co);
      ROOST_PROBE(co_mutex_lock_return, &mutex, &co);
      break;
  }
  wake_waiter(co);
  return true;
}

}  // namespace roost
