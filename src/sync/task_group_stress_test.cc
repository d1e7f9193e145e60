// SPDX-License-Identifier: MIT
// Groups whose children run on three contexts, end, fail, wait until they are stopped, and are
// answered by a thread that no context knows.
//
// Invariant: when a join returns, as many children have ended as have started, no frame is alive,
// and the parent is at home; a group fails if and only if a child failed, or was not started.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <memory>
#include <thread>

#include "aio/test_loop.h"
#include "base/test_build.h"
#include "roost/aio/iothread.h"
#include "roost/sync/task_group.h"
#include "sync/test_tasks.h"

namespace roost {
namespace {

constexpr int kContexts = 3;
const int kRounds = rounds(3'000);

struct Counts {
  int succeeded = 0;
  int failed = 0;
  int stopped_children = 0;
  int not_started = 0;
  int answered = 0;
  int errors = 0;
};

struct World {
  std::array<std::unique_ptr<IOThread>, kContexts> threads;
  std::atomic<void*> question{nullptr};
  std::atomic<bool> done{false};

  // The foreign thread: answers, or drops, whatever it is asked.
  void answer() {
    bool drop = false;
    while (!done.load()) {
      void* const opaque = question.exchange(nullptr);
      if (!opaque) {
        std::this_thread::yield();
        continue;
      }
      auto token = CompletionToken<>::from_opaque(opaque);
      drop = !drop;
      if (!drop) token.fire();
    }
    // That of a child that was stopped while it waited.
    if (void* const opaque = question.exchange(nullptr)) {
      const auto dropped = CompletionToken<>::from_opaque(opaque);
    }
  }
};

Task<Result<void>> child(World& world, std::stop_token stop, unsigned kind, Log& log, Log::Frame,
                         AioContext& elsewhere) {
  log.begin();
  if (kind % 2) co_await move_to(elsewhere);
  Result<void> result;
  if (kind < 2) {
    result = fail(EIO, "a child");
  } else if (kind < 6) {
    Completion<> answered("the foreign thread");
    void* const opaque = answered.token().release();
    // Displaces what nobody has taken yet: that is dropped.
    if (void* old = world.question.exchange(opaque)) {
      const auto dropped = CompletionToken<>::from_opaque(old);
    }
    (void)co_await answered.wait(stop);
  } else if (kind < 8) {
    co_await move_to(elsewhere);
  } else if (kind == 8) {
    Completion<> never("what never comes");
    const auto token = never.token();
    (void)co_await never.wait(stop);
    ++log.stopped;
  }
  log.end();
  co_return result;
}

Task<void> parent(World& world, Counts& counts) {
  CoContext* const home = this_thread().context;
  TestRandom random(7);
  for (int round = 0; round < kRounds; ++round) {
    Log log;
    const int children = static_cast<int>(random.below(12)) + 1;
    const bool to_fail = random.below(2);
    {
      TaskGroup group({.name = "stress", .max_running = random.below(2) ? 3 : ~std::uint32_t{0}});
      bool will_wait = false;
      for (int i = 0; i < children; ++i) {
        // Those that wait for ever are few, and somebody stops them.
        unsigned kind = 2 + random.below(will_wait || group.stop_token().stop_requested() ? 6 : 7);
        if (to_fail && i == children - 1) kind = random.below(2);
        will_wait |= kind == 8;
        auto& at = world.threads[random.below(kContexts)]->context();
        auto& elsewhere = world.threads[random.below(kContexts)]->context();
        group.spawn(at, child(world, group.stop_token(), kind, log, Log::Frame(log), elsewhere));
        counts.answered += kind >= 2 && kind < 6;
      }
      if (!to_fail && will_wait) group.request_stop();
      const Result<void> result = co_await group.join();
      ++(result ? counts.succeeded : counts.failed);
      counts.errors += result.has_value() == to_fail;
      if (!result) counts.errors += result.error().code() != EIO;
    }
    counts.errors += log.frames != 0 || log.started != log.ended;
    counts.errors += this_thread().context != home;
    counts.stopped_children += log.stopped;
    counts.not_started += children - log.started;
  }
  world.done = true;
}

class TaskGroupStress : public OnEachLoop {};
ROOST_ON_EACH_LOOP(TaskGroupStress);

TEST_P(TaskGroupStress, ChildrenOnManyContextsNeverOutliveTheirGroup) {
  World world;
  Counts counts;
  for (int i = 0; i < kContexts; ++i) {
    world.threads[i] = std::make_unique<IOThread>(options("context " + std::to_string(i)));
  }
  spawn(world.threads[0]->context(), parent(world, counts), "parent");
  std::thread([&] { world.answer(); }).join();
  for (auto& thread : world.threads) {
    thread->stop();
    thread->join();
  }
  std::printf(
      "groups that succeeded %d, failed %d; children stopped %d, not started %d, answered "
      "by a foreign thread %d\n",
      counts.succeeded, counts.failed, counts.stopped_children, counts.not_started,
      counts.answered);
  EXPECT_EQ(counts.errors, 0);
  EXPECT_GT(counts.succeeded, 0);
  EXPECT_GT(counts.failed, 0);
  EXPECT_GT(counts.stopped_children, 0);
  EXPECT_GT(counts.not_started, 0);
  EXPECT_GT(counts.answered, 0);
}

}  // namespace
}  // namespace roost
