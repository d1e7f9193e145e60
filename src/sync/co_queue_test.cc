// SPDX-License-Identifier: MIT
// CoQueue with both kinds of lock, on contexts polled by hand.
#include "roost/sync/co_queue.h"

#include <mutex>
#include <thread>
#include <vector>

#include "roost/sync/co_event.h"
#include "sync/test_sync.h"

namespace roost {
namespace {

class CoQueues : public SyncTest {
 protected:
  Task<> wait(char name) {
    auto guard = co_await mutex_.lock();
    co_await queue_.wait(guard);
    EXPECT_TRUE(guard);
    EXPECT_FALSE(mutex_.try_lock());
    order_ += name;
    homes_.push_back(AioContext::current());
  }
  Task<> wait(char name, std::stop_token stop) {
    auto guard = co_await mutex_.lock();
    const Result<void> woken = co_await queue_.wait(guard, stop);
    EXPECT_FALSE(mutex_.try_lock());
    order_ += woken ? name : static_cast<char>(name - 'a' + 'A');
  }
  template <class M>
  Task<> wait_with(M& mutex, char name, std::stop_token stop) {
    std::unique_lock lock(mutex);
    const Result<void> woken = co_await queue_.wait(lock, stop);
    EXPECT_TRUE(lock.owns_lock());
    order_ += woken ? name : static_cast<char>(name - 'a' + 'A');
    homes_.push_back(AioContext::current());
  }
  template <class M>
  static bool is_free(M& mutex) {
    bool free = false;
    std::thread([&] {
      free = mutex.try_lock();
      if (free) mutex.unlock();
    }).join();
    return free;
  }

  CoMutex mutex_{"the lock"};
  CoQueue queue_{"the news"};
  std::vector<AioContext*> homes_;
};

TEST_F(CoQueues, WaitLetsGoOfTheMutexAndWakeOneWakesTheOldestAtHome) {
  spawn(a(), wait('1'));
  spawn(b(), wait('2'));
  settle();
  EXPECT_FALSE(queue_.empty());
  EXPECT_EQ(order_, "");
  EXPECT_TRUE(queue_.wake_one());
  settle();
  EXPECT_EQ(order_, "1");
  EXPECT_TRUE(queue_.wake_one());
  settle();
  EXPECT_EQ(order_, "12");
  EXPECT_FALSE(queue_.wake_one());
  EXPECT_EQ(homes_, (std::vector<AioContext*>{&a(), &b()}));
}

TEST_F(CoQueues, WakeAllMovesTheWaitersToTheMutexAndNobodyCompetesInVain) {
  for (char name = 'a'; name < 'k'; ++name) {
    spawn(name % 2 ? a() : b(), wait(name));
    settle();
  }
  const auto waker = [&]() -> Task<> {
    auto guard = co_await mutex_.lock();
    EXPECT_EQ(queue_.wake_all(), 10u);
    EXPECT_TRUE(queue_.empty());
    co_await yield();
    order_ += '|';
  };
  Coroutine* co = spawn(c(), waker());
  settle();
  EXPECT_EQ(order_, "");  // nobody runs before the lock is to be had
  co_wake(*co);
  settle();
  EXPECT_EQ(order_, "|abcdefghij");
  EXPECT_EQ(mutex_.statistics().defeats, 0u);
}

TEST_F(CoQueues, AStopEndsTheWaitWithTheMutexHeldAndUsesUpNoWakeUp) {
  std::stop_source stop;
  spawn(a(), wait('x', stop.get_token()));
  settle();
  spawn(b(), wait('2'));
  settle();
  stop.request_stop();
  settle();
  EXPECT_EQ(order_, "X");
  EXPECT_TRUE(queue_.wake_one());
  settle();
  EXPECT_EQ(order_, "X2");
}

// The mutex is free: nothing but the caller's stack is in the way.
TEST_F(CoQueues, NeitherAStopNorAWakeUpEntersAWaiterOnTheCallersStack) {
  std::stop_source stop;
  spawn(a(), wait('x', stop.get_token()));
  settle();
  {
    ContextScope scope(a());
    stop.request_stop();
    EXPECT_EQ(order_, "");
  }
  settle();
  EXPECT_EQ(order_, "X");
  for (const bool all : {false, true}) {
    order_.clear();
    spawn(a(), wait('1'));
    settle();
    {
      ContextScope scope(a());
      EXPECT_TRUE(all ? queue_.wake_all() == 1 : queue_.wake_one());
      EXPECT_EQ(order_, "");
    }
    settle();
    EXPECT_EQ(order_, "1");
  }
}

TEST_F(CoQueues, AStopRequestedBeforeEndsTheWaitAtOnce) {
  std::stop_source stop;
  stop.request_stop();
  spawn(a(), wait('x', stop.get_token()));
  settle();
  EXPECT_EQ(order_, "X");
  EXPECT_TRUE(queue_.empty());
}

TEST_F(CoQueues, AStopAfterTheWakeUpChangesNothing) {
  std::stop_source stop;
  const auto holder = [&]() -> Task<> {
    auto guard = co_await mutex_.lock();
    co_await yield();
  };
  spawn(a(), wait('x', stop.get_token()));
  settle();
  Coroutine* co = spawn(b(), holder());
  settle();
  EXPECT_TRUE(queue_.wake_one());  // on to the mutex, which is held
  stop.request_stop();
  settle();
  EXPECT_EQ(order_, "");
  co_wake(*co);
  settle();
  EXPECT_EQ(order_, "x");
}

TEST_F(CoQueues, AWaitWithAThreadMutexHoldsItBeforeAndAfterButNotMeanwhile) {
  ThreadMutex mutex;
  std::stop_source stop;
  spawn(b(), wait_with(mutex, 'x', stop.get_token()));
  settle();
  EXPECT_TRUE(is_free(mutex));
  {
    // The waker may hold it, and be on the waiter's thread.
    ContextScope scope(b());
    std::lock_guard lock(mutex);
    EXPECT_TRUE(queue_.wake_one());
  }
  settle();
  EXPECT_EQ(order_, "x");
  EXPECT_EQ(homes_, (std::vector<AioContext*>{&b()}));
  EXPECT_TRUE(is_free(mutex));
}

TEST_F(CoQueues, AWaitWithAThreadMutexCanBeCancelled) {
  std::mutex mutex;
  std::stop_source stop;
  spawn(a(), wait_with(mutex, 'x', stop.get_token()));
  spawn(b(), wait_with(mutex, 'y', stop.get_token()));
  settle();
  stop.request_stop();
  settle();
  EXPECT_EQ(order_, "XY");
  spawn(b(), wait_with(mutex, 'z', stop.get_token()));
  settle();
  EXPECT_EQ(order_, "XYZ");
  EXPECT_TRUE(is_free(mutex));
}

// Awaits `wait` and has a stop requested when that has been found not to be.
template <class Wait>
class StoppedOnTheWay {
 public:
  StoppedOnTheWay(Wait wait, std::stop_source stop)
      : awaiter_(std::move(wait).operator co_await()), stop_(std::move(stop)) {}
  StoppedOnTheWay(const StoppedOnTheWay&) = delete;

  AwaitInPlace<StoppedOnTheWay> operator co_await() && noexcept { return AwaitInPlace(*this); }
  bool await_ready() { return awaiter_.await_ready(); }
  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) {
    stop_.request_stop();
    awaiter_.await_suspend(frame);
  }
  auto await_resume() { return awaiter_.await_resume(); }

 private:
  decltype(std::declval<Wait>().operator co_await()) awaiter_;
  std::stop_source stop_;
};

TEST_F(CoQueues, AStopOnTheWayIntoTheLineLeavesNoThreadLockWithWhoRunsNext) {
  ThreadMutex mutex;
  CoEvent go("both");
  const auto stopped = [&]() -> Task<> {
    co_await go.wait();
    std::stop_source stop;
    std::unique_lock lock(mutex);
    StoppedOnTheWay wait(queue_.wait(lock, stop.get_token()), stop);
    const Result<void> woken = co_await std::move(wait);
    EXPECT_FALSE(woken);
    EXPECT_TRUE(lock.owns_lock());
    order_ += 's';
  };
  const auto next = [&]() -> Task<> {
    co_await go.wait();
    order_ += is_free(mutex) ? 'f' : 'H';
  };
  // Both are woken at once, and run one after the other.
  const auto wake_both = [&]() -> Task<> {
    go.set();
    co_return;
  };
  spawn(a(), stopped());
  spawn(a(), next());
  settle();
  spawn(a(), wake_both());
  settle();
  EXPECT_EQ(order_, "fs");
}

TEST_F(CoQueues, AStopOnTheWayIntoTheLineKeepsACoMutex) {
  const auto stopped = [&]() -> Task<> {
    std::stop_source stop;
    auto guard = co_await mutex_.lock();
    StoppedOnTheWay wait(queue_.wait(guard, stop.get_token()), stop);
    const Result<void> woken = co_await std::move(wait);
    EXPECT_FALSE(woken);
    EXPECT_FALSE(mutex_.try_lock());
    order_ += 's';
  };
  spawn(a(), stopped());
  settle();
  EXPECT_EQ(order_, "s");
  EXPECT_TRUE(queue_.empty());
}

TEST_F(CoQueues, WakeAllWithAThreadMutexWakesEverybodyInOrder) {
  std::mutex mutex;
  std::stop_source stop;
  for (char name : {'1', '2', '3'}) {
    spawn(a(), wait_with(mutex, name, stop.get_token()));
    settle();
  }
  EXPECT_EQ(queue_.wake_all(), 3u);
  settle();
  EXPECT_EQ(order_, "123");
}

using CoQueueDeath = CoQueues;

TEST_F(CoQueueDeath, WaitingWithoutTheMutex) {
  const auto body = [&]() -> Task<> {
    CoMutex::Guard none;
    co_await queue_.wait(none);
  };
  EXPECT_DEATH(
      {
        spawn(a(), body(), "lockless");
        settle();
      },
      "wait for the news by coroutine 'lockless', which does not hold the mutex");
}

TEST_F(CoQueueDeath, AnotherThreadMutexHeldDuringTheWait) {
  ThreadMutex one;
  ThreadMutex other;
  const auto body = [&]() -> Task<> {
    std::lock_guard held(other);
    std::unique_lock lock(one);
    co_await queue_.wait(lock);
  };
  EXPECT_DEATH(
      {
        spawn(a(), body(), "greedy");
        settle();
      },
      "coroutine 'greedy' is about to wait for the news while its thread holds a ThreadMutex");
}

}  // namespace
}  // namespace roost
