// SPDX-License-Identifier: MIT
// Time, passed in so that tests can own it.
//
// Threads: now_ns() from any thread.
#pragma once

#include <cstdint>

namespace roost {

/// Lifetime: outlives the contexts that were given it.
class Clock {
 public:
  /// Nanoseconds since some fixed moment; never goes back.
  virtual std::int64_t now_ns() const noexcept = 0;

 protected:
  ~Clock() = default;
};

/// CLOCK_MONOTONIC.
const Clock& real_clock() noexcept;

/// Time that stands still until it is told to go on. For tests; one thread at a time.
class ManualClock final : public Clock {
 public:
  std::int64_t now_ns() const noexcept override { return now_ns_; }
  void advance_ns(std::int64_t by) noexcept { now_ns_ += by; }

 private:
  std::int64_t now_ns_ = 0;
};

}  // namespace roost
