// SPDX-License-Identifier: MIT
// How far a long work is: a bar on a terminal, or lines of JSON, on standard error.
//
// Threads: made and destroyed on the main context, in a coroutine; what it counts is changed by
// any.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "roost/aio/timer.h"

namespace roost::cli {

enum class ProgressStyle : std::uint8_t { kAuto, kNone, kBar, kJson };

/// Shows the counter from time to time while it lives, and once more at its end.
class Progress {
 public:
  /// `what` is a word or two, `total` is in bytes. kAuto: a bar if standard error is a terminal.
  Progress(AioContext& context, std::string what, std::uint64_t total, ProgressStyle style);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  std::atomic<std::uint64_t>* counter() noexcept { return &done_; }

 private:
  void show(bool last);

  AioContext& context_;
  const std::string what_;
  const std::uint64_t total_;
  const ProgressStyle style_;
  const std::int64_t began_ns_;
  std::atomic<std::uint64_t> done_{0};
  Timer timer_;
};

/// "1.5 GiB".
std::string human_size(double bytes);

}  // namespace roost::cli
