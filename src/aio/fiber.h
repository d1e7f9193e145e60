// SPDX-License-Identifier: MIT
// Fiber: a call stack that can be left and come back to, on the same thread. It stands in for a
// thread in a simulation; nothing else in Roost has a stack of its own.
//
// Threads: all fibers of a simulation belong to one thread. What the runtime and the language keep
// for each thread (the current context, exceptions being handled) goes with the fiber.
// Lifetime: ends when its body returns; it is not destroyed before that (checked).
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstddef>
#include <functional>

#include "roost/coro/context.h"

namespace roost {

class Fiber {
 public:
  explicit Fiber(std::function<void()> body);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// Runs it on until it pauses or ends. Not from within a fiber.
  void resume();

  /// Goes back to the caller of resume(). From within this fiber.
  void pause();

  bool ended() const noexcept { return ended_; }

 private:
  // What C++ knows of exceptions under way on this thread; the layout is the ABI's.
  struct Exceptions {
    void* caught = nullptr;
    unsigned uncaught = 0;
  };

  // A side of a switch while the other runs. The C library's switch saves the signal mask too,
  // which costs two system calls, the greater part of a simulation's time.
#if defined(__x86_64__)
  using Side = void*;  // its stack pointer; the registers lie on its stack
#else
  using Side = ucontext_t;
#endif

  static void prepare(Side& side, std::byte* stack, std::size_t size);
  static void switch_sides(Side& from, Side& to) noexcept;
  static void start();
  void run() noexcept;
  void swap_thread_state() noexcept;

  std::function<void()> body_;
  std::byte* stack_ = nullptr;
  Side own_{};
  Side caller_{};
  ThreadState thread_state_;  // the fiber's while it is paused, the caller's while it runs
  Exceptions exceptions_;     // likewise
  bool ended_ = false;
  // For the sanitizers.
  [[maybe_unused]] void* fake_stack_ = nullptr;
  [[maybe_unused]] const void* caller_stack_ = nullptr;
  [[maybe_unused]] std::size_t caller_stack_size_ = 0;
  [[maybe_unused]] void* tsan_fiber_ = nullptr;
  [[maybe_unused]] void* tsan_caller_ = nullptr;
};

}  // namespace roost
