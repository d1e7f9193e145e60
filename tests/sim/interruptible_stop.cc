// SPDX-License-Identifier: MIT
#include "interruptible_stop.h"

namespace roost {

void StopSemaphore::release() noexcept {
  // What was stopped may have come to its end by now, and may go afterwards, with all that it
  // waited with. That takes others several turns.
  maybe_stall();
  released_ = true;
  maybe_stall();  // this is gone, perhaps
}

void StopSemaphore::acquire() noexcept {
  maybe_interrupt();
  if (!released_) ++stop_callbacks_awaited;
  wait_until("the end of a stop's callback", released_);
  released_ = false;
}

}  // namespace roost
