// SPDX-License-Identifier: MIT
// StopRelay: brings a stop request to the home context of the operation that it is to end.
//
// What ends early only on its home thread (a timer, a request of a ring) cannot be cancelled by a
// std::stop_callback, which runs on whichever thread asked. The relay is that callback, and the
// entry which it posts home.
//
// Threads and Lifetime: see StopRelayCore, which also says how it is used.
#pragma once

#include <stop_token>

#include "roost/aio/stop_relay_core.h"
#include "roost/base/platform.h"
#include "roost/coro/queue_entry.h"

namespace roost {

class AioContext;

/// What a StopRelay is made of.
struct StopRelayParts {
  using Platform = RealPlatform;
  using Context = AioContext;
  using Entry = CallbackEntry;
  using Token = std::stop_token;
  template <class F>
  using Callback = std::stop_callback<F>;

  static bool is_current(const AioContext& context) noexcept;
  static void post(AioContext& home, CallbackEntry& entry) noexcept;
};

using StopRelay = StopRelayCore<StopRelayParts>;
extern template class StopRelayCore<StopRelayParts>;

}  // namespace roost
