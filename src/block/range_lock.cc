// SPDX-License-Identifier: MIT
#include "block/range_lock.h"

#include <utility>

#include "roost/base/check.h"

namespace roost {

RangeLock::~RangeLock() { ROOST_CHECK(!first_, "a lock of ranges goes while one is held"); }

bool RangeLock::may_be_granted(const Range& range) noexcept {
  for (const Range* other = range.earlier_; other; other = other->earlier_) {
    if (range.conflicts_with(*other)) return false;
  }
  return true;
}

// True: the range is held. False: it stands in line.
bool RangeLock::enter(Range& range) noexcept {
  std::lock_guard lock(mutex_);
  ROOST_CHECK(!range.lock_, "a range is acquired twice");
  range.lock_ = this;
  range.earlier_ = last_;
  (last_ ? last_->later_ : first_) = &range;
  last_ = &range;
  exclusive_ += range.exclusive_;
  range.granted_ = exclusive_ == 0 || may_be_granted(range);
  waiting_ += !range.granted_;
  return range.granted_;
}

// It may have been granted since enter().
void RangeLock::wait(Range& range, Coroutine& co) noexcept {
  {
    std::lock_guard lock(mutex_);
    if (!range.granted_) {
      range.waiter_ = &co;
      return;
    }
  }
  wake_waiter(co);
}

void RangeLock::release(Range& range) noexcept {
  Range* to_wake = nullptr;
  Range** end = &to_wake;
  {
    std::lock_guard lock(mutex_);
    (range.earlier_ ? range.earlier_->later_ : first_) = range.later_;
    (range.later_ ? range.later_->earlier_ : last_) = range.earlier_;
    range.lock_ = nullptr;
    exclusive_ -= range.exclusive_;
    for (Range* other = range.later_; other && waiting_ > 0; other = other->later_) {
      if (other->granted_ || !may_be_granted(*other)) continue;
      other->granted_ = true;
      --waiting_;
      if (!other->waiter_) continue;  // it is about to suspend, and will see
      *end = other;
      end = &other->next_to_wake_;
    }
  }
  // A coroutine that was woken may be gone, and its range with it.
  while (Range* const next = to_wake) {
    to_wake = next->next_to_wake_;
    wake_waiter(*next->waiter_);
  }
}

}  // namespace roost
