// SPDX-License-Identifier: MIT
// The policy that lock-free code is written over.
//
// Every lock-free protocol in Roost is a template over a Platform, so that the source that ships is
// the source that a model checker compiles. A Platform supplies
//
//   Atomic<T>   an atomic 64-bit word or pointer with the load/store/exchange/compare-and-swap
//               and fetch_* operations of std::atomic, explicit memory orders only;
//   Shared<T>   a plain variable that threads hand to each other under the protection of an
//               atomic (a link of a list, say): a checker reports unordered accesses to it;
//   Mutex       a thread lock with lock() and unlock(), for a few instructions at a time; never
//               held across a suspension or a wake-up;
//   cpu_relax() one step of a busy wait.
//
// Standalone fences are not part of it: ThreadSanitizer does not see them.
//
// Threads: stateless.
#pragma once

#include <atomic>
#include <concepts>
#include <cstdint>
#include <mutex>

namespace roost {

/// The machine itself.
struct RealPlatform {
  template <class T>
  using Atomic = std::atomic<T>;

  template <class T>
  class Shared {
   public:
    Shared() noexcept : value_{} {}
    explicit Shared(T value) noexcept : value_(value) {}
    T get() const noexcept { return value_; }
    void set(T value) noexcept { value_ = value; }

   private:
    T value_;
  };

  using Mutex = std::mutex;

  static void cpu_relax() noexcept {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
};

/// What a policy has to have, in so far as a compiler can tell.
template <class P>
concept Platform = requires(typename P::template Atomic<std::uint64_t>& word,
                            typename P::template Shared<void*>& shared, typename P::Mutex& mutex) {
  { word.load(std::memory_order_relaxed) } -> std::convertible_to<std::uint64_t>;
  word.store(std::uint64_t{}, std::memory_order_release);
  { shared.get() } -> std::convertible_to<void*>;
  mutex.lock();
  mutex.unlock();
  P::cpu_relax();
};
static_assert(Platform<RealPlatform>);

}  // namespace roost
