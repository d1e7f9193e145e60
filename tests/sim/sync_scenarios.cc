// SPDX-License-Identifier: MIT
// Locks, queues and task groups between contexts that take turns.

#include <array>
#include <deque>
#include <memory>
#include <mutex>

#include "contexts.h"
#include "roost/sync/co_event.h"
#include "roost/sync/co_mutex.h"
#include "roost/sync/co_queue.h"
#include "roost/sync/co_rwlock.h"
#include "roost/sync/co_semaphore.h"
#include "roost/sync/task_group.h"
#include "scenario.h"

namespace roost::sim {

namespace {

void mutex(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Contexts contexts(simulation, machine);
  CoMutex lock;
  int inside = 0;
  int ended = 0;
  std::uint64_t total = 0;
  constexpr int kCoroutines = 6;
  constexpr int kEach = 15;
  const auto body = [&](std::uint64_t me) -> Task<void> {
    for (int i = 0; i < kEach; ++i) {
      AioContext* const home = AioContext::current();
      {
        auto guard = co_await lock.lock();
        CHECK_AT_HOME(home);
        ROOST_CHECK(++inside == 1, "{} coroutines hold a mutex", inside);
        simulation.note("locked", me);
        simulation.interrupt();
        if (simulation.random().one_in(4)) co_await sleep_for(5'000);
        if (simulation.random().one_in(4)) co_await move_to(contexts.any());
        ++total;
        --inside;
      }
      if (simulation.random().one_in(3)) co_await move_to(contexts.any());
    }
    ++ended;
  };
  for (int i = 0; i < kCoroutines; ++i) {
    simulation.spawn(contexts.any(), body(static_cast<std::uint64_t>(i)), "locker");
  }
  machine.wait_until([&] { return ended == kCoroutines; });
  ROOST_CHECK(total == kCoroutines * kEach, "{} turns with the mutex", total);
  counters.add("defeats", lock.statistics().defeats);
  counters.add("handoffs", lock.statistics().handoffs);
}

// A bounded buffer, guarded by a CoMutex; and a flag guarded by a thread mutex.
void queue(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Contexts contexts(simulation, machine);
  CoMutex lock;
  CoQueue not_empty;
  CoQueue not_full;
  std::deque<int> buffer;
  constexpr int kEach = 25;
  int ended = 0;
  int sum = 0;
  const auto producer = [&]() -> Task<void> {
    for (int i = 1; i <= kEach; ++i) {
      auto guard = co_await lock.lock();
      while (buffer.size() >= 3) {
        counters.add("full", 1);
        co_await not_full.wait(guard);
      }
      buffer.push_back(i);
      not_empty.wake_one();
    }
    ++ended;
  };
  const auto consumer = [&]() -> Task<void> {
    for (int i = 1; i <= kEach; ++i) {
      AioContext* const home = AioContext::current();
      auto guard = co_await lock.lock();
      while (buffer.empty()) {
        counters.add("empty", 1);
        co_await not_empty.wait(guard);
        CHECK_AT_HOME(home);
      }
      sum += buffer.front();
      simulation.note("consumed", static_cast<std::uint64_t>(buffer.front()));
      buffer.pop_front();
      i % 5 ? not_full.wake_one() : not_full.wake_all() > 0;
    }
    ++ended;
  };
  for (int i = 0; i < 2; ++i) {
    simulation.spawn(contexts.any(), producer(), "producer");
    simulation.spawn(contexts.any(), consumer(), "consumer");
  }
  machine.wait_until([&] { return ended == 4; });
  ROOST_CHECK(sum == kEach * (kEach + 1), "the sum of what was consumed is {}", sum);
}

void semaphore(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Contexts contexts(simulation, machine);
  CoSemaphore units(4);
  CoEvent start;
  std::uint64_t taken = 0;
  int ended = 0;
  const auto body = [&]() -> Task<void> {
    AioContext* const home = AioContext::current();
    co_await start.wait();
    CHECK_AT_HOME(home);
    for (int i = 0; i < 10; ++i) {
      const std::uint64_t want = 1 + simulation.random().below(3);
      co_await units.acquire(want);
      CHECK_AT_HOME(home);
      taken += want;
      ROOST_CHECK(taken <= 4, "{} of 4 units are taken", taken);
      simulation.note("acquired", want, taken);
      if (simulation.random().one_in(2)) co_await sleep_for(3'000);
      taken -= want;
      units.release(want);
      counters.add("acquired", 1);
    }
    ++ended;
  };
  for (int i = 0; i < 6; ++i) simulation.spawn(contexts.any(), body(), "taker");
  machine.add_thread("starter", [&] {
    for (auto n = simulation.random().below(10); n > 0; --n) machine.relax();
    start.set();
  });
  machine.join_threads();
  machine.wait_until([&] { return ended == 6; });
  ROOST_CHECK(units.available() == 4, "{} units are left", units.available());
}

void rwlock(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Contexts contexts(simulation, machine);
  CoRwlock lock;
  int readers = 0;
  int writers = 0;
  int ended = 0;
  const auto body = [&]() -> Task<void> {
    for (int i = 0; i < 12; ++i) {
      AioContext* const home = AioContext::current();
      if (simulation.random().one_in(3)) {
        auto guard = co_await lock.write();
        CHECK_AT_HOME(home);
        ++writers;
        ROOST_CHECK(writers == 1 && readers == 0, "{} writers, {} readers", writers, readers);
        if (simulation.random().one_in(2)) co_await sleep_for(2'000);
        --writers;
      } else {
        auto guard = co_await lock.read();
        CHECK_AT_HOME(home);
        ++readers;
        ROOST_CHECK(writers == 0, "{} writers, {} readers", writers, readers);
        counters.add("shared", readers > 1);
        if (simulation.random().one_in(2)) co_await sleep_for(2'000);
        --readers;
      }
      simulation.note("turn", static_cast<std::uint64_t>(i));
    }
    ++ended;
  };
  for (int i = 0; i < 6; ++i) simulation.spawn(contexts.any(), body(), "reader and writer");
  machine.wait_until([&] { return ended == 6; });
}

void task_group(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Contexts contexts(simulation, machine);
  int running = 0;
  int children = 0;
  int ended = 0;
  const auto child = [&](std::uint64_t i) -> Task<void> {
    ROOST_CHECK(++running <= 4, "{} children of a group of 4 run", running);
    co_await sleep_for(static_cast<std::int64_t>(simulation.random().below(20'000)));
    if (i % 3 == 0) co_await move_to(contexts.any());
    simulation.note("child", i);
    ++children;
    --running;
  };
  const auto parent = [&]() -> Task<void> {
    AioContext* const home = AioContext::current();
    TaskGroup group({.name = "group", .max_running = 4});
    for (std::uint64_t i = 0; i < 15; ++i) group.spawn(contexts.any(), child(i));
    const Result<void> result = co_await group.join();
    CHECK_AT_HOME(home);
    ROOST_CHECK(result && children == 15 && running == 0, "{} children ended, {} run", children,
                running);
    ++ended;
  };
  simulation.spawn(contexts.any(), parent(), "parent");
  machine.wait_until([&] { return ended == 1; });
  counters.add("children", static_cast<std::uint64_t>(children));
}

constexpr Scenario kScenarios[] = {
    {"mutex", "coroutines of several contexts share a CoMutex", mutex},
    {"queue", "producers and consumers wait for each other", queue},
    {"semaphore", "units of a semaphore, after an event", semaphore},
    {"rwlock", "readers and writers", rwlock},
    {"task_group", "children on several contexts, four at a time", task_group},
};

}  // namespace

std::span<const Scenario> sync_scenarios() { return kScenarios; }

}  // namespace roost::sim
