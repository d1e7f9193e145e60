// SPDX-License-Identifier: MIT
// A drain of a gate, and requests that entered it and wait for their turn behind a limit: those
// count as much as the ones that run. On contexts polled by hand.
#include <cerrno>
#include <cstdint>
#include <stop_token>
#include <vector>

#include "roost/coro/gate.h"
#include "roost/sync/co_semaphore.h"
#include "roost/sync/task_group.h"
#include "sync/test_sync.h"

namespace roost {
namespace {

constexpr std::uint32_t kLimit = 2;
constexpr std::uint32_t kRequests = 5;

class ThrottledDrains : public SyncTest {
 protected:
  // Runs once `limit_` lets it, until the test ends it.
  Task<> request(std::stop_token stop = {}) {
    const Gate::Pass pass = gate_.try_pass();
    if (!pass) {
      ++refused_;
      co_return;
    }
    const Result<void> turn = co_await limit_.acquire(1, stop);
    if (!turn) {
      ++cancelled_;
      co_return;
    }
    co_await run();
    limit_.release();
  }
  Task<> run() {
    running_.push_back(Coroutine::self());
    co_await yield();
    ++answered_;
  }
  Task<> drain() {
    gate_.close();
    co_await gate_.idle();
    drained_ = true;
  }

  AioContext& context_of(std::uint32_t number) {
    AioContext* const all[] = {&a(), &b(), &c()};
    return *all[number % 3];
  }
  void begin_drain() {
    spawn(b(), drain());
    settle();
  }
  // The oldest that runs.
  void end_one() {
    Coroutine* const co = running_.front();
    running_.erase(running_.begin());
    co_wake(*co);
    settle();
  }

  Gate gate_{"the requests"};
  CoSemaphore limit_{kLimit, "a turn"};
  std::vector<Coroutine*> running_;
  std::uint32_t answered_ = 0;
  std::uint32_t refused_ = 0;
  std::uint32_t cancelled_ = 0;
  bool drained_ = false;
};

TEST_F(ThrottledDrains, ThrottledRequestsThatADrainForgets) {
  for (std::uint32_t i = 0; i < kRequests; ++i) spawn(context_of(i), request());
  settle();
  ASSERT_EQ(running_.size(), kLimit);
  begin_drain();
  EXPECT_FALSE(drained_);
  spawn(a(), request());
  settle();
  EXPECT_EQ(refused_, 1u);
  for (std::uint32_t ended = 0; ended < kRequests; ++ended) {
    EXPECT_FALSE(drained_) << ended;
    EXPECT_EQ(gate_.in_flight(), kRequests - ended);
    ASSERT_FALSE(running_.empty()) << "one in line was forgotten";
    end_one();
  }
  EXPECT_TRUE(drained_);
  EXPECT_EQ(answered_, kRequests);
  gate_.open();
}

TEST_F(ThrottledDrains, ADrainDoesNotWaitForThrottledRequestsThatWereCancelled) {
  std::stop_source stop;
  spawn(a(), request());
  spawn(b(), request());
  settle();
  spawn(a(), request(stop.get_token()));
  spawn(c(), request(stop.get_token()));
  settle();
  begin_drain();
  stop.request_stop();
  settle();
  EXPECT_EQ(cancelled_, 2u);
  end_one();
  EXPECT_FALSE(drained_);
  end_one();
  EXPECT_TRUE(drained_);
  EXPECT_EQ(answered_, 2u);
  gate_.open();
}

// A limit that is itself taken away for the drain: those in line get their turn when it is back,
// and the drain has waited for them.
TEST_F(ThrottledDrains, ADrainWaitsForRequestsThatNobodyLetsIn) {
  ASSERT_TRUE(limit_.try_acquire(kLimit));
  for (std::uint32_t i = 0; i < kRequests; ++i) spawn(context_of(i), request());
  settle();
  ASSERT_TRUE(running_.empty());
  begin_drain();
  EXPECT_FALSE(drained_);
  limit_.release(kRequests);
  settle();
  ASSERT_EQ(running_.size(), kRequests);
  while (!running_.empty()) {
    EXPECT_FALSE(drained_);
    end_one();
  }
  EXPECT_TRUE(drained_);
  gate_.open();
}

// A child has entered before it is spawned; a group with a bound runs it later.
TEST_F(ThrottledDrains, ChildrenOfABoundedGroupThatWaitForTheirTurnAreNotForgotten) {
  bool joined = false;
  const auto child = [this](Gate::Pass pass) -> Task<> {
    EXPECT_TRUE(pass);
    co_await run();
  };
  const auto parent = [&]() -> Task<> {
    TaskGroup group({.name = "requests", .max_running = kLimit});
    for (std::uint32_t i = 0; i < kRequests; ++i) {
      group.spawn(context_of(i), child(gate_.try_pass()));
    }
    EXPECT_TRUE(co_await group.join());
    joined = true;
  };
  spawn(a(), parent());
  settle();
  ASSERT_EQ(running_.size(), kLimit);
  begin_drain();
  for (std::uint32_t ended = 0; ended < kRequests; ++ended) {
    EXPECT_FALSE(drained_ || joined) << ended;
    ASSERT_FALSE(running_.empty()) << "a child was forgotten";
    end_one();
  }
  EXPECT_TRUE(drained_ && joined);
  EXPECT_EQ(answered_, kRequests);
  gate_.open();
}

// Stopped, it starts those no more; what they hold is let go of all the same.
TEST_F(ThrottledDrains, ChildrenThatAStoppedGroupNeverStartsLeaveTheGate) {
  std::stop_source stop;
  bool joined = false;
  const auto child = [this](Gate::Pass pass) -> Task<> {
    EXPECT_TRUE(pass);
    co_await run();
  };
  const auto parent = [&]() -> Task<> {
    TaskGroup group({.name = "requests", .stop = stop.get_token(), .max_running = kLimit});
    for (std::uint32_t i = 0; i < kRequests; ++i) {
      group.spawn(context_of(i), child(gate_.try_pass()));
    }
    const Result<void> done = co_await group.join();
    EXPECT_EQ(done ? 0 : done.error().code(), ECANCELED);
    joined = true;
  };
  spawn(a(), parent());
  settle();
  begin_drain();
  stop.request_stop();
  settle();
  EXPECT_FALSE(drained_);
  end_one();
  EXPECT_FALSE(drained_);
  end_one();
  EXPECT_TRUE(drained_ && joined);
  EXPECT_EQ(answered_, kLimit);
  gate_.open();
}

}  // namespace
}  // namespace roost
