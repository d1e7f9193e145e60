// SPDX-License-Identifier: MIT
// The core of CoMutex: taking, waiting, competing, being handed the lock, cancelling, and a holder
// that destroys the mutex once it let go.
#include "model/checker.h"
#include "roost/sync/co_mutex_core.h"

namespace roost::model {
namespace {

using P = RelacyPlatform<Pause::kNothing>;
using Core = CoMutexCore<P>;

Path taken_at_once{"the lock was free"};
Path taken_late{"it was let go between looking and enqueueing"};
Path competed{"a woken waiter took it"};
Path defeated{"a woken waiter found it taken again"};
Path handed{"it was handed on"};
Path cancelled_queued{"a waiter was cancelled in the list"};
Path cancelled_late{"a cancelled waiter found the lock taken"};
Path cancelled_in_vain{"a cancelled waiter had got it before"};

enum class Wake : std::uint8_t { kOwns, kCompete, kCancelled };

struct Waiter : Core::Waiter {
  explicit Waiter(unsigned of) : Core::Waiter(8 * (of + 1)), thread(of) {}
  const unsigned thread;
};

struct World {
  Storage<Core> core;
  Storage<Waiter> waiters[4];
  Mailbox<Wake, Order::kHandsOver> wakes[4];
  P::Shared<std::uint64_t> guarded;
  bool held = false;
  unsigned turns = 0;

  static std::uint64_t token(unsigned self) { return 8 * (self + 1); }

  void critical_section() {
    require(!std::exchange(held, true), "one holds it");
    guarded.set(guarded.get() + 1);
    ++turns;
    schedule_point();
    held = false;
  }

  bool try_lock(unsigned self) {
    if (!core->try_lock(token(self))) return false;
    taken_at_once.take();
    return true;
  }

  // False: cancelled.
  bool wait(unsigned self) {
    Waiter& waiter = waiters[self].get();
    bool again = false;
    for (;;) {
      switch (core->wait(waiter)) {
        case Core::Outcome::kTaken:
          (again ? competed : taken_late).take();
          return true;
        case Core::Outcome::kCancelled:
          cancelled_late.take();
          return false;
        case Core::Outcome::kQueued:
          if (again) defeated.take();
          break;
      }
      switch (wakes[self].take()) {
        case Wake::kOwns:
          handed.take();
          return true;
        case Wake::kCancelled:
          cancelled_queued.take();
          return false;
        case Wake::kCompete:
          again = true;
          break;
      }
    }
  }

  void lock(unsigned self) {
    if (try_lock(self)) return;
    waiters[self].make(self);
    require(wait(self), "nobody cancels it");
    waiters[self].destroy();
  }

  void unlock(unsigned self) {
    if (core->try_unlock(token(self))) return;
    const Core::Next next = core->unlock();
    if (!next.waiter) return;
    const unsigned thread = static_cast<Waiter*>(next.waiter)->thread;
    wakes[thread].post(next.owns ? Wake::kOwns : Wake::kCompete);
  }
};

template <unsigned threads, unsigned rounds>
struct Lock : Suite<threads>, World {
  void before() override { core.make(); }
  void thread(unsigned self) override {
    for (unsigned i = 0; i < rounds; ++i) {
      lock(self);
      critical_section();
      unlock(self);
    }
  }
  void after() override {
    require(turns == threads * rounds, "everybody had every turn");
    require(core->unused(), "nothing is left over");
    core.destroy();
  }
};

// The last of two holders destroys it.
struct Destroy : Suite<2>, World {
  void before() override {
    core.make();
    require(core->try_lock(token(0)), "it is free");
  }
  void thread(unsigned self) override {
    if (self == 1) lock(1);
    critical_section();
    unlock(self);
    if (self == 1) core.destroy();
  }
  void after() override { require(turns == 2, "both held it"); }
};

// Thread 1's wait is cancelled by the last thread; the others lock.
template <unsigned threads>
struct Cancel : Suite<threads>, World {
  Flag cancel_returned;
  bool victim_had_it = false;

  void before() override {
    core.make();
    require(core->try_lock(token(0)), "it is free");
    waiters[1].make(1u);
  }
  void thread(unsigned self) override {
    if (self == threads - 1) {
      if (core->cancel(waiters[1].get())) wakes[1].post(Wake::kCancelled);
      cancel_returned.set();
    } else if (self == 1) {
      victim_had_it = wait(1);
      cancel_returned.await();
      if (victim_had_it) {
        if (waiters[1]->cancelled.get()) cancelled_in_vain.take();
        critical_section();
        unlock(1);
      }
      waiters[1].destroy();
    } else {
      if (self != 0) lock(self);
      critical_section();
      unlock(self);
    }
  }
  void after() override {
    require(turns == threads - 2 + victim_had_it, "everybody had a turn");
    require(core->unused(), "nothing is left over");
    core.destroy();
  }
};

}  // namespace
}  // namespace roost::model

int main(int argc, char** argv) {
  using namespace roost::model;
  Cases cases(argc, argv);
  cases.exhaustive<Destroy>("destroy", {&taken_at_once, &taken_late, &competed});
  cases.exhaustive<Lock<2, 1>>("two_threads", {&taken_at_once, &taken_late, &competed});
  cases.bounded<Cancel<3>>("cancel", 3, {&cancelled_queued, &cancelled_late, &cancelled_in_vain});
  cases.random<Lock<3, 3>>("three_threads", 200000,
                           {&taken_at_once, &taken_late, &competed, &defeated});
  cases.random<Lock<2, 12>>("many_rounds", 60000,
                            {&taken_at_once, &taken_late, &competed, &defeated, &handed});
  cases.random<Cancel<4>>("cancel_at_random", 300000,
                          {&cancelled_queued, &cancelled_late, &cancelled_in_vain, &competed});
  return cases.result();
}
