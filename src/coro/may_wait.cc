// SPDX-License-Identifier: MIT
#include "roost/coro/may_wait.h"

#include "roost/base/check.h"
#include "roost/coro/coroutine.h"

namespace roost {

void detail::check_may_wait(const Coroutine& co, const char* waits_for, unsigned allowed) {
  const unsigned held = this_thread().thread_locks;
  ROOST_CHECK(held <= allowed,
              "coroutine '{}' is about to wait for {} while its thread holds a ThreadMutex",
              co.name(), waits_for);
}

}  // namespace roost
