// SPDX-License-Identifier: MIT
// What a tracer is told about the coroutines of one context, which carries a pointer to it. A
// context without a tracer has none, and pays a look at that pointer for each schedule and turn.
//
// Threads: scheduled() from any thread, as soon as the coroutine is suspended and before its turn
// can come; everything else on the context's home thread.
// Lifetime: outlives the context.
#pragma once

#include <cstdint>
#include <source_location>

namespace roost {

class Coroutine;

class TraceTrack {
 public:
  using Place = std::source_location;

  /// Why a turn begins.
  enum class Turn : std::uint8_t {
    kDirect,     // it is entered; what was scheduled() before is void
    kScheduled,  // its entry's turn, or its place on a driver's list, has come
  };

  /// `co` will run on this track's context.
  virtual void scheduled(const Coroutine& co, Place by) noexcept = 0;

  /// Turns nest: a coroutine may enter another one.
  virtual void turn_begins(const Coroutine& co, Turn why) noexcept = 0;

  /// The turn that began last, and has not ended yet, is over. `awaits_at`: the co_await that
  /// suspended the coroutine; `ended`: there is none, and it may be gone.
  virtual void turn_ends(bool ended, Place awaits_at) noexcept = 0;

  /// The context goes to sleep, and has woken up.
  virtual void sleeps() noexcept = 0;
  virtual void woke() noexcept = 0;

 protected:
  ~TraceTrack() = default;
};

}  // namespace roost
