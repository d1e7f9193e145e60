// SPDX-License-Identifier: MIT
// Deadlines that are met on one context while what was under them ends on another.
//
// Invariant: a deadline that was cleared in time stops nothing afterwards; one that was not gives
// ETIMEDOUT where the task heeded it. The delay follows what came of the last ones, so that the two
// come at about the same time.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <semaphore>

#include "aio/test_loop.h"
#include "base/test_build.h"
#include "roost/aio/iothread.h"
#include "roost/sync/stop_scope.h"

namespace roost {
namespace {

const int kRounds = rounds(5'000);

struct Counts {
  int in_time = 0;
  int timed_out = 0;
  int unheeded = 0;  // met when the task had looked at its token for the last time
  int errors = 0;
};

Task<Result<void>> go(AioContext& to, std::stop_token stop) {
  co_await move_to(to);
  if (stop.stop_requested()) co_return fail(ECANCELED, "going");
  co_return Result<void>();
}

Task<void> run(AioContext& home, AioContext& other, Counts& counts, std::binary_semaphore& done) {
  std::int64_t delay_ns = 10'000;
  for (int round = 0; round < kRounds; ++round) {
    std::stop_token token;
    bool stopped = false;
    {
      StopScope scope;
      token = scope.token();
      const std::int64_t deadline_ns = home.clock().now_ns() + delay_ns;
      const Result<void> result = co_await with_deadline(deadline_ns, scope, go(other, token));
      stopped = scope.stopped();
      if (!result) {
        counts.errors += result.error().code() != ETIMEDOUT || !stopped;
        ++counts.timed_out;
      } else {
        ++(stopped ? counts.unheeded : counts.in_time);
      }
    }
    counts.errors += this_thread().context != &other;
    co_await move_to(home);  // behind the message that clears the deadline
    counts.errors += !stopped && token.stop_requested();
    delay_ns = std::clamp<std::int64_t>(delay_ns + (stopped ? 500 : -500), 500, 1'000'000);
  }
  done.release();
}

class DeadlineStress : public OnEachLoop {};
ROOST_ON_EACH_LOOP(DeadlineStress);

TEST_P(DeadlineStress, ADeadlineIsMetOrClearedFromElsewhereNotBoth) {
  IOThread home(options("home"));
  IOThread other(options("other"));
  Counts counts;
  std::binary_semaphore done{0};
  spawn(home.context(), run(home.context(), other.context(), counts, done), "wanderer");
  done.acquire();
  std::printf("in time %d, timed out %d, met unheeded %d\n", counts.in_time, counts.timed_out,
              counts.unheeded);
  EXPECT_EQ(counts.errors, 0);
  EXPECT_GT(counts.in_time, 0);
  EXPECT_GT(counts.timed_out, 0);
}

}  // namespace
}  // namespace roost
