// SPDX-License-Identifier: MIT
// A ThreadMutex is held while a coroutine is about to wait for something that is no lock.
#include "roost/sync/thread_mutex.h"

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <stop_token>
#include <string>

#include "aio/test_io.h"
#include "roost/aio/io.h"
#include "roost/aio/thread_pool.h"
#include "roost/aio/timer.h"
#include "roost/coro/gate.h"
#include "roost/sync/task_group.h"
#include "sync/test_tasks.h"

namespace roost {
namespace {

constexpr std::int64_t kLongNs = 3'600'000'000'000;

class ThreadMutexes : public StructuredTest {
 protected:
  // Runs `wait()` with the mutex held.
  template <class Wait>
  Task<void> with_mutex(Wait& wait) {
    const std::lock_guard guard(mutex_);
    co_await wait();
  }

  template <class Wait>
  void expect_death(Wait wait, const std::string& waits_for) {
    EXPECT_DEATH(start(with_mutex(wait)), "coroutine 'parent' is about to wait for " + waits_for +
                                              " while its thread holds a ThreadMutex");
  }

  ThreadMutex mutex_;
  std::stop_source source_;
};
using ThreadMutexDeathTest = ThreadMutexes;
ROOST_ON_EACH_LOOP(ThreadMutexDeathTest);

TEST_P(ThreadMutexDeathTest, ACompletionIsAwaited) {
  Completion<> done("an answer");
  const auto token = done.token();
  expect_death([&]() -> Task<void> { (void)co_await done.wait(); }, "an answer");
  expect_death([&]() -> Task<void> { (void)co_await done.wait(source_.get_token()); }, "an answer");
}

TEST_P(ThreadMutexDeathTest, AGateIsAwaited) {
  Gate gate("requests");
  const Gate::Pass pass = gate.try_pass();
  gate.close();
  expect_death([&]() -> Task<void> { co_await gate.idle(); }, "requests");
  expect_death([&]() -> Task<void> { (void)co_await gate.idle(source_.get_token()); }, "requests");
}

TEST_P(ThreadMutexDeathTest, ATimerIsAwaited) {
  expect_death([]() -> Task<void> { co_await sleep_for(kLongNs); }, "a timer");
  expect_death([&]() -> Task<void> { (void)co_await sleep_for(kLongNs, source_.get_token()); },
               "a timer");
}

TEST_P(ThreadMutexDeathTest, IoIsAwaited) {
  const SocketPair pair = socket_pair();
  std::array<std::byte, 1> buffer{};
  expect_death([&]() -> Task<void> { co_await io_recv(pair.near.get(), buffer, 0); }, "I/O");
  expect_death(
      [&]() -> Task<void> { co_await io_recv(pair.near.get(), buffer, 0, source_.get_token()); },
      "I/O");
}

TEST_P(ThreadMutexDeathTest, AWorkerIsAwaited) {
  const auto nothing = [] {};
  const auto run = [&]() -> Task<void> {
    ThreadPool pool(1);
    co_await pool.run(nothing);
  };
  const auto run_until_stopped = [&]() -> Task<void> {
    ThreadPool pool(1);
    (void)co_await pool.run(nothing, source_.get_token());
  };
  expect_death(run, "a worker thread");
  expect_death(run_until_stopped, "a worker thread");
}

TEST_P(ThreadMutexDeathTest, AGroupsRoomOrItsChildrenAreAwaited) {
  Log log;
  const auto room = [&]() -> Task<void> {
    TaskGroup group({.max_running = 1});
    group.spawn(until_stopped(group.stop_token(), log));
    (void)co_await group.room();
  };
  const auto join = [&]() -> Task<void> {
    TaskGroup group;
    group.spawn(until_stopped(group.stop_token(), log));
    (void)co_await group.join();
  };
  expect_death(room, "room in a task group");
  expect_death(join, "task group");
}

}  // namespace
}  // namespace roost
