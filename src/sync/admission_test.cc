// SPDX-License-Identifier: MIT
// CoSemaphore, CoEvent and CoRwlock on contexts polled by hand.
#include <cstdio>
#include <optional>
#include <type_traits>
#include <vector>

#include "roost/sync/co_event.h"
#include "roost/sync/co_rwlock.h"
#include "roost/sync/co_semaphore.h"
#include "roost/sync/thread_mutex.h"
#include "sync/test_sync.h"

namespace roost {
namespace {

char cancelled(char name) { return static_cast<char>(name - 'a' + 'A'); }

// ---- CoSemaphore

class CoSemaphores : public SyncTest {
 protected:
  Task<> acquire(char name, std::uint64_t units, std::stop_token stop = {}) {
    const Result<void> acquired = co_await semaphore_.acquire(units, stop);
    order_ += acquired ? name : cancelled(name);
    homes_.push_back(AioContext::current());
  }
  CoSemaphore semaphore_{2, "places"};
  std::vector<AioContext*> homes_;
};

TEST_F(CoSemaphores, UnitsThatAreThereAreTakenAtOnce) {
  ContextScope scope(a());
  Coroutine::create(acquire('x', 2))->enter();
  EXPECT_EQ(order_, "x");
  EXPECT_EQ(semaphore_.available(), 0u);
  EXPECT_FALSE(semaphore_.try_acquire());
  semaphore_.release();
  EXPECT_TRUE(semaphore_.try_acquire());
}

TEST_F(CoSemaphores, AReleaseOutsideOfAnyCoroutineWakesTheOldestAtHome) {
  spawn(a(), acquire('0', 2));
  settle();
  spawn(b(), acquire('1', 1));
  spawn(c(), acquire('2', 1));
  settle();
  semaphore_.release();
  settle();
  EXPECT_EQ(order_, "01");
  semaphore_.release();
  settle();
  EXPECT_EQ(order_, "012");
  EXPECT_EQ(homes_, (std::vector<AioContext*>{&a(), &b(), &c()}));
}

TEST_F(CoSemaphores, ALargeRequestIsNotOvertakenBySmallOnes) {
  spawn(a(), acquire('0', 1));
  settle();
  spawn(b(), acquire('5', 5));
  settle();
  spawn(a(), acquire('1', 1));
  settle();
  EXPECT_EQ(order_, "0");
  EXPECT_FALSE(semaphore_.try_acquire());  // although one is there
  semaphore_.release(4);
  settle();
  EXPECT_EQ(order_, "05");
  semaphore_.release(1);
  settle();
  EXPECT_EQ(order_, "051");
}

TEST_F(CoSemaphores, ACancelledRequestTakesNothingAndLetsTheNextIn) {
  std::stop_source stop;
  spawn(a(), acquire('x', 5, stop.get_token()));
  settle();
  spawn(b(), acquire('1', 2));
  settle();
  EXPECT_EQ(order_, "");
  stop.request_stop();
  settle();
  EXPECT_EQ(order_, "X1");
  EXPECT_EQ(semaphore_.available(), 0u);
}

TEST_F(CoSemaphores, AStopEntersNeitherItsWaiterNorTheNextOnTheCallersStack) {
  std::stop_source stop;
  spawn(a(), acquire('x', 5, stop.get_token()));
  settle();
  spawn(a(), acquire('1', 2));
  settle();
  {
    ContextScope scope(a());
    stop.request_stop();
    EXPECT_EQ(order_, "");
  }
  settle();
  EXPECT_NE(order_.find('X'), std::string::npos);
  EXPECT_NE(order_.find('1'), std::string::npos);
}

TEST_F(CoSemaphores, AStopBeforeTakesNothingAndAStopAfterwardsChangesNothing) {
  std::stop_source stop;
  spawn(a(), acquire('0', 2));
  settle();
  spawn(a(), acquire('x', 1, stop.get_token()));
  settle();
  semaphore_.release();  // granted, not resumed yet
  stop.request_stop();
  settle();
  EXPECT_EQ(order_, "0x");
  semaphore_.release();
  spawn(a(), acquire('y', 1, stop.get_token()));
  settle();
  EXPECT_EQ(order_, "0xY");
  EXPECT_EQ(semaphore_.available(), 1u);
}

// Takes two places, tells how many are left, waits for `go_on`, and lets the guard give them back.
Task<> hold(CoSemaphore& semaphore, CoEvent& go_on, std::string& order) {
  const CoSemaphore::Guard guard = co_await semaphore.hold(2);
  order += 'a' + static_cast<char>(semaphore.available());
  co_await go_on.wait();
}

TEST_F(CoSemaphores, AGuardGivesItsUnitsBackWhenItGoes) {
  CoEvent go_on("the test");
  spawn(a(), hold(semaphore_, go_on, order_));
  settle();
  EXPECT_EQ(order_, "a");
  spawn(b(), acquire('1', 1));
  spawn(b(), hold(semaphore_, go_on, order_));
  settle();
  EXPECT_EQ(order_, "a");
  go_on.set();
  settle();
  EXPECT_EQ(order_, "a1");  // the second wants two, one is left
  semaphore_.release();
  settle();
  EXPECT_EQ(order_, "a1a");
  EXPECT_EQ(semaphore_.available(), 2u);
}

TEST_F(CoSemaphores, AStoppedHoldHasNoGuardAndAGrantedOneHas) {
  std::stop_source stop;
  Result<CoSemaphore::Guard> got[2];
  const auto hold_stoppable = [&](int i) -> Task<> {
    got[i] = co_await semaphore_.hold(2, stop.get_token());
  };
  spawn(a(), hold_stoppable(0));
  spawn(a(), hold_stoppable(1));
  settle();
  ASSERT_TRUE(got[0]);
  EXPECT_EQ(got[0]->units(), 2u);
  stop.request_stop();
  settle();
  ASSERT_FALSE(got[1]);
  EXPECT_EQ(got[1].error().code(), ECANCELED);
  EXPECT_EQ(semaphore_.available(), 0u);
  got[0]->give_back();
  EXPECT_EQ(semaphore_.available(), 2u);
}

TEST_F(CoSemaphores, AMovedGuardGivesBackOnceAndWhatItHeldBefore) {
  ContextScope scope(a());
  CoSemaphore::Guard first;
  CoSemaphore::Guard second;
  const auto take = [&](CoSemaphore::Guard& to) -> Task<> { to = co_await semaphore_.hold(); };
  Coroutine::create(take(first))->enter();
  Coroutine::create(take(second))->enter();
  EXPECT_EQ(semaphore_.available(), 0u);
  first = std::move(second);
  EXPECT_EQ(semaphore_.available(), 1u);
  EXPECT_EQ(second.units(), 0u);
  EXPECT_EQ(first.release(), 1u);  // kept: nobody gives it back
  first.give_back();
  EXPECT_EQ(semaphore_.available(), 1u);
}

// ---- CoEvent

class CoEvents : public SyncTest {
 protected:
  Task<> wait(char name, std::stop_token stop = {}) {
    const Result<void> happened = co_await event_.wait(stop);
    order_ += happened ? name : cancelled(name);
  }
  CoEvent event_;
};

TEST_F(CoEvents, SetWakesEverybodyInOrderAndLetsLaterOnesPass) {
  spawn(a(), wait('1'));
  settle();
  spawn(a(), wait('2'));
  settle();
  spawn(b(), wait('3'));
  settle();
  EXPECT_EQ(order_, "");
  event_.set();
  event_.reset();
  settle();
  EXPECT_EQ(order_, "123");
  spawn(a(), wait('4'));
  settle();
  EXPECT_EQ(order_, "123");
  event_.set();
  spawn(a(), wait('5'));
  settle();
  EXPECT_EQ(order_, "12345");
  EXPECT_TRUE(event_.is_set());
}

TEST_F(CoEvents, ItIsSetFromTheBeginningOnlyWhereThatIsSaid) {
  EXPECT_FALSE(CoEvent().is_set());
  EXPECT_FALSE(CoEvent("a name").is_set());
  EXPECT_FALSE(CoEvent("a name", false).is_set());
  EXPECT_TRUE(CoEvent("a name", true).is_set());
  // No name is taken for a flag.
  static_assert(!std::is_constructible_v<CoEvent, const char*, const char*>);
  static_assert(!std::is_constructible_v<CoEvent, bool, const char*>);
}

TEST_F(CoEvents, AWaitCanBeCancelledBeforeWhileAndNotAfter) {
  std::stop_source stop;
  spawn(a(), wait('x', stop.get_token()));
  settle();
  stop.request_stop();
  settle();
  EXPECT_EQ(order_, "X");
  event_.set();
  spawn(a(), wait('y', stop.get_token()));
  settle();
  EXPECT_EQ(order_, "XY");
  event_.reset();
  std::stop_source late;
  spawn(a(), wait('z', late.get_token()));
  settle();
  event_.set();
  late.request_stop();
  settle();
  EXPECT_EQ(order_, "XYz");
}

TEST_F(CoEvents, AWokenWaiterMayDestroyIt) {
  auto event = std::make_unique<CoEvent>();
  const auto body = [&]() -> Task<> {
    co_await event->wait();
    event.reset();
    order_ += 'x';
  };
  spawn(a(), body());
  settle();
  ContextScope scope(a());
  event->set();  // enters the waiter at once
  EXPECT_EQ(order_, "x");
}

TEST_F(CoEvents, DestroyingOneThatIsWaitedForAborts) {
  std::optional<CoEvent> event(std::in_place, "the end");
  const auto body = [&]() -> Task<> { co_await event->wait(); };
  EXPECT_DEATH(
      {
        spawn(a(), body(), "patient");
        settle();
        event.reset();
      },
      "the end .* destroyed while coroutine 'patient' waits for it");
}

// ---- CoRwlock

class CoRwlocks : public SyncTest {
 protected:
  // Notes its name when it has got the lock; lets go when it is woken.
  Task<> hold(bool writing, char name, std::stop_token stop = {}) {
    Result<CoRwlock::Guard> guard;
    if (writing) {
      guard = co_await lock_.write(stop);
    } else {
      guard = co_await lock_.read(stop);
    }
    if (!guard) {
      order_ += cancelled(name);
      co_return;
    }
    order_ += name;
    co_await yield();
  }
  Coroutine* start(AioContext& context, bool writing, char name, std::stop_token stop = {}) {
    Coroutine* co = spawn(context, hold(writing, name, stop), "holder");
    settle();
    return co;
  }
  Coroutine* reader(char name) { return start(a(), false, name); }
  Coroutine* writer(char name) { return start(b(), true, name); }
  void end(Coroutine* co) {
    co_wake(*co);
    settle();
  }
  CoRwlock lock_{"the map"};
};

TEST_F(CoRwlocks, ReadersShareAndAWriterIsAlone) {
  Coroutine* r = reader('r');
  Coroutine* s = reader('s');
  Coroutine* w = writer('w');
  EXPECT_EQ(order_, "rs");
  end(r);
  EXPECT_EQ(order_, "rs");
  end(s);
  EXPECT_EQ(order_, "rsw");
  Coroutine* x = writer('x');
  Coroutine* t = reader('t');
  EXPECT_EQ(order_, "rsw");
  end(w);
  EXPECT_EQ(order_, "rswx");
  end(x);
  EXPECT_EQ(order_, "rswxt");
  end(t);
}

TEST_F(CoRwlocks, TriedItIsGivenOnlyWhereNobodyWaitsOrIsInTheWay) {
  const auto tries = [&]() -> Task<> {
    order_ += lock_.try_read() ? 'r' : '-';
    order_ += lock_.try_write() ? 'w' : '-';
    co_return;
  };
  const auto expect_tries = [&](const std::string& given) {
    order_.clear();
    spawn(a(), tries());
    settle();
    EXPECT_EQ(order_, given);
  };
  expect_tries("rw");
  EXPECT_FALSE(lock_.try_read());  // outside of any coroutine
  EXPECT_FALSE(lock_.try_write());
  Coroutine* r = reader('r');
  expect_tries("r-");
  Coroutine* w = writer('w');
  expect_tries("--");  // the writer waits
  end(r);
  expect_tries("--");  // and writes
  end(w);
  expect_tries("rw");
}

TEST_F(CoRwlocks, AReaderDoesNotOvertakeAWaitingWriter) {
  Coroutine* r = reader('r');
  Coroutine* w = writer('w');
  Coroutine* s = reader('s');
  Coroutine* t = reader('t');
  EXPECT_EQ(order_, "r");
  end(r);
  EXPECT_EQ(order_, "rw");
  end(w);
  EXPECT_EQ(order_, "rwst");  // together
  end(s);
  end(t);
}

TEST_F(CoRwlocks, AWaitingWriterCancelledLetsTheReadersBehindItIn) {
  std::stop_source stop;
  Coroutine* r = reader('r');
  start(b(), true, 'w', stop.get_token());
  Coroutine* s = reader('s');
  EXPECT_EQ(order_, "r");
  stop.request_stop();
  settle();
  EXPECT_EQ(order_, "rsW");
  start(b(), true, 'x', stop.get_token());
  EXPECT_EQ(order_, "rsWX");
  end(r);
  end(s);
}

TEST_F(CoRwlocks, AnUpgradeWaitsForTheOtherReadersAndGoesBeforeWaitingWriters) {
  Coroutine* r = reader('r');
  const auto body = [&]() -> Task<> {
    auto guard = co_await lock_.read();
    order_ += 'u';
    EXPECT_TRUE(co_await guard.upgrade());
    EXPECT_TRUE(guard.writing());
    order_ += 'U';
    co_await yield();
    guard.downgrade();
    EXPECT_FALSE(guard.writing());
    order_ += 'd';
    co_await yield();
    EXPECT_TRUE(co_await guard.upgrade());  // nobody else reads
    order_ += 'V';
  };
  Coroutine* u = spawn(b(), body());
  settle();
  Coroutine* w = writer('w');
  Coroutine* s = reader('s');
  EXPECT_EQ(order_, "ru");
  end(r);
  EXPECT_EQ(order_, "ruU");
  end(u);
  EXPECT_EQ(order_, "ruUd");  // the writer is next, so no reader is let in
  end(u);
  EXPECT_EQ(order_, "ruUdVw");
  end(w);
  EXPECT_EQ(order_, "ruUdVws");
  end(s);
}

TEST_F(CoRwlocks, ADowngradeLetsTheReadersInThatWaitNext) {
  const auto body = [&]() -> Task<> {
    auto guard = co_await lock_.write();
    co_await yield();
    guard.downgrade();
    order_ += 'd';
    co_await yield();
  };
  Coroutine* d = spawn(b(), body());
  settle();
  Coroutine* r = reader('r');
  EXPECT_EQ(order_, "");
  end(d);
  EXPECT_EQ(order_, "dr");
  end(d);
  end(r);
}

TEST_F(CoRwlocks, OfTwoUpgradesAtATimeTheSecondIsRefusedAndStillReads) {
  const auto body = [&](char name) -> Task<> {
    auto guard = co_await lock_.read();
    co_await yield();
    const bool upgraded = co_await guard.upgrade();
    EXPECT_EQ(guard.writing(), upgraded);
    order_ += upgraded ? name : cancelled(name);
    co_await yield();
  };
  Coroutine* one = spawn(a(), body('a'));
  Coroutine* two = spawn(b(), body('b'));
  settle();
  end(one);
  end(two);
  EXPECT_EQ(order_, "B");
  end(two);
  EXPECT_EQ(order_, "Ba");
  end(one);
}

TEST_F(CoRwlocks, ACancelledUpgradeStillReadsAndCanBeTriedAgain) {
  std::stop_source stop;
  Coroutine* r = reader('r');
  const auto body = [&]() -> Task<> {
    auto guard = co_await lock_.read();
    const Result<bool> upgraded = co_await guard.upgrade(stop.get_token());
    EXPECT_FALSE(upgraded);
    EXPECT_FALSE(guard.writing());
    EXPECT_TRUE(guard);
    const Result<bool> again = co_await guard.upgrade(stop.get_token());
    EXPECT_FALSE(again);
    order_ += 'X';
    EXPECT_TRUE(co_await guard.upgrade());
    order_ += 'U';
  };
  spawn(b(), body());
  settle();
  EXPECT_EQ(order_, "r");
  stop.request_stop();
  settle();
  EXPECT_EQ(order_, "rX");
  end(r);
  EXPECT_EQ(order_, "rXU");
}

TEST_F(CoRwlocks, AskedForByItsWriterItAborts) {
  const auto body = [&]() -> Task<> {
    auto guard = co_await lock_.write();
    auto again = co_await lock_.read();
  };
  EXPECT_DEATH(
      {
        spawn(a(), body(), "narcissus");
        settle();
      },
      "the map .* asked for by coroutine 'narcissus', which holds it for writing");
}

// What would wait for itself, as soon as nobody else reads.
TEST_F(CoRwlocks, AskedForWriteByItsOnlyReaderItAborts) {
  const auto body = [&]() -> Task<> {
    auto guard = co_await lock_.read();
    auto again = co_await lock_.write();
  };
  EXPECT_DEATH(
      {
        spawn(a(), body(), "narcissus");
        settle();
      },
      "the map asked for by coroutine 'narcissus', which is its only reader");
}

TEST_F(CoRwlocks, AskedForWriteByOneOfItsReadersItAbortsOnceTheOthersHaveGone) {
  const auto body = [&]() -> Task<> {
    auto guard = co_await lock_.read();
    co_await yield();
    auto again = co_await lock_.write(std::stop_token());
  };
  EXPECT_DEATH(
      {
        Coroutine* r = reader('r');
        Coroutine* s = reader('s');
        Coroutine* n = spawn(a(), body(), "narcissus");
        settle();
        end(r);
        end(n);
        std::fputs("waits for another\n", stderr);
        end(s);
      },
      "waits for another.*the map asked for by coroutine 'narcissus', which is its only reader");
}

TEST_F(CoRwlocks, ReadAgainByItsOnlyReaderBehindAWriterItAborts) {
  const auto body = [&]() -> Task<> {
    auto guard = co_await lock_.read();
    auto again = co_await lock_.read();
    order_ += '2';
    again.unlock();
    co_await yield();
    auto once_more = co_await lock_.read();
  };
  EXPECT_DEATH(
      {
        Coroutine* n = spawn(a(), body(), "narcissus");
        settle();
        std::fputs(order_.c_str(), stderr);
        writer('w');
        end(n);
      },
      "2.*the map asked for by coroutine 'narcissus', which is its only reader");
}

// After each way of becoming, and of no longer being, a reader.
TEST_F(CoRwlocks, WhoIsItsOnlyReaderIsKnownAfterUpgradesAndDowngrades) {
  const auto body = [&](bool ask) -> Task<> {
    auto guard = co_await lock_.read();
    co_await guard.upgrade();
    guard.downgrade();
    guard.unlock();
    guard = co_await lock_.write();
    guard.downgrade();
    co_await yield();
    if (ask) {
      auto again = co_await lock_.write();
    }
  };
  EXPECT_DEATH(
      {
        Coroutine* n = spawn(a(), body(true), "narcissus");
        settle();
        end(n);
      },
      "the map asked for by coroutine 'narcissus', which is its only reader");
  // The only reader is another one.
  Coroutine* n = spawn(a(), body(false), "former reader");
  settle();
  Coroutine* r = reader('r');
  end(n);
  Coroutine* w = writer('w');
  Coroutine* s = reader('s');
  EXPECT_EQ(order_, "r");
  end(r);
  EXPECT_EQ(order_, "rw");
  end(w);
  EXPECT_EQ(order_, "rws");
  end(s);
}

TEST_F(CoRwlocks, AGuardLetGoOfByAnotherCoroutineAborts) {
  CoRwlock::Guard given;
  const auto giver = [&]() -> Task<> {
    given = co_await lock_.read();
    co_await yield();
  };
  const auto taker = [&]() -> Task<> {
    given.unlock();
    co_return;
  };
  EXPECT_DEATH(
      {
        spawn(a(), giver(), "giver");
        settle();
        spawn(a(), taker(), "taker");
        settle();
      },
      "the map unlocked by coroutine 'taker', which does not hold it");
}

TEST_F(CoRwlocks, ACoroutineThatEndsWithItHeldIsCaught) {
  CoRwlock::Guard kept;
  const auto body = [&]() -> Task<> { kept = co_await lock_.read(); };
  EXPECT_DEATH(
      {
        spawn(a(), body(), "forgetful");
        settle();
      },
      "coroutine 'forgetful' ended with 1 of its coroutine locks held");
}

TEST_F(CoRwlocks, AThreadMutexHeldWhileItIsAwaitedAborts) {
  ThreadMutex mutex;
  const auto body = [&]() -> Task<> {
    std::lock_guard held(mutex);
    auto guard = co_await lock_.read();
  };
  EXPECT_DEATH(
      {
        writer('w');
        spawn(a(), body(), "mixer");
        settle();
      },
      "coroutine 'mixer' is about to wait for the map while its thread holds a ThreadMutex");
}

}  // namespace
}  // namespace roost
