// SPDX-License-Identifier: MIT
#include "roost/coro/gate.h"

namespace roost {

Gate::~Gate() {
  ROOST_CHECK(core_.in_flight() == 0 && !core_.has_waiters(),
              "gate '{}' destroyed with {} in flight{}", name_, core_.in_flight(),
              core_.has_waiters() ? " and somebody waiting for idleness" : "");
}

void Gate::open() noexcept {
  ROOST_CHECK(core_.open(), "gate '{}' opened more often than it was closed", name_);
}

void Gate::too_many() const noexcept {
  panicf("gate '{}' entered by more than {}", name_, Core::kMaxInFlight);
}

void Gate::finish_leaving(Core::Left left) noexcept {
  ROOST_CHECK(left.was_inside, "gate '{}' left by one who was not inside", name_);
  for (Core::Waiter* waiter = left.wake; waiter;) {
    Core::Waiter* const next = waiter->next();
    // The waiter, and the gate after the last one, may go once it is woken.
    wake_waiter_later(*static_cast<Waiter*>(waiter)->co);
    waiter = next;
  }
}

void Gate::Publish::operator()(Coroutine& co) const noexcept {
  if (!gate->core_.wait(*waiter)) wake_waiter(co);
}

void Gate::OnStop::operator()() const noexcept {
  // Only who took the waiter off its list may look into it: before that it may be being set up.
  if (gate->core_.stop(*waiter)) wake_waiter_later(*waiter->co);
}

}  // namespace roost
