// SPDX-License-Identifier: MIT
// The thread pool: growing, shrinking, withdrawing, and callables that a coroutine runs on it.
#include "roost/aio/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <latch>
#include <memory>
#include <stdexcept>
#include <stop_token>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "aio/test_loop.h"

namespace roost {
namespace {

// Work that waits until it is let go, and tells what became of it.
struct Held : ThreadPool::Work {
  explicit Held(std::latch& until) : gate(until) {
    run = [](ThreadPool::Work& work) noexcept {
      auto& self = static_cast<Held&>(work);
      ++*self.started;
      self.gate.wait();
      --*self.running;  // the last thing that is touched is not ours
    };
  }
  std::latch& gate;
  std::atomic<int>* started = nullptr;
  std::atomic<int>* running = nullptr;
};

class Crowd {
 public:
  Crowd(ThreadPool& pool, int size) : running_(size) {
    for (int i = 0; i < size; ++i) {
      held_.push_back(std::make_unique<Held>(gate_));
      held_.back()->started = &started_;
      held_.back()->running = &running_;
      pool.submit(*held_.back());
    }
  }
  void wait_until_started(int count) const {
    while (started_.load() < count) std::this_thread::yield();
  }
  void let_go() {
    gate_.count_down();
    while (running_.load() > 0) std::this_thread::yield();
  }
  Held& operator[](int i) { return *held_[static_cast<std::size_t>(i)]; }

 private:
  std::latch gate_{1};
  std::atomic<int> started_{0};
  std::atomic<int> running_;
  std::vector<std::unique_ptr<Held>> held_;
};

TEST(ThreadPool, GrowsWithTheWorkUpToItsMaximum) {
  ThreadPool pool(ThreadPool::Options{.max_threads = 3});
  EXPECT_EQ(pool.statistics().threads, 0u);
  Crowd crowd(pool, 5);
  crowd.wait_until_started(3);
  const auto statistics = pool.statistics();
  EXPECT_EQ(statistics.threads, 3u);
  EXPECT_EQ(statistics.queued, 2u);
  EXPECT_EQ(statistics.executed, 3u);
  crowd.let_go();
  EXPECT_EQ(pool.statistics().executed, 5u);
  EXPECT_EQ(pool.statistics().peak_threads, 3u);
  EXPECT_GE(pool.statistics().peak_queued, 2u);
}

TEST(ThreadPool, ShrinksToItsMinimumOnceItsThreadsHaveBeenIdle) {
  ThreadPool pool({.min_threads = 2, .max_threads = 6, .idle_timeout_ns = 1'000'000});
  EXPECT_EQ(pool.statistics().threads, 2u);
  for (int round = 0; round < 3; ++round) {
    Crowd crowd(pool, 6);
    crowd.wait_until_started(6);
    EXPECT_EQ(pool.statistics().threads, 6u);
    crowd.let_go();
    while (pool.statistics().threads > 2) std::this_thread::yield();
  }
  EXPECT_EQ(pool.statistics().peak_threads, 6u);
  while (pool.statistics().idle < 2) std::this_thread::yield();
  EXPECT_EQ(pool.statistics().threads, 2u);
}

TEST(ThreadPool, OneWorkerAtATimeDoesWhatComesOneAtATime) {
  ThreadPool pool(8);
  for (int i = 0; i < 100; ++i) {
    Crowd crowd(pool, 1);
    crowd.wait_until_started(1);
    crowd.let_go();
    while (pool.statistics().idle < pool.statistics().threads) std::this_thread::yield();
  }
  EXPECT_EQ(pool.statistics().peak_threads, 1u);
}

TEST(ThreadPool, QueuedWorkCanBeWithdrawnAndStartedWorkCannot) {
  ThreadPool pool(1);
  auto crowd = std::make_unique<Crowd>(pool, 4);
  crowd->wait_until_started(1);
  EXPECT_FALSE(pool.withdraw((*crowd)[0]));
  EXPECT_TRUE(pool.withdraw((*crowd)[2]));
  EXPECT_FALSE(pool.withdraw((*crowd)[2]));
  EXPECT_TRUE(pool.withdraw((*crowd)[3]));  // the last
  EXPECT_TRUE(pool.withdraw((*crowd)[1]));  // the only
  EXPECT_EQ(pool.statistics().queued, 0u);
  EXPECT_EQ(pool.statistics().cancelled, 3u);
  std::atomic<int> started{0};
  std::atomic<int> running{3};
  for (int i : {1, 2, 3}) (*crowd)[i].running = &running;
  Held late((*crowd)[0].gate);
  late.started = &started;
  late.running = &running;
  EXPECT_FALSE(pool.withdraw(late));
  EXPECT_FALSE(pool.submit(late)) << "withdrawn before it was submitted";
  EXPECT_EQ(pool.statistics().cancelled, 4u);
  (*crowd)[0].gate.count_down();
  while (pool.statistics().idle < 1) std::this_thread::yield();
  EXPECT_EQ(pool.statistics().executed, 1u);
  EXPECT_EQ(started.load(), 0);
}

TEST(ThreadPool, ItsDestructorWaitsForWhatWasSubmitted) {
  std::atomic<int> ran{0};
  struct Count : ThreadPool::Work {
    std::atomic<int>* ran = nullptr;
  };
  std::vector<Count> work(1000);
  {
    ThreadPool pool({.min_threads = 1, .max_threads = 4});
    for (Count& one : work) {
      one.ran = &ran;
      one.run = [](ThreadPool::Work& w) noexcept { ++*static_cast<Count&>(w).ran; };
      pool.submit(one);
    }
  }
  EXPECT_EQ(ran.load(), 1000);
}

TEST(ThreadPoolDeathTest, WorkSubmittedTwiceAborts) {
  EXPECT_DEATH(
      {
        ThreadPool pool(1);
        Crowd crowd(pool, 1);
        pool.submit(crowd[0]);
      },
      "submitted to a thread pool twice");
}

// ---- Callables of coroutines

int answer() { return 42; }

class Offload : public LoopTest {
 protected:
  template <class Body>
  void run(Body& body) {
    bool ended = false;
    const auto outer = [&]() -> Task<void> {
      co_await body();
      EXPECT_EQ(AioContext::current(), &context());
      ended = true;
    };
    Coroutine::create(outer(), "offload")->enter();
    poll_until([&] { return ended; });
  }

  ThreadPool pool_{2};
};
ROOST_ON_EACH_LOOP(Offload);

TEST_P(Offload, ACallableRunsOnAWorkerAndItsResultComesHome) {
  const auto home = std::this_thread::get_id();
  std::string text = "on ";
  const auto body = [&]() -> Task<void> {
    const auto where = [&] {
      text += "a worker";
      return std::this_thread::get_id();
    };
    const auto ran_on = co_await pool_.run(where);
    EXPECT_NE(ran_on, home);
    EXPECT_EQ(std::this_thread::get_id(), home);
  };
  run(body);
  EXPECT_EQ(text, "on a worker");
}

TEST_P(Offload, FunctionsAndMoveOnlyResultsAndNothingAtAll) {
  const auto body = [&]() -> Task<void> {
    EXPECT_EQ(co_await pool_.run(&answer), 42);
    const auto make = [] { return std::make_unique<std::string>("moved"); };
    const std::unique_ptr<std::string> made = co_await pool_.run(make);
    EXPECT_EQ(*made, "moved");
    int calls = 0;
    const auto count = [&calls]() mutable { ++calls; };
    auto counter = count;
    co_await pool_.run(counter);
    co_await pool_.run(counter);
    EXPECT_EQ(calls, 2);
  };
  run(body);
}

// The trap that GCC 12 has for temporaries of a co_await expression: a named callable is used in
// place, and destroyed once.
TEST_P(Offload, ANamedCallableWithCapturesThatNeedADestructorIsDestroyedOnce) {
  const auto shared = std::make_shared<int>(7);
  const auto body = [&]() -> Task<void> {
    for (int i = 0; i < 100; ++i) {
      const auto work = [shared, text = std::string(100, 'x')] { return *shared + text.size(); };
      EXPECT_EQ(co_await pool_.run(work), 107u);
      const Result<std::size_t> same = co_await pool_.run(work, std::stop_token());
      EXPECT_EQ(same.value(), 107u);
      std::stop_source source;
      EXPECT_EQ((co_await pool_.run(work, source.get_token())).value(), 107u);
    }
  };
  run(body);
  EXPECT_EQ(shared.use_count(), 1);
}

TEST_P(Offload, AResultOfTheCallableIsGivenAsItIsWithAStopTokenToo) {
  const auto body = [&]() -> Task<void> {
    const auto refuse = []() -> Result<int> { return fail(EIO, "on a worker"); };
    const auto agree = []() -> Result<void> { return {}; };
    std::stop_source source;
    auto refused = co_await pool_.run(refuse, source.get_token());
    static_assert(std::is_same_v<decltype(refused), Result<int>>);
    EXPECT_EQ(refused.error().code(), EIO);
    auto agreed = co_await pool_.run(agree, source.get_token());
    static_assert(std::is_same_v<decltype(agreed), Result<void>>);
    EXPECT_TRUE(agreed);
    source.request_stop();
    EXPECT_EQ((co_await pool_.run(agree, source.get_token())).error().code(), ECANCELED);
  };
  run(body);
}

TEST_P(Offload, AnExceptionIsRethrownAtHome) {
  const auto body = [&]() -> Task<void> {
    const auto fails = []() -> int { throw std::runtime_error("on a worker"); };
    for (const bool with_token : {false, true}) {
      std::string caught;
      try {
        std::stop_source source;
        if (with_token) {
          const Result<int> never = co_await pool_.run(fails, source.get_token());
          ADD_FAILURE() << never.has_value();
        } else {
          co_await pool_.run(fails);
        }
      } catch (const std::runtime_error& e) {
        caught = e.what();
      }
      EXPECT_EQ(caught, "on a worker");
    }
  };
  run(body);
}

TEST_P(Offload, WhatHasNotStartedIsCancelled) {
  Crowd crowd(pool_, 2);
  crowd.wait_until_started(2);
  std::stop_source source;
  bool ran = false;
  int cancelled = 0;
  const auto body = [&]() -> Task<void> {
    const auto work = [&ran] { ran = true; };
    const Result<void> result = co_await pool_.run(work, source.get_token());
    if (!result) cancelled = result.error().code();
  };
  Coroutine::create(body())->enter();
  poll_some();
  EXPECT_EQ(pool_.statistics().queued, 1u);
  std::thread other([&] { source.request_stop(); });
  poll_until([&] { return cancelled != 0; });
  other.join();
  EXPECT_EQ(cancelled, ECANCELED);
  // Once more, at home, where it does not go on on the caller's stack; and once more, with a stop
  // that was there before.
  cancelled = 0;
  source = std::stop_source();
  Coroutine::create(body())->enter();
  source.request_stop();
  EXPECT_EQ(cancelled, 0);
  poll_some();
  EXPECT_EQ(cancelled, ECANCELED);
  cancelled = 0;
  Coroutine::create(body())->enter();
  EXPECT_EQ(cancelled, ECANCELED);
  crowd.let_go();
  EXPECT_FALSE(ran);
  EXPECT_EQ(pool_.statistics().cancelled, 2u);
}

TEST_P(Offload, WhatHasStartedIsFinished) {
  std::stop_source source;
  std::atomic<bool> started{false};
  std::atomic<bool> go_on{false};
  int value = 0;
  const auto body = [&]() -> Task<void> {
    const auto work = [&] {
      started = true;
      go_on.wait(false);
      return 5;
    };
    value = (co_await pool_.run(work, source.get_token())).value_or(-1);
  };
  Coroutine::create(body())->enter();
  while (!started) std::this_thread::yield();
  source.request_stop();
  EXPECT_FALSE(poll_some());
  go_on = true;
  go_on.notify_all();
  poll_until([&] { return value != 0; });
  EXPECT_EQ(value, 5);
}

}  // namespace
}  // namespace roost
