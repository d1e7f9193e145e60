// SPDX-License-Identifier: MIT
// The stress tests of the runtime, simulated.

#include <array>
#include <memory>
#include <vector>

#include "aio/test_bottom_halves.h"
#include "aio/test_direct_entry.h"
#include "aio/test_hop.h"
#include "aio/test_sleeping.h"
#include "roost/aio/bottom_half.h"
#include "scenario.h"

namespace roost::sim {

namespace {

void hop(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Random& random = simulation.random();
  const int contexts = static_cast<int>(random.between(2, HopWorld::kMaxContexts));
  const int hoppers = static_cast<int>(random.between(contexts, HopWorld::kMaxHoppers));
  HopWorld world(machine, contexts, hoppers, random.next());
  world.start();
  machine.wait_until([&] { return world.counts().resumed > 150; });
  world.finish();
  const HopCounts sum = world.counts();
  ROOST_CHECK(world.errors() == 0, "{} resumptions were wrong", world.errors());
  ROOST_CHECK(sum.resumed == sum.elsewhere + sum.here, "{} schedules, {} resumptions",
              sum.elsewhere + sum.here, sum.resumed);
  counters.add("elsewhere", sum.elsewhere);
  counters.add("here", sum.here);
  counters.add("displaced", sum.displaced);
  counters.add("stolen", sum.stolen);
}

void direct_entry(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  DirectEntryRace race(machine, simulation.random().next());
  constexpr int kCoroutines = 3;
  constexpr int kRounds = 12;
  for (int i = 0; i < kCoroutines; ++i) race.run(kRounds);
  race.finish();
  ROOST_CHECK(race.errors() == 0, "{} rounds had not exactly one winner", race.errors());
  ROOST_CHECK(race.won_by_queue + race.won_by_rival == kCoroutines * kRounds, "{} + {} wins",
              race.won_by_queue, race.won_by_rival);
  counters.add("won_by_queue", race.won_by_queue);
  counters.add("won_by_rival", race.won_by_rival);
  counters.add("rescheduled_with_stale_entry", race.rescheduled_with_stale_entry);
  counters.add("ended_with_stale_entry", race.ended_with_stale_entry);
}

void check_bottom_halves(const BottomHalfCounts& counts) {
  ROOST_CHECK(counts.runs <= counts.schedules, "{} runs of {} schedules", counts.runs,
              counts.schedules);
  ROOST_CHECK(counts.alive == 0, "{} callbacks are left over", counts.alive);
}

void bottom_halves(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  const auto coalesced = coalesce_bottom_halves(machine, 3, 40, simulation.random().next());
  check_bottom_halves(coalesced);
  counters.add("coalesced", coalesced.schedules - coalesced.runs);
  const auto oneshots = run_oneshots(machine, 2, 20);
  check_bottom_halves(oneshots);
  ROOST_CHECK(oneshots.runs == oneshots.schedules, "{} of {} one-shots ran", oneshots.runs,
              oneshots.schedules);
  const auto mixed = mix_bottom_halves(machine, 3, 40, simulation.random().next());
  check_bottom_halves(mixed);
  counters.add("runs", mixed.runs);
  counters.add("deleted_while_scheduled", mixed.deleted_while_scheduled);
  counters.add("deleted_in_callback", mixed.deleted_in_callback);
}

// A schedule() that meets its bottom half on the idle list does not wait for the end of the wait.
void idle_bottom_halves(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  auto context = machine.add_context("idle");
  std::int64_t ran_at = -1;
  BottomHalf bh(*context, [&] { ran_at = simulation.now_ns(); });
  for (int i = 0; i < 10; ++i) {
    bh.schedule_idle();
    std::int64_t scheduled_at = 0;
    machine.add_thread("scheduler", [&] {
      for (auto n = simulation.random().below(10); n > 0; --n) machine.relax();
      scheduled_at = simulation.now_ns();
      ran_at = -1;
      bh.schedule();
    });
    machine.join_threads();
    machine.wait_until([&] { return ran_at >= 0; });
    // Stalls of a thread included; but no idle period, which is 10 ms.
    ROOST_CHECK(ran_at - scheduled_at < 5'000'000, "a scheduled bottom half ran after {} ns",
                ran_at - scheduled_at);
    counters.add("upgraded", 1);
  }
}

void sleeping(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  auto a = machine.add_context("a");
  auto b = machine.add_context("b");
  const int wrong = ping_pong(machine, *a, *b, 60, simulation.random().next());
  ROOST_CHECK(wrong == 0, "{} hops led to the wrong context", wrong);
  counters.add("sleeps", a->statistics().sleeps + b->statistics().sleeps);
  const WakeCounts counts = wake_from_outside(machine, 2, 40);
  ROOST_CHECK(counts.resumed == 80, "{} resumptions of 80 wake-ups", counts.resumed);
  ROOST_CHECK(counts.elsewhere == 0, "{} coroutines woke elsewhere", counts.elsewhere);
}

// Contexts go while others have just posted to them, and owe them a signal that the context, woken
// by somebody else, has not waited for.
void closing(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  struct Post : CallbackEntry {
    explicit Post(int& counter) noexcept : CallbackEntry(&arrive), count(&counter) {}
    static bool arrive(CallbackEntry& entry) noexcept {
      ++*static_cast<Post&>(entry).count;
      return true;
    }
    int* count;
  };
  for (int round = 0; round < 12; ++round) {
    auto context = machine.add_context("brief");
    int arrived = 0;
    int posting = 0;
    // Another reason to wake up, so that a poster may be slower with its signal.
    std::unique_ptr<Timer> timer;
    const auto wake_again = [&] {
      if (arrived < 3) timer->arm_after(simulation.random().between(1'000, 20'000));
    };
    context->run([&] {
      timer = std::make_unique<Timer>(*context, wake_again);
      wake_again();
    });
    std::array<Post, 3> posts{Post(arrived), Post(arrived), Post(arrived)};
    for (Post& post : posts) {
      machine.add_thread("poster", [&] {
        for (auto n = simulation.random().below(4); n > 0; --n) machine.relax();
        ++posting;
        ROOST_CHECK(context->post(post), "a context that is open refused an entry");
        --posting;
      });
    }
    machine.wait_until([&] { return arrived == 3 && !timer->armed(); });
    counters.add("went_during_post", posting > 0);
    context.reset();
    machine.join_threads();
  }
}

// Timers fire in the order of their deadlines, never early, and not after they were cancelled.
void timers(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  auto context = machine.add_context("timers");
  Random& random = simulation.random();
  struct Armed {
    std::unique_ptr<Timer> timer;
    std::int64_t deadline_ns = 0;
    bool fired = false;
    bool cancelled = false;
  };
  std::vector<Armed> armed(20);
  std::int64_t last_deadline_ns = 0;
  context->run([&] {
    for (Armed& a : armed) {
      a.timer = std::make_unique<Timer>(*context, [&] {
        ROOST_CHECK(!a.cancelled && !a.fired, "a timer fired that was cancelled or had fired");
        ROOST_CHECK(simulation.now_ns() >= a.deadline_ns, "a timer fired early");
        a.fired = true;
        simulation.note("timer", static_cast<std::uint64_t>(&a - armed.data()));
        counters.add("in_order", a.deadline_ns >= last_deadline_ns);
        last_deadline_ns = a.deadline_ns;
        Armed& other = armed[random.below(armed.size())];
        if (other.timer->armed() && random.one_in(3)) {
          other.timer->cancel();
          other.cancelled = true;
          counters.add("cancelled", 1);
        }
      });
      a.deadline_ns = simulation.now_ns() + random.between(0, 2'000'000);
      a.timer->arm_at(a.deadline_ns);
    }
  });
  // Meanwhile the context has other things to do, and coroutines of others sleep.
  int ended = 0;
  auto other = machine.add_context("other");
  const auto body = [&]() -> Task<void> {
    for (int i = 0; i < 5; ++i) {
      const std::int64_t until = simulation.now_ns() + 100'000;
      co_await sleep_for(100'000);
      ROOST_CHECK(simulation.now_ns() >= until, "a sleep ended early");
      co_await move_to(AioContext::current() == context.get() ? *other : *context);
    }
    ++ended;
  };
  for (int i = 0; i < 3; ++i) simulation.spawn(*context, body(), "sleeper");
  machine.wait_until([&] {
    for (const Armed& a : armed) {
      if (!a.fired && !a.cancelled) return false;
    }
    return ended == 3;
  });
  context->run([&] { armed.clear(); });
}

// A callback polls its own context while it waits for others.
void nested_polls(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  auto a = machine.add_context("a");
  auto b = machine.add_context("b");
  int done = 0;
  int idle = 0;
  BottomHalf idler(*a, [&] { ++idle; });
  for (int i = 0; i < 5; ++i) {
    schedule_oneshot(*a, [&] {
      const auto answers = std::make_shared<int>(0);
      idler.schedule_idle();
      schedule_oneshot(*b, [a = a.get(), answers] {
        for (int n = 0; n < 3; ++n) schedule_oneshot(*a, [answers] { ++*answers; });
      });
      while (*answers < 3) a->poll(true);
      ++done;
    });
  }
  simulation.note("posted");
  machine.wait_until([&] { return done == 5; });
  counters.add("idle_runs", static_cast<std::uint64_t>(idle));
}

constexpr Scenario kScenarios[] = {
    {"hop", "contexts pass coroutines around", hop, "elsewhere here displaced stolen"},
    {"direct_entry", "try_enter() races with a pending schedule", direct_entry,
     "won_by_queue won_by_rival rescheduled_with_stale_entry ended_with_stale_entry"},
    {"bottom_halves", "threads schedule, cancel and delete bottom halves", bottom_halves,
     "coalesced runs deleted_while_scheduled deleted_in_callback"},
    {"idle_bottom_halves", "schedule() overtakes schedule_idle()", idle_bottom_halves, "upgraded"},
    {"sleeping", "pushes meet contexts that fall asleep", sleeping, "sleeps"},
    {"closing", "contexts go while others are in post()", closing, "went_during_post"},
    {"timers", "timers and sleeps", timers, "in_order cancelled"},
    {"nested_polls", "callbacks that poll", nested_polls, "idle_runs"},
};

}  // namespace

std::span<const Scenario> runtime_scenarios() { return kScenarios; }

}  // namespace roost::sim
