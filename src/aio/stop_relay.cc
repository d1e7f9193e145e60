// SPDX-License-Identifier: MIT
#include "roost/aio/stop_relay.h"

#include "roost/aio/aio_context.h"
#include "roost/base/check.h"

namespace roost {

void StopRelay::watch(const std::stop_token& token) {
  if (token.stop_possible()) callback_.emplace(token, OnStop{this});
}

//     thread of the stop                     home thread
//
//     armed -> posted       \  one of        any -> ended
//     (fails: it has ended) /  them first    finds posted: does not let the coroutine go on
//     posts the entry                        the entry's turn comes: lets it go on
//     returns from the callback              forget() waits for that return
void StopRelay::stop_requested() noexcept {
  if (AioContext::current() == &home_) {
    if (!word_.has_ended()) stop_(*this);
    return;
  }
  if (!word_.claim_post()) return;
  // The entry is in the frame of a coroutine that now waits for its turn to come.
  ROOST_CHECK(home_.post(*this), "an operation outlived its context '{}'", home_.name());
}

bool StopRelay::ended() noexcept { return !word_.end() || arrived_; }

bool StopRelay::arrive(CallbackEntry& entry) noexcept {
  auto& relay = static_cast<StopRelay&>(entry);
  relay.arrived_ = true;
  if (relay.word_.has_ended()) {
    relay.resume_(relay);
  } else {
    relay.stop_(relay);
  }
  return true;
}

}  // namespace roost
