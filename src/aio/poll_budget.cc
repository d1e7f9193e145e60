// SPDX-License-Identifier: MIT
#include "roost/aio/poll_budget.h"

#include <sched.h>

#include <thread>

namespace roost {

PollBudget& PollBudget::of_process() {
  static PollBudget budget([] {
    cpu_set_t allowed;
    if (::sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
    return static_cast<int>(std::thread::hardware_concurrency());
  }());
  return budget;
}

}  // namespace roost
