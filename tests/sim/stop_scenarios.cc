// SPDX-License-Identifier: MIT
// Stops that come from within the library: the first failure in a group, deadlines, the first to
// end. What is stopped waits on other contexts, and may end, and what it waited with go, while the
// callbacks of the stop still run.

#include <array>
#include <cerrno>
#include <memory>
#include <vector>

#include "contexts.h"
#include "helpers.h"
#include "roost/aio/io.h"
#include "roost/aio/timer.h"
#include "roost/coro/completion.h"
#include "roost/coro/gate.h"
#include "roost/sync/co_event.h"
#include "roost/sync/co_mutex.h"
#include "roost/sync/co_semaphore.h"
#include "roost/sync/stop_scope.h"
#include "roost/sync/task_group.h"
#include "roost/sync/when.h"

namespace roost::sim {

namespace {

// Things to wait for, which do not come, and that others wait for too.
class Waits {
 public:
  Waits(Simulation& simulation, Contexts& contexts) : simulation_(simulation), contexts_(contexts) {
    ROOST_CHECK(gate_.try_enter(), "a gate that is closed");
    simulation.spawn(contexts.any(), hold(), "holder");
    simulation.run_until([this] { return held_; });
  }
  ~Waits() {
    ROOST_CHECK(waiting_ == 0, "{} coroutines still wait", waiting_);
    over_.set();
    simulation_.run_until([this] { return !held_; });
    gate_.leave();
  }
  Waits(const Waits&) = delete;
  Waits& operator=(const Waits&) = delete;

  /// Waits somewhere until it is stopped, and comes back.
  Task<Result<void>> until_stopped(std::stop_token stop) {
    Random& random = simulation_.random();
    AioContext* const home = AioContext::current();
    AioContext* const there = random.one_in(4) ? home : &contexts_.any();
    co_await move_to(*there);
    ++waiting_;
    bool stopped = false;
    switch (random.below(6)) {
      case 0: {
        const Result<CoMutex::Guard> guard = co_await lock_.lock(stop);
        stopped = !guard;
        break;
      }
      case 1: {
        const Result<void> acquired = co_await units_.acquire(1, stop);
        stopped = !acquired;
        break;
      }
      case 2: {
        const Result<void> idle = co_await gate_.idle(stop);
        stopped = !idle;
        break;
      }
      case 3: {
        Completion<> never("an answer that does not come");
        const CompletionToken<> token = never.token();
        const Result<void> done = co_await never.wait(stop);
        stopped = !done;
        break;
      }
      case 4: {
        const auto [near, far] = simulation_.make_channel();
        std::array<std::byte, 4> bytes;
        const std::int64_t n = co_await io_recv(near, bytes, 0, stop);
        stopped = n == -ECANCELED;
        simulation_.close(near);
        simulation_.close(far);
        break;
      }
      default: {
        // Time passes while somebody waits in a loop: one long sleep would end.
        while (!stopped) {
          const Result<void> slept = co_await sleep_for(100'000, stop);
          stopped = !slept;
        }
        break;
      }
    }
    --waiting_;
    CHECK_AT_HOME(there);
    ROOST_CHECK(stopped && stop.stop_requested(), "what does not come came");
    simulation_.note("stopped");
    co_await move_to(*home);
    co_return fail(ECANCELED, "a wait");
  }

 private:
  Task<void> hold() {
    auto guard = co_await lock_.lock();
    held_ = true;
    co_await over_.wait();
    guard.unlock();
    held_ = false;
  }

  Simulation& simulation_;
  Contexts& contexts_;
  CoMutex lock_;
  CoSemaphore units_{0};
  Gate gate_{"what does not end"};
  CoEvent over_;
  bool held_ = false;
  int waiting_ = 0;
};

// A child fails, and the others, on other contexts, are stopped; or all are, from outside or by a
// deadline.
void group_stops(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Contexts contexts(simulation, machine);
  Helpers helpers(simulation, machine);
  Random& random = simulation.random();
  Waits waits(simulation, contexts);
  int ended = 0;
  constexpr int kParents = 3;
  const auto failing = [&]() -> Task<Result<void>> {
    co_await sleep_for(static_cast<std::int64_t>(random.below(40'000)));
    co_return fail(EIO, "a child");
  };
  const auto parent = [&]() -> Task<void> {
    AioContext* const home = AioContext::current();
    for (int i = 0; i < 6; ++i) {
      const auto source = std::make_shared<std::stop_source>();
      TaskGroup group({.name = "group", .stop = source->get_token()});
      for (auto n = 1 + random.below(4); n > 0; --n) {
        group.spawn(contexts.any(), waits.until_stopped(group.stop_token()));
      }
      // One of them comes first.
      const auto how = random.below(4);
      if (how == 0 || how == 3) helpers.give_stop(source);
      if (how == 1) group.scope().set_deadline(simulation.now_ns() + 20'000);
      if (how >= 2) group.spawn(contexts.any(), failing());
      if (how == 3) group.spawn(contexts.any(), failing());
      const Result<void> result = co_await group.join();
      CHECK_AT_HOME(home);
      ROOST_CHECK(!result, "a group that was stopped ended well");
      const int error = result.error().code();
      simulation.note("joined", static_cast<std::uint64_t>(error));
      counters.add("failed", error == EIO);
      counters.add("timed_out", error == ETIMEDOUT);
      counters.add("cancelled", error == ECANCELED);
      ROOST_CHECK(error == EIO         ? how >= 2
                  : error == ETIMEDOUT ? how == 1
                                       : how == 0 || how == 3,
                  "a group stopped in way {} gave {}", how, error);
    }
    ++ended;
  };
  for (int i = 0; i < kParents; ++i) simulation.spawn(contexts.any(), parent(), "parent");
  machine.wait_until([&] { return ended == kParents; });
  helpers.finish(machine, counters);
}

// Waits under a deadline that somebody else may anticipate, and scopes that are stopped by another
// thread and go as soon as what they stopped has ended.
void scope_stops(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Contexts contexts(simulation, machine);
  Helpers helpers(simulation, machine);
  Random& random = simulation.random();
  Waits waits(simulation, contexts);
  int ended = 0;
  constexpr int kCoroutines = 4;
  const auto timed = [&]() -> Task<void> {
    const auto source = std::make_shared<std::stop_source>();
    if (random.one_in(2)) helpers.give_stop(source);
    const auto scope = std::make_unique<StopScope>(source->get_token());
    const std::int64_t deadline =
        simulation.now_ns() + 10'000 + static_cast<std::int64_t>(random.below(20'000));
    const Result<void> result =
        co_await with_deadline(deadline, *scope, waits.until_stopped(scope->token()));
    ROOST_CHECK(!result, "a stopped wait ended well");
    const bool in_time = result.error().code() == ECANCELED;
    ROOST_CHECK(in_time ? scope->reason() == StopScope::Reason::kParent
                        : result.error().code() == ETIMEDOUT && simulation.now_ns() >= deadline,
                "a stopped wait gave {}", result.error().code());
    counters.add(in_time ? "stopped_in_time" : "timed_out", 1);
  };
  const auto foreign = [&]() -> Task<void> {
    const auto scope = std::make_unique<StopScope>();
    helpers.give([scope = scope.get()] { scope->request_stop(); });
    auto first = waits.until_stopped(scope->token());
    auto second = waits.until_stopped(scope->token());
    const auto both = co_await when_all(*scope, std::move(first), std::move(second));
    ROOST_CHECK(!both && both.error().code() == ECANCELED &&
                    scope->reason() == StopScope::Reason::kRequested,
                "two stopped waits did not say so");
    counters.add("stopped_by_another_thread", 1);
  };
  const auto body = [&]() -> Task<void> {
    AioContext* const home = AioContext::current();
    for (int i = 0; i < 8; ++i) {
      if (random.one_in(2)) {
        co_await timed();
      } else {
        co_await foreign();
      }
      CHECK_AT_HOME(home);
    }
    ++ended;
  };
  for (int i = 0; i < kCoroutines; ++i) simulation.spawn(contexts.any(), body(), "waiting");
  machine.wait_until([&] { return ended == kCoroutines; });
  helpers.finish(machine, counters);
}

// The first to end stops the others.
void race_stops(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Contexts contexts(simulation, machine);
  Random& random = simulation.random();
  Waits waits(simulation, contexts);
  int ended = 0;
  constexpr int kCoroutines = 4;
  const auto runner = [&](std::stop_token stop) -> Task<Result<void>> {
    co_await move_to(contexts.any());
    const Result<void> slept =
        co_await sleep_for(static_cast<std::int64_t>(random.below(30'000)), stop);
    co_return slept;
  };
  const auto body = [&]() -> Task<void> {
    AioContext* const home = AioContext::current();
    for (int i = 0; i < 8; ++i) {
      const auto scope = std::make_unique<StopScope>();
      std::vector<Task<Result<void>>> tasks;
      const std::size_t runners = 1 + random.below(2);
      for (std::size_t n = 0; n < runners; ++n) tasks.push_back(runner(scope->token()));
      for (auto n = 1 + random.below(3); n > 0; --n) {
        tasks.push_back(waits.until_stopped(scope->token()));
      }
      auto first = co_await when_any(*scope, std::move(tasks));
      CHECK_AT_HOME(home);
      ROOST_CHECK(first.index() < runners && first.value(), "a task that was stopped came first");
      ROOST_CHECK(scope->stopped(), "the first to end did not stop the others");
      simulation.note("first", first.index());
      counters.add("second_came_first", first.index() == 1);
    }
    ++ended;
  };
  for (int i = 0; i < kCoroutines; ++i) simulation.spawn(contexts.any(), body(), "race");
  machine.wait_until([&] { return ended == kCoroutines; });
  counters.add("callbacks_awaited", stop_callbacks_awaited);
}

constexpr Scenario kScenarios[] = {
    {"group_stops", "a group is stopped by a failure, a deadline, another thread", group_stops,
     "failed timed_out cancelled callbacks_awaited"},
    {"scope_stops", "deadlines, and scopes that go with what they stopped", scope_stops,
     "stopped_in_time timed_out stopped_by_another_thread callbacks_awaited"},
    {"race_stops", "the first task to end stops the others", race_stops,
     "second_came_first callbacks_awaited"},
};

}  // namespace

std::span<const Scenario> stop_scenarios() { return kScenarios; }

}  // namespace roost::sim
