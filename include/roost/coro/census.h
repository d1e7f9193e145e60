// SPDX-License-Identifier: MIT
// The census: every living coroutine, with what it does, for how long, and who made it where.
//
// It costs a coroutine a few stores: control blocks come from memory of their own, in which all can
// be found, and what is read of them on other threads is atomic (docs/lockfree/state-word.md says
// how a reader knows that a block is whole). Frames are not: await chains are read on the home
// thread alone, where a coroutine cannot go on meanwhile.
//
// Threads: as each function says.
// Lifetime: what is returned is copied; names and places are literals.
#pragma once

#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

#include "roost/coro/coroutine.h"

namespace roost {

struct CoroutineInfo {
  using Place = Coroutine::Place;

  /// The address of its control block: identifies it as long as it lives.
  const Coroutine* id = nullptr;
  const char* name = "";
  CoState state = CoState::kIdle;
  /// Index of the context it runs, last ran or is scheduled on.
  std::uint32_t context = 0;
  /// The name of the primitive's wait it is in; null if it is in none.
  const char* waits_for = nullptr;
  /// The context's tick (CoContext::kTickNs) when it was made, or last suspended.
  std::uint32_t since_tick = 0;
  /// Coroutine locks that it holds.
  std::uint32_t locks = 0;
  Place created_at;
  /// Who scheduled, woke or entered it last; line 0: nobody yet.
  Place placed_at;
  /// Where it waits, in the innermost task; line 0: it has not awaited anything yet.
  Place awaits_at;
  /// The co_await expressions it is in, innermost first; empty where they were not read.
  std::vector<Place> await_chain;
};

/// Every living coroutine, without await chains. Any thread; in no particular order. Coroutines
/// that begin, end or move meanwhile may be missing or be reported as they were.
std::vector<CoroutineInfo> list_coroutines();

/// Those whose home is the current context, with their await chains wherever they are suspended.
/// REQUIRES: a current context, on the thread that polls it.
std::vector<CoroutineInfo> list_coroutines_here();

/// Writes a line on stderr for each living coroutine, for the first ones of many. Returns how many
/// there are. Called when the process exits. Any thread.
std::size_t report_leaked_coroutines() noexcept;

/// The co_await expressions that the running coroutine is in, innermost first; empty outside of any
/// coroutine. No allocation: at most `size` places are stored. Returns how many.
std::size_t own_await_chain(Coroutine::Place* places, std::size_t size) noexcept;

}  // namespace roost
