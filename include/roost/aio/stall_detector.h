// SPDX-License-Identifier: MIT
// StallDetector: says which coroutine, or callback, keeps a context from serving its descriptors.
//
//   StallDetector stalls({.threshold_ns = 100'000'000});
//   IOThread thread({.name = "iothread0", .stall_detector = &stalls});
//
// A thread of its own looks at the contexts a few times in each threshold. To one that is at work
// and has not got on for that long it sends a signal, SIGURG, whose handler writes the context's
// name, the running coroutine with its await chain, and the stack of the thread. A stall is
// reported once. A context that sleeps, waits busily or for its lock, or that nobody polls, does
// not stall.
//
// The signal makes some system calls of a thread that stalls fail with EINTR (signal(7)); others
// are restarted. SIGURG is ignored by default, and its handler stays when the detector goes, so
// that a late one does no harm. A thread that blocks SIGURG is not reported.
//
// Threads: look() from any one thread at a time; reports() from any.
// Lifetime: outlives the contexts that were given it.
#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "roost/aio/activity.h"
#include "roost/base/clock.h"

namespace roost {

class StallWatch;

class StallDetector {
 public:
  struct Options {
    std::int64_t threshold_ns = 500'000'000;
    /// Where reports are written.
    int fd = 2;
    const Clock* clock = &real_clock();
    /// Without, somebody has to call look().
    bool own_thread = true;
  };

  explicit StallDetector(Options options);
  ~StallDetector();
  StallDetector(const StallDetector&) = delete;
  StallDetector& operator=(const StallDetector&) = delete;

  /// How often it has to look.
  std::int64_t period_ns() const noexcept { return period_ns_; }

  /// Looks at every context, and asks those that stall for a report.
  void look();

  /// How many have been written.
  std::uint64_t reports() const noexcept { return reports_.load(std::memory_order_acquire); }

 private:
  friend class StallWatch;

  void run();

  const Options options_;
  const std::int64_t period_ns_;
  std::atomic<std::uint64_t> reports_{0};

  std::mutex mutex_;  // guards everything below
  std::vector<StallWatch*> watches_;
  std::int64_t last_look_ns_;
  bool stopping_ = false;
  std::condition_variable stop_requested_;
  std::thread thread_;
};

/// What the detector knows of one context. For contexts.
class StallWatch {
 public:
  /// `name` and `activity` outlive it.
  StallWatch(StallDetector& detector, const std::string& name, const Activity& activity);
  ~StallWatch();
  StallWatch(const StallWatch&) = delete;
  StallWatch& operator=(const StallWatch&) = delete;

  /// The outermost poll begins, and ends, on this thread.
  void enter();
  void leave() noexcept;

 private:
  friend class StallDetector;

  static void handle_signal(int) noexcept;
  void look(std::int64_t passed_ns) noexcept;
  void report() noexcept;

  StallDetector& detector_;
  const std::string& name_;
  const Activity& activity_;

  // The home thread, its signal handler included.
  StallWatch* outer_ = nullptr;  // the context whose callback polls this one

  // Guarded by the detector's mutex. While a thread is entered, it cannot end: for leave() it needs
  // the mutex.
  bool entered_ = false;
  pthread_t polled_by_{};
  std::uint64_t seen_ = 0;         // the activity at the last look
  std::int64_t unchanged_ns_ = 0;  // for how long it has been that, at work
  bool asked_ = false;             // for a report of this stall

  // Set by the detector before it signals, taken by the handler. 0: nothing is asked for.
  std::atomic<std::uint64_t> report_on_{0};  // the activity that it has seen
  std::atomic<std::int64_t> report_ns_{0};   // and for how long
};

}  // namespace roost
