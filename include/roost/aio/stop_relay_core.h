// SPDX-License-Identifier: MIT
// The hand-shake of StopRelay: who posts, who calls `stop` and `resume`, and who waits for whom.
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

#include "roost/base/platform.h"

namespace roost {

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
///
/// `Parts` is what it is made of, a parameter for the sake of model checkers:
///   Platform, Context
///   Entry                  stands in an inbox; made of what is called when its turn comes
///   Token, Callback<F>     as std::stop_token and std::stop_callback
///   is_current(context)    whether the caller runs there
///   post(context, entry)   puts the entry into the context's inbox
template <class Parts>
class StopRelayCore : private Parts::Entry {
  using Context = typename Parts::Context;
  using Entry = typename Parts::Entry;
  using Token = typename Parts::Token;

 public:
  using Function = void (*)(StopRelayCore&) noexcept;

  /// `stop` is called at most once, and only before ended(): the operation should end early.
  /// `resume` is called after ended() has said false. Neither touches the relay after it has woken
  /// the coroutine.
  StopRelayCore(Context& home, Function stop, Function resume) noexcept
      : Entry(&arrive), home_(home), stop_(stop), resume_(resume) {}
  StopRelayCore(const StopRelayCore&) = delete;
  StopRelayCore& operator=(const StopRelayCore&) = delete;

  /// Begins to heed the token. If its stop was requested already, `stop` is called before this
  /// returns.
  void watch(const Token& token);

  /// The operation has ended. False: a stop is on its way home; `resume` is called once it has
  /// come.
  [[nodiscard]] bool ended() noexcept;

  /// Heeds the token no more.
  void forget() noexcept { callback_.reset(); }

 private:
  struct OnStop {
    StopRelayCore* relay;
    void operator()() const noexcept { relay->stop_requested(); }
  };

  void stop_requested() noexcept;
  static bool arrive(Entry& entry) noexcept;

  // Constant.
  Context& home_;
  const Function stop_;
  const Function resume_;

  // The thread of the stop, and home.
  StopRelayWord<typename Parts::Platform> word_;

  // Home thread.
  typename Parts::Platform::template Shared<bool> arrived_{false};  // the entry's turn has come
  // The last member, so the first to go: until then the callback may use the others.
  std::optional<typename Parts::template Callback<OnStop>> callback_;
};

template <class Parts>
void StopRelayCore<Parts>::watch(const Token& token) {
  if (token.stop_possible()) callback_.emplace(token, OnStop{this});
}

//     thread of the stop                     home thread
//
//     armed -> posted       \  one of        any -> ended
//     (fails: it has ended) /  them first    finds posted: does not let the coroutine go on
//     posts the entry                        the entry's turn comes: lets it go on
//     returns from the callback              forget() waits for that return
template <class Parts>
void StopRelayCore<Parts>::stop_requested() noexcept {
  if (Parts::is_current(home_)) {
    if (!word_.has_ended()) stop_(*this);
    return;
  }
  if (!word_.claim_post()) return;
  // The entry is in the frame of a coroutine that now waits for its turn to come.
  Parts::post(home_, *this);
}

template <class Parts>
bool StopRelayCore<Parts>::ended() noexcept {
  return !word_.end() || arrived_.get();
}

template <class Parts>
bool StopRelayCore<Parts>::arrive(Entry& entry) noexcept {
  auto& relay = static_cast<StopRelayCore&>(entry);
  relay.arrived_.set(true);
  if (relay.word_.has_ended()) {
    relay.resume_(relay);
  } else {
    relay.stop_(relay);
  }
  return true;
}

}  // namespace roost
