// SPDX-License-Identifier: MIT
// What roost_sim_test puts in the place of RealPlatform's atomics: the same, but each operation,
// and each step of a busy wait, is a moment at which the simulation may switch to another thread.
// So the races within the lock-free code of the runtime are simulated too.
//
// Threads: one, the simulation's.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <utility>

namespace roost {

/// What a simulation does for the code that is compiled with this; null while none runs.
struct InterruptHooks {
  /// Called before each operation.
  void (*interrupt)() noexcept = nullptr;
  /// Called where it matters that others get several turns.
  void (*stall)() noexcept = nullptr;
  /// Called when the simulated thread whose turn it is begins to keep it, and when that ends.
  void (*keep_turn)(bool begins) noexcept = nullptr;
  /// One step of a wait that only others can end, and all of a wait until `over` is set.
  void (*let_others_run)() noexcept = nullptr;
  void (*wait_until)(const char* what, const bool& over) noexcept = nullptr;
  /// Who runs: a simulated thread, or null for whoever drives them.
  const void* (*current_thread)() noexcept = nullptr;
  /// Another simulated thread, and something that happens later.
  void (*start_thread)(std::function<void()> body) = nullptr;
  void (*call_after)(std::int64_t delay_ns, std::function<void()> action) = nullptr;
};
inline InterruptHooks interrupt_hooks;

/// Counts the reasons to keep the turn: mutexes that are held, and stops, where they are one step.
inline int uninterruptible = 0;

inline void keep_turn() noexcept {
  if (uninterruptible++ == 0 && interrupt_hooks.keep_turn) interrupt_hooks.keep_turn(true);
}
inline void stop_keeping_turn() noexcept {
  if (--uninterruptible == 0 && interrupt_hooks.keep_turn) interrupt_hooks.keep_turn(false);
}

inline void maybe_interrupt() noexcept {
  if (interrupt_hooks.interrupt && uninterruptible == 0) interrupt_hooks.interrupt();
}

inline void maybe_stall() noexcept {
  if (interrupt_hooks.stall && uninterruptible == 0) interrupt_hooks.stall();
}

/// Who has to wait for others lets them run, whatever it holds: they may find it locked then.
class TurnGivenUp {
 public:
  TurnGivenUp() noexcept : kept_(std::exchange(uninterruptible, 0)) {
    if (kept_ > 0 && interrupt_hooks.keep_turn) interrupt_hooks.keep_turn(false);
  }
  ~TurnGivenUp() {
    uninterruptible = kept_;
    if (kept_ > 0 && interrupt_hooks.keep_turn) interrupt_hooks.keep_turn(true);
  }
  TurnGivenUp(const TurnGivenUp&) = delete;
  TurnGivenUp& operator=(const TurnGivenUp&) = delete;

 private:
  const int kept_;
};

inline void let_others_run() noexcept {
  const TurnGivenUp given_up;
  if (!interrupt_hooks.let_others_run) std::abort();  // they cannot
  interrupt_hooks.let_others_run();
}

inline void wait_until(const char* what, const bool& over) noexcept {
  if (over) return;
  const TurnGivenUp given_up;
  if (!interrupt_hooks.wait_until) std::abort();  // nobody can end it
  while (!over) interrupt_hooks.wait_until(what, over);
}

/// Whoever holds it keeps the turn: what it guards is one step of the simulation, and it is found
/// locked only where its holder has to wait for others.
class InterruptibleMutex {
 public:
  void lock() noexcept {
    maybe_interrupt();
    wait_until("a mutex", free_);
    free_ = false;
    keep_turn();
  }
  bool try_lock() noexcept {
    maybe_interrupt();
    if (!free_) return false;
    free_ = false;
    keep_turn();
    return true;
  }
  void unlock() noexcept {
    free_ = true;
    stop_keeping_turn();
    maybe_interrupt();
  }

 private:
  bool free_ = true;
};

/// Its holder may lose the turn, as the holder of a mutex may lose its CPU: others wait for it in
/// simulated time.
class PreemptibleMutex {
 public:
  void lock() noexcept {
    maybe_interrupt();
    wait_until("a thread mutex", free_);
    free_ = false;
    maybe_interrupt();
  }
  bool try_lock() noexcept {
    maybe_interrupt();
    return std::exchange(free_, false);
  }
  void unlock() noexcept {
    maybe_interrupt();
    free_ = true;
    maybe_interrupt();
  }

 private:
  bool free_ = true;
};

template <class T>
class InterruptibleAtomic {
 public:
  using Order = std::memory_order;

  InterruptibleAtomic() noexcept = default;
  constexpr InterruptibleAtomic(T value) noexcept : value_(value) {}
  InterruptibleAtomic(const InterruptibleAtomic&) = delete;
  InterruptibleAtomic& operator=(const InterruptibleAtomic&) = delete;

  T load(Order order = Order::seq_cst) const noexcept { return before().load(order); }
  void store(T value, Order order = Order::seq_cst) noexcept { before().store(value, order); }
  T exchange(T value, Order order = Order::seq_cst) noexcept {
    return before().exchange(value, order);
  }
  template <class... Orders>
  bool compare_exchange_weak(T& expected, T value, Orders... orders) noexcept {
    // On one machine it fails now and then without reason, on another never: never, to be sure.
    return before().compare_exchange_strong(expected, value, orders...);
  }
  template <class... Orders>
  bool compare_exchange_strong(T& expected, T value, Orders... orders) noexcept {
    return before().compare_exchange_strong(expected, value, orders...);
  }
  template <class V>
  T fetch_add(V value, Order order = Order::seq_cst) noexcept {
    return before().fetch_add(value, order);
  }
  template <class V>
  T fetch_sub(V value, Order order = Order::seq_cst) noexcept {
    return before().fetch_sub(value, order);
  }
  T fetch_or(T value, Order order = Order::seq_cst) noexcept {
    return before().fetch_or(value, order);
  }
  T fetch_and(T value, Order order = Order::seq_cst) noexcept {
    return before().fetch_and(value, order);
  }
  T fetch_xor(T value, Order order = Order::seq_cst) noexcept {
    return before().fetch_xor(value, order);
  }

 private:
  std::atomic<T>& before() noexcept {
    maybe_interrupt();
    return value_;
  }
  const std::atomic<T>& before() const noexcept {
    maybe_interrupt();
    return value_;
  }

  std::atomic<T> value_;
};

}  // namespace roost
