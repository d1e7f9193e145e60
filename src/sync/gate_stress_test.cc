// SPDX-License-Identifier: MIT
// Requests on three contexts and on a thread without one enter and leave a gate, while two
// coroutines drain it over and over.
//
// Invariant: in a drained section nothing is inside, and what those inside have written is visible,
// and the other way round (plain variables, which ThreadSanitizer watches). Each wait ends once.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <memory>
#include <stop_token>
#include <thread>

#include "aio/test_loop.h"
#include "base/test_build.h"
#include "roost/aio/iothread.h"
#include "roost/coro/gate.h"
#include "roost/coro/task.h"

namespace roost {
namespace {

constexpr int kContexts = 3;
constexpr int kRequesters = 6;
constexpr int kDrainers = 2;
const int kDrains = rounds(4'000);

struct alignas(128) Requester {
  std::uint64_t requests = 0;  // plain: written inside, read by drainers in drained sections
  int refused = 0;
};

struct alignas(128) Drainer {
  std::uint64_t drains = 0;  // plain: written in drained sections, read inside
  int waited = 0;
  int at_once = 0;
  int stopped = 0;
};

struct World {
  std::array<std::unique_ptr<IOThread>, kContexts> threads;
  Gate gate{"the requests"};
  std::array<Requester, kRequesters + 1> requesters;
  std::array<Drainer, kDrainers> drainers;
  std::atomic<int> inside{0};
  std::atomic<int> draining{kDrainers};  // not done yet
  std::atomic<int> live{kRequesters + kDrainers};
  std::atomic<int> errors{0};
  std::atomic<int> beaten{0};         // a stop was requested, but idleness came first
  std::atomic<std::uint64_t> sum{0};  // keeps the plain reads alive
  // Each drainer's stop source on its way to the stopper; null: none.
  std::array<std::atomic<std::stop_source*>, kDrainers> stops{};

  World() = default;
  // The stopper may have gone before the last of them: nobody waited for it any more.
  ~World() {
    for (auto& slot : stops) delete slot.load();
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  CoContext& any_context(TestRandom& random) { return threads[random.below(kContexts)]->context(); }

  // Everything that happens between entering and leaving but for the wait.
  void work(Requester& requester) {
    ++inside;
    std::uint64_t seen = 0;
    for (const Drainer& drainer : drainers) seen += drainer.drains;
    sum.fetch_add(seen, std::memory_order_relaxed);
    ++requester.requests;
  }
  void end_work() { --inside; }

  void foreign() {
    Requester& me = requesters[kRequesters];
    while (draining.load() > 0) {
      if (gate.try_enter()) {
        work(me);
        end_work();
        gate.leave();
      } else {
        ++me.refused;
      }
      std::this_thread::yield();
    }
  }

  // Another thread without a context.
  void stop() {
    TestRandom random(3);
    while (live.load() > 0) {
      for (auto& slot : stops) {
        if (const std::unique_ptr<std::stop_source> source{slot.exchange(nullptr)}) {
          for (unsigned i = random.below(200); i > 0; --i) RealPlatform::cpu_relax();
          source->request_stop();
        }
      }
      std::this_thread::yield();
    }
  }
};

Task<void> request(World& world, int index) {
  Requester& me = world.requesters[index];
  TestRandom random(index + 1);
  while (world.draining.load() > 0) {
    if (Gate::Pass pass = world.gate.try_pass()) {
      world.work(me);
      co_await move_to(world.any_context(random));
      world.end_work();
    } else {
      ++me.refused;
    }
    co_await move_to(world.any_context(random));
  }
  --world.live;
}

Task<void> drain(World& world, int index) {
  Drainer& me = world.drainers[index];
  CoContext* const home = this_thread().context;
  TestRandom random(index + 100);
  // Until the race between a stop and the last to leave went both ways.
  for (int i = 0; i < kDrains || (world.beaten.load() == 0 && i < 100 * kDrains); ++i) {
    // Most often there is somebody to wait for.
    for (int turns = 0; turns < 500 && world.inside.load() == 0; ++turns) {
      co_await move_to(*home);
    }
    const unsigned mode = random.below(4);
    // Now and then it is itself what it waits for: then only the stop ends the wait.
    Gate::Pass pass;
    if (mode == 0) pass = world.gate.try_pass();
    world.gate.close();
    if (mode < 3) {
      std::stop_source source;
      while (world.stops[index].load()) std::this_thread::yield();
      world.stops[index].store(new std::stop_source(source));
      const Result<void> result = co_await world.gate.idle(source.get_token());
      if (result) {
        if (pass) ++world.errors;
        if (source.stop_requested()) ++world.beaten;
      } else {
        ++me.stopped;
        if (!source.stop_requested()) ++world.errors;
      }
    }
    pass.leave();
    ++(world.gate.in_flight() ? me.waited : me.at_once);
    co_await world.gate.idle();
    if (this_thread().context != home) ++world.errors;
    if (world.inside.load() != 0 || world.gate.in_flight() != 0) ++world.errors;
    std::uint64_t seen = 0;
    for (const Requester& requester : world.requesters) seen += requester.requests;
    world.sum.fetch_add(seen, std::memory_order_relaxed);
    ++me.drains;
    world.gate.open();
    for (unsigned turns = random.below(8); turns > 0; --turns) co_await move_to(*home);
  }
  --world.draining;
  --world.live;
}

class GateStress : public OnEachLoop {};
ROOST_ON_EACH_LOOP(GateStress);

TEST_P(GateStress, NothingIsInFlightInADrainedSection) {
  World world;
  for (int i = 0; i < kContexts; ++i) {
    world.threads[i] = std::make_unique<IOThread>(options("context " + std::to_string(i)));
  }
  for (int i = 0; i < kRequesters; ++i) {
    spawn(world.threads[i % kContexts]->context(), request(world, i), "request");
  }
  for (int i = 0; i < kDrainers; ++i) {
    spawn(world.threads[i]->context(), drain(world, i), "drain");
  }
  std::thread foreign([&] { world.foreign(); });
  std::thread stopper([&] { world.stop(); });
  foreign.join();
  stopper.join();
  for (auto& thread : world.threads) {
    thread->stop();
    thread->join();
  }
  std::uint64_t requests = 0;
  int refused = 0, waited = 0, at_once = 0, stopped = 0;
  for (const Requester& requester : world.requesters) {
    requests += requester.requests;
    refused += requester.refused;
  }
  for (const Drainer& drainer : world.drainers) {
    EXPECT_GE(drainer.drains, static_cast<std::uint64_t>(kDrains));
    waited += drainer.waited;
    at_once += drainer.at_once;
    stopped += drainer.stopped;
  }
  std::printf(
      "requests %lu, refused %d; drains that waited %d, did not wait %d, were stopped %d, "
      "beat the stop %d\n",
      requests, refused, waited, at_once, stopped, world.beaten.load());
  EXPECT_EQ(world.errors, 0);
  EXPECT_GT(requests, 0u);
  EXPECT_GT(refused, 0);
  EXPECT_GT(waited, 0);
  EXPECT_GT(at_once, 0);
  EXPECT_GT(stopped, 0);
  EXPECT_GT(world.beaten.load(), 0);
}

}  // namespace
}  // namespace roost
