// SPDX-License-Identifier: MIT
// StopRelay: brings a stop request to the home context of the operation that it is to end.
//
// What ends early only on its home thread (a timer, a request of a ring) cannot be cancelled by a
// std::stop_callback, which runs on whichever thread asked. The relay is that callback, and the
// entry which it posts home.
//
// Threads: watch(), ended() and forget() on the home thread, which also calls `stop` and `resume`;
// the stop may be requested by any thread, home included, before, while or after the operation.
// Lifetime: in the frame of the waiting coroutine, which must not go on before ended() has said
// true or `resume` was called. forget(), or the destructor, waits for a callback that is running on
// another thread.
//
// docs/lockfree/stop-relay.md argues for it.
#pragma once

#include <cstdint>
#include <optional>
#include <stop_token>

#include "roost/base/platform.h"
#include "roost/coro/queue_entry.h"

namespace roost {

class AioContext;

/// Which came first: the stop from another thread, or the end of the operation.
///
///   value   set by
///   armed   the constructor
///   posted  the thread that requested the stop, once, from armed: it posts the entry then
///   ended   the home thread, once, from any: nobody is going to post the entry any more
template <Platform P>
class StopRelayWord {
 public:
  /// The thread of the stop. True: it owns the entry, and posts it.
  ///
  /// Relaxed: the word hands over nothing but the right to post. What the home thread is to see of
  /// this thread comes with the entry, through the inbox; and the entry itself was made before the
  /// callback was registered, which is a synchronization of the stop token.
  bool claim_post() noexcept {
    std::uint64_t expected = kArmed;
    return word_.compare_exchange_strong(expected, kPosted, std::memory_order_relaxed,
                                         std::memory_order_relaxed);
  }

  /// The home thread: the operation has ended. True: the entry was posted, or is about to be.
  /// Relaxed, as in claim_post(): one of the two comes first in the order of this word.
  bool end() noexcept { return word_.exchange(kEnded, std::memory_order_relaxed) == kPosted; }

  /// The home thread. Relaxed: it is the only one that sets `ended`.
  bool has_ended() const noexcept { return word_.load(std::memory_order_relaxed) == kEnded; }

 private:
  static constexpr std::uint64_t kArmed = 0;
  static constexpr std::uint64_t kPosted = 1;
  static constexpr std::uint64_t kEnded = 2;

  typename P::template Atomic<std::uint64_t> word_{kArmed};
};

/// One operation's way from a stop token to its home.
class StopRelay : private CallbackEntry {
 public:
  using Function = void (*)(StopRelay&) noexcept;

  /// `stop` is called at most once, and only before ended(): the operation should end early.
  /// `resume` is called after ended() has said false. Neither touches the relay after it has woken
  /// the coroutine.
  StopRelay(AioContext& home, Function stop, Function resume) noexcept
      : CallbackEntry(&arrive), home_(home), stop_(stop), resume_(resume) {}
  StopRelay(const StopRelay&) = delete;
  StopRelay& operator=(const StopRelay&) = delete;

  /// Begins to heed the token. If its stop was requested already, `stop` is called before this
  /// returns.
  void watch(const std::stop_token& token);

  /// The operation has ended. False: a stop is on its way home; `resume` is called once it has
  /// come.
  [[nodiscard]] bool ended() noexcept;

  /// Heeds the token no more.
  void forget() noexcept { callback_.reset(); }

 private:
  struct OnStop {
    StopRelay* relay;
    void operator()() const noexcept { relay->stop_requested(); }
  };

  void stop_requested() noexcept;
  static bool arrive(CallbackEntry& entry) noexcept;

  // Constant.
  AioContext& home_;
  const Function stop_;
  const Function resume_;

  // The thread of the stop, and home.
  StopRelayWord<RealPlatform> word_;

  // Home thread.
  bool arrived_ = false;  // the entry's turn has come
  std::optional<std::stop_callback<OnStop>> callback_;
};

}  // namespace roost
