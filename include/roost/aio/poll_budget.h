// SPDX-License-Identifier: MIT
// How many threads of this process may busy-wait: none that would take a CPU from one with work.
//
// Threads: any; all operations are relaxed counts, since a stale value only costs time.
// Lifetime: outlives the contexts that use it.
#pragma once

#include <atomic>

namespace roost {

/// A count of the threads that are awake, and of the CPUs.
class PollBudget {
 public:
  /// `cpus`: how many CPUs the process may use.
  explicit PollBudget(int cpus) noexcept : cpus_(cpus) {}

  /// Of the whole process, from its CPU affinity when first asked.
  static PollBudget& of_process();

  /// A context's thread counts as awake from the end of one blocking wait to the next.
  void woke() noexcept { awake_.fetch_add(1, std::memory_order_relaxed); }
  void sleeps() noexcept { awake_.fetch_sub(1, std::memory_order_relaxed); }

  /// Whether an awake thread may busy-wait: there are other CPUs, and no more threads awake
  /// than CPUs.
  bool may_spin() const noexcept {
    return cpus_ > 1 && awake_.load(std::memory_order_relaxed) <= cpus_;
  }

 private:
  const int cpus_;
  std::atomic<int> awake_{0};
};

}  // namespace roost
