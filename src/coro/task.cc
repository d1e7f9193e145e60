// SPDX-License-Identifier: MIT
#include "roost/coro/task.h"

#include "roost/base/check.h"

namespace roost::detail {

void await_of_no_task(const PromiseBase& parent) {
  panicf("coroutine '{}' at {} awaits an empty task: one that was moved from, or awaited before",
         parent.co->name(), describe(parent.awaits_at));
}

}  // namespace roost::detail
