// SPDX-License-Identifier: MIT
// A test in virtual time: an hour passes at once, and a seed draws in which order things happen.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <stop_token>

#include "roost/aio/io.h"
#include "roost/aio/simulation.h"
#include "roost/base/result.h"
#include "roost/coro/task.h"
#include "roost/sync/stop_scope.h"

namespace {

using roost::Result;
using roost::Task;

constexpr std::int64_t kSecondNs = 1'000'000'000;
constexpr std::int64_t kHourNs = 3600 * kSecondNs;

// The code under test, as it ships.
Task<Result<std::int64_t>> receive(int fd, std::stop_token stop) {
  std::array<std::byte, 64> buffer;
  const std::int64_t got = co_await roost::io_recv(fd, buffer, 0, stop);
  if (got < 0) co_return roost::fail(static_cast<int>(-got), "recv");
  co_return got;
}

Task<void> wait_an_hour(int fd, int* error, bool* done) {
  roost::StopScope scope;
  const std::int64_t deadline_ns = roost::AioContext::current()->clock().now_ns() + kHourNs;
  const Result<std::int64_t> got =
      co_await roost::with_deadline(deadline_ns, scope, receive(fd, scope.token()));
  *error = got ? 0 : got.error().code();
  *done = true;
}

// The peer is lost at some moment of two hours: either the deadline came first, or the error.
int run(std::uint64_t seed) {
  roost::Simulation simulation({.seed = seed});
  const auto context = simulation.make_context("loop");
  const auto [near, far] = simulation.make_channel();
  const int fd = near;
  const std::int64_t lost_after_ns = simulation.random().between(1, 7200) * kSecondNs;
  simulation.after(lost_after_ns, [&simulation, fd] { simulation.break_channel(fd); });

  int error = -1;
  bool done = false;
  simulation.spawn(*context, wait_an_hour(fd, &error, &done), "waiting");
  simulation.run_until([&done] { return done; });
  return error;
}

}  // namespace

int main() {
  int timed_out = 0;
  int lost = 0;
  for (std::uint64_t seed = 1; seed <= 100; ++seed) {
    const int error = run(seed);
    timed_out += error == ETIMEDOUT;
    lost += error == ECONNRESET;
    if (error != ETIMEDOUT && error != ECONNRESET) {
      std::printf("seed %d: error %d\n", static_cast<int>(seed), error);
      return EXIT_FAILURE;
    }
  }
  std::printf("both happened: %s\n", timed_out > 0 && lost > 0 ? "yes" : "no");
}

// Output:
// both happened: yes
