// SPDX-License-Identifier: MIT
// Task groups with room(), when_any(), when_all() and deadlines, with children on three contexts,
// while another thread stops them from outside at any moment.
//
// Invariants: when they return, every child that started has ended, its frame is gone, what it
// wrote is visible (plain variables, which ThreadSanitizer watches), and the parent is at home; no
// more run at a time than may; the result is that of a child, or tells of one that was not started.
// Each test goes on until the stop met every stage, and fails if it did not after half a minute.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <span>
#include <tuple>
#include <vector>

#include "aio/test_loop.h"
#include "roost/sync/task_group.h"
#include "roost/sync/when.h"
#include "sync/test_stops.h"
#include "sync/test_tasks.h"

namespace roost {
namespace {

enum class Part : std::uint8_t { kTurns, kSleep, kFail, kUntilStopped };
constexpr std::uint32_t kOnTheirOwn = 3;  // the first ones end without being stopped

// What a child tells its parent.
struct Report {
  bool started = false;
  bool ended = false;
  int code = 0;  // of its error
};

Task<Result<int>> take_part(Report& report, Log& log, Log::Frame, Part part, std::int64_t amount,
                            std::stop_token stop, AioContext& elsewhere) {
  log.begin();
  report.started = true;
  if (amount % 4) co_await move_to(elsewhere);
  switch (part) {
    case Part::kTurns:
      for (auto i = amount % 4; i > 0; --i) co_await move_to(elsewhere);
      break;
    case Part::kSleep: {
      const Result<void> slept = co_await sleep_for(amount, stop);
      if (!slept) report.code = slept.error().code();
      break;
    }
    case Part::kFail:
      report.code = EIO;
      break;
    case Part::kUntilStopped: {
      Completion<> never("what never comes");
      const auto token = never.token();
      (void)co_await never.wait(stop);
      report.code = ECANCELED;
    }
  }
  report.ended = true;
  log.end();
  if (report.code) co_return fail(report.code, "a child");
  co_return static_cast<int>(amount);
}

Task<Result<void>> without_value(Task<Result<int>> task) {
  const Result<int> result = co_await std::move(task);
  if (!result) co_return fail(result.error().code(), "a child");
  co_return Result<void>();
}

using Count = std::atomic<std::uint64_t>;

class StructuredStress : public StopsAtAnyMoment, public testing::WithParamInterface<EventLoop> {
 protected:
  void SetUp() override {
    if (GetParam() == EventLoop::kIoUring && !io_uring_available()) {
      GTEST_SKIP() << "the kernel refuses io_uring";
    }
  }
  AioContextOptions context_options() const override {
    AioContextOptions o;
    o.event_loop = GetParam();
    return o;
  }

  AioContext& any_context(TestRandom& random) { return *contexts_[random.below(kCoroutines)]; }
  // Most often one that is stopped from outside.
  std::stop_token any_stop(int i, TestRandom& random) {
    return random.below(4) ? slots_[i].renew() : std::stop_token();
  }
  static Part any_part(TestRandom& random, const std::stop_token& stop) {
    return static_cast<Part>(random.below(kOnTheirOwn + (stop.stop_possible() ? 1 : 0)));
  }

  // After the end; first what the children wrote, since looking at the log orders memory.
  void check_children(std::span<const Report> reports, const Log& log, int i) {
    for (const Report& report : reports) errors_ += report.started != report.ended;
    errors_ += log.frames != 0 || log.running != 0;
    errors_ += AioContext::current() != contexts_[i];
  }

  std::atomic<int> errors_{0};
};
ROOST_ON_EACH_LOOP(StructuredStress);

bool any_code(std::span<const Report> reports, int code) {
  return std::ranges::any_of(reports, [code](const Report& r) { return r.code == code; });
}

TEST_P(StructuredStress, AStopMeetsAGroupWithRoomAtEveryStage) {
  Count whole{0};         // groups whose children all succeeded
  Count too_late{0};      // of those, although they were stopped
  Count refused{0};       // the stop came before, or within, a spawn
  Count dropped{0};       // children that stood in line when the stop came
  Count given_room{0};    // to a parent that had to wait for it
  Count stopped_room{0};  // the stop came while the parent waited
  Count failed{0};
  const auto body = [&](int i) -> Task<> {
    TestRandom random(i + 1);
    while (!stop_) {
      constexpr int kChildren = 8;
      std::array<Report, kChildren> reports;
      Log log;
      const std::stop_token stop = any_stop(i, random);
      const std::uint32_t max_running = 1 + random.below(3);
      const bool asks = random.below(2);
      int spawned = 0;
      int accepted = 0;
      TaskGroup group({.name = "stress", .stop = stop, .max_running = max_running});
      while (spawned < kChildren) {
        const bool stopped_before = group.scope().stopped();
        if (asks) {
          const bool full = group.children() >= max_running && !stopped_before;
          if (!co_await group.room()) {
            stopped_room += full;
            break;
          }
          given_room += full;
        }
        const Part part = random.below(4) ? Part::kTurns : any_part(random, stop);
        group.spawn(any_context(random),
                    without_value(take_part(reports[spawned], log, Log::Frame(log), part,
                                            random.below(20'000), group.stop_token(),
                                            any_context(random))));
        ++spawned;
        if (group.scope().stopped()) {
          ++refused;
          break;
        }
        ++accepted;  // it runs, or stands in line
      }
      const Result<void> result = co_await group.join();
      const bool stopped = group.scope().reason() == StopScope::Reason::kParent;
      const auto started =
          static_cast<int>(std::ranges::count_if(reports, [](auto& r) { return r.started; }));
      const bool good =
          started == spawned && !any_code(reports, EIO) && !any_code(reports, ECANCELED);
      errors_ += result.has_value() != good;
      if (!result) {
        const int code = result.error().code();
        errors_ += code == ECANCELED ? !any_code(reports, ECANCELED) && started == spawned
                                     : code != EIO || !any_code(reports, EIO);
        failed += code == EIO;
      }
      check_children(reports, log, i);
      errors_ += log.most > static_cast<int>(max_running);
      whole += good;
      too_late += good && stopped;
      if (stopped) dropped += static_cast<std::uint64_t>(std::max(0, accepted - started));
    }
  };
  run(body, [&] {
    return whole > 100 && too_late > 20 && refused > 20 && dropped > 100 && given_room > 100 &&
           stopped_room > 20 && failed > 20;
  });
  std::printf(
      "groups: %lu whole, of them %lu stopped too late, %lu failed; spawns refused %lu, children "
      "dropped from the line %lu; waits for room that were granted %lu, stopped %lu\n",
      whole.load(), too_late.load(), failed.load(), refused.load(), dropped.load(),
      given_room.load(), stopped_room.load());
  EXPECT_EQ(errors_, 0);
}

TEST_P(StructuredStress, AStopMeetsARace) {
  Count won{0};          // by one that ended on its own
  Count outrun{0};       // others had ended on their own as well
  Count stop_won{0};     // the stop from outside came before any had ended
  Count stop_outrun{0};  // it came after one had won
  const auto body = [&](int i) -> Task<> {
    TestRandom random(i + 1);
    while (!stop_) {
      constexpr std::uint32_t kMost = 4;
      const std::uint32_t racers = 2 + random.below(kMost - 1);
      std::array<Report, kMost> reports;
      std::array<int, kMost> amounts{};
      Log log;
      const std::stop_token stop = any_stop(i, random);
      StopScope scope(stop);
      std::vector<Task<Result<int>>> tasks;
      for (std::uint32_t n = 0; n < racers; ++n) {
        amounts[n] = static_cast<int>(random.below(20'000));
        tasks.push_back(take_part(reports[n], log, Log::Frame(log), any_part(random, stop),
                                  amounts[n], scope.token(), any_context(random)));
      }
      First<Result<int>> first = co_await when_any(scope, std::move(tasks));
      const StopScope::Reason reason = scope.reason();
      const Report& winner = reports[first.index()];
      errors_ += first.value() ? winner.code != 0 || *first.value() != amounts[first.index()]
                               : winner.code != first.value().error().code();
      errors_ += reason == StopScope::Reason::kNone;
      const auto on_their_own =
          std::count_if(reports.begin(), reports.begin() + racers,
                        [](const Report& r) { return r.ended && r.code != ECANCELED; });
      for (std::uint32_t n = 0; n < racers; ++n) errors_ += !reports[n].ended;
      const bool stopped = reason == StopScope::Reason::kParent;
      if (winner.code == ECANCELED) {
        ++stop_won;
        errors_ += !stopped;
      } else {
        ++won;
        outrun += on_their_own > 1;
        stop_outrun += stopped;
      }
      check_children(reports, log, i);
    }
  };
  run(body, [&] { return won > 100 && outrun > 20 && stop_won > 20 && stop_outrun > 20; });
  std::printf(
      "races: %lu won, of them %lu narrowly, %lu although they were stopped; %lu stopped first\n",
      won.load(), outrun.load(), stop_outrun.load(), stop_won.load());
  EXPECT_EQ(errors_, 0);
}

TEST_P(StructuredStress, AStopMeetsAWaitForAll) {
  Count whole{0};     // all had succeeded
  Count too_late{0};  // of those, although they were stopped
  Count failed{0};    // a child had, by itself
  Count stopped{0};   // the stop from outside was the first failure
  Count both{0};      // a child failed while others were stopped from outside
  const auto body = [&](int i) -> Task<> {
    TestRandom random(i + 1);
    while (!stop_) {
      std::array<Report, 3> reports;
      std::array<int, 3> amounts{};
      Log log;
      const std::stop_token stop = any_stop(i, random);
      StopScope scope(stop);
      const auto make = [&](int n) {
        amounts[n] = static_cast<int>(random.below(20'000));
        Part part = any_part(random, stop);
        if (part != Part::kSleep && random.below(2)) part = Part::kTurns;
        return take_part(reports[n], log, Log::Frame(log), part, amounts[n], scope.token(),
                         any_context(random));
      };
      Task<Result<int>> a = make(0);
      Task<Result<int>> b = make(1);
      Task<Result<int>> c = make(2);
      const Result<std::tuple<int, int, int>> all =
          co_await when_all(scope, std::move(a), std::move(b), std::move(c));
      const bool from_outside = scope.reason() == StopScope::Reason::kParent;
      const bool good = !any_code(reports, EIO) && !any_code(reports, ECANCELED);
      for (const Report& report : reports) errors_ += !report.ended;
      errors_ += all.has_value() != good;
      if (all) {
        errors_ += *all != std::tuple(amounts[0], amounts[1], amounts[2]);
        ++whole;
        too_late += from_outside;
      } else {
        const int code = all.error().code();
        errors_ += !any_code(reports, code);
        ++(code == EIO ? failed : stopped);
        errors_ += code == ECANCELED && !from_outside;
        both += from_outside && any_code(reports, EIO) && any_code(reports, ECANCELED);
      }
      check_children(reports, log, i);
    }
  };
  run(body,
      [&] { return whole > 100 && too_late > 20 && failed > 20 && stopped > 20 && both > 5; });
  std::printf(
      "waits for all: %lu whole, of them %lu stopped too late; %lu failed, %lu stopped, %lu both\n",
      whole.load(), too_late.load(), failed.load(), stopped.load(), both.load());
  EXPECT_EQ(errors_, 0);
}

TEST_P(StructuredStress, ADeadlineAStopAndTheEndRace) {
  Count in_time{0};
  Count timed_out{0};
  Count stopped{0};
  Count deadline_late{0};  // the task had succeeded, but its parent was not back yet
  Count stop_late{0};
  const auto body = [&](int i) -> Task<> {
    TestRandom random(i + 1);
    while (!stop_) {
      std::array<Report, 1> reports;
      Log log;
      const std::stop_token stop = any_stop(i, random);
      StopScope scope(stop);
      const std::int64_t delay_ns = random.below(100'000);
      const std::int64_t deadline_ns = contexts_[i]->clock().now_ns() + delay_ns;
      // The child runs elsewhere; it would sleep for less, until about the deadline, or for ever.
      const std::int64_t sleep_ns = random.below(2) ? delay_ns : delay_ns / 4;
      const auto wait_for_child = [&]() -> Task<Result<void>> {
        TaskGroup group({.name = "before a deadline", .stop = scope.token()});
        const Part part = random.below(4) ? Part::kSleep : Part::kUntilStopped;
        group.spawn(any_context(random),
                    without_value(take_part(reports[0], log, Log::Frame(log), part, sleep_ns,
                                            group.stop_token(), any_context(random))));
        co_return co_await group.join();
      };
      Task<Result<void>> task = wait_for_child();
      const Result<void> result = co_await with_deadline(deadline_ns, scope, std::move(task));
      const StopScope::Reason reason = scope.reason();
      errors_ += result.has_value() != (reports[0].ended && reports[0].code == 0);
      if (reason == StopScope::Reason::kDeadline) {
        errors_ += contexts_[i]->clock().now_ns() < deadline_ns;
      }
      if (result) {
        in_time += reason == StopScope::Reason::kNone;
        deadline_late += reason == StopScope::Reason::kDeadline;
        stop_late += reason == StopScope::Reason::kParent;
      } else if (result.error().code() == ETIMEDOUT) {
        ++timed_out;
        errors_ += reason != StopScope::Reason::kDeadline;
      } else {
        ++stopped;
        errors_ += result.error().code() != ECANCELED || reason != StopScope::Reason::kParent;
      }
      check_children(reports, log, i);
    }
  };
  run(body, [&] {
    return in_time > 20 && timed_out > 100 && stopped > 100 && deadline_late > 20 && stop_late > 5;
  });
  std::printf(
      "deadlines: %lu ended in time, %lu timed out, %lu stopped; too late for the task came %lu "
      "deadlines and %lu stops\n",
      in_time.load(), timed_out.load(), stopped.load(), deadline_late.load(), stop_late.load());
  EXPECT_EQ(errors_, 0);
}

}  // namespace
}  // namespace roost
