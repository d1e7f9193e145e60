// SPDX-License-Identifier: MIT
// What roost_sim_test puts into the standard library's stop tokens. They tell threads apart by
// their id, which all simulated threads share, and the destructor of a std::stop_callback blocks
// its thread while the callback runs on another.
//
// Threads: one, the simulation's.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "interruptible_atomic.h"

namespace roost {

/// The id of a thread, to a stop token.
struct StopThreadId {
  const void* thread = nullptr;

  static StopThreadId current() noexcept {
    return {interrupt_hooks.current_thread ? interrupt_hooks.current_thread() : nullptr};
  }
  friend bool operator==(const StopThreadId&, const StopThreadId&) = default;
};

/// An atomic of a stop state: an InterruptibleAtomic that notices when it is used after it has
/// gone. A stop that is interrupted between two of its callbacks may find itself there.
template <class T>
class StopAtomic {
 public:
  using Order = std::memory_order;

  StopAtomic(T value) noexcept : value_(value) {}
  ~StopAtomic() { alive_ = 0; }
  StopAtomic(const StopAtomic&) = delete;
  StopAtomic& operator=(const StopAtomic&) = delete;

  T load(Order order) noexcept { return before().load(order); }
  T fetch_add(T value, Order order) noexcept { return before().fetch_add(value, order); }
  T fetch_sub(T value, Order order) noexcept { return before().fetch_sub(value, order); }
  bool compare_exchange_weak(T& expected, T value, Order success, Order failure) noexcept {
    return before().compare_exchange_strong(expected, value, success, failure);
  }

 private:
  static constexpr std::uint32_t kAlive = 0x600d'600d;

  std::atomic<T>& before() noexcept {
    maybe_interrupt();
    if (alive_ != kAlive) {
      std::fputs("a stop state was used after it had gone\n", stderr);
      std::abort();
    }
    return value_;
  }

  std::atomic<T> value_;
  volatile std::uint32_t alive_ = kAlive;  // volatile: it is read after its end
};

/// How often the owner of a stop_callback had to wait for it: it was running, interrupted, on
/// another thread.
inline std::uint64_t stop_callbacks_awaited = 0;

/// The end of a callback, which one thread waits for.
class StopSemaphore {
 public:
  explicit StopSemaphore(int units) noexcept : released_(units > 0) {}
  void release() noexcept;
  void acquire() noexcept;

 private:
  bool released_;
};

/// Set: nobody else runs from a stop's request to its end. To see what is found only because stops
/// are interrupted.
inline bool stops_in_one_step = false;

class StopInOneStep {
 public:
  StopInOneStep() noexcept {
    if (stops_in_one_step) keep_turn();
  }
  ~StopInOneStep() {
    if (stops_in_one_step) stop_keeping_turn();
  }
  StopInOneStep(const StopInOneStep&) = delete;
  StopInOneStep& operator=(const StopInOneStep&) = delete;
};

}  // namespace roost
