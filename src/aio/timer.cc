// SPDX-License-Identifier: MIT
#include "roost/aio/timer.h"

#include <algorithm>
#include <cerrno>
#include <limits>
#include <utility>

#include "roost/aio/aio_context.h"
#include "roost/aio/stop_relay.h"
#include "roost/base/check.h"
#include "roost/coro/may_wait.h"

namespace roost {

namespace {

std::int64_t after(const Clock& clock, std::int64_t delay_ns) noexcept {
  const std::int64_t now = clock.now_ns();
  constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();
  return delay_ns < kNever - now ? now + delay_ns : kNever;
}

}  // namespace

Timer::Timer(AioContext& context, std::function<void()> callback)
    : context_(context), callback_(std::make_shared<std::function<void()>>(std::move(callback))) {}

Timer::~Timer() { cancel(); }

void Timer::arm_at(std::int64_t deadline_ns) {
  ROOST_CHECK(AioContext::current() == &context_, "timer armed outside of its context '{}'",
              context_.name());
  context_.timers().arm(*this, deadline_ns);
}

void Timer::arm_after(std::int64_t delay_ns) { arm_at(after(context_.clock(), delay_ns)); }

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
  timer.deadline_ns_ = std::max(deadline_ns, earliest_ns_);
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
  // A timer that is armed meanwhile, for a moment that has passed, waits for the next iteration. It
  // counts as armed for now, and so stands behind all that are due: else one that is armed for the
  // past each time it fires would keep them from firing for ever.
  const std::uint64_t end = next_order_;
  const std::int64_t outer = std::exchange(earliest_ns_, now_ns);
  bool fired = false;
  while (!heap_.empty()) {
    Timer& timer = *heap_.front();
    if (timer.deadline_ns_ > now_ns || timer.order_ >= end) break;
    cancel(timer);
    auto callback = timer.callback_;
    (*callback)();
    fired = true;
  }
  earliest_ns_ = outer;
  return fired;
}

namespace {

// A wait for a moment, which a stop ends early.
class Sleep : public StopRelay {
 public:
  explicit Sleep(AioContext& home)
      : StopRelay(home, &cancel, &resume), timer_(home, [this] { end(); }) {}

  bool cancelled() const noexcept { return cancelled_; }

  void begin(std::int64_t deadline_ns) {
    co_ = Coroutine::self();
    timer_.arm_at(deadline_ns);
  }

 private:
  static void cancel(StopRelay& relay) noexcept {
    auto& self = static_cast<Sleep&>(relay);
    self.cancelled_ = true;
    if (!self.co_) return;  // requested before it began
    self.timer_.cancel();
    // It may be the stop callback itself that calls this.
    if (self.ended()) wake_waiter_later(*self.co_);
  }

  static void resume(StopRelay& relay) noexcept { wake_waiter(*static_cast<Sleep&>(relay).co_); }

  void end() noexcept {
    if (ended()) wake_waiter(*co_);
  }

  Timer timer_;
  Coroutine* co_ = nullptr;
  bool cancelled_ = false;
};

}  // namespace

Task<void> sleep_until(std::int64_t deadline_ns) {
  AioContext& home = *AioContext::current();
  if (deadline_ns <= home.clock().now_ns()) co_return;
  Coroutine* co = Coroutine::self();
  detail::check_may_wait(*co, "a timer");
  Timer timer(home, [co] { wake_waiter(*co); });
  timer.arm_at(deadline_ns);
  co_await suspend_waiting("a timer", PublishNothing{});
}

Task<void> sleep_for(std::int64_t delay_ns) {
  co_await sleep_until(after(AioContext::current()->clock(), delay_ns));
}

Task<Result<void>> sleep_until(std::int64_t deadline_ns, std::stop_token stop) {
  AioContext& home = *AioContext::current();
  if (stop.stop_requested()) co_return fail(ECANCELED, "sleep");
  if (deadline_ns <= home.clock().now_ns()) co_return Result<void>();
  Sleep sleep(home);
  sleep.watch(stop);
  if (!sleep.cancelled()) {
    detail::check_may_wait(*Coroutine::self(), "a timer");
    sleep.begin(deadline_ns);
    co_await suspend_waiting("a timer", PublishNothing{});
    sleep.forget();
  }
  if (sleep.cancelled()) co_return fail(ECANCELED, "sleep");
  co_return Result<void>();
}

Task<Result<void>> sleep_for(std::int64_t delay_ns, std::stop_token stop) {
  const std::int64_t deadline_ns = after(AioContext::current()->clock(), delay_ns);
  co_return co_await sleep_until(deadline_ns, std::move(stop));
}

}  // namespace roost
