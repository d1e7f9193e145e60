// SPDX-License-Identifier: MIT
// Gate: a count of work in flight that can be closed and awaited.
//
//   if (Gate::Pass pass = gate.try_pass()) {        // a request
//     co_await serve(request);
//   } else { /* it is closed */ }
//
//   gate.close();                                   // a drain
//   co_await gate.idle();
//   ... nothing is in flight, and nothing starts ...
//   gate.open();
//
// Threads: everything from any thread; idle() within a coroutine, which resumes at home. Entering
// and leaving are one atomic operation, and no lock, except for the last to leave while somebody
// waits.
// Lifetime: a gate outlives what is in flight and who waits: its destructor aborts otherwise. Who
// has left touches it no more, so it may go as soon as it is idle.
#pragma once

#include <cerrno>
#include <optional>
#include <stop_token>
#include <utility>

#include "roost/base/check.h"
#include "roost/base/result.h"
#include "roost/coro/coroutine.h"
#include "roost/coro/gate_core.h"
#include "roost/coro/may_wait.h"

namespace roost {

/// The file's head says how it is used, and by whom.
class Gate {
  using Core = GateCore<RealPlatform, RealPlatform::Mutex>;

 public:
  /// `name` is for messages and for those who wait, and outlives the gate (a literal).
  explicit Gate(const char* name = "a gate") noexcept : name_(name) {}
  ~Gate();
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

  /// One more in flight, to be ended by leave(). False: the gate is closed.
  [[nodiscard]] bool try_enter() noexcept {
    switch (core_.try_enter()) {
      case Core::Enter::kEntered:
        return true;
      case Core::Enter::kClosed:
        return false;
      case Core::Enter::kTooMany:
        break;
    }
    too_many();
  }

  /// One more in flight although the gate may be closed: for what belongs to something in flight, a
  /// part of an admitted request.
  /// REQUIRES: the caller is in flight.
  void enter_inside() noexcept {
    if (!core_.enter_inside()) [[unlikely]]
      too_many();
  }

  /// One less in flight. May be called with locks held: who waits is never entered by it.
  void leave() noexcept {
    const Core::Left left = core_.leave();
    // Nothing of the gate from here on, unless it has waiters to be woken.
    if (!left.was_inside || left.wake) [[unlikely]]
      finish_leaving(left);
  }

  /// Leaves when it goes. Move-only; empty if the gate was closed.
  class [[nodiscard]] Pass {
   public:
    Pass() noexcept = default;
    Pass(Pass&& other) noexcept : gate_(std::exchange(other.gate_, nullptr)) {}
    Pass& operator=(Pass&& other) noexcept {
      Pass moved(std::move(other));  // leaves with the old one
      std::swap(gate_, moved.gate_);
      return *this;
    }
    ~Pass() { leave(); }

    explicit operator bool() const noexcept { return gate_ != nullptr; }
    void leave() noexcept {
      if (gate_) std::exchange(gate_, nullptr)->leave();
    }
    /// The caller calls Gate::leave() instead.
    void release() noexcept { gate_ = nullptr; }

   private:
    friend class Gate;
    explicit Pass(Gate* gate) noexcept : gate_(gate) {}
    Gate* gate_ = nullptr;
  };
  Pass try_pass() noexcept { return Pass(try_enter() ? this : nullptr); }

  /// Nobody enters until open() has been called as often as close(). What is in flight goes on.
  void close() noexcept { core_.close(); }
  /// Aborts if the gate is not closed.
  void open() noexcept;

  class Idle;
  class StoppableIdle;
  // What idle() returns: co_await makes the awaiter of it, in the frame. The gate comes to hold the
  // address of that, so it cannot be moved; but what passes through await_transform() GCC 12 moves.
  class [[nodiscard]] IdleWait {
   public:
    explicit IdleWait(Gate& gate) noexcept : gate_(gate) {}
    Idle operator co_await() && noexcept;

   private:
    Gate& gate_;
  };
  class [[nodiscard]] StoppableIdleWait {
   public:
    StoppableIdleWait(Gate& gate, std::stop_token stop) noexcept
        : gate_(gate), stop_(std::move(stop)) {}
    StoppableIdle operator co_await() && noexcept;

   private:
    Gate& gate_;
    std::stop_token stop_;
  };

  /// Suspends until nothing is in flight. That lasts only if the gate is closed, and may never come
  /// if it is not. All who wait are woken by the same leave().
  IdleWait idle() noexcept { return IdleWait(*this); }
  /// As idle(); ECANCELED if `stop` came first. Nothing has changed then: a closed gate is closed.
  StoppableIdleWait idle(std::stop_token stop) noexcept {
    return StoppableIdleWait(*this, std::move(stop));
  }

  // Snapshots, for messages and tests.
  std::uint32_t in_flight() const noexcept { return core_.in_flight(); }
  bool closed() const noexcept { return core_.closed(); }
  const char* name() const noexcept { return name_; }

 private:
  struct Waiter : Core::Waiter {
    Coroutine* co = nullptr;  // set before it is listed
  };
  struct Publish {
    Gate* gate;
    Waiter* waiter;
    void operator()(Coroutine& co) const noexcept;
  };
  struct OnStop {
    Gate* gate;
    Waiter* waiter;
    void operator()() const noexcept;
  };

  [[noreturn, gnu::cold]] void too_many() const noexcept;
  void finish_leaving(Core::Left left) noexcept;

  Core core_;
  const char* const name_;
};

class Gate::Idle {
 public:
  explicit Idle(Gate& gate) noexcept
      : gate_(gate), suspension_(suspend_waiting(gate.name_, Publish{&gate, &waiter_})) {}
  Idle(const Idle&) = delete;
  Idle& operator=(const Idle&) = delete;

  bool await_ready() const noexcept { return gate_.core_.idle(); }
  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) noexcept {
    waiter_.co = frame.promise().co;
    detail::check_may_wait(*waiter_.co, gate_.name_);
    suspension_.await_suspend(frame);
  }
  void await_resume() const noexcept {}

 private:
  friend class StoppableIdle;
  Gate& gate_;
  Waiter waiter_;
  SuspendAwaiter<Publish> suspension_;
};

class Gate::StoppableIdle {
 public:
  StoppableIdle(Gate& gate, std::stop_token stop) noexcept : idle_(gate), stop_(std::move(stop)) {}

  bool await_ready() const noexcept { return idle_.await_ready(); }
  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) {
    // From here on the wait may be stopped, the waiter not being listed yet: see GateCore.
    on_stop_.emplace(std::move(stop_), OnStop{&idle_.gate_, &idle_.waiter_});
    idle_.await_suspend(frame);
  }
  Result<void> await_resume() {
    on_stop_.reset();  // waits for a callback that is running on another thread
    if (idle_.waiter_.stopped()) return fail(ECANCELED, idle_.gate_.name_);
    return {};
  }

 private:
  Idle idle_;
  std::stop_token stop_;
  std::optional<std::stop_callback<OnStop>> on_stop_;
};

inline Gate::Idle Gate::IdleWait::operator co_await() && noexcept { return Idle(gate_); }
inline Gate::StoppableIdle Gate::StoppableIdleWait::operator co_await() && noexcept {
  return StoppableIdle(gate_, std::move(stop_));
}

}  // namespace roost
