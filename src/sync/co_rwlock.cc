// SPDX-License-Identifier: MIT
#include "roost/sync/co_rwlock.h"

#include <fmt/format.h>

#include "roost/base/check.h"

namespace roost {

CoRwlock::~CoRwlock() {
  queue_.ask([this](const State& state) {
    ROOST_CHECK(!state.writing && state.readers == 0, "{} ({}) destroyed while it is held", name(),
                fmt::ptr(this));
  });
}

CoRwlock::Guard CoRwlock::try_lock(std::uint64_t kind) {
  Coroutine* const me = Coroutine::self();
  if (!me || !queue_.try_enter(address_of(*me) | kind)) return {};
  return Guard(*this, *me, kind == kWrite);
}

CoRwlock::Guard CoRwlock::try_read() { return try_lock(kRead); }
CoRwlock::Guard CoRwlock::try_write() { return try_lock(kWrite); }

// False: another reader is upgrading.
bool CoRwlock::begin_upgrade() noexcept {
  bool mine = false;
  queue_.change([&mine](State& state) { mine = !std::exchange(state.upgrading, true); });
  return mine;
}

void CoRwlock::check_not_writer(const Coroutine& co) const {
  const Coroutine* writer = queue_.ask([](const State& state) { return state.writer; });
  ROOST_CHECK(writer != &co, "{} ({}) asked for by coroutine '{}', which holds it for writing",
              name(), fmt::ptr(this), co.name());
}

void CoRwlock::waits_for_itself(std::uint64_t address, const char* name) {
  const auto* co = reinterpret_cast<const Coroutine*>(address);
  panicf("{} asked for by coroutine '{}', which is its only reader and would wait for itself", name,
         co->name());
}

CoRwlock::Guard::Guard(CoRwlock& lock, Coroutine& co, bool writing) noexcept
    : lock_(&lock), co_(&co), writing_(writing) {
  if (writing) lock.queue_.change([&co](State& state) { state.writer = &co; });
  co.lock_taken();
}

void CoRwlock::Guard::check_holder(const char* what) const {
  const Coroutine* const me = Coroutine::self();
  ROOST_CHECK(lock_ && me == co_, "{} {} by {} '{}', which does not hold it",
              lock_ ? lock_->name() : "an empty guard of a read-write lock", what,
              me ? "coroutine" : "nobody", me ? me->name() : "");
}

void CoRwlock::Guard::unlock() {
  if (!lock_) return;
  check_holder("unlocked");
  co_->lock_released();
  std::exchange(lock_, nullptr)
      ->queue_.change([writing = writing_, address = address_of(*co_)](State& state) {
        if (writing) {
          state.writing = false;
          state.writer = nullptr;
        } else {
          --state.readers;
          state.reader_sum -= address;
        }
      });
}

void CoRwlock::Guard::downgrade() {
  check_holder("downgraded");
  ROOST_CHECK(writing_, "{} downgraded by coroutine '{}', which holds it for reading",
              lock_->name(), co_->name());
  writing_ = false;
  lock_->queue_.change([address = address_of(*co_)](State& state) {
    state.writing = false;
    state.writer = nullptr;
    state.readers = 1;
    state.reader_sum = address;
  });
}

}  // namespace roost
