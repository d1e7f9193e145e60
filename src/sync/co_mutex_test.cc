// SPDX-License-Identifier: MIT
// CoMutex on contexts polled by hand.
#include "roost/sync/co_mutex.h"

#include <optional>
#include <vector>

#include "roost/sync/thread_mutex.h"
#include "sync/test_sync.h"

namespace roost {
namespace {

class CoMutexes : public SyncTest {
 protected:
  // Takes the lock, notes it, yields until it is entered again, and lets go.
  Task<> hold(char name) {
    auto guard = co_await mutex_.lock();
    order_ += name;
    co_await yield();
  }
  // Takes the lock, notes where, and lets go.
  Task<> pass(char name) {
    auto guard = co_await mutex_.lock();
    order_ += name;
    homes_.push_back(AioContext::current());
  }
  // The same with a stop token; capital: it was cancelled.
  Task<> pass(char name, std::stop_token stop) {
    auto guard = co_await mutex_.lock(stop);
    order_ += guard ? name : static_cast<char>(name - 'a' + 'A');
    if (!guard) {
      EXPECT_EQ(guard.error().code(), ECANCELED);
    }
  }

  Coroutine* start_holder(AioContext& context, char name = 'h') {
    Coroutine* co = spawn(context, hold(name), "holder");
    settle();
    return co;
  }
  void resume(Coroutine* co) {
    co_wake(*co);
    settle();
  }

  CoMutex mutex_{"the lock"};
  std::vector<AioContext*> homes_;
};

TEST_F(CoMutexes, AFreeOneIsTakenWithoutSuspending) {
  ContextScope scope(a());
  Coroutine::create(pass('x'))->enter();
  EXPECT_EQ(order_, "x");
}

TEST_F(CoMutexes, AWaiterResumesAtHomeOnceItIsUnlockedElsewhere) {
  Coroutine* holder = start_holder(a());
  spawn(b(), pass('x'));
  spawn(c(), pass('y'));
  settle();
  EXPECT_EQ(order_, "h");
  resume(holder);
  EXPECT_EQ(order_, "hxy");
  EXPECT_EQ(homes_, (std::vector<AioContext*>{&b(), &c()}));
}

TEST_F(CoMutexes, WaitersAreServedInTheirOrder) {
  Coroutine* holder = start_holder(a());
  for (char name : {'1', '2', '3', '4', '5', '6'}) {
    spawn(name % 2 ? a() : b(), pass(name));
    settle();
  }
  resume(holder);
  EXPECT_EQ(order_, "h123456");
}

// What the design calls a lock held across a suspension: other coroutines of the same thread wait
// for it without keeping the holder from running.
TEST_F(CoMutexes, ALockHeldAcrossASuspensionBlocksNoThread) {
  const auto body = [&](char name) -> Task<> {
    auto guard = co_await mutex_.lock();
    for (int i = 0; i < 10; ++i) co_await move_to(i % 2 ? a() : b());  // trivial branches
    order_ += name;
  };
  for (char name : {'1', '2', '3'}) spawn(a(), body(name));
  settle();
  EXPECT_EQ(order_, "123");
}

TEST_F(CoMutexes, ARunningCoroutineMayGoBeforeAWaiterOnItsWay) {
  Coroutine* holder = start_holder(a());
  spawn(b(), pass('w'));
  settle();
  co_wake(*holder);
  a().poll(false);  // unlocked; the waiter has not had its turn
  spawn(a(), pass('r'));
  a().poll(false);
  EXPECT_EQ(order_, "hr");
  settle();
  EXPECT_EQ(order_, "hrw");
}

TEST_F(CoMutexes, AWaiterThatLostTooOftenIsHandedTheLock) {
  // One coroutine lets go of the lock and takes it again before the waiter has its turn.
  bool go_on = true;
  int rounds = 0;
  const auto greedy = [&]() -> Task<> {
    while (go_on) {
      auto guard = co_await mutex_.lock();
      ++rounds;
      guard.unlock();
      auto again = co_await mutex_.lock();
      co_await move_to(a());
    }
  };
  const auto waiter = [&]() -> Task<> {
    auto guard = co_await mutex_.lock();
    go_on = false;
  };
  spawn(a(), greedy());
  a().poll(false);
  spawn(b(), waiter());
  for (int i = 0; i < 100 && go_on; ++i) {
    b().poll(false);
    a().poll(false);
  }
  EXPECT_FALSE(go_on) << "starved";
  EXPECT_EQ(mutex_.statistics().handoffs, 1u);
  EXPECT_EQ(mutex_.statistics().defeats, 4u);
  settle();
}

// ---- Cancellation

TEST_F(CoMutexes, AStopRequestedBeforeCancelsEvenIfTheLockIsFree) {
  std::stop_source stop;
  stop.request_stop();
  spawn(a(), pass('x', stop.get_token()));
  settle();
  EXPECT_EQ(order_, "X");
  spawn(a(), pass('y'));
  settle();
  EXPECT_EQ(order_, "Xy");
}

TEST_F(CoMutexes, ACancelledWaiterNeverOwnsAndTheOthersKeepTheirOrder) {
  std::stop_source stop;
  Coroutine* holder = start_holder(a());
  spawn(b(), pass('1'));
  settle();
  spawn(b(), pass('x', stop.get_token()));
  settle();
  spawn(a(), pass('2'));
  settle();
  stop.request_stop();
  settle();
  EXPECT_EQ(order_, "hX");
  resume(holder);
  EXPECT_EQ(order_, "hX12");
}

TEST_F(CoMutexes, TheOnlyWaiterCancelledLeavesAFreeLock) {
  std::stop_source stop;
  Coroutine* holder = start_holder(a());
  spawn(b(), pass('x', stop.get_token()));
  settle();
  stop.request_stop();
  resume(holder);
  EXPECT_EQ(order_, "hX");
  spawn(b(), pass('y'));
  settle();
  EXPECT_EQ(order_, "hXy");
}

TEST_F(CoMutexes, AStopAfterTheLockWasTakenChangesNothing) {
  std::stop_source stop;
  spawn(a(), pass('x', stop.get_token()));
  settle();
  stop.request_stop();
  settle();
  EXPECT_EQ(order_, "x");
}

TEST_F(CoMutexes, CancelledWhileBeingWokenItTakesTheLockIfThatIsFree) {
  std::stop_source stop;
  Coroutine* holder = start_holder(a());
  spawn(b(), pass('x', stop.get_token()));
  settle();
  spawn(c(), pass('y'));
  settle();
  co_wake(*holder);
  a().poll(false);  // unlocked: x is on its way
  stop.request_stop();
  settle();
  EXPECT_EQ(order_, "hxy");
}

TEST_F(CoMutexes, CancelledWhileBeingWokenItGivesUpIfTheLockIsHeldAgain) {
  std::stop_source stop;
  Coroutine* first = start_holder(a());
  spawn(b(), pass('x', stop.get_token()));
  settle();
  spawn(c(), pass('y'));
  settle();
  Coroutine* second = Coroutine::create(hold('i'), "second holder");
  co_wake(*first);
  a().poll(false);  // unlocked: x is on its way
  {
    ContextScope scope(a());
    second->enter();
  }
  stop.request_stop();
  settle();
  EXPECT_EQ(order_, "hiX");
  EXPECT_EQ(mutex_.statistics().cancelled_late, 1u);
  resume(second);
  EXPECT_EQ(order_, "hiXy");
}

TEST_F(CoMutexes, AStopWithinTheWaitersOwnThreadDoesNotEnterItOnTheCallersStack) {
  std::stop_source stop;
  Coroutine* holder = start_holder(a());
  spawn(b(), pass('x', stop.get_token()));
  settle();
  {
    ContextScope scope(b());
    stop.request_stop();
    EXPECT_EQ(order_, "h");
  }
  b().poll(false);
  EXPECT_EQ(order_, "hX");
  resume(holder);
}

TEST_F(CoMutexes, CancelledWhileItIsToBeHandedTheLockTheNextOneGetsIt) {
  std::stop_source stop;
  std::vector<Coroutine*> holders;
  holders.push_back(start_holder(a()));
  spawn(b(), pass('x', stop.get_token()));
  settle();
  spawn(c(), pass('y'));
  settle();
  for (int defeat = 0; defeat < 4; ++defeat) {
    Coroutine* next = Coroutine::create(hold('h'), "next holder");
    co_wake(*holders.back());
    a().poll(false);
    ContextScope scope(a());
    next->enter();
    holders.push_back(next);
    b().poll(false);
  }
  EXPECT_EQ(mutex_.statistics().defeats, 4u);
  stop.request_stop();
  settle();
  EXPECT_EQ(order_, "hhhhhX");
  resume(holders.back());
  EXPECT_EQ(order_, "hhhhhXy");
}

// ---- Guards

TEST_F(CoMutexes, AGuardCanBeMovedUnlockedAndReleased) {
  const auto body = [&]() -> Task<> {
    auto one = co_await mutex_.lock();
    CoMutex::Guard two = std::move(one);
    EXPECT_FALSE(one);
    EXPECT_TRUE(two);
    EXPECT_FALSE(mutex_.try_lock());
    two.unlock();
    EXPECT_FALSE(two);
    two = mutex_.try_lock();
    EXPECT_TRUE(two);
    CoMutex other;
    two = co_await other.lock();  // lets go of the first
    EXPECT_TRUE(mutex_.try_lock());
    two.unlock();
    CoMutex* released = (co_await mutex_.lock()).release();
    EXPECT_EQ(released, &mutex_);
    released->unlock();
    (co_await mutex_.lock()).release();
    {
      const CoMutex::Guard again = mutex_.adopt();
      EXPECT_FALSE(mutex_.try_lock());
    }
    EXPECT_TRUE(mutex_.try_lock());
    order_ += 'x';
  };
  spawn(a(), body());
  settle();
  EXPECT_EQ(order_, "x");
}

TEST_F(CoMutexes, AnExceptionLetsGoOfTheLock) {
  const auto throwing = [&]() -> Task<> {
    auto guard = co_await mutex_.lock();
    throw 1;
  };
  const auto body = [&]() -> Task<> {
    try {
      co_await throwing();
    } catch (int) {
      order_ += 'c';
    }
    auto guard = co_await mutex_.lock();
    order_ += 'x';
  };
  spawn(a(), body());
  settle();
  EXPECT_EQ(order_, "cx");
}

// ---- Misuse

using CoMutexDeath = CoMutexes;

TEST_F(CoMutexDeath, LockingWhatOneHolds) {
  const auto body = [&]() -> Task<> {
    auto guard = co_await mutex_.lock();
    auto again = co_await mutex_.lock();
  };
  EXPECT_DEATH(
      {
        spawn(a(), body(), "narcissus");
        settle();
      },
      "the lock .* locked by coroutine 'narcissus' at .*co_mutex_test.cc.*which holds it");
}

TEST_F(CoMutexDeath, LockingWhatOneHoldsWithATokenThatIsStopped) {
  const auto twice = [this]() -> Task<> {
    std::stop_source stop;
    const auto outer = co_await mutex_.lock();
    stop.request_stop();
    const auto inner = co_await mutex_.lock(stop.get_token());
  };
  EXPECT_DEATH(
      {
        spawn(a(), twice(), "the greedy");
        settle();
      },
      "locked by coroutine 'the greedy'.*which holds it");
}

TEST_F(CoMutexDeath, UnlockingWhatAnotherHolds) {
  Coroutine* holder = start_holder(b());
  const auto body = [&]() -> Task<> {
    mutex_.unlock();
    co_return;
  };
  EXPECT_DEATH(
      {
        spawn(a(), body(), "thief");
        settle();
      },
      "the lock .* unlocked by coroutine 'thief' at .*co_mutex_test.cc.*does not hold it");
  EXPECT_DEATH(mutex_.unlock(), "the lock .* unlocked by nobody");
  resume(holder);
}

TEST_F(CoMutexDeath, AGuardGivenToAnotherCoroutine) {
  CoMutex::Guard given;
  const auto giver = [&]() -> Task<> {
    given = co_await mutex_.lock();
    co_await yield();
  };
  const auto taker = [&]() -> Task<> {
    CoMutex::Guard mine = std::move(given);
    co_return;
  };
  EXPECT_DEATH(
      {
        spawn(a(), giver(), "giver");
        settle();
        spawn(b(), taker(), "taker");
        settle();
      },
      "unlocked by coroutine 'taker'");
}

TEST_F(CoMutexDeath, ACoroutineThatEndsWithALockHeld) {
  const auto body = [&]() -> Task<> { (co_await mutex_.lock()).release(); };
  EXPECT_DEATH(
      {
        spawn(a(), body(), "forgetful");
        settle();
      },
      "coroutine 'forgetful' ended with 1 of its coroutine locks held");
}

TEST_F(CoMutexDeath, ACoroutineDestroyedWithALockHeld) {
  EXPECT_DEATH(Coroutine::destroy(start_holder(a())),
               "coroutine 'holder' ended with 1 of its coroutine locks held");
}

TEST_F(CoMutexDeath, AdoptingWhatOneDoesNotHold) {
  const auto body = [&]() -> Task<> {
    const CoMutex::Guard guard = mutex_.adopt();
    co_return;
  };
  ContextScope scope(a());
  EXPECT_DEATH(Coroutine::create(body(), "impostor")->enter(),
               "the lock adopted by coroutine 'impostor' at sync/co_mutex_test.cc:[0-9]+, which "
               "does not hold it");
}

TEST_F(CoMutexDeath, AThreadMutexHeldWhileACoroutineLockIsAwaited) {
  ThreadMutex thread_mutex;
  const auto body = [&]() -> Task<> {
    std::lock_guard held(thread_mutex);
    auto guard = co_await mutex_.lock();
  };
  EXPECT_DEATH(
      {
        start_holder(b());
        spawn(a(), body(), "mixer");
        settle();
      },
      "coroutine 'mixer' is about to wait for the lock while its thread holds a ThreadMutex");
}

TEST_F(CoMutexDeath, DestroyingAHeldOne) {
  std::optional<CoMutex> mutex{"a lock"};
  const auto body = [&]() -> Task<> {
    auto guard = co_await mutex->lock();
    co_await yield();
  };
  EXPECT_DEATH(
      {
        spawn(a(), body());
        settle();
        mutex.reset();
      },
      "a lock .* destroyed while it is held or waited for");
}

}  // namespace
}  // namespace roost
