// SPDX-License-Identifier: MIT
// Locks, queues and task groups between contexts that take turns.

#include <array>
#include <deque>
#include <memory>
#include <mutex>
#include <stop_token>

#include "contexts.h"
#include "helpers.h"
#include "roost/sync/co_event.h"
#include "roost/sync/co_mutex.h"
#include "roost/sync/co_queue.h"
#include "roost/sync/co_rwlock.h"
#include "roost/sync/co_semaphore.h"
#include "roost/sync/task_group.h"
#include "roost/sync/thread_mutex.h"
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

// A bounded buffer, guarded by a CoMutex.
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

// Tokens, guarded by a thread mutex, whose holder is interrupted.
void queue_thread_mutex(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Contexts contexts(simulation, machine);
  Helpers helpers(simulation, machine);
  Random& random = simulation.random();
  ThreadMutex mutex;
  CoQueue changed;
  int tokens = 2;
  int holders = 0;
  std::uint64_t woken = 0;
  std::uint64_t waited = 0;
  std::uint64_t in_wait = 0;  // that nobody stops
  int ended = 0;
  constexpr int kCoroutines = 6;
  const auto taken = [&] {
    ROOST_CHECK(++holders == 1, "{} threads hold a thread mutex", holders);
    machine.interrupt();
  };
  const auto take = [&](std::unique_lock<ThreadMutex>& lock) {
    if (!lock.try_lock()) {
      counters.add("contended", 1);
      lock.lock();
    }
    taken();
  };
  // After a wake-up, with the lock: whoever let go of it in a wait is in the queue, or was woken.
  const auto check_queue_is_empty = [&] {
    ROOST_CHECK(in_wait <= woken - waited, "{} coroutines wait, of which {} were woken", in_wait,
                woken - waited);
  };
  const auto body = [&](std::uint64_t me) -> Task<void> {
    AioContext* const home = AioContext::current();
    for (int i = 0; i < 10; ++i) {
      {
        std::unique_lock lock(mutex, std::defer_lock);
        take(lock);
        bool ok = true;
        while (tokens == 0 && ok) {
          const auto source = std::make_shared<std::stop_source>();
          const bool stopped = random.one_in(2);
          if (stopped) helpers.give_stop(source);
          const std::stop_token stop = source->get_token();
          in_wait += !stopped;
          --holders;
          const Result<void> result = co_await changed.wait(lock, stop);
          CHECK_AT_HOME(home);
          ROOST_CHECK(lock.owns_lock(), "a wait for a queue ended without the lock");
          taken();
          in_wait -= !stopped;
          ok = result.has_value();
          waited += ok;
          counters.add(ok ? "woken" : "stopped", 1);
          counters.add("woken_although_stopped", ok && stop.stop_requested());
        }
        --holders;
        if (tokens == 0) continue;
        --tokens;
      }
      simulation.note("token", me);
      if (random.one_in(2)) co_await sleep_for(3'000);
      std::unique_lock lock(mutex, std::defer_lock);
      take(lock);
      ++tokens;
      if (changed.wake_one()) {
        ++woken;
      } else {
        check_queue_is_empty();
      }
      --holders;
    }
    ++ended;
  };
  for (std::uint64_t i = 0; i < kCoroutines; ++i)
    simulation.spawn(contexts.any(), body(i), "taker");
  // A thread without a context, that wakes them in vain.
  machine.add_thread("waker", [&] {
    for (int i = 0; i < 10; ++i) {
      for (auto n = random.below(6); n > 0; --n) machine.relax();
      std::unique_lock lock(mutex, std::defer_lock);
      take(lock);
      woken += changed.wake_all();
      check_queue_is_empty();
      --holders;
    }
  });
  machine.wait_until([&] { return ended == kCoroutines; });
  helpers.finish(machine, counters);
  ROOST_CHECK(tokens == 2 && changed.empty(), "{} of 2 tokens are left", tokens);
  // Who was stopped used up none.
  ROOST_CHECK(waited == woken, "{} waits ended by {} wake-ups", waited, woken);
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

// Readers become writers and writers become readers, and whoever waits may be stopped.
class ReadersAndWriters {
 public:
  ReadersAndWriters(Simulation& simulation, SimulatedMachine& machine, Counters& counters)
      : simulation_(simulation),
        machine_(machine),
        counters_(counters),
        contexts_(simulation, machine),
        helpers_(simulation, machine) {}

  void run() {
    constexpr int kCoroutines = 6;
    for (int i = 0; i < kCoroutines; ++i) {
      simulation_.spawn(contexts_.any(), body(), "reader and writer");
    }
    machine_.wait_until([&] { return ended_ == kCoroutines; });
    helpers_.finish(machine_, counters_);
  }

 private:
  std::stop_token any_stop() {
    const auto source = std::make_shared<std::stop_source>();
    if (simulation_.random().one_in(2)) helpers_.give_stop(source);
    return source->get_token();
  }

  Task<void> write_for_a_while() {
    ++writers_;
    ROOST_CHECK(writers_ == 1 && readers_ == 0, "{} writers, {} readers", writers_, readers_);
    const std::uint64_t mine = ++value_;
    simulation_.note("wrote", mine);
    if (simulation_.random().one_in(2)) co_await sleep_for(2'000);
    ROOST_CHECK(writers_ == 1 && readers_ == 0 && value_ == mine, "{} writers, {} readers",
                writers_, readers_);
    --writers_;
  }

  Task<void> read_for_a_while() {
    ++readers_;
    ROOST_CHECK(writers_ == 0, "{} writers, {} readers", writers_, readers_);
    counters_.add("shared", readers_ > 1);
    const std::uint64_t before = value_;
    if (simulation_.random().one_in(2)) co_await sleep_for(2'000);
    ROOST_CHECK(writers_ == 0 && value_ == before, "somebody wrote while others read");
    --readers_;
  }

  Task<void> write() {
    AioContext* const home = AioContext::current();
    const std::stop_token stop = any_stop();
    Result<CoRwlock::Guard> guard = co_await lock_.write(stop);
    CHECK_AT_HOME(home);
    if (!guard) {
      ROOST_CHECK(stop.stop_requested(), "a write that nobody stopped was");
      counters_.add("write_stopped", 1);
      co_return;
    }
    counters_.add("write_stopped_too_late", stop.stop_requested());
    co_await write_for_a_while();
    if (simulation_.random().one_in(2)) co_return;
    const std::uint64_t before = value_;
    guard->downgrade();
    co_await read_for_a_while();
    ROOST_CHECK(value_ == before, "somebody wrote after a downgrade");
    counters_.add("downgraded", 1);
  }

  Task<void> read() {
    AioContext* const home = AioContext::current();
    std::stop_token stop = any_stop();
    Result<CoRwlock::Guard> guard = co_await lock_.read(stop);
    CHECK_AT_HOME(home);
    if (!guard) {
      ROOST_CHECK(stop.stop_requested(), "a read that nobody stopped was");
      counters_.add("read_stopped", 1);
      co_return;
    }
    co_await read_for_a_while();
    if (!simulation_.random().one_in(3)) co_return;
    stop = any_stop();
    const std::uint64_t before = value_;
    const std::uint64_t ended_before = upgrades_ended_;
    ++upgrades_;
    const Result<bool> upgraded = co_await guard->upgrade(stop);
    --upgrades_;
    CHECK_AT_HOME(home);
    const bool alone = upgrades_ == 0 && upgrades_ended_ == ended_before;
    ++upgrades_ended_;
    ROOST_CHECK(!alone || !upgraded || *upgraded, "an upgrade was refused, and nobody upgrades");
    ROOST_CHECK(value_ == before, "somebody wrote before an upgrade");
    ROOST_CHECK(guard->writing() == upgraded.value_or(false), "an upgrade did not say what it did");
    if (upgraded.value_or(false)) {
      counters_.add("upgraded", 1);
      counters_.add("upgrade_stopped_too_late", stop.stop_requested());
      co_await write_for_a_while();
    } else {
      counters_.add(upgraded ? "upgrade_refused" : "upgrade_stopped", 1);
      co_await read_for_a_while();
      ROOST_CHECK(value_ == before, "somebody wrote while another read on");
    }
  }

  Task<void> body() {
    for (int i = 0; i < 12; ++i) {
      if (simulation_.random().one_in(3)) {
        co_await write();
      } else {
        co_await read();
      }
      simulation_.note("turn", static_cast<std::uint64_t>(i));
    }
    ++ended_;
  }

  Simulation& simulation_;
  SimulatedMachine& machine_;
  Counters& counters_;
  Contexts contexts_;
  Helpers helpers_;
  CoRwlock lock_;
  std::uint64_t value_ = 0;
  std::uint64_t upgrades_ended_ = 0;
  int upgrades_ = 0;  // under way
  int readers_ = 0;
  int writers_ = 0;
  int ended_ = 0;
};

// An event is set and reset. Who waits goes on if it was set meanwhile.
void event(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Contexts contexts(simulation, machine);
  Helpers helpers(simulation, machine);
  Random& random = simulation.random();
  CoEvent event;
  std::uint64_t sets = 0;    // begun
  std::uint64_t resets = 0;  // done
  int ended = 0;
  constexpr int kCoroutines = 5;
  const auto body = [&]() -> Task<void> {
    AioContext* const home = AioContext::current();
    for (int i = 0; i < 10; ++i) {
      const auto source = std::make_shared<std::stop_source>();
      if (random.one_in(2)) helpers.give_stop(source);
      const std::stop_token stop = source->get_token();
      const std::uint64_t resets_before = resets;
      const Result<void> result = co_await event.wait(stop);
      CHECK_AT_HOME(home);
      simulation.note("event", result.has_value());
      if (result) {
        ROOST_CHECK(sets > resets_before, "an event came that did not happen");
        counters.add("happened", 1);
        counters.add("happened_although_stopped", stop.stop_requested());
      } else {
        ROOST_CHECK(stop.stop_requested(), "nobody stopped what was stopped");
        counters.add("stopped", 1);
      }
      if (random.one_in(2)) co_await sleep_for(2'000);
    }
    ++ended;
  };
  for (int i = 0; i < kCoroutines; ++i) simulation.spawn(contexts.any(), body(), "waiting");
  machine.add_thread("setter", [&] {
    for (int i = 0; i < 10; ++i) {
      for (auto n = random.below(8); n > 0; --n) machine.relax();
      ++sets;
      event.set();
      if (random.one_in(2)) machine.relax();
      event.reset();
      ++resets;
    }
    ++sets;
    event.set();  // whoever still waits is waiting for this
  });
  machine.wait_until([&] { return ended == kCoroutines; });
  helpers.finish(machine, counters);
}

void rwlock(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  ReadersAndWriters(simulation, machine, counters).run();
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
    {"mutex", "coroutines of several contexts share a CoMutex", mutex, "defeats handoffs"},
    {"queue", "producers and consumers wait for each other", queue, "full empty"},
    {"queue_thread_mutex", "coroutines wait for what a thread mutex guards", queue_thread_mutex,
     "contended woken stopped woken_although_stopped callbacks_awaited"},
    {"event", "an event is set and reset", event,
     "happened happened_although_stopped stopped callbacks_awaited"},
    {"semaphore", "units of a semaphore, after an event", semaphore, "acquired"},
    {"rwlock", "readers and writers change their minds", rwlock,
     "shared read_stopped write_stopped write_stopped_too_late downgraded upgraded "
     "upgrade_refused upgrade_stopped upgrade_stopped_too_late callbacks_awaited"},
    {"task_group", "children on several contexts, four at a time", task_group, "children"},
};

}  // namespace

std::span<const Scenario> sync_scenarios() { return kScenarios; }

}  // namespace roost::sim
