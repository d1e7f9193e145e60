// SPDX-License-Identifier: MIT
// Bottom half: a callback that a context runs in its next iteration.
//
// Threads: schedule(), schedule_idle(), cancel() and destruction from any thread; the callback runs
// on the context's home thread, outside of any coroutine.
// Lifetime: may be destroyed at any time, scheduled or running, from its own callback too; the
// callback object is then destroyed in a later iteration. After destruction, or cancel() on the
// home thread, the callback is not started any more. The context outlives it.
#pragma once

#include <cstdint>
#include <functional>

#include "roost/base/platform.h"
#include "roost/coro/queue_entry.h"

namespace roost {

class AioContext;

/// What a bottom half is to do next, as bits of one atomic.
///
///   bit        set by                        cleared by
///   queued     whoever enqueues the entry    the home thread, when its turn comes
///   scheduled  schedule, schedule_idle       the home thread at its turn; cancel
///   idle       schedule_idle                 the home thread at its turn
///   deleted    the destructor                nobody: the home thread frees it at its turn
///
/// The one that finds `queued` clear owns the entry and enqueues it; so an entry stands in one
/// queue at a time, and everybody else's schedule is coalesced with it.
template <Platform P>
class BottomHalfFlags {
 public:
  static constexpr std::uint64_t kQueued = 1;
  static constexpr std::uint64_t kScheduled = 2;
  static constexpr std::uint64_t kIdle = 4;
  static constexpr std::uint64_t kDeleted = 8;

  /// Returns what stood there before. Without kQueued in it, the caller must enqueue the entry.
  std::uint64_t request(std::uint64_t bits) noexcept {
    // Release: the callback sees what the scheduler did before, also when it is coalesced.
    return flags_.fetch_or(bits | kQueued, std::memory_order_acq_rel);
  }

  void cancel() noexcept { flags_.fetch_and(~kScheduled, std::memory_order_relaxed); }

  /// The turn of the entry: what is to be done now. From here it may be enqueued again.
  std::uint64_t take() noexcept {
    // Acquire pairs with the release in request().
    return flags_.fetch_and(~(kQueued | kScheduled | kIdle), std::memory_order_acq_rel);
  }

  std::uint64_t peek() const noexcept { return flags_.load(std::memory_order_acquire); }

 private:
  typename P::template Atomic<std::uint64_t> flags_{0};
};

/// A callback of a context; the file's head says who may do what with it.
class BottomHalf {
 public:
  /// Any thread. `callback` must not throw.
  BottomHalf(AioContext& context, std::function<void()> callback);
  ~BottomHalf();
  BottomHalf(const BottomHalf&) = delete;
  BottomHalf& operator=(const BottomHalf&) = delete;

  /// Runs the callback once in the next iteration, however often it is scheduled before.
  void schedule();

  /// As schedule(), but it is no reason not to sleep (for longer than 10 ms) and no progress.
  void schedule_idle();

  /// Takes a schedule back. On the home thread the callback is not started any more; elsewhere it
  /// may just be running.
  void cancel();

 private:
  friend class AioContext;
  struct Core;
  Core* core_;
};

/// Runs `callback` once in the next iteration of `context`. Any thread. Aborts if the context is
/// closed.
void schedule_oneshot(AioContext& context, std::function<void()> callback);

}  // namespace roost
