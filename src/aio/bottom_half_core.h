// SPDX-License-Identifier: MIT
// The part of a bottom half that its context keeps: the entry, the flags and the callback.
//
// Threads and lifetime: as BottomHalf; freed on the home thread, at the turn that finds it deleted
// or, where that comes in a nested poll of its own callback, when the callback returns.
#pragma once

#include "roost/aio/aio_context.h"
#include "roost/aio/bottom_half.h"

namespace roost {

struct BottomHalf::Core : CallbackEntry {
  Core(AioContext& ctx, std::function<void()> cb)
      : CallbackEntry(&AioContext::run_bottom_half), context(ctx), callback(std::move(cb)) {}

  /// The turn of a bottom half, idle ones included.
  static bool run_now(Core& core) noexcept;

  void request(std::uint64_t bits);

  AioContext& context;
  BottomHalfFlags<RealPlatform> flags;
  std::function<void()> callback;

  // Home thread.
  unsigned running = 0;  // calls of the callback on the stack; a nested poll may run it again
  bool deleted = false;  // its last turn has come: the outermost call frees it
};

}  // namespace roost
