// SPDX-License-Identifier: MIT
// The places in a coroutine's life that can be seen from outside: each is a static tracepoint and,
// where that has something to tell, an event for the context's tracer.
#pragma once

#include "roost/base/probe.h"
#include "roost/coro/coroutine.h"
#include "roost/coro/trace.h"

namespace roost::trace {

// Out of the way: what is not traced should not make room for it.
[[gnu::noinline, gnu::cold]] void tell_scheduled(const CoContext& to, const Coroutine& co) noexcept;

// Before the post: after it, the coroutine's turn may have come.
inline void schedule(CoContext& to, Coroutine& co) noexcept {
  ROOST_PROBE(aio_co_schedule, &to, &co);
  if (to.trace()) [[unlikely]]
    tell_scheduled(to, co);
}

inline void turn_has_come([[maybe_unused]] CoContext& at, [[maybe_unused]] Coroutine& co) noexcept {
  ROOST_PROBE(aio_co_schedule_bh_cb, &at, &co);
}

inline void wake([[maybe_unused]] CoContext* home, [[maybe_unused]] Coroutine& co) noexcept {
  ROOST_PROBE(co_wake, home, &co);
}

// A wake-up that takes no queue entry: the driver's list runs it.
inline void list(CoContext& home, Coroutine& co) noexcept {
  if (home.trace()) [[unlikely]]
    tell_scheduled(home, co);
}

inline void enter([[maybe_unused]] Coroutine* from, [[maybe_unused]] Coroutine& to) noexcept {
  ROOST_PROBE(coroutine_enter, from, &to);
}

inline void yield([[maybe_unused]] Coroutine& co) noexcept { ROOST_PROBE(coroutine_yield, &co); }

inline void terminate([[maybe_unused]] Coroutine& co) noexcept {
  ROOST_PROBE(coroutine_terminate, &co);
}

}  // namespace roost::trace
