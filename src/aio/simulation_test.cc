// SPDX-License-Identifier: MIT
#include "roost/aio/simulation.h"

#include <gtest/gtest.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <set>
#include <vector>

#include "roost/aio/bottom_half.h"
#include "roost/aio/io.h"
#include "roost/aio/iothread.h"

namespace roost {
namespace {

Task<void> hop_to_and_fro(Simulation& simulation, AioContext& a, AioContext& b, int hops) {
  for (int i = 0; i < hops; ++i) {
    co_await move_to(i % 2 ? a : b);
    simulation.note("hopped", static_cast<std::uint64_t>(i));
    co_await sleep_for(1000);
  }
}

struct Outcome {
  std::uint64_t hash;
  std::int64_t time_ns;
  std::string trace;
};

Outcome hop(std::uint64_t seed, bool traced = false) {
  SimulationOptions options{.seed = seed};
  std::string trace;
  if (traced) {
    options.trace = [&trace](std::string_view line) { trace.append(line).append("\n"); };
  }
  Simulation simulation(options);
  auto a = simulation.make_context("a");
  auto b = simulation.make_context("b");
  for (int i = 0; i < 3; ++i) {
    simulation.spawn(*a, hop_to_and_fro(simulation, *a, *b, 10), "hopper");
  }
  simulation.run();
  return {simulation.hash(), simulation.now_ns(), trace};
}

TEST(Simulation, TheSameSeedGivesTheSameRunAndAnotherSeedAnother) {
  std::set<std::uint64_t> hashes;
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    const Outcome once = hop(seed);
    EXPECT_EQ(once.hash, hop(seed).hash);
    hashes.insert(once.hash);
  }
  EXPECT_EQ(hashes.size(), 50u);
}

TEST(Simulation, TracingChangesNothingAndShowsTheEvents) {
  const Outcome traced = hop(7, true);
  EXPECT_EQ(traced.hash, hop(7).hash);
  EXPECT_NE(traced.trace.find("hopped"), std::string::npos);
  EXPECT_NE(traced.trace.find("sleep"), std::string::npos);
  EXPECT_NE(traced.trace.find("signal"), std::string::npos);
}

TEST(Simulation, TimePassesWithoutWaiting) {
  Simulation simulation;
  auto context = simulation.make_context("sleeper");
  const auto body = [&]() -> Task<void> { co_await sleep_for(3600'000'000'000); };
  simulation.spawn(*context, body(), "sleeper");
  const std::int64_t real_start = real_clock().now_ns();
  simulation.run();
  EXPECT_GE(simulation.now_ns(), 3600'000'000'000);
  EXPECT_LT(simulation.now_ns(), 3600'001'000'000);
  EXPECT_LT(real_clock().now_ns() - real_start, 60'000'000'000);
}

TEST(Simulation, ASleepingContextIsWokenByASignalThatTakesItsTime) {
  Simulation simulation;
  auto context = simulation.make_context("a");
  simulation.run();
  const std::uint64_t sleeps = context->statistics().sleeps;
  EXPECT_GT(sleeps, 0u);
  std::int64_t ran_at = -1;
  const std::int64_t posted_at = simulation.now_ns();
  schedule_oneshot(*context, [&] { ran_at = simulation.now_ns(); });
  EXPECT_EQ(ran_at, -1);
  simulation.run();
  EXPECT_GT(ran_at, posted_at);
  EXPECT_GT(context->statistics().sleeps, sleeps);
}

TEST(Simulation, AnIdleBottomHalfRunsAfterTheWaitAndNotBefore) {
  Simulation simulation;
  auto context = simulation.make_context("a");
  std::int64_t ran_at = -1;
  BottomHalf bh(*context, [&] { ran_at = simulation.now_ns(); });
  bh.schedule_idle();
  const std::int64_t before = simulation.now_ns();
  simulation.run_until([&] { return ran_at >= 0; });
  EXPECT_GE(ran_at - before, 0);
  EXPECT_LT(ran_at - before, 12'000'000);
}

TEST(Simulation, APollWithinACallbackWaitsWhileOthersGoOn) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Simulation simulation({.seed = seed});
    auto a = simulation.make_context("a");
    auto b = simulation.make_context("b");
    bool answered = false;
    bool done = false;
    schedule_oneshot(*a, [&] {
      schedule_oneshot(*b, [&] { schedule_oneshot(*a, [&] { answered = true; }); });
      while (!answered) a->poll(true);
      done = true;
    });
    simulation.run_until([&] { return done; });
    simulation.run();
  }
}

TEST(Simulation, AThreadRunsOutsideOfAnyContext) {
  Simulation simulation;
  auto context = simulation.make_context("a");
  int ran = 0;
  int answer = 0;
  simulation.add_thread("poster", [&] {
    EXPECT_EQ(AioContext::current(), nullptr);
    for (int i = 0; i < 10; ++i) {
      schedule_oneshot(*context, [&ran] { ++ran; });
      simulation.relax();
    }
    answer = context->run([&] { return AioContext::current() == context.get() ? ran : -1; });
    EXPECT_EQ(AioContext::current(), nullptr);
  });
  simulation.run();
  EXPECT_EQ(ran, 10);
  EXPECT_EQ(answer, 10);
}

TEST(Simulation, ThreadsThatWaitForEachOtherInLoopsGoOn) {
  Simulation simulation;
  int turn = 0;
  for (int me = 0; me < 2; ++me) {
    simulation.add_thread("player", [&, me] {
      for (int i = 0; i < 1000; ++i) {
        while (turn % 2 != me) simulation.relax();
        ++turn;
      }
    });
  }
  simulation.run();
  EXPECT_EQ(turn, 2000);
}

TEST(Simulation, AnExceptionIsHandledWhereItWasThrownAlthoughThreadsTakeTurns) {
  Simulation simulation;
  int caught = 0;
  for (int me = 0; me < 3; ++me) {
    simulation.add_thread("thrower", [&, me] {
      for (int i = 0; i < 20; ++i) {
        try {
          throw me * 100 + i;
        } catch (int thrown) {
          simulation.relax();
          caught += thrown == me * 100 + i && std::current_exception() != nullptr;
          try {
            std::rethrow_exception(std::current_exception());
          } catch (int again) {
            caught += again == me * 100 + i;
          }
        }
      }
    });
  }
  simulation.run();
  EXPECT_EQ(caught, 120);
}

TEST(Simulation, WorkOfThePoolRunsLaterOutsideOfAnyContext) {
  Simulation simulation;
  struct Work : ThreadPool::Work {
    int ran = 0;
  } work;
  work.run = [](ThreadPool::Work& w) noexcept {
    EXPECT_EQ(AioContext::current(), nullptr);
    ++static_cast<Work&>(w).ran;
  };
  simulation.submit(work);
  EXPECT_EQ(work.ran, 0);
  simulation.run();
  EXPECT_EQ(work.ran, 1);
}

// ---- Channels

Task<void> send_all(int fd, std::span<const std::byte> bytes, std::int64_t* result) {
  std::size_t sent = 0;
  while (sent < bytes.size()) {
    iovec piece{const_cast<std::byte*>(bytes.data()) + sent, bytes.size() - sent};
    msghdr message{};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    const std::int64_t n = co_await io_sendmsg(fd, message);
    if (n < 0) {
      *result = n;
      co_return;
    }
    sent += static_cast<std::size_t>(n);
  }
  *result = static_cast<std::int64_t>(sent);
}

Task<void> receive_all(int fd, std::vector<std::byte>* into, std::int64_t* result) {
  std::array<std::byte, 700> buffer;
  for (;;) {
    const std::int64_t n = co_await io_recv(fd, buffer);
    if (n <= 0) {
      *result = n;
      co_return;
    }
    into->insert(into->end(), buffer.begin(), buffer.begin() + n);
  }
}

std::vector<std::byte> some_bytes(std::size_t count) {
  std::vector<std::byte> bytes(count);
  for (std::size_t i = 0; i < count; ++i) bytes[i] = static_cast<std::byte>(i * 7 + i / 251);
  return bytes;
}

TEST(Simulation, AChannelDeliversAllBytesInOrderAndThenTheEnd) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Simulation simulation({.seed = seed});
    auto a = simulation.make_context("a");
    auto b = simulation.make_context("b");
    const auto [left, right] = simulation.make_channel({.capacity = 1000});
    const auto bytes = some_bytes(20'000);
    std::vector<std::byte> received;
    std::int64_t sent = 0;
    std::int64_t end = -1;
    simulation.spawn(*a, send_all(left, bytes, &sent), "sender");
    simulation.spawn(*b, receive_all(right, &received, &end), "receiver");
    simulation.run_until([&] { return sent != 0; });
    EXPECT_EQ(sent, 20'000);
    simulation.close(left);
    simulation.run_until([&] { return end != -1; });
    EXPECT_EQ(end, 0);
    EXPECT_EQ(received, bytes);
  }
}

TEST(Simulation, ABrokenChannelFailsAtBothEnds) {
  Simulation simulation;
  auto a = simulation.make_context("a");
  const auto [left, right] = simulation.make_channel({.capacity = 100});
  const auto bytes = some_bytes(1000);
  std::vector<std::byte> received;
  std::int64_t sent = 0;
  std::int64_t end = 1;
  simulation.spawn(*a, receive_all(left, &received, &end), "receiver");
  simulation.spawn(*a, send_all(right, bytes, &sent), "sender");
  simulation.run_until([&] { return !received.empty(); });
  simulation.break_channel(left);
  simulation.run();
  EXPECT_EQ(end, -ECONNRESET);
  EXPECT_EQ(sent, -ECONNRESET);
}

TEST(Simulation, SendingToAnEndThatClosedFails) {
  Simulation simulation;
  auto a = simulation.make_context("a");
  const auto [left, right] = simulation.make_channel({.capacity = 100});
  const auto bytes = some_bytes(1000);
  std::int64_t sent = 0;
  simulation.spawn(*a, send_all(right, bytes, &sent), "sender");
  simulation.run();
  EXPECT_EQ(sent, 0);  // waits for room
  simulation.close(left);
  simulation.run();
  EXPECT_EQ(sent, -EPIPE);
}

TEST(Simulation, AHandlerIsCalledWhileItsDescriptorIsReady) {
  Simulation simulation;
  auto a = simulation.make_context("a");
  auto b = simulation.make_context("b");
  const auto [left, right] = simulation.make_channel();
  const auto bytes = some_bytes(5000);
  std::int64_t sent = 0;
  std::vector<std::byte> received;
  int calls = 0;
  const auto read = [&, fd = right] {
    ++calls;
    std::array<std::byte, 100> buffer;
    const std::int64_t n = simulation.receive_now(fd, buffer);
    ASSERT_GT(n, 0);
    received.insert(received.end(), buffer.begin(), buffer.begin() + n);
  };
  b->run([&, fd = right] { b->set_fd_handler(fd, {.read = read}); });
  simulation.spawn(*a, send_all(left, bytes, &sent), "sender");
  simulation.run_until([&] { return received.size() == bytes.size(); });
  EXPECT_EQ(received, bytes);
  EXPECT_GE(calls, 50);
  b->run([&, fd = right] { b->remove_fd_handler(fd); });
}

// ---- Disks

Task<void> write_at(int fd, std::uint64_t offset, std::vector<std::byte> bytes, bool sync,
                    std::int64_t* result) {
  iovec piece{bytes.data(), bytes.size()};
  std::int64_t n = co_await io_writev(fd, std::span(&piece, 1), offset);
  if (n >= 0 && sync) {
    if (const std::int64_t error = co_await io_data_sync(fd); error < 0) n = error;
  }
  *result = n;
}

constexpr SimulatedDiskOptions kWholeTransfers{.short_one_in = 0};

TEST(Simulation, ADiskKeepsWhatWasSyncedWhenPowerIsLostAndMayLoseTheRest) {
  int lost = 0;
  int kept = 0;
  int torn = 0;
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    Simulation simulation({.seed = seed});
    auto a = simulation.make_context("a");
    const int disk = simulation.make_disk(64 << 10, kWholeTransfers);
    std::int64_t result = 0;
    simulation.spawn(*a, write_at(disk, 0, std::vector(1024, std::byte{1}), true, &result), "w");
    simulation.run();
    ASSERT_EQ(result, 1024);
    simulation.spawn(*a, write_at(disk, 1024, std::vector(1024, std::byte{2}), false, &result),
                     "w");
    simulation.run();
    ASSERT_EQ(result, 1024);
    EXPECT_EQ(simulation.disk_contents(disk)[1500], std::byte{2});
    simulation.crash_disk(disk);
    const auto after = simulation.disk_contents(disk);
    for (int i = 0; i < 1024; ++i) ASSERT_EQ(after[i], std::byte{1});
    const bool first = after[1024] == std::byte{2};
    const bool second = after[1536] == std::byte{2};
    lost += !first && !second;
    kept += first && second;
    torn += first != second;
  }
  EXPECT_GT(lost, 0);
  EXPECT_GT(kept, 0);
  EXPECT_GT(torn, 0);
}

TEST(Simulation, ASyncThatFailedIsNotMadeUpForByTheNext) {
  Simulation simulation;
  auto a = simulation.make_context("a");
  const int disk = simulation.make_disk(4096, kWholeTransfers);
  simulation.fail_next(disk, IoRequest::Op::kDataSync, ENOSPC);
  std::int64_t result = 0;
  simulation.spawn(*a, write_at(disk, 0, std::vector(512, std::byte{1}), true, &result), "w");
  simulation.run();
  EXPECT_EQ(result, -ENOSPC);
  simulation.spawn(*a, write_at(disk, 512, std::vector(512, std::byte{1}), true, &result), "w");
  simulation.run();
  EXPECT_EQ(result, 512);
  simulation.crash_disk(disk);
  EXPECT_EQ(simulation.disk_contents(disk)[0], std::byte{0});
  EXPECT_EQ(simulation.disk_contents(disk)[512], std::byte{1});
}

TEST(Simulation, ADurableWriteIsNotUndoneByAnOlderOneInTheCache) {
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    Simulation simulation({.seed = seed});
    auto a = simulation.make_context("a");
    const int disk = simulation.make_disk(4096, kWholeTransfers);
    const auto body = [&]() -> Task<void> {
      std::array<std::byte, 512> ones;
      ones.fill(std::byte{1});
      std::array<std::byte, 512> twos;
      twos.fill(std::byte{2});
      iovec first{ones.data(), ones.size()};
      iovec second{twos.data(), twos.size()};
      co_await io_writev(disk, std::span(&first, 1), 0);
      co_await io_writev(disk, std::span(&second, 1), 0, RWF_DSYNC);
      co_await io_data_sync(disk);
    };
    simulation.spawn(*a, body(), "writer");
    simulation.run();
    simulation.crash_disk(disk);
    EXPECT_EQ(simulation.disk_contents(disk)[0], std::byte{2});
  }
}

TEST(Simulation, WhatIsInFlightWhenPowerIsLostFails) {
  Simulation simulation;
  auto a = simulation.make_context("a");
  const int disk =
      simulation.make_disk(4096, {.min_delay_ns = 1'000'000, .max_delay_ns = 1'000'000});
  std::int64_t result = 0;
  simulation.spawn(*a, write_at(disk, 0, std::vector(512, std::byte{1}), true, &result), "w");
  simulation.after(500'000, [&] { simulation.crash_disk(disk); });
  simulation.run();
  EXPECT_EQ(result, -EIO);
}

TEST(Simulation, ADiskThatIsTakenOverKeepsItsCacheUnlessPowerIsLost) {
  int gone = 0;
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    for (const bool power_lost : {false, true}) {
      Simulation simulation({.seed = seed});
      auto a = simulation.make_context("a");
      const int disk = simulation.make_disk(4096, kWholeTransfers);
      std::int64_t result = 0;
      simulation.spawn(*a, write_at(disk, 0, std::vector(512, std::byte{1}), true, &result), "w");
      simulation.run();
      simulation.spawn(*a, write_at(disk, 512, std::vector(512, std::byte{2}), false, &result),
                       "w");
      simulation.run();
      ASSERT_EQ(result, 512);
      const int next = simulation.take_disk_over(disk, power_lost);
      EXPECT_EQ(simulation.disk_contents(next)[0], std::byte{1});
      const bool there = simulation.disk_contents(next)[512] == std::byte{2};
      EXPECT_TRUE(there || power_lost);
      if (!there) ++gone;
      // Who had it cannot reach it any more; the next one can.
      simulation.spawn(*a, write_at(disk, 0, std::vector(512, std::byte{3}), false, &result), "w");
      simulation.run();
      EXPECT_EQ(result, -EIO);
      EXPECT_EQ(simulation.disk_contents(next)[0], std::byte{1});
      simulation.spawn(*a, write_at(next, 0, std::vector(512, std::byte{4}), true, &result), "w");
      simulation.run();
      EXPECT_EQ(result, 512);
      simulation.close(disk);
      simulation.close(next);
    }
  }
  EXPECT_GT(gone, 0);
}

TEST(Simulation, WhatIsInFlightWhenADiskIsTakenOverFailsAndMayBeDone) {
  int done = 0;
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    Simulation simulation({.seed = seed});
    auto a = simulation.make_context("a");
    const int disk = simulation.make_disk(
        4096, {.min_delay_ns = 1'000'000, .max_delay_ns = 1'000'000, .short_one_in = 0});
    std::int64_t result = 0;
    int next = -1;
    simulation.spawn(*a, write_at(disk, 0, std::vector(512, std::byte{1}), true, &result), "w");
    simulation.after(500'000, [&] { next = simulation.take_disk_over(disk, false); });
    simulation.run();
    if (result == -EIO) done += simulation.disk_contents(next)[0] == std::byte{1};
  }
  EXPECT_GT(done, 0);
  EXPECT_LT(done, 10);
}

// ---- Misuse and dead ends

using SimulationDeathTest = testing::Test;

TEST(SimulationDeathTest, ADeadlockIsReportedWithTheCoroutinesThatWait) {
  EXPECT_DEATH(
      {
        Simulation simulation;
        auto context = simulation.make_context("stuck");
        bool done = false;
        const auto body = [&]() -> Task<void> {
          co_await suspend_waiting("a lock", PublishNothing{});
          done = true;
        };
        simulation.spawn(*context, body(), "patient");
        simulation.run_until([&] { return done; });
      },
      "nothing can happen any more(.|\n)*coroutine 'patient': waiting for a lock, home 'stuck'");
}

TEST(SimulationDeathTest, ARunThatGoesOnForEverIsEnded) {
  EXPECT_DEATH(
      {
        Simulation simulation({.max_turns = 1000});
        auto context = simulation.make_context("busy");
        const auto body = [&]() -> Task<void> {
          for (;;) co_await move_to(*context);
        };
        simulation.spawn(*context, body(), "restless");
        simulation.run_until([] { return false; });
      },
      "it does not come to an end");
}

TEST(SimulationDeathTest, ARealDescriptorIsRefused) {
  EXPECT_DEATH(
      {
        Simulation simulation;
        auto context = simulation.make_context("a");
        std::int64_t result = 0;
        simulation.spawn(*context, write_at(1, 0, std::vector(1, std::byte{1}), false, &result),
                         "writer");
        simulation.run();
      },
      "descriptor 1, which is not the simulation's");
}

TEST(SimulationDeathTest, AContextIsPolledByItsOwnThreadOnly) {
  EXPECT_DEATH(
      {
        Simulation simulation;
        auto context = simulation.make_context("a");
        context->poll(true);
      },
      "simulated context 'a' is polled by another than its own simulated thread");
}

TEST(SimulationDeathTest, ALoopForSomethingThatCannotComeIsReported) {
  EXPECT_DEATH(
      {
        Simulation simulation;
        auto context = simulation.make_context("a");
        schedule_oneshot(*context, [&] {
          for (;;) simulation.relax();
        });
        simulation.run_until([] { return false; });
      },
      "nothing can happen any more(.|\\n)*thread 'a': waits in a loop");
}

}  // namespace
}  // namespace roost
