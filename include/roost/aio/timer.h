// SPDX-License-Identifier: MIT
// Timers of a context, on the context's clock.
//
// Threads: home thread only (AioContext::run() helps others).
// Lifetime: a Timer may be destroyed at any time, armed or within its own callback. The context
// outlives it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <stop_token>
#include <vector>

#include "roost/base/result.h"
#include "roost/coro/task.h"

namespace roost {

class AioContext;

/// A callback at a moment of a context's clock. Home thread; arming and cancelling elsewhere
/// aborts.
class Timer {
 public:
  /// `callback` runs on the home thread, outside of any coroutine, and must not throw.
  Timer(AioContext& context, std::function<void()> callback);
  ~Timer();
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

  /// Calls the callback once, at or after `deadline_ns` of the context's clock. Arming again
  /// replaces the deadline.
  void arm_at(std::int64_t deadline_ns);
  /// As arm_at(), so long after now; at once, in the next iteration, if that is not positive; never
  /// if it is beyond what the clock can show.
  void arm_after(std::int64_t delay_ns);
  /// The callback is not called any more, unless it is armed again.
  void cancel() noexcept;
  /// Whether a call is due: not any more while the callback runs.
  bool armed() const noexcept { return position_ != kNotArmed; }

 private:
  friend class TimerQueue;
  static constexpr std::size_t kNotArmed = ~std::size_t{0};

  AioContext& context_;
  std::shared_ptr<std::function<void()>> callback_;  // shared: the timer may go while it runs
  std::int64_t deadline_ns_ = 0;
  std::uint64_t order_ = 0;           // equal deadlines fire in the order of arming
  std::size_t position_ = kNotArmed;  // in the queue's heap
};

/// For contexts: the armed timers of one. A binary heap whose timers know their positions.
class TimerQueue {
 public:
  /// For Timer, as its members say.
  void arm(Timer& timer, std::int64_t deadline_ns);
  void cancel(Timer& timer) noexcept;

  bool empty() const noexcept { return heap_.empty(); }

  /// REQUIRES: not empty.
  std::int64_t next_deadline_ns() const noexcept { return heap_.front()->deadline_ns_; }

  /// Fires what is due at `now_ns`, each timer at most once; true if something fired.
  bool run_due(std::int64_t now_ns);

 private:
  static bool before(const Timer& a, const Timer& b) noexcept;
  void place(Timer& timer, std::size_t position) noexcept;
  void sift_up(std::size_t position) noexcept;
  void sift_down(std::size_t position) noexcept;

  std::vector<Timer*> heap_;
  std::uint64_t next_order_ = 0;
  std::int64_t earliest_ns_ = std::numeric_limits<std::int64_t>::min();  // now, in run_due()
};

/// Suspends the current coroutine for `delay_ns` of its context's clock.
Task<void> sleep_for(std::int64_t delay_ns);
/// Until its context's clock shows `deadline_ns`.
Task<void> sleep_until(std::int64_t deadline_ns);

/// As above, and ends early, with ECANCELED, when `stop` is requested, by any thread. A sleep that
/// has ended has no other effect, so nothing is lost by cancelling it. Where the time is over
/// before the stop has come home, it has not been cancelled.
Task<Result<void>> sleep_for(std::int64_t delay_ns, std::stop_token stop);
Task<Result<void>> sleep_until(std::int64_t deadline_ns, std::stop_token stop);

}  // namespace roost
