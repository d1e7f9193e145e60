// SPDX-License-Identifier: MIT
// Groups with room(), races, waits for all and deadlines, with children on three contexts, which
// another thread stops at any moment.
//
// Invariants: when they return, every child that started has ended, its frame is gone, and the
// parent is at home; no more run at a time than may; the result is that of a child, or tells of one
// that was not started.

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <span>
#include <stop_token>
#include <tuple>
#include <utility>
#include <vector>

#include "contexts.h"
#include "helpers.h"
#include "roost/aio/timer.h"
#include "roost/coro/completion.h"
#include "roost/sync/stop_scope.h"
#include "roost/sync/task_group.h"
#include "roost/sync/when.h"

namespace roost::sim {

namespace {

enum class Part : std::uint8_t { kTurns, kSleep, kFail, kUntilStopped };
constexpr std::uint64_t kOnTheirOwn = 3;  // the first ones end without being stopped
constexpr std::int64_t kLongestSleepNs = 30'000;

// What a child tells its parent.
struct Report {
  bool started = false;
  bool ended = false;
  int code = 0;  // of its error
};

bool any_code(std::span<const Report> reports, int code) {
  return std::ranges::any_of(reports, [code](const Report& r) { return r.code == code; });
}

// The children of one parent.
struct Children {
  int frames = 0;
  int running = 0;
  int most = 0;  // running at the same time

  // Lives in a child's frame, as an argument.
  class Frame {
   public:
    explicit Frame(Children& children) : children_(&children) { ++children_->frames; }
    Frame(Frame&& other) noexcept : children_(std::exchange(other.children_, nullptr)) {}
    Frame& operator=(Frame&&) = delete;
    ~Frame() {
      if (children_) --children_->frames;
    }

   private:
    Children* children_;
  };
};

class Family {
 public:
  Family(Simulation& simulation, SimulatedMachine& machine)
      : simulation_(simulation),
        machine_(machine),
        contexts_(simulation, machine),
        helpers_(simulation, machine) {}

  /// Runs the coroutine that `parent` makes several times, until all have ended.
  template <class Parent>
  void run(const Parent& parent) {
    constexpr int kParents = 3;
    int ended = 0;
    const auto body = [&]() -> Task<void> {
      AioContext* const home = AioContext::current();
      for (int i = 0; i < 6; ++i) {
        co_await parent();
        CHECK_AT_HOME(home);
      }
      ++ended;
    };
    for (int i = 0; i < kParents; ++i) simulation_.spawn(contexts_.any(), body(), "parent");
    machine_.wait_until([&] { return ended == kParents; });
    helpers_.finish(machine_);
  }

  AioContext& any_context() { return contexts_.any(); }

  /// Most often one that is stopped, soon or later.
  std::stop_token any_stop() {
    if (random().one_in(4)) return {};
    const auto source = std::make_shared<std::stop_source>();
    helpers_.give([this, source, turns = random().below(60)]() mutable {
      for (; turns > 0; --turns) machine_.relax();
      source->request_stop();
    });
    return source->get_token();
  }
  Part any_part(const std::stop_token& stop) {
    return static_cast<Part>(random().below(kOnTheirOwn + (stop.stop_possible() ? 1 : 0)));
  }
  std::int64_t any_amount() { return random().between(0, kLongestSleepNs); }

  /// A child that gives `amount`, if it does not fail.
  Task<Result<int>> child(Report& report, Children& children, Part part, std::int64_t amount,
                          std::stop_token stop) {
    return take_part(report, children, Children::Frame(children), part, amount, std::move(stop));
  }
  Task<Result<void>> without_value(Task<Result<int>> task) {
    const Result<int> result = co_await std::move(task);
    if (!result) co_return fail(result.error().code(), "a child");
    co_return Result<void>();
  }

  static void check(std::span<const Report> reports, const Children& children) {
    for (const Report& report : reports) {
      ROOST_CHECK(report.started == report.ended, "a child outlived the wait for it");
    }
    ROOST_CHECK(children.frames == 0 && children.running == 0, "{} frames are left, {} run",
                children.frames, children.running);
  }

  Simulation& simulation() { return simulation_; }
  Random& random() { return simulation_.random(); }

 private:
  Task<Result<int>> take_part(Report& report, Children& children, Children::Frame, Part part,
                              std::int64_t amount, std::stop_token stop) {
    children.most = std::max(children.most, ++children.running);
    report.started = true;
    if (!random().one_in(4)) co_await move_to(contexts_.any());
    switch (part) {
      case Part::kTurns:
        for (auto n = random().below(4); n > 0; --n) co_await move_to(contexts_.any());
        break;
      case Part::kSleep: {
        const Result<void> slept = co_await sleep_for(amount, stop);
        if (!slept) report.code = slept.error().code();
        break;
      }
      case Part::kFail:
        for (auto n = random().below(4); n > 0; --n) co_await move_to(contexts_.any());
        report.code = EIO;
        break;
      case Part::kUntilStopped: {
        Completion<> never("what never comes");
        const CompletionToken<> token = never.token();
        const Result<void> done = co_await never.wait(stop);
        report.code = done ? 0 : ECANCELED;
        break;
      }
    }
    ROOST_CHECK(report.code != ECANCELED || stop.stop_requested(), "a child stopped by itself");
    simulation_.note("child", static_cast<std::uint64_t>(part),
                     static_cast<std::uint64_t>(report.code));
    report.ended = true;
    --children.running;
    if (report.code) co_return fail(report.code, "a child");
    co_return static_cast<int>(amount);
  }

  Simulation& simulation_;
  SimulatedMachine& machine_;
  Contexts contexts_;
  Helpers helpers_;
};

// A group that may run a few at a time is stopped at every stage.
void group_room(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Family family(simulation, machine);
  Random& random = simulation.random();
  const auto parent = [&]() -> Task<void> {
    constexpr int kChildren = 8;
    std::array<Report, kChildren> reports;
    Children children;
    const std::stop_token stop = family.any_stop();
    const auto max_running = static_cast<std::uint32_t>(1 + random.below(3));
    const bool asks = random.one_in(2);
    int spawned = 0;
    int accepted = 0;
    TaskGroup group({.name = "group", .stop = stop, .max_running = max_running});
    while (spawned < kChildren) {
      const bool stopped_before = group.scope().stopped();
      if (asks) {
        const bool full = group.children() >= max_running && !stopped_before;
        const bool room = co_await group.room();
        if (!room) {
          ROOST_CHECK(group.scope().stopped(), "a group that was not stopped has no room");
          counters.add("stopped_room", full);
          break;
        }
        counters.add("given_room", full);
      }
      const Part part = random.one_in(4) ? family.any_part(stop) : Part::kTurns;
      auto task = family.child(reports[static_cast<std::size_t>(spawned)], children, part,
                               family.any_amount(), group.stop_token());
      group.spawn(family.any_context(), family.without_value(std::move(task)));
      ++spawned;
      if (group.scope().stopped()) {
        counters.add("refused", 1);
        break;
      }
      ++accepted;  // it runs, or stands in line
    }
    const Result<void> result = co_await group.join();
    Family::check(reports, children);
    ROOST_CHECK(children.most <= static_cast<int>(max_running), "{} children of a group of {} ran",
                children.most, max_running);
    const bool stopped = group.scope().reason() == StopScope::Reason::kParent;
    const auto started =
        static_cast<int>(std::ranges::count_if(reports, [](const Report& r) { return r.started; }));
    const bool good =
        started == spawned && !any_code(reports, EIO) && !any_code(reports, ECANCELED);
    ROOST_CHECK(result.has_value() == good, "a group of {} of which {} started gave {}", spawned,
                started, result ? 0 : result.error().code());
    if (!result) {
      const int code = result.error().code();
      ROOST_CHECK(code == ECANCELED ? any_code(reports, ECANCELED) || started < spawned
                                    : code == EIO && any_code(reports, EIO),
                  "a group gave {}, which none of its children did", code);
      counters.add("failed", code == EIO);
    }
    simulation.note("joined", static_cast<std::uint64_t>(started), good);
    counters.add("whole", good);
    counters.add("too_late", good && stopped);
    counters.add("dropped",
                 stopped ? static_cast<std::uint64_t>(std::max(0, accepted - started)) : 0);
  };
  family.run(parent);
  counters.add("callbacks_awaited", stop_callbacks_awaited);
}

// The first to end is told, and the others are stopped; or all are, before or after it.
void any_stopped(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Family family(simulation, machine);
  Random& random = simulation.random();
  const auto parent = [&]() -> Task<void> {
    constexpr std::size_t kMost = 4;
    const std::size_t racers = 2 + random.below(kMost - 1);
    std::array<Report, kMost> reports;
    std::array<int, kMost> amounts{};
    Children children;
    const std::stop_token stop = family.any_stop();
    StopScope scope(stop);
    std::vector<Task<Result<int>>> tasks;
    for (std::size_t n = 0; n < racers; ++n) {
      amounts[n] = static_cast<int>(family.any_amount());
      tasks.push_back(
          family.child(reports[n], children, family.any_part(stop), amounts[n], scope.token()));
    }
    First<Result<int>> first = co_await when_any(scope, std::move(tasks));
    const StopScope::Reason reason = scope.reason();
    Family::check(reports, children);
    const Report& winner = reports[first.index()];
    ROOST_CHECK(first.value() ? winner.code == 0 && *first.value() == amounts[first.index()]
                              : winner.code == first.value().error().code(),
                "a race gave something else than its winner");
    ROOST_CHECK(reason != StopScope::Reason::kNone, "a race was won, and nobody stopped");
    for (std::size_t n = 0; n < racers; ++n) ROOST_CHECK(reports[n].ended, "a racer is left");
    const auto on_their_own = std::ranges::count_if(
        reports, [](const Report& r) { return r.ended && r.code != ECANCELED; });
    const bool stopped = reason == StopScope::Reason::kParent;
    simulation.note("first", first.index(), stopped);
    if (winner.code == ECANCELED) {
      ROOST_CHECK(stopped, "a racer was stopped that came first");
      counters.add("stop_won", 1);
    } else {
      counters.add("won", 1);
      counters.add("outrun", on_their_own > 1);
      counters.add("stop_outrun", stopped);
    }
  };
  family.run(parent);
  counters.add("callbacks_awaited", stop_callbacks_awaited);
}

// All results, or the first failure, that of a stop among them.
void all_stopped(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Family family(simulation, machine);
  Random& random = simulation.random();
  const auto parent = [&]() -> Task<void> {
    std::array<Report, 3> reports;
    std::array<int, 3> amounts{};
    Children children;
    const std::stop_token stop = family.any_stop();
    StopScope scope(stop);
    const auto make = [&](std::size_t n) {
      amounts[n] = static_cast<int>(family.any_amount());
      Part part = family.any_part(stop);
      if (part != Part::kSleep && random.one_in(2)) part = Part::kTurns;
      return family.child(reports[n], children, part, amounts[n], scope.token());
    };
    Task<Result<int>> a = make(0);
    Task<Result<int>> b = make(1);
    Task<Result<int>> c = make(2);
    const Result<std::tuple<int, int, int>> all =
        co_await when_all(scope, std::move(a), std::move(b), std::move(c));
    const bool from_outside = scope.reason() == StopScope::Reason::kParent;
    Family::check(reports, children);
    for (const Report& report : reports) ROOST_CHECK(report.ended, "one of all is left");
    const bool good = !any_code(reports, EIO) && !any_code(reports, ECANCELED);
    ROOST_CHECK(all.has_value() == good, "all ended well, and it was not told");
    simulation.note("all", good, from_outside);
    if (all) {
      ROOST_CHECK(*all == std::tuple(amounts[0], amounts[1], amounts[2]), "wrong results of all");
      counters.add("whole", 1);
      counters.add("too_late", from_outside);
      co_return;
    }
    const int code = all.error().code();
    ROOST_CHECK(any_code(reports, code), "a wait for all gave {}, which none did", code);
    ROOST_CHECK(code != ECANCELED || from_outside, "nobody stopped what was stopped first");
    counters.add(code == EIO ? "failed" : "stopped", 1);
    counters.add("both", from_outside && any_code(reports, EIO) && any_code(reports, ECANCELED));
  };
  family.run(parent);
  counters.add("callbacks_awaited", stop_callbacks_awaited);
}

// A deadline, a stop and the end of the task come at about the same time.
void deadline_race(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Family family(simulation, machine);
  Random& random = simulation.random();
  const auto parent = [&]() -> Task<void> {
    std::array<Report, 1> reports;
    Children children;
    const std::stop_token stop = family.any_stop();
    StopScope scope(stop);
    const std::int64_t delay_ns = family.any_amount();
    const std::int64_t deadline_ns = simulation.now_ns() + delay_ns;
    // The child runs elsewhere; it would sleep for less, until about the deadline, or for ever.
    const std::int64_t sleep_ns = random.one_in(2) ? delay_ns : delay_ns / 4;
    const auto wait_for_child = [&]() -> Task<Result<void>> {
      TaskGroup group({.name = "before a deadline", .stop = scope.token()});
      const Part part = random.one_in(4) ? Part::kUntilStopped : Part::kSleep;
      auto child = family.child(reports[0], children, part, sleep_ns, group.stop_token());
      group.spawn(family.any_context(), family.without_value(std::move(child)));
      co_return co_await group.join();
    };
    Task<Result<void>> task = wait_for_child();
    const Result<void> result = co_await with_deadline(deadline_ns, scope, std::move(task));
    const StopScope::Reason reason = scope.reason();
    Family::check(reports, children);
    ROOST_CHECK(result.has_value() == (reports[0].ended && reports[0].code == 0),
                "a wait with a deadline gave something else than its child");
    ROOST_CHECK(reason != StopScope::Reason::kDeadline || simulation.now_ns() >= deadline_ns,
                "a deadline came early");
    simulation.note("over", static_cast<std::uint64_t>(reason), result.has_value());
    if (result) {
      counters.add("in_time", reason == StopScope::Reason::kNone);
      counters.add("deadline_late", reason == StopScope::Reason::kDeadline);
      counters.add("stop_late", reason == StopScope::Reason::kParent);
    } else if (result.error().code() == ETIMEDOUT) {
      ROOST_CHECK(reason == StopScope::Reason::kDeadline, "a time-out before the deadline");
      counters.add("timed_out", 1);
    } else {
      ROOST_CHECK(result.error().code() == ECANCELED && reason == StopScope::Reason::kParent,
                  "a wait with a deadline gave {}", result.error().code());
      counters.add("stopped", 1);
    }
  };
  family.run(parent);
  counters.add("callbacks_awaited", stop_callbacks_awaited);
}

// A deadline is met on one context while what was under it ends on another: one that was cleared in
// time stops nothing afterwards.
void deadline_elsewhere(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Family family(simulation, machine);
  Random& random = simulation.random();
  const auto go = [&](AioContext& to, std::stop_token stop) -> Task<Result<void>> {
    for (auto n = 1 + random.below(3); n > 0; --n) co_await move_to(to);
    if (stop.stop_requested()) co_return fail(ECANCELED, "going");
    co_return Result<void>();
  };
  const auto parent = [&]() -> Task<void> {
    AioContext* const home = AioContext::current();
    AioContext& other = family.any_context();
    std::stop_token token;
    bool stopped = false;
    {
      StopScope scope;
      token = scope.token();
      const std::int64_t deadline_ns = simulation.now_ns() + random.between(1, 20'000);
      Task<Result<void>> task = go(other, token);
      const Result<void> result = co_await with_deadline(deadline_ns, scope, std::move(task));
      CHECK_AT_HOME(&other);
      stopped = scope.stopped();
      simulation.note("gone", result.has_value(), stopped);
      if (result) {
        counters.add(stopped ? "unheeded" : "in_time", 1);
      } else {
        ROOST_CHECK(
            result.error().code() == ETIMEDOUT && stopped && simulation.now_ns() >= deadline_ns,
            "a deadline that was not met gave {}", result.error().code());
        counters.add("timed_out", 1);
      }
    }
    co_await move_to(*home);  // behind the message that clears the deadline
    if (random.one_in(2)) co_await sleep_for(20'000);
    ROOST_CHECK(stopped || !token.stop_requested(), "a deadline was met that had been cleared");
  };
  family.run(parent);
}

constexpr Scenario kScenarios[] = {
    {"group_room", "a group that may run a few at a time is stopped at every stage", group_room,
     "whole too_late failed refused dropped given_room stopped_room callbacks_awaited"},
    {"any_stopped", "a race is won, or stopped from outside", any_stopped,
     "won outrun stop_won stop_outrun callbacks_awaited"},
    {"all_stopped", "a wait for all meets failures and a stop", all_stopped,
     "whole too_late failed stopped both callbacks_awaited"},
    {"deadline_race", "a deadline, a stop and the end of a task meet", deadline_race,
     "in_time timed_out stopped deadline_late stop_late callbacks_awaited"},
    {"deadline_elsewhere", "a deadline is cleared on another context", deadline_elsewhere,
     "in_time timed_out unheeded"},
};

}  // namespace

std::span<const Scenario> structured_scenarios() { return kScenarios; }

}  // namespace roost::sim
