// SPDX-License-Identifier: MIT
// For awaiters of primitives: a thread lock must not be held across a suspension.
//
// Threads: the coroutine's, while it runs.
#pragma once

namespace roost {

class Coroutine;

namespace detail {

/// Aborts if the thread holds more than `allowed` ThreadMutexes: they would be held across a
/// suspension of `co` that waits for `waits_for`.
void check_may_wait(const Coroutine& co, const char* waits_for, unsigned allowed = 0);

}  // namespace detail

}  // namespace roost
