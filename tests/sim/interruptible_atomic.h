// SPDX-License-Identifier: MIT
// What roost_sim_test puts in the place of RealPlatform's atomics: the same, but each operation,
// and each step of a busy wait, is a moment at which the simulation may switch to another thread.
// So the races within the lock-free code of the runtime are simulated too.
//
// Threads: one, the simulation's.
#pragma once

#include <atomic>

namespace roost {

/// Called before each operation while a simulation runs; null otherwise.
using InterruptHook = void (*)() noexcept;
inline InterruptHook interrupt_hook = nullptr;

/// Called when the simulated thread whose turn it is begins to keep it, and when that ends.
using KeepTurnHook = void (*)(bool begins) noexcept;
inline KeepTurnHook keep_turn_hook = nullptr;

/// Counts the reasons for that: mutexes that are held, and stops whose callbacks run.
inline int uninterruptible = 0;

inline void keep_turn() noexcept {
  if (uninterruptible++ == 0 && keep_turn_hook) keep_turn_hook(true);
}
inline void stop_keeping_turn() noexcept {
  if (--uninterruptible == 0 && keep_turn_hook) keep_turn_hook(false);
}

inline void maybe_interrupt() noexcept {
  if (interrupt_hook && uninterruptible == 0) interrupt_hook();
}

/// A mutex that is never found locked: what it guards is one step of the simulation.
class InterruptibleMutex {
 public:
  void lock() noexcept {
    maybe_interrupt();
    keep_turn();
  }
  bool try_lock() noexcept {
    lock();
    return true;
  }
  void unlock() noexcept {
    stop_keeping_turn();
    maybe_interrupt();
  }
};

/// What stands around the library's stops: see Simulation::Undisturbed.
class Uninterrupted {
 public:
  Uninterrupted() noexcept { keep_turn(); }
  ~Uninterrupted() { stop_keeping_turn(); }
  Uninterrupted(const Uninterrupted&) = delete;
  Uninterrupted& operator=(const Uninterrupted&) = delete;
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
