// SPDX-License-Identifier: MIT
#include "roost/aio/timer.h"

#include "roost/aio/aio_context.h"
#include "roost/base/check.h"

namespace roost {

Timer::Timer(AioContext& context, std::function<void()> callback)
    : context_(context), callback_(std::make_shared<std::function<void()>>(std::move(callback))) {}

Timer::~Timer() { cancel(); }

void Timer::arm_at(std::int64_t deadline_ns) {
  ROOST_CHECK(AioContext::current() == &context_, "timer armed outside of its context '{}'",
              context_.name());
  context_.timers().arm(*this, deadline_ns);
}

void Timer::arm_after(std::int64_t delay_ns) { arm_at(context_.clock().now_ns() + delay_ns); }

void Timer::cancel() noexcept {
  if (!armed()) return;
  ROOST_CHECK(AioContext::current() == &context_, "timer cancelled outside of its context '{}'",
              context_.name());
  context_.timers().cancel(*this);
}

bool TimerQueue::before(const Timer& a, const Timer& b) noexcept {
  return a.deadline_ns_ != b.deadline_ns_ ? a.deadline_ns_ < b.deadline_ns_ : a.order_ < b.order_;
}

void TimerQueue::place(Timer& timer, std::size_t position) noexcept {
  heap_[position] = &timer;
  timer.position_ = position;
}

void TimerQueue::sift_up(std::size_t position) noexcept {
  Timer& timer = *heap_[position];
  while (position > 0) {
    const std::size_t parent = (position - 1) / 2;
    if (!before(timer, *heap_[parent])) break;
    place(*heap_[parent], position);
    position = parent;
  }
  place(timer, position);
}

void TimerQueue::sift_down(std::size_t position) noexcept {
  Timer& timer = *heap_[position];
  for (;;) {
    std::size_t child = 2 * position + 1;
    if (child >= heap_.size()) break;
    if (child + 1 < heap_.size() && before(*heap_[child + 1], *heap_[child])) ++child;
    if (!before(*heap_[child], timer)) break;
    place(*heap_[child], position);
    position = child;
  }
  place(timer, position);
}

void TimerQueue::arm(Timer& timer, std::int64_t deadline_ns) {
  cancel(timer);
  timer.deadline_ns_ = deadline_ns;
  timer.order_ = next_order_++;
  heap_.push_back(&timer);
  timer.position_ = heap_.size() - 1;
  sift_up(timer.position_);
}

void TimerQueue::cancel(Timer& timer) noexcept {
  if (!timer.armed()) return;
  const std::size_t hole = timer.position_;
  Timer& last = *heap_.back();
  heap_.pop_back();
  timer.position_ = Timer::kNotArmed;
  if (&last == &timer) return;
  place(last, hole);
  sift_up(hole);
  sift_down(last.position_);
}

bool TimerQueue::run_due(std::int64_t now_ns) {
  // A timer that arms itself again for a moment that has passed waits for the next iteration.
  const std::uint64_t end = next_order_;
  bool fired = false;
  while (!heap_.empty()) {
    Timer& timer = *heap_.front();
    if (timer.deadline_ns_ > now_ns || timer.order_ >= end) break;
    cancel(timer);
    auto callback = timer.callback_;
    (*callback)();
    fired = true;
  }
  return fired;
}

Task<void> sleep_for(std::int64_t delay_ns) {
  if (delay_ns <= 0) co_return;
  Coroutine* co = Coroutine::self();
  Timer timer(*AioContext::current(), [co] { wake_waiter(*co); });
  timer.arm_after(delay_ns);
  co_await suspend_waiting("a timer", PublishNothing{});
}

}  // namespace roost
