// SPDX-License-Identifier: MIT
// The Platform of the model checker: Roost's lock-free headers, as they ship, on Relacy's atomics.
//
// Relacy runs the threads of a test as fibers of one thread, changes between them at each atomic
// operation, lets loads see old values where the memory orders allow it, and reports races of plain
// variables, deadlocks, livelocks, leaks and accesses to freed memory.
//
// Its headers turn `new`, `delete`, `malloc`, `assert`, `errno`, `$` and the names of the memory
// orders into macros. This header takes that back, so it is included before any header of Roost.
//
// Threads: Relacy's share one set of thread-locals; models use none.
#pragma once

// What the shipped headers and the models include of the standard library, before the macros.
#include <atomic>
#include <concepts>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <source_location>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#pragma push_macro("new")
#pragma push_macro("delete")
#pragma push_macro("malloc")
#pragma push_macro("calloc")
#pragma push_macro("realloc")
#pragma push_macro("free")
#pragma push_macro("assert")
#pragma push_macro("errno")
// A model that is not deterministic stops instead of leading the search astray.
#define RL_DO_ASSERT 1
#include <relacy/relacy.hpp>
#pragma pop_macro("errno")
#pragma pop_macro("assert")
#pragma pop_macro("free")
#pragma pop_macro("realloc")
#pragma pop_macro("calloc")
#pragma pop_macro("malloc")
#pragma pop_macro("delete")
#pragma pop_macro("new")
#undef memory_order_relaxed
#undef memory_order_consume
#undef memory_order_acquire
#undef memory_order_release
#undef memory_order_acq_rel
#undef memory_order_seq_cst
#undef VAR
#undef VAR_T
#undef TLS_T
#undef $

#include "roost/base/platform.h"

namespace roost::model {

inline rl::debug_info here(const std::source_location& at) {
  return rl::debug_info(at.function_name(), at.file_name(), at.line());
}

/// What cpu_relax() is. kYield: the thread stands back until others made a step, which a loop that
/// waits for another thread needs in order to end. kNothing: for loops that end by themselves; it
/// leaves more schedules to be tried.
enum class Pause : std::uint8_t { kYield, kNothing };

template <Pause pause>
struct RelacyPlatform {
  /// The operations of std::atomic that Roost uses; a memory order has to be given.
  template <class T>
  class Atomic {
    static_assert(sizeof(T) == 8 || std::is_same_v<T, bool>,
                  "Relacy's atomics are words and pointers");
    using At = std::source_location;

   public:
    Atomic(T value) : value_(value) {}
    Atomic(const Atomic&) = delete;
    Atomic& operator=(const Atomic&) = delete;

    T load(std::memory_order order, At at = At::current()) const {
      step();
      return value_.load(mapped(order), here(at));
    }
    void store(T value, std::memory_order order, At at = At::current()) {
      step();
      value_.store(value, mapped(order), here(at));
    }
    T exchange(T value, std::memory_order order, At at = At::current()) {
      step();
      return value_.exchange(value, mapped(order), here(at));
    }
    bool compare_exchange_weak(T& expected, T value, std::memory_order success,
                               std::memory_order failure, At at = At::current()) {
      return compare_exchange<true>(expected, value, success, failure, at);
    }
    bool compare_exchange_strong(T& expected, T value, std::memory_order success,
                                 std::memory_order failure, At at = At::current()) {
      return compare_exchange<false>(expected, value, success, failure, at);
    }
    T fetch_add(T value, std::memory_order order, At at = At::current()) {
      step();
      return value_.fetch_add(value, mapped(order), here(at));
    }
    T fetch_sub(T value, std::memory_order order, At at = At::current()) {
      step();
      return value_.fetch_sub(value, mapped(order), here(at));
    }
    T fetch_or(T value, std::memory_order order, At at = At::current()) {
      step();
      return value_.fetch_or(value, mapped(order), here(at));
    }
    T fetch_and(T value, std::memory_order order, At at = At::current()) {
      step();
      return value_.fetch_and(value, mapped(order), here(at));
    }

    /// The newest value, for what stands for the kernel. Not a step.
    T newest() const { return value_.debug_value(); }

   private:
    template <bool weak>
    bool compare_exchange(T& expected, T value, std::memory_order success,
                          std::memory_order failure, const At& at) {
      step();
      // A compare-and-swap that fails is a load, and may have seen an old value. Relacy's sees the
      // newest. So in a random search each now and then begins with a load of its own.
      if (rl::ctx().is_random_sched() && rl::rand(4) == 0) {
        const T seen = value_.load(mapped(failure), here(at));
        if (seen != expected) {
          expected = seen;
          return false;
        }
      }
      // Relacy wants failure to be no more than success. An acquire fence makes up for it (and for
      // earlier relaxed loads of the thread too, so it is a little more than what is written).
      const bool fence =
          success == std::memory_order_release && failure == std::memory_order_acquire;
      const bool done =
          value_.compare_exchange(rl::bool_t<weak>(), expected, value, mapped(success),
                                  fence ? rl::mo_relaxed : mapped(failure), here(at));
      if (fence && !done) rl::ctx().atomic_thread_fence_acquire();
      return done;
    }

    rl::atomic<T> value_;
  };

  /// A plain variable; Relacy reports accesses to it that nothing orders.
  template <class T>
  class Shared {
    using At = std::source_location;

   public:
    Shared() : value_(T{}) {}
    explicit Shared(T value) : value_(value) {}
    Shared(const Shared&) = delete;
    Shared& operator=(const Shared&) = delete;
    T get(At at = At::current()) const { return value_(here(at)).load(); }
    void set(T value, At at = At::current()) { value_(here(at)).store(value); }

   private:
    rl::var<T> value_;
  };

  /// As std::mutex.
  class Mutex {
   public:
    void lock(std::source_location at = std::source_location::current()) {
      step();
      mutex_.lock(here(at));
    }
    bool try_lock(std::source_location at = std::source_location::current()) {
      step();
      return mutex_.try_lock(here(at));
    }
    void unlock(std::source_location at = std::source_location::current()) {
      step();
      mutex_.unlock(here(at));
    }

   private:
    rl::mutex mutex_;
  };

  static void cpu_relax(std::source_location at = std::source_location::current()) {
    if constexpr (pause == Pause::kYield) {
      // Pauses in a row are one.
      bool& paused = paused_[rl::thread_index()];
      if (!std::exchange(paused, true)) rl::yield(1, here(at));
    }
  }

 private:
  static rl::memory_order mapped(std::memory_order order) {
    switch (order) {
      case std::memory_order_relaxed:
        return rl::mo_relaxed;
      case std::memory_order_consume:
        return rl::mo_consume;
      case std::memory_order_acquire:
        return rl::mo_acquire;
      case std::memory_order_release:
        return rl::mo_release;
      case std::memory_order_acq_rel:
        return rl::mo_acq_rel;
      case std::memory_order_seq_cst:
        return rl::mo_seq_cst;
    }
    std::abort();
  }

  static void step() {
    if constexpr (pause == Pause::kYield) {
      // The thread is none while Relacy makes and destroys the test.
      if (rl::ctx().threadx_) paused_[rl::thread_index()] = false;
    }
  }

  static constexpr unsigned kMaxThreads = 8;
  static inline bool paused_[kMaxThreads] = {};
};

static_assert(Platform<RelacyPlatform<Pause::kYield>>);
static_assert(Platform<RelacyPlatform<Pause::kNothing>>);

/// A check in a model.
inline void require(bool condition, const char* what,
                    std::source_location at = std::source_location::current()) {
  if (!condition) rl::ctx().fail_test(what, rl::test_result_user_assert_failed, here(at));
}

/// A point where Relacy may change to another thread.
inline void schedule_point() { rl::ctx().sched(); }

}  // namespace roost::model
