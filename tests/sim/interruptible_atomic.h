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

/// Counts the mutexes held by the simulated thread whose turn it is, which keeps it meanwhile.
inline int uninterruptible = 0;

inline void maybe_interrupt() noexcept {
  if (interrupt_hook && uninterruptible == 0) interrupt_hook();
}

/// A mutex that is never found locked: what it guards is one step of the simulation.
class InterruptibleMutex {
 public:
  void lock() noexcept {
    maybe_interrupt();
    ++uninterruptible;
  }
  bool try_lock() noexcept {
    lock();
    return true;
  }
  void unlock() noexcept {
    --uninterruptible;
    maybe_interrupt();
  }
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
