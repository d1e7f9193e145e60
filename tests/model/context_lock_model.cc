// SPDX-License-Identifier: MIT
// The lock of a context: the home thread that keeps it and lets others go first, threads that come
// for it and sleep until their turn, and recursion.
#include "model/checker.h"
#include "roost/aio/context_lock.h"

namespace roost::model {
namespace {

using P = RelacyPlatform<Pause::kYield>;

Path slept{"a waiter slept"};
Path woken{"a sleeping waiter was woken"};
Path not_slept{"the turn came on the way to sleep"};
Path let_others{"the home let others go first"};
Path queued_behind{"the home queued after its sleep"};

// A futex: it compares and blocks in one step, orders no memory, and may wake for nothing. What is
// woken is an address, whose word may be gone.
struct Park {
  static constexpr unsigned kSpins = 1;
  using Word = P::Atomic<std::uint64_t>;

  static void wait(const Word& word, std::uint64_t value) {
    schedule_point();
    if (word.newest() != value) {
      not_slept.take();
      // A step back, after which the caller's next look finds what was seen here, or newer.
      rl::yield(1, RL_INFO);
      return;
    }
    slept.take();
    const unsigned self = rl::thread_index();
    sleeping_on[self] = &word;
    const bool spurious = spurious_left > 0;
    if (rl::ctx().park_current_thread(false, spurious, false, RL_INFO) ==
        rl::unpark_reason_spurious) {
      --spurious_left;
    }
    sleeping_on[self] = nullptr;
  }

  static void wake(const Word* word) {
    schedule_point();
    for (unsigned thread = 0; thread < kThreads; ++thread) {
      if (sleeping_on[thread] != word) continue;
      sleeping_on[thread] = nullptr;
      woken.take();
      rl::ctx().unpark_thread(static_cast<int>(thread), false, RL_INFO);
    }
  }

  static void reset(unsigned spurious_wake_ups = 1) {
    spurious_left = spurious_wake_ups;
    for (auto& word : sleeping_on) word = nullptr;
  }

  static constexpr unsigned kThreads = 4;
  static inline const Word* sleeping_on[kThreads];
  static inline unsigned spurious_left;
};

using Lock = ContextLock<P, Park>;

struct World {
  Storage<Lock> lock;
  P::Shared<std::uint64_t> guarded;
  bool held = false;
  unsigned turns = 0;

  void critical_section() {
    require(!std::exchange(held, true), "one holds it");
    guarded.set(guarded.get() + 1);
    ++turns;
    schedule_point();
    held = false;
  }

  // In one step: it is the order of memory that tells whether another is at it.
  void brief_section() {
    guarded.set(guarded.get() + 1);
    ++turns;
  }

  // A control thread; recursive.
  void foreign(unsigned self) {
    const Lock::ThreadId me = self + 1;
    require(lock->acquire(me), "it did not hold it");
    critical_section();
    require(!lock->acquire(me), "it holds it");
    require(lock->owned_by(me), "it knows that it holds it");
    require(!lock->release(), "it still holds it");
    critical_section();
    require(lock->release(), "it let it go");
    require(!lock->owned_by(me), "it knows that it let go");
  }
};

// The home polls: works, lets others go first if somebody waits, sleeps without the lock.
template <unsigned threads, unsigned iterations>
struct Home : Suite<threads>, World {
  void before() override {
    Park::reset();
    lock.make();
  }
  void thread(unsigned self) override {
    if (self != 0) return foreign(self);
    lock->lock();
    for (unsigned i = 0; i < iterations; ++i) {
      critical_section();
      if (lock->let_others()) let_others.take();
      critical_section();
      lock->unlock();
      schedule_point();  // the wait
      if (!lock->try_lock()) {
        queued_behind.take();
        lock->lock();
      }
      critical_section();
    }
    lock->unlock();
  }
  void after() override {
    require(turns == 3 * iterations + 2 * (threads - 1), "all had their turns");
    require(lock->is_free(), "nobody holds it");
    lock.destroy();
  }
};

// Two or three that only lock.
template <unsigned threads>
struct Foreign : Suite<threads>, World {
  void before() override {
    Park::reset();
    lock.make();
  }
  void thread(unsigned) override {
    lock->lock();
    critical_section();
    lock->unlock();
  }
  void after() override {
    require(turns == threads, "all had their turn");
    require(lock->is_free(), "nobody holds it");
    lock.destroy();
  }
};

// The home lets one go first, if it waits.
struct LetOthers : Suite<2>, World {
  void before() override {
    Park::reset(0);
    lock.make();
    lock->lock();
  }
  void thread(unsigned self) override {
    if (self == 0) {
      if (lock->let_others()) let_others.take();
    } else {
      lock->lock();
    }
    brief_section();
    lock->unlock();
  }
  void after() override {
    require(turns == 2, "both had their turn");
    require(lock->is_free(), "nobody holds it");
    lock.destroy();
  }
};

}  // namespace
}  // namespace roost::model

int main(int argc, char** argv) {
  using namespace roost::model;
  Cases cases(argc, argv);
  cases.exhaustive<Foreign<2>>("two_threads", {&slept, &woken, &not_slept});
  cases.bounded<Home<2, 1>>("home", 3, {&slept, &woken, &let_others, &queued_behind});
  cases.bounded<Foreign<3>>("foreign", 2, {&slept, &woken});
  cases.random<Home<3, 2>>("home_at_random", 200000,
                           {&slept, &woken, &not_slept, &let_others, &queued_behind});
  cases.random<Foreign<3>>("foreign_at_random", 300000, {&slept, &woken, &not_slept});
  cases.exhaustive<LetOthers>("let_others", {&slept, &woken, &let_others});
  return cases.result();
}
