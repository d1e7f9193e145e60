// SPDX-License-Identifier: MIT
// Whether a context is at work, and gets on: one word that its loop writes anyway, for a
// StallDetector to look at.
//
// Threads: written by the home thread; word() from any thread.
#pragma once

#include <atomic>
#include <cstdint>

namespace roost {

class Activity {
 public:
  /// Callbacks and coroutines may run from here on.
  void works() noexcept { set((word() + kStep) | kWorking); }
  /// Nothing runs until works(): nobody polls, or the poll waits.
  void rests() noexcept { set((word() + kStep) & ~kWorking); }
  /// It works, and has just served its descriptors.
  void gets_on() noexcept { set(word() + kStep); }

  /// Differs from the one seen before if the context has got on, or rested, since.
  std::uint64_t word() const noexcept { return word_.load(std::memory_order_relaxed); }
  static bool works(std::uint64_t word) noexcept { return word & kWorking; }

 private:
  static constexpr std::uint64_t kWorking = 1;
  static constexpr std::uint64_t kStep = 2;

  // Relaxed: it publishes nothing, and a watcher that sees a stale word looks again.
  void set(std::uint64_t word) noexcept { word_.store(word, std::memory_order_relaxed); }

  // The bit kWorking, and a count of changes above it. Written by the home thread alone.
  std::atomic<std::uint64_t> word_{0};
};

}  // namespace roost
