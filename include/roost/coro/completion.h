// SPDX-License-Identifier: MIT
// Completion<T>: waits for a result that is delivered once, from anywhere: the way back from a
// foreign library's callback, a device's thread, a signal's handler thread.
//
//   Completion<int> done("remote read");
//   remote_read(fd, buffer, &on_read, done.token().release());
//   Result<int> bytes = co_await done.wait(stop);
//
//   void on_read(void* opaque, int bytes) {
//     CompletionToken<int>::from_opaque(opaque).fire(bytes);
//   }
//
// The token may be fired before, while or after the coroutine suspends; the coroutine resumes at
// home. A token that is destroyed without having been fired gives ECANCELED, so no wait is for
// ever.
//
// Threads: the Completion belongs to its coroutine. The token belongs to one thread at a time and
// may be fired on any, with or without a context, with locks held, but not from a signal handler:
// firing never runs the coroutine on the caller's stack.
// Lifetime: either may go first. A result that nobody waits for any more is destroyed by whoever
// fires it. A Completion may not be destroyed while another coroutine waits for it.
#pragma once

#include <cerrno>
#include <optional>
#include <stop_token>
#include <type_traits>
#include <utility>

#include "roost/base/check.h"
#include "roost/base/result.h"
#include "roost/coro/completion_core.h"
#include "roost/coro/coroutine.h"
#include "roost/coro/may_wait.h"

namespace roost {

namespace detail {

template <class T>
struct CompletionState : FrameAllocated {
  using Place = Coroutine::Place;
  /// What a wait gives: Result<T>, or T where that is a Result already.
  using R = std::conditional_t<kIsResult<T>, T, Result<T>>;

  CompletionState(const char* n, Place place) noexcept : name(n), made_at(place) {}

  CompletionCore<RealPlatform, Coroutine> core;
  const char* const name;
  const Place made_at;
  std::optional<R> result;  // the firing side until it fires, then the waiting side; null: dropped
  Place fired_at;           // likewise
  bool taken = false;       // the waiting side: the result was given to a wait
};

}  // namespace detail

/// The firing side. Move-only; made by Completion::token().
template <class T = void>
class [[nodiscard]] CompletionToken {
  using State = detail::CompletionState<T>;

 public:
  using Place = Coroutine::Place;

  CompletionToken(CompletionToken&& other) noexcept
      : state_(std::exchange(other.state_, nullptr)),
        name_(std::exchange(other.name_, nullptr)),
        fired_at_(other.fired_at_) {}
  CompletionToken& operator=(CompletionToken&& other) noexcept {
    CompletionToken moved(std::move(other));  // leaves with the old one
    std::swap(state_, moved.state_);
    std::swap(name_, moved.name_);
    std::swap(fired_at_, moved.fired_at_);
    return *this;
  }
  ~CompletionToken() {
    if (state_) finish(Place());
  }

  /// Delivers the result: `fire(value)`, or `fire()` for void. Aborts if it was fired before.
  template <class U = T>
  requires(!std::is_void_v<T> && std::is_constructible_v<typename State::R, U&&>) void fire(
      U&& value, Place place = Place::current()) {
    check_unfired(place);
    state_->result.emplace(std::forward<U>(value));
    finish(place);
  }
  void fire(Place place = Place::current()) requires std::is_void_v<T> {
    check_unfired(place);
    state_->result.emplace();
    finish(place);
  }

  /// Delivers an error. Aborts if it was fired before.
  void fail(Error error, Place place = Place::current()) {
    check_unfired(place);
    state_->result.emplace(std::unexpect, std::move(error));
    finish(place);
  }

  /// For a C callback: gives the token away as a pointer, to be taken up by from_opaque() exactly
  /// once.
  [[nodiscard]] void* release(Place place = Place::current()) {
    check_unfired(place);
    name_ = nullptr;
    return std::exchange(state_, nullptr);
  }
  static CompletionToken from_opaque(void* opaque) noexcept {
    return CompletionToken(static_cast<State*>(opaque));
  }

  /// False: fired, released or moved from.
  explicit operator bool() const noexcept { return state_ != nullptr; }

 private:
  template <class>
  friend class Completion;

  explicit CompletionToken(State* state) noexcept : state_(state), name_(state->name) {}

  void check_unfired(Place place) const {
    if (!state_) [[unlikely]] {
      if (!name_) panicf("completion fired at {} by a token that was given away", describe(place));
      panicf("completion '{}' fired at {}: it was fired before at {}", name_, describe(place),
             describe(fired_at_));
    }
    // A second token made of the same pointer: seen for certain while the waiting side is there,
    // and before the result is spoilt.
    if (state_->core.fired()) [[unlikely]]
      fired_twice(place);
  }
  [[noreturn, gnu::cold]] void fired_twice(Place place) const {
    panicf("completion '{}', made at {}, fired at {}: it was fired before at {}", name_,
           describe(state_->made_at), describe(place), describe(state_->fired_at));
  }

  void finish(Place place) {
    State* const state = std::exchange(state_, nullptr);
    state->fired_at = place;
    fired_at_ = place;
    using Core = decltype(state->core);
    const auto fired = state->core.fire();
    // The block is the waiting side's by now, and may be gone, unless it is ours to free.
    switch (fired.todo) {
      case Core::Fire::kNothing:
        break;
      case Core::Fire::kWake:
        wake_waiter_later(*fired.waiter, place);
        break;
      case Core::Fire::kFree:
        delete state;
        break;
      case Core::Fire::kTwice:
        panicf("completion '{}' fired twice at the same time, once at {}", name_, describe(place));
    }
  }

  State* state_;
  const char* name_;  // null: moved from or released
  Place fired_at_;
};

/// The waiting side.
template <class T = void>
class Completion {
  using State = detail::CompletionState<T>;

 public:
  using Place = Coroutine::Place;
  using R = typename State::R;

  /// `name` says what is waited for; it outlives both sides (a literal).
  explicit Completion(const char* name = "a completion", Place place = Place::current())
      : state_(new State(name, place)) {}
  Completion(Completion&& other) noexcept
      : state_(std::exchange(other.state_, nullptr)), token_made_(other.token_made_) {}
  Completion& operator=(Completion&& other) noexcept {
    Completion moved(std::move(other));  // leaves with the old one
    std::swap(state_, moved.state_);
    std::swap(token_made_, moved.token_made_);
    return *this;
  }
  ~Completion() {
    if (!state_) return;
    if (!token_made_) {
      delete state_;
      return;
    }
    const char* const name = state_->name;
    using Core = decltype(state_->core);
    switch (state_->core.abandon()) {
      case Core::Abandon::kNothing:
        break;
      case Core::Abandon::kFree:
        delete state_;
        break;
      case Core::Abandon::kOccupied:
        panicf("completion '{}' destroyed while a coroutine waits for it", name);
    }
  }

  /// The one token of this completion: a second call aborts.
  CompletionToken<T> token(Place place = Place::current()) {
    ROOST_CHECK(!token_made_, "second token of completion '{}' wanted at {}", state_->name,
                describe(place));
    token_made_ = true;
    return CompletionToken<T>(state_);
  }

  /// Whether the token was fired or dropped: wait() will not suspend.
  bool fired() const noexcept { return state_->core.fired(); }

  class [[nodiscard]] Wait;
  class StoppableAwaiter;
  // co_await makes the awaiter of it, in the frame. That cannot be moved; but what passes through
  // await_transform() GCC 12 moves.
  class [[nodiscard]] StoppableWait {
   public:
    StoppableWait(State& state, bool token_made, std::stop_token stop) noexcept
        : state_(state), token_made_(token_made), stop_(std::move(stop)) {}
    StoppableAwaiter operator co_await() && noexcept {
      return StoppableAwaiter(state_, token_made_, std::move(stop_));
    }

   private:
    State& state_;
    bool token_made_;
    std::stop_token stop_;
  };

  /// Suspends until the token is fired or dropped, and gives what it was fired with, or ECANCELED
  /// if it was dropped. A result can be waited for once, by one coroutine.
  Wait wait() noexcept { return Wait(*state_, token_made_); }

  /// As wait(), but `stop` ends the wait with ECANCELED as well. What was to be completed is then
  /// *unknown*: it goes on, and what it needs (its buffers) must stay. One may wait() again to
  /// learn its end, or drop the Completion: then the token is fired into nothing.
  StoppableWait wait(std::stop_token stop) noexcept {
    return StoppableWait(*state_, token_made_, std::move(stop));
  }

 private:
  static R take(State& state) {
    ROOST_CHECK(!std::exchange(state.taken, true),
                "completion '{}' waited for again after it gave its result", state.name);
    if (!state.result) {
      return std::unexpected(Error(ECANCELED, fmt::format("{} (dropped unanswered)", state.name)));
    }
    return std::move(*state.result);
  }

  State* state_;  // null: moved from
  bool token_made_ = false;
};

template <class T>
class Completion<T>::Wait {
 public:
  Wait(State& state, bool token_made) noexcept : state_(state), suspension_(suspend_on(state)) {
    ROOST_CHECK(token_made, "completion '{}' waited for, but it has no token", state.name);
  }

  bool await_ready() const noexcept { return state_.core.fired(); }
  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) noexcept {
    detail::check_may_wait(*frame.promise().co, state_.name);
    suspension_.await_suspend(frame);
  }
  R await_resume() {
    // Says acquire: the result is visible.
    ROOST_CHECK(state_.core.fired(), "completion '{}' woke its waiter unfired", state_.name);
    return take(state_);
  }

 private:
  friend class StoppableAwaiter;

  struct Publish {
    State* state;
    void operator()(Coroutine& co) const noexcept {
      const char* const name = state->name;
      using Core = decltype(state->core);
      switch (state->core.wait(co)) {
        case Core::Wait::kWaiting:
          break;  // the coroutine may be running by now, or the block gone
        case Core::Wait::kNotNeeded:
          wake_waiter(co);
          break;
        case Core::Wait::kOccupied:
          panicf("completion '{}' waited for by coroutine '{}': another waits already", name,
                 co.name());
      }
    }
  };
  static SuspendAwaiter<Publish> suspend_on(State& state) noexcept {
    return suspend_waiting(state.name, Publish{&state});
  }

  State& state_;
  SuspendAwaiter<Publish> suspension_;
};

template <class T>
class Completion<T>::StoppableAwaiter {
 public:
  StoppableAwaiter(State& state, bool token_made, std::stop_token stop) noexcept
      : wait_(state, token_made), stop_(std::move(stop)) {}
  StoppableAwaiter(const StoppableAwaiter&) = delete;
  StoppableAwaiter& operator=(const StoppableAwaiter&) = delete;

  bool await_ready() const noexcept { return wait_.await_ready(); }
  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) {
    // From here on the wait may be stopped, the waiter not being visible yet: see CompletionCore.
    on_stop_.emplace(std::move(stop_), OnStop{&wait_.state_});
    wait_.await_suspend(frame);
  }
  R await_resume() {
    on_stop_.reset();  // waits for a callback that is running on another thread
    State& state = wait_.state_;
    if (!state.core.end_wait()) return std::unexpected(Error(ECANCELED, state.name));
    return take(state);
  }

 private:
  struct OnStop {
    State* state;
    void operator()() const noexcept {
      if (Coroutine* const co = state->core.stop()) wake_waiter_later(*co);
    }
  };

  Wait wait_;
  std::stop_token stop_;
  std::optional<std::stop_callback<OnStop>> on_stop_;
};

}  // namespace roost
