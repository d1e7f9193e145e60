// SPDX-License-Identifier: MIT
// The core of CoMutex: taking, waiting, competing, being handed the lock, cancelling, and a holder
// that destroys the mutex once it let go.
#include "model/checker.h"
#include "roost/sync/co_mutex_core.h"

namespace roost::model {
namespace {

using P = RelacyPlatform<Pause::kNothing>;
constexpr std::uint64_t kShipped = 4;  // the patience of a waiter
static_assert(std::is_same_v<CoMutexCore<P>, CoMutexCore<P, kShipped>>);

Path taken_at_once{"the lock was free"};
Path taken_late{"it was let go between looking and enqueueing"};
Path competed{"a woken waiter took it"};
Path defeated{"a woken waiter found it taken again"};
Path handed{"it was handed on"};
Path handed_while_others_wait{"it was handed on while others were in the list"};
Path cancelled_queued{"a waiter was cancelled in the list"};
Path cancelled_late{"a cancelled waiter found the lock taken"};
Path cancelled_in_vain{"a cancelled waiter had got it before"};
Path cancelled_last{"a hand-off was cancelled with the only waiter"};
Path cancelled_next{"a hand-off meant for a cancelled waiter went to the next"};

enum class Wake : std::uint8_t { kOwns, kCompete, kCancelled };

template <std::uint64_t patience>
struct World {
  using Core = CoMutexCore<P, patience>;

  struct Waiter : Core::Waiter {
    explicit Waiter(unsigned of) : Core::Waiter(token(of)), thread(of) {}
    const unsigned thread;
  };

  Storage<Core> core;
  Storage<Waiter> waiters[4];
  Mailbox<Wake, Order::kHandsOver> wakes[4];
  P::Shared<std::uint64_t> guarded;
  bool held = false;
  unsigned turns = 0;

  // What happens here without a step of another thread in between is in the list's order.
  bool queued[4] = {};     // stands in the list
  unsigned lost[4] = {};   // how often it competed in vain, in this wait
  bool passed_on = false;  // a hand-off, from who was cancelled

  bool others_wait() const { return queued[0] || queued[1] || queued[2] || queued[3]; }

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
    lost[self] = 0;
    for (;;) {
      switch (core->wait(waiter)) {
        case Core::Outcome::kTaken:
          (again ? competed : taken_late).take();
          return true;
        case Core::Outcome::kCancelled:
          cancelled_late.take();
          return false;
        case Core::Outcome::kQueued:
          queued[self] = true;
          if (!again) break;
          defeated.take();
          require(++lost[self] <= patience, "who has lost so often does not compete again");
          break;
      }
      switch (wakes[self].take()) {
        case Wake::kOwns:
          handed.take();
          if (lost[self] < patience) cancelled_next.take();
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
    const typename Core::Next next = core->unlock();
    require(next.owns || !passed_on, "a hand-off whose waiter was cancelled goes to the next");
    if (!next.waiter) return;
    const unsigned thread = static_cast<Waiter*>(next.waiter)->thread;
    queued[thread] = false;
    if (next.owns) {
      require(lost[thread] >= patience || std::exchange(passed_on, false),
              "it is handed to who lost so often, or stands behind");
      if (others_wait()) handed_while_others_wait.take();
    }
    wakes[thread].post(next.owns ? Wake::kOwns : Wake::kCompete);
  }

  void cancel(unsigned victim) {
    if (!core->cancel(waiters[victim].get())) return;
    queued[victim] = false;
    if (lost[victim] == patience) {
      passed_on = others_wait();
      if (!passed_on) cancelled_last.take();
    }
    wakes[victim].post(Wake::kCancelled);
  }
};

template <unsigned threads, unsigned rounds, std::uint64_t patience = kShipped>
struct Lock : Suite<threads>, World<patience> {
  using W = World<patience>;
  using W::core, W::lock, W::unlock, W::critical_section, W::turns;

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
struct Destroy : Suite<2>, World<kShipped> {
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

// Thread 1's wait is cancelled by the last thread; the others lock, the first of them `more` times
// once it has let go.
template <unsigned threads, unsigned more = 0, std::uint64_t patience = kShipped>
struct Cancel : Suite<threads>, World<patience> {
  using W = World<patience>;
  using W::core, W::lock, W::unlock, W::wait, W::critical_section, W::turns, W::waiters, W::token;

  Flag cancel_returned;
  bool victim_had_it = false;

  void before() override {
    core.make();
    require(core->try_lock(token(0)), "it is free");
    waiters[1].make(1u);
  }
  void thread(unsigned self) override {
    if (self == threads - 1) {
      W::cancel(1);
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
      for (unsigned i = 0; self == 0 && i < more; ++i) {
        lock(self);
        critical_section();
        unlock(self);
      }
    }
  }
  void after() override {
    require(turns == threads - 2 + more + victim_had_it, "everybody had a turn");
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
  cases.bounded<Lock<3, 2, 1>>("hand_off", 2, {&defeated, &handed, &handed_while_others_wait});
  cases.bounded<Cancel<3, 1, 1>>("cancel_hand_off", 3, {&cancelled_last});
  cases.bounded<Cancel<4, 1, 1>>("cancel_of_the_next", 2, {&cancelled_next});
  cases.random<Lock<3, 3, 1>>("hand_off_at_random", 200000, {&handed_while_others_wait});
  cases.random<Cancel<4, 2, 1>>("cancel_hand_off_at_random", 200000,
                                {&cancelled_last, &cancelled_next});
  cases.random<Cancel<4>>("cancel_at_random", 300000,
                          {&cancelled_queued, &cancelled_late, &cancelled_in_vain, &competed});
  return cases.result();
}
