// SPDX-License-Identifier: MIT
// The context lock: the queue by itself, what the home thread and control threads may rely on, and
// the abort of every misuse.
#include "roost/aio/context_lock.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "aio/test_loop.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/event_notifier.h"
#include "roost/aio/iothread.h"
#include "roost/aio/poll_budget.h"
#include "roost/aio/timer.h"

namespace roost {
namespace {

// ---- The queue

// Counts who sleeps, so that a test knows who has queued.
struct CountingPark {
  static constexpr unsigned kSpins = 0;
  static inline std::atomic<int> slept{0};
  static inline std::atomic<int> woken{0};
  static void wait(const std::atomic<std::uint64_t>& word, std::uint64_t value) noexcept {
    ++slept;
    FutexPark::wait(word, value);
  }
  static void wake(const std::atomic<std::uint64_t>* word) noexcept {
    ++woken;
    FutexPark::wake(word);
  }
};

class ContextLocks : public testing::Test {
 protected:
  void SetUp() override { CountingPark::slept = CountingPark::woken = 0; }

  // Starts a thread that queues for the lock, appends its name once it has it, and passes it on.
  // Returns when the thread has queued.
  void queue(char name) {
    const int before = CountingPark::slept.load();
    threads_.emplace_back([this, name] {
      lock_.lock();
      order_ += name;
      lock_.unlock();
    });
    while (CountingPark::slept.load() == before) std::this_thread::yield();
  }
  void join() {
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }

  ContextLock<RealPlatform, CountingPark> lock_;
  std::string order_;  // guarded by lock_
  std::vector<std::thread> threads_;
};

TEST_F(ContextLocks, AFreshOneIsFreeAndTakenOnce) {
  EXPECT_TRUE(lock_.is_free());
  EXPECT_TRUE(lock_.try_lock());
  EXPECT_FALSE(lock_.is_free());
  EXPECT_FALSE(lock_.try_lock());
  EXPECT_FALSE(lock_.wanted());
  EXPECT_FALSE(lock_.unlock());
  EXPECT_TRUE(lock_.is_free());
}

TEST_F(ContextLocks, WaitersAreServedInTheOrderTheyCame) {
  lock_.lock();
  for (char name : {'a', 'b', 'c', 'd'}) queue(name);
  EXPECT_TRUE(lock_.wanted());
  EXPECT_EQ(order_, "");
  EXPECT_TRUE(lock_.unlock());
  join();
  EXPECT_EQ(order_, "abcd");
  EXPECT_TRUE(lock_.is_free());
  EXPECT_GE(CountingPark::woken.load(), 4);
}

// The holder that took a list of waiters passes the rest of it on with the lock; who comes later
// stands behind them.
TEST_F(ContextLocks, WhoComesAfterAHandOverStandsBehindThoseWhoWaitedBefore) {
  lock_.lock();
  std::atomic<bool> first_has_it{false};
  std::atomic<bool> go_on{false};
  const int before = CountingPark::slept.load();
  threads_.emplace_back([&] {
    lock_.lock();
    EXPECT_TRUE(lock_.wanted());
    first_has_it = true;
    while (!go_on) std::this_thread::yield();
    order_ += 'a';
    lock_.unlock();
  });
  while (CountingPark::slept.load() == before) std::this_thread::yield();
  queue('b');
  queue('c');
  lock_.unlock();
  while (!first_has_it) std::this_thread::yield();
  queue('d');
  queue('e');
  go_on = true;
  join();
  EXPECT_EQ(order_, "abcde");
}

TEST_F(ContextLocks, WhoLetsOthersGoFirstGetsItBackBehindThem) {
  lock_.lock();
  EXPECT_FALSE(lock_.let_others());
  queue('a');
  queue('b');
  EXPECT_TRUE(lock_.let_others());
  order_ += 'h';
  EXPECT_FALSE(lock_.wanted());
  lock_.unlock();
  join();
  EXPECT_EQ(order_, "abh");
}

// The thread that is let go first comes again at once, and again: it does not overtake.
TEST_F(ContextLocks, WhoLetsOthersGoFirstIsNotOvertakenByThem) {
  lock_.lock();
  threads_.emplace_back([&] {
    for (int i = 0; i < 100; ++i) {
      lock_.lock();
      order_ += 'f';
      lock_.unlock();
    }
  });
  for (int i = 0; i < 100; ++i) {
    while (!lock_.wanted()) std::this_thread::yield();
    EXPECT_TRUE(lock_.let_others());
    order_ += 'h';
  }
  lock_.unlock();
  join();
  std::string alternating;
  for (int i = 0; i < 100; ++i) alternating += "fh";
  EXPECT_EQ(order_, alternating);
}

TEST_F(ContextLocks, OnlyTheOutermostReleaseGivesItUp) {
  constexpr std::uint64_t kMe = 8;
  EXPECT_TRUE(lock_.acquire(kMe));
  EXPECT_FALSE(lock_.acquire(kMe));
  EXPECT_TRUE(lock_.owned_by(kMe));
  EXPECT_FALSE(lock_.owned_by(16));
  EXPECT_FALSE(lock_.release());
  EXPECT_TRUE(lock_.owned_by(kMe));
  EXPECT_TRUE(lock_.release());
  EXPECT_FALSE(lock_.owned_by(kMe));
  EXPECT_TRUE(lock_.is_free());
}

// Counts the atomic read-modify-writes and stores, and the loads.
struct CountingPlatform {
  using Mutex = RealPlatform::Mutex;

  static inline int writes = 0;
  static inline int loads = 0;

  template <class T>
  class Atomic {
   public:
    explicit Atomic(T value) noexcept : value_(value) {}
    T load(std::memory_order order) const noexcept {
      ++loads;
      return value_.load(order);
    }
    void store(T value, std::memory_order order) noexcept {
      ++writes;
      value_.store(value, order);
    }
    T exchange(T value, std::memory_order order) noexcept {
      ++writes;
      return value_.exchange(value, order);
    }
    bool compare_exchange_strong(T& expected, T value, std::memory_order won,
                                 std::memory_order lost) noexcept {
      ++writes;
      return value_.compare_exchange_strong(expected, value, won, lost);
    }
    bool compare_exchange_weak(T& expected, T value, std::memory_order won,
                               std::memory_order lost) noexcept {
      return compare_exchange_strong(expected, value, won, lost);
    }

   private:
    std::atomic<T> value_;
  };
  template <class T>
  using Shared = RealPlatform::Shared<T>;
  static void cpu_relax() noexcept {}
};

struct NoPark {
  [[maybe_unused]] static constexpr unsigned kSpins = 0;
  static void wait(const CountingPlatform::Atomic<std::uint64_t>&, std::uint64_t) noexcept {}
  static void wake(const CountingPlatform::Atomic<std::uint64_t>*) noexcept {}
};

TEST(ContextLockCost, WithoutContentionItIsOneAtomicOperationASideAndALoadInBetween) {
  ContextLock<CountingPlatform, NoPark> lock;
  CountingPlatform::writes = CountingPlatform::loads = 0;
  EXPECT_TRUE(lock.try_lock());
  EXPECT_EQ(CountingPlatform::writes, 1);
  EXPECT_FALSE(lock.wanted());
  EXPECT_EQ(CountingPlatform::writes, 1);
  EXPECT_EQ(CountingPlatform::loads, 1);
  lock.unlock();
  EXPECT_EQ(CountingPlatform::writes, 2);
}

// ---- What a control thread may rely on

void yield_often() {
  for (int i = 0; i < 500; ++i) std::this_thread::yield();
}

class Acquiring : public LoopTest {};
ROOST_ON_EACH_LOOP(Acquiring);

TEST_P(Acquiring, AContextThatNobodyPollsIsTakenAtOnce) {
  auto other = AioContext::create(options("other"));
  EXPECT_FALSE(other->acquired_here());
  other->acquire();
  EXPECT_TRUE(other->acquired_here());
  other->release();
  EXPECT_FALSE(other->acquired_here());
  context().poll(false);
  std::thread([&] { ContextGuard guard(context()); }).join();
  EXPECT_FALSE(context().poll(false));
}

TEST_P(Acquiring, ItIsRecursive) {
  IOThread thread(options("worker"));
  {
    ContextGuard outer(thread.context());
    {
      ContextGuard inner(thread.context());
      EXPECT_TRUE(thread.context().acquired_here());
    }
    EXPECT_TRUE(thread.context().acquired_here());
  }
  EXPECT_FALSE(thread.context().acquired_here());
  thread.context().run([] {});
}

TEST_P(Acquiring, NoCallbackRunsBeforeTheRelease) {
  IOThread thread(options("worker"));
  EventNotifier notifier;
  std::atomic<int> ran{0};
  thread.context().run([&] {
    thread.context().set_event_notifier(notifier, [&] { ++ran; });
    Coroutine::create(sleep_for(1))->enter();
  });
  const auto body = [&]() -> Task<void> {
    ++ran;
    co_return;
  };
  const auto lock_waits = [&] {
    return thread.context().run([&] { return thread.context().statistics().lock_waits; });
  };
  // On a busy machine the thread may sleep through many releases; that it waits is to be seen once.
  const std::int64_t give_up_at = real_clock().now_ns() + 20'000'000'000;
  for (int i = 0; i < 20 || (lock_waits() == 0 && real_clock().now_ns() < give_up_at); ++i) {
    ran = 0;
    {
      ContextGuard guard(thread.context());
      schedule_oneshot(thread.context(), [&] { ++ran; });
      spawn(thread.context(), body());
      notifier.set();
      yield_often();
      EXPECT_EQ(ran, 0);
    }
    while (ran.load() < 3) std::this_thread::yield();
  }
  EXPECT_GT(lock_waits(), 0u);
  thread.context().run([&] { thread.context().remove_event_notifier(notifier); });
}

// Timers and idle bottom halves come of no descriptor and no entry.
TEST_P(Acquiring, NoTimerAndNoIdleBottomHalfFiresBeforeTheRelease) {
  IOThread thread(options("worker"));
  std::atomic<int> fired{0};
  std::optional<Timer> timer;
  BottomHalf idle(thread.context(), [&] { ++fired; });
  thread.context().run([&] { timer.emplace(thread.context(), [&] { ++fired; }); });
  for (int i = 0; i < 5; ++i) {
    thread.context().run([&] {
      fired = 0;
      timer->arm_after(3'000'000);
      idle.schedule_idle();
    });
    const auto begin = real_clock().now_ns();
    {
      ContextGuard guard(thread.context());
      const int before = fired.load();
      // Until both are long due.
      while (real_clock().now_ns() - begin < 25'000'000) std::this_thread::yield();
      EXPECT_EQ(fired, before);
    }
    while (fired.load() < 2) std::this_thread::yield();
  }
  thread.context().run([&] { timer.reset(); });
}

TEST_P(Acquiring, ASleepingContextIsTakenWithoutWakingIt) {
  auto o = options("sleeper");
  o.poll_max_ns = 0;
  IOThread thread(o);
  const auto statistics = [&] {
    return thread.context().run([&] { return thread.context().statistics(); });
  };
  const auto before = statistics();
  for (int i = 0; i < 1000; ++i) ContextGuard guard(thread.context());
  const auto after = statistics();
  // The two calls wake it, and the guards may have met it just before it slept.
  EXPECT_LE(after.sleeps - before.sleeps, 3u);
}

TEST_P(Acquiring, ABusyContextGivesWayBetweenIterations) {
  IOThread thread(options("busy"));
  std::atomic<std::uint64_t> turns{0};
  std::atomic<bool> stop{false};
  const auto body = [&]() -> Task<void> {
    while (!stop) {
      turns.fetch_add(1);
      co_await move_to(thread.context());
    }
    stop = false;
  };
  spawn(thread.context(), body());
  for (int i = 0; i < 100; ++i) {
    const auto seen = turns.load();
    while (turns.load() == seen) std::this_thread::yield();
    ContextGuard guard(thread.context());
    const auto held = turns.load();
    for (int j = 0; j < 20; ++j) std::this_thread::yield();
    EXPECT_EQ(turns.load(), held);
  }
  stop = true;
  while (stop) std::this_thread::yield();
  const auto statistics = thread.context().run([&] { return thread.context().statistics(); });
  EXPECT_GT(statistics.lock_passed_busy, 0u);
}

TEST_P(Acquiring, AContextThatWaitsBusilyGivesWay) {
  PollBudget budget(1000);
  auto o = options("spinner");
  o.poll_budget = &budget;
  o.poll_max_ns = 2'000'000'000;
  IOThread thread(o);
  AioContext::Statistics statistics;
  for (int i = 0; i < 100'000 && statistics.lock_passed_busy == 0; ++i) {
    // Short waits teach it to wait busily.
    for (int j = 0; j < 20; ++j) thread.context().run([] {});
    { ContextGuard guard(thread.context()); }
    statistics = thread.context().run([&] { return thread.context().statistics(); });
  }
  EXPECT_GT(statistics.lock_passed_busy, 0u);
}

// A nested wait has a callback below it, which is running.
TEST_P(Acquiring, ANestedBlockingWaitKeepsIt) {
  std::atomic<bool> nested{false};
  std::atomic<bool> acquired{false};
  std::thread foreign([&] {
    while (!nested) std::this_thread::yield();
    ContextGuard guard(context());
    acquired = true;
  });
  schedule_oneshot(context(), [&] {
    nested = true;
    bool fired = false;
    Timer timer(context(), [&] { fired = true; });
    timer.arm_after(20'000'000);
    poll_until([&] { return fired; });
    EXPECT_FALSE(acquired);
  });
  const auto sleeps = context().statistics().sleeps;
  context().poll(true);
  EXPECT_GT(context().statistics().sleeps, sleeps);
  foreign.join();
  EXPECT_TRUE(acquired);
}

TEST_P(Acquiring, TheOutermostBlockingWaitGivesItUpAfterANestedOne) {
  schedule_oneshot(context(), [&] {
    schedule_oneshot(context(), [] {});
    context().poll(true);
  });
  context().poll(true);
  std::atomic<bool> acquired{false};
  bool done = false;
  std::thread foreign([&] {
    {
      ContextGuard guard(context());
      acquired = true;
    }
    schedule_oneshot(context(), [&] { done = true; });
  });
  context().poll_until(done);
  foreign.join();
  EXPECT_TRUE(acquired);
}

TEST_P(Acquiring, ACallbackHasItAndMayAcquireItAgain) {
  bool ran = false;
  schedule_oneshot(context(), [&] {
    EXPECT_TRUE(context().acquired_here());
    ContextGuard outer(context());
    ContextGuard inner(context());
    context().poll(false);
    ran = true;
  });
  context().poll(true);
  EXPECT_TRUE(ran);
  EXPECT_FALSE(context().acquired_here());
}

// What a thread acquires before it polls stays acquired while that poll waits.
TEST_P(Acquiring, WhoAcquiredItBeforePollingKeepsItWhileItPolls) {
  std::atomic<bool> acquired{false};
  bool fired = false;
  std::optional<std::thread> foreign;
  {
    ContextGuard guard(context());
    foreign.emplace([&] {
      ContextGuard other(context());
      acquired = true;
    });
    Timer timer(context(), [&] { fired = true; });
    timer.arm_after(10'000'000);
    poll_until([&] { return fired; });
    schedule_oneshot(context(), [&] { EXPECT_TRUE(context().acquired_here()); });
    context().poll(true);
    EXPECT_TRUE(context().acquired_here());
    EXPECT_FALSE(acquired);
  }
  foreign->join();
  EXPECT_TRUE(acquired);
}

TEST_P(Acquiring, OneThreadMayHoldSeveralContexts) {
  IOThread a(options("a"));
  IOThread b(options("b"));
  ContextGuard first(a.context());
  ContextGuard second(b.context());
  EXPECT_TRUE(a.context().acquired_here());
  EXPECT_TRUE(b.context().acquired_here());
}

TEST_P(Acquiring, AThreadWithACurrentContextMayAcquireAnotherBetweenItsPolls) {
  IOThread thread(options("worker"));
  context().poll(false);
  ContextGuard guard(thread.context());
  context().poll(false);
  EXPECT_EQ(AioContext::current(), &context());
  EXPECT_TRUE(thread.context().acquired_here());
}

TEST_P(Acquiring, AStopWaitsForTheRelease) {
  std::optional<IOThread> thread(options("worker"));
  std::atomic<bool> ran{false};
  {
    ContextGuard guard(thread->context());
    schedule_oneshot(thread->context(), [&] { ran = true; });
    thread->stop();
    yield_often();
    EXPECT_FALSE(ran);
  }
  thread.reset();
  EXPECT_TRUE(ran);
}

// One thread polls many contexts, as simulations do, and acquires them in between.
TEST_P(Acquiring, OneThreadPollsManyContextsAndAcquiresThemInBetween) {
  std::vector<std::shared_ptr<AioContext>> contexts;
  for (int i = 0; i < 4; ++i) contexts.push_back(AioContext::create(options("many")));
  int ran = 0;
  for (int round = 0; round < 20; ++round) {
    AioContext& at = *contexts[round % 4];
    schedule_oneshot(at, [&] { ++ran; });
    for (auto& other : contexts) ContextGuard guard(*other);
    EXPECT_TRUE(at.poll(true));
  }
  EXPECT_EQ(ran, 20);
}

// ---- Misuse

class AcquireMisuseDeathTest : public LoopTest {
 protected:
  void enter(Task<void> task) { Coroutine::create(std::move(task), "impatient")->enter(); }
};
ROOST_ON_EACH_LOOP(AcquireMisuseDeathTest);

TEST_P(AcquireMisuseDeathTest, AcquireInsideACoroutine) {
  const auto body = [&]() -> Task<void> {
    ContextGuard guard(context());
    co_return;
  };
  EXPECT_DEATH(enter(body()), "acquire of context 'loop' inside coroutine 'impatient'");
  const auto die = [&] {
    spawn(context(), body(), "impatient");
    context().poll(true);
  };
  EXPECT_DEATH(die(), "acquire of context 'loop' inside coroutine 'impatient'");
}

TEST_P(AcquireMisuseDeathTest, ReleaseInsideACoroutine) {
  const auto body = [&]() -> Task<void> {
    context().release();
    co_return;
  };
  const auto die = [&] {
    context().acquire();
    enter(body());
  };
  EXPECT_DEATH(die(), "release of context 'loop' inside coroutine 'impatient'");
}

TEST_P(AcquireMisuseDeathTest, AcquireInACallbackOfAnotherContext) {
  auto other = AioContext::create(options("other"));
  const auto die = [&] {
    schedule_oneshot(context(), [&] { other->acquire(); });
    context().poll(true);
  };
  EXPECT_DEATH(die(), "acquire of context 'other' in a callback of context 'loop'");
  const auto scoped = [&] {
    schedule_oneshot(context(), [&] {
      ContextScope scope(*other);
      other->acquire();
    });
    context().poll(true);
  };
  EXPECT_DEATH(scoped(), "acquire of context 'other' in a callback of context 'loop'");
}

TEST_P(AcquireMisuseDeathTest, ReleaseWithoutAcquire) {
  EXPECT_DEATH(context().release(),
               "release of context 'loop' by a thread that has not acquired it");
  const auto twice = [&] {
    context().acquire();
    context().release();
    context().release();
  };
  EXPECT_DEATH(twice(), "release of context 'loop' by a thread that has not acquired it");
  const auto in_callback = [&] {
    ContextGuard guard(context());
    schedule_oneshot(context(), [&] { context().release(); });
    context().poll(true);
  };
  EXPECT_DEATH(in_callback(), "release of context 'loop' by a callback that has not acquired it");
}

TEST_P(AcquireMisuseDeathTest, ReleaseByAnotherThread) {
  const auto die = [&] {
    context().acquire();
    std::thread([&] { context().release(); }).join();
  };
  EXPECT_DEATH(die(), "release of context 'loop' by a thread that has not acquired it");
}

TEST_P(AcquireMisuseDeathTest, ACallbackThatReturnsWithoutReleasing) {
  const auto die = [&] {
    schedule_oneshot(context(), [&] { context().acquire(); });
    context().poll(true);
  };
  EXPECT_DEATH(die(), "a callback of context 'loop' returned without releasing it");
  const auto nested = [&] {
    schedule_oneshot(context(), [&] {
      context().acquire();
      schedule_oneshot(context(), [&] { context().acquire(); });
      context().poll(true);
      context().release();
      context().release();
    });
    context().poll(true);
  };
  EXPECT_DEATH(nested(), "a callback of context 'loop' returned without releasing it");
  const auto before_sleep = [&] {
    bool never = false;
    schedule_oneshot(context(), [&] { context().acquire(); });
    context().poll_until(never);
  };
  EXPECT_DEATH(before_sleep(), "a callback of context 'loop' returned without releasing it");
}

TEST_P(AcquireMisuseDeathTest, ACallThatWouldWaitForTheThreadThatIsHeldOff) {
  const auto run = [&] {
    IOThread thread(options("worker"));
    ContextGuard guard(thread.context());
    thread.context().run([] {});
  };
  EXPECT_DEATH(run(), "a call to context 'worker' by the thread that has acquired it");
  const auto join = [&] {
    IOThread thread(options("worker"));
    ContextGuard guard(thread.context());
    thread.stop();
    thread.join();
  };
  EXPECT_DEATH(join(), "join of thread 'worker' by the thread that has acquired its context");
}

TEST_P(AcquireMisuseDeathTest, AThreadThatEndsWithIt) {
  const auto die = [&] { std::thread([&] { context().acquire(); }).join(); };
  EXPECT_DEATH(die(), "a thread ended with context 'loop' acquired");
}

TEST_P(AcquireMisuseDeathTest, DestructionWhileItIsAcquired) {
  const auto die = [&] {
    auto other = AioContext::create(options("other"));
    other->acquire();
    other.reset();
  };
  EXPECT_DEATH(die(), "context 'other' destroyed while its lock is held");
}

}  // namespace
}  // namespace roost
