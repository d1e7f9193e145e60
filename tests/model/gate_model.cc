// SPDX-License-Identifier: MIT
// The in-flight counter of a Gate: entering, leaving, closing, waiting for idleness, stopping the
// wait, and the end of the gate as soon as it is idle.
#include "model/checker.h"
#include "roost/coro/gate_core.h"

namespace roost::model {
namespace {

using P = RelacyPlatform<Pause::kNothing>;
using Core = GateCore<P, P::Mutex>;

Path entered{"a request entered"};
Path refused{"a request found the gate closed"};
Path entered_later{"a request entered after the gate was opened again"};
Path was_idle{"nothing was in flight when the drain came"};
Path not_listed{"the last left between looking and waiting"};
Path woken{"the last to leave woke the drain"};
Path woke_two{"one leave woke two"};
Path stopped{"the wait was stopped"};

struct World {
  Storage<Core> gate;
  Core::Waiter waiters[2];
  Mailbox<bool, Order::kHandsOver> wakes[2];
  P::Shared<std::uint64_t> work[3];
  Flag opened;
  Flag stop_returned;
  unsigned in_flight = 0;
  bool drained = false;

  void enter() {
    require(!drained, "no request starts in a drained section");
    ++in_flight;
    entered.take();
  }

  void leave() {
    --in_flight;
    const Core::Left left = gate->leave();
    require(left.was_inside, "it was in flight");
    unsigned count = 0;
    for (Core::Waiter* waiter = left.wake; waiter;) {
      Core::Waiter* const next = waiter->next();
      (count++ == 0 ? woken : woke_two).take();
      wakes[waiter == &waiters[0] ? 0 : 1].post(true);
      waiter = next;
    }
  }

  // True: idle; false: stopped.
  bool wait_until_idle(unsigned self, bool stoppable) {
    if (gate->idle()) {
      was_idle.take();
      if (stoppable) stop_returned.await();
      return true;
    }
    if (gate->wait(waiters[self])) {
      wakes[self].take();
    } else {
      not_listed.take();
    }
    if (stoppable) stop_returned.await();
    return !waiters[self].stopped();
  }

  void use_drained() {
    require(in_flight == 0, "nothing is in flight in a drained section");
    drained = true;
    for (auto& what : work) what.set(what.get() + 1);
    schedule_point();
    drained = false;
  }

  // A request: enters, is joined by a part of itself, leaves.
  bool request(unsigned self, bool with_part) {
    switch (gate->try_enter()) {
      case Core::Enter::kEntered:
        enter();
        work[self].set(work[self].get() + 1);
        if (with_part) {
          require(gate->enter_inside(), "there is room for a part");
          ++in_flight;
          leave();
        }
        leave();
        return true;
      case Core::Enter::kClosed:
        refused.take();
        return false;
      case Core::Enter::kTooMany:
        require(false, "there is room");
    }
    return false;
  }
};

// A drain against one or two requests, one of which comes back when the gate is open again.
template <unsigned threads, bool with_part>
struct Drain : Suite<threads>, World {
  void before() override { gate.make(); }
  void thread(unsigned self) override {
    if (self == 0) {
      gate->close();
      require(wait_until_idle(0, false), "nobody stops it");
      use_drained();
      require(gate->open(), "it was closed");
      opened.set();
    } else if (!request(self, with_part && self == 1) && self == 1) {
      opened.await();
      require(request(1, false), "the gate is open again");
      entered_later.take();
    }
  }
  void after() override {
    require(in_flight == 0 && gate->idle(), "all left");
    gate.destroy();
  }
};

// One or two are in flight; the drain frees the gate as soon as they have left.
template <unsigned threads>
struct GoWhenIdle : Suite<threads>, World {
  void before() override {
    gate.make();
    for (unsigned i = 1; i < threads; ++i) {
      require(gate->try_enter() == Core::Enter::kEntered, "it is open");
      enter();
    }
  }
  void thread(unsigned self) override {
    if (self == 0) {
      gate->close();
      require(wait_until_idle(0, false), "nobody stops it");
      use_drained();
      gate.destroy();
    } else {
      work[self].set(1);
      leave();
    }
  }
};

// Two wait for one in flight, and the wait of one of them is stopped; the one in flight may leave
// only after that.
struct Stop : Suite<4>, World {
  Flag second_returned;

  void before() override {
    gate.make();
    require(gate->try_enter() == Core::Enter::kEntered, "it is open");
    enter();
    gate->close();
  }
  void thread(unsigned self) override {
    if (self < 2) {
      if (wait_until_idle(self, self == 1)) {
        require(in_flight == 0, "all left");
        require(work[2].get() == 1, "what was done in flight is seen");
      } else {
        stopped.take();
      }
      if (self == 1) second_returned.set();
    } else if (self == 2) {
      if (rl::rand(2) == 0) second_returned.await();
      work[2].set(1);
      leave();
    } else {
      if (gate->stop(waiters[1])) wakes[1].post(true);
      stop_returned.set();
    }
  }
  void after() override {
    require(!gate->has_waiters() || gate->idle(), "a flag left over does no harm");
    gate.destroy();
  }
};

// The only wait is stopped while the last one leaves, and then frees the gate once it is idle: a
// leave that nobody waits for may not touch it any more.
struct StoppedThenGoes : Suite<3>, World {
  void before() override {
    gate.make();
    require(gate->try_enter() == Core::Enter::kEntered, "it is open");
    enter();
    gate->close();
  }
  void thread(unsigned self) override {
    if (self == 1) return leave();
    if (self == 2) {
      if (gate->stop(waiters[0])) wakes[0].post(true);
      return stop_returned.set();
    }
    if (!wait_until_idle(0, true)) {
      stopped.take();
      while (!gate->idle()) rl::yield(1, RL_INFO);
    }
    gate.destroy();
  }
};

// The same with one thread that stops the wait and leaves, in either order.
struct StopAndLeave : Suite<2>, World {
  void before() override {
    gate.make();
    require(gate->try_enter() == Core::Enter::kEntered, "it is open");
    enter();
    gate->close();
  }
  void thread(unsigned self) override {
    if (self == 1) {
      const bool leaves_first = rl::rand(2) == 0;
      const auto finish = [&] {
        work[1].set(1);
        leave();
      };
      if (leaves_first) finish();
      if (gate->stop(waiters[0])) wakes[0].post(true);
      stop_returned.set();
      if (!leaves_first) finish();
      return;
    }
    if (!wait_until_idle(0, true)) {
      stopped.take();
      while (!gate->idle()) rl::yield(1, RL_INFO);
    }
    require(work[1].get() == 1, "what was done in flight is seen");
    gate.destroy();
  }
};

}  // namespace
}  // namespace roost::model

int main(int argc, char** argv) {
  using namespace roost::model;
  Cases cases(argc, argv);
  cases.exhaustive<GoWhenIdle<2>>("one_goes", {&was_idle, &not_listed, &woken});
  cases.exhaustive<Drain<2, true>>(
      "drain_one", {&entered, &refused, &entered_later, &was_idle, &not_listed, &woken});
  cases.exhaustive<StopAndLeave>("stop_and_leave", {&was_idle, &not_listed, &woken, &stopped});
  cases.bounded<GoWhenIdle<3>>("go_when_idle", 3, {&was_idle, &not_listed, &woken});
  cases.bounded<Drain<3, false>>("drain", 2,
                                 {&entered, &refused, &entered_later, &was_idle, &woken});
  cases.bounded<Stop>("stop", 2, {&was_idle, &not_listed, &woken, &woke_two, &stopped});
  cases.bounded<StoppedThenGoes>("stopped_then_goes", 3,
                                 {&was_idle, &not_listed, &woken, &stopped});
  cases.random<GoWhenIdle<3>>("go_when_idle_at_random", 200000, {&was_idle, &not_listed, &woken});
  cases.random<Drain<3, true>>(
      "drain_at_random", 300000,
      {&entered, &refused, &entered_later, &was_idle, &not_listed, &woken});
  cases.random<Stop>("stop_at_random", 300000,
                     {&was_idle, &not_listed, &woken, &woke_two, &stopped});
  return cases.result();
}
