// SPDX-License-Identifier: MIT
#include "roost/base/clock.h"

#include <ctime>

namespace roost {

namespace {

class MonotonicClock final : public Clock {
 public:
  std::int64_t now_ns() const noexcept override {
    timespec now;
    ::clock_gettime(CLOCK_MONOTONIC, &now);  // through the vDSO: no system call
    return std::int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
  }
};

}  // namespace

const Clock& real_clock() noexcept {
  static const MonotonicClock clock;
  return clock;
}

}  // namespace roost
