// SPDX-License-Identifier: MIT
// The thread pool as it ships, with simulated threads as its workers.

#include <algorithm>
#include <cerrno>
#include <memory>
#include <stop_token>

#include "contexts.h"
#include "helpers.h"
#include "roost/aio/thread_pool.h"
#include "roost/aio/timer.h"

namespace roost::sim {

namespace {

// Coroutines of several contexts offload work and change their minds, while the pool grows and
// shrinks under them. What is withdrawn does not run; what has started is waited for.
void offload(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Contexts contexts(simulation, machine);
  Helpers helpers(simulation, machine);
  Random& random = simulation.random();
  constexpr unsigned kMostThreads = 2;
  ThreadPool pool({.max_threads = kMostThreads, .idle_timeout_ns = 20'000});
  int ended = 0;
  unsigned working = 0;
  std::uint64_t executed = 0;
  constexpr int kCoroutines = 5;
  const auto body = [&](int me) -> Task<void> {
    AioContext* const home = AioContext::current();
    for (int i = 0; i < 8; ++i) {
      const auto source = std::make_shared<std::stop_source>();
      if (!random.one_in(3)) helpers.give_stop(source);
      const std::stop_token stop = source->get_token();
      const int answer = 100 * me + i;
      bool began = false;
      bool ran = false;
      const auto work = [&] {
        ROOST_CHECK(!AioContext::current(), "the pool runs work within a context");
        ROOST_CHECK(!began, "work ran twice");
        ROOST_CHECK(++working <= kMostThreads, "{} workers of {} work", working, kMostThreads);
        began = true;
        for (auto n = random.below(8); n > 0; --n) machine.relax();
        --working;
        ran = true;
        ++executed;
        return answer;
      };
      const unsigned threads_before = pool.statistics().threads;
      const Result<int> result = co_await pool.run(work, stop);
      CHECK_AT_HOME(home);
      simulation.note("offloaded", static_cast<std::uint64_t>(answer), ran);
      ROOST_CHECK(began == ran, "work was given up that had begun");
      ROOST_CHECK(result.has_value() == ran, "it ran: {}, and was told: {}", ran,
                  result.has_value());
      if (result) {
        ROOST_CHECK(*result == answer, "coroutine {} got a wrong answer", me);
        counters.add("stopped_too_late", stop.stop_requested());
      } else {
        ROOST_CHECK(result.error().code() == ECANCELED && stop.stop_requested(),
                    "nobody gave up work that did not run");
      }
      if (random.one_in(3)) co_await sleep_for(50'000);
      counters.add("shrank", pool.statistics().threads < threads_before);
    }
    ++ended;
  };
  for (int i = 0; i < kCoroutines; ++i) simulation.spawn(contexts.any(), body(i), "offloading");
  machine.wait_until([&] { return ended == kCoroutines; });
  helpers.finish(machine, counters);
  const auto statistics = pool.statistics();
  ROOST_CHECK(statistics.executed == executed && statistics.queued == 0 && working == 0,
              "{} of {} pieces of work ran, {} are left", executed, statistics.executed,
              statistics.queued);
  ROOST_CHECK(statistics.peak_threads <= kMostThreads, "{} workers", statistics.peak_threads);
  counters.add("withdrawn", statistics.cancelled);
  counters.add("all_workers", statistics.peak_threads == kMostThreads);
}

constexpr Scenario kScenarios[] = {
    {"offload", "work of a pool that grows and shrinks is withdrawn", offload,
     "stopped_too_late withdrawn shrank all_workers callbacks_awaited"},
};

}  // namespace

std::span<const Scenario> pool_scenarios() { return kScenarios; }

}  // namespace roost::sim
