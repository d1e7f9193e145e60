// SPDX-License-Identifier: MIT
#include "roost/aio/stop_relay.h"

#include "roost/aio/aio_context.h"
#include "roost/base/check.h"

namespace roost {

bool StopRelayParts::is_current(const AioContext& context) noexcept {
  return AioContext::current() == &context;
}

void StopRelayParts::post(AioContext& home, CallbackEntry& entry) noexcept {
  ROOST_CHECK(home.post(entry), "an operation outlived its context '{}'", home.name());
}

template class StopRelayCore<StopRelayParts>;

}  // namespace roost
