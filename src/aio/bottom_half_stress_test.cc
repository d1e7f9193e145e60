// SPDX-License-Identifier: MIT
// Several threads schedule, cancel and delete bottom halves of one context.
//
// Invariants: a schedule that is not cancelled is followed by a run that sees what its scheduler
// wrote before; nothing runs more often than it was scheduled; one-shots run exactly once; nothing
// runs after its deletion on the home thread, and every callback is destroyed.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "aio/test_loop.h"
#include "base/test_build.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/iothread.h"

namespace roost {
namespace {

constexpr int kThreads = 3;
constexpr int kSeed = 4;

class BottomHalfStress : public OnEachLoop {};
ROOST_ON_EACH_LOOP(BottomHalfStress);

// Counts the callbacks that exist.
struct Tracked {
  explicit Tracked(std::atomic<int>& counter) : alive(&counter) { alive->fetch_add(1); }
  Tracked(const Tracked& other) : alive(other.alive) { alive->fetch_add(1); }
  ~Tracked() { alive->fetch_sub(1); }
  std::atomic<int>* alive;
};

TEST_P(BottomHalfStress, SchedulesFromManyThreadsAreCoalescedButNeverLost) {
  struct Shared {
    std::atomic<std::uint64_t> written{0};
    std::uint64_t seen = 0;  // home thread
    std::uint64_t runs = 0;
    std::unique_ptr<BottomHalf> bh;
  };
  constexpr int kShared = 8;
  std::array<Shared, kShared> shared;
  IOThread home(options("home"));
  for (Shared& s : shared) {
    s.bh = std::make_unique<BottomHalf>(home.context(), [&s] {
      s.seen = s.written.load(std::memory_order_relaxed);  // the schedule itself orders it
      ++s.runs;
    });
  }
  const int each = rounds(100'000);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      TestRandom random(kSeed + t);
      for (int i = 0; i < each; ++i) {
        Shared& s = shared[random.below(kShared)];
        s.written.fetch_add(1, std::memory_order_relaxed);
        random.below(8) ? s.bh->schedule() : s.bh->schedule_idle();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  // Each was scheduled after its last write; idle ones may take 10 ms.
  std::uint64_t runs = 0;
  for (Shared& s : shared) {
    while (home.context().run([&] { return s.seen; }) != s.written.load()) {
      std::this_thread::yield();
    }
    runs += home.context().run([&] { return s.runs; });
  }
  const auto schedules = static_cast<std::uint64_t>(each) * kThreads;
  std::printf("seed %d: %lu schedules, %lu runs, %lu coalesced\n", kSeed, schedules, runs,
              schedules - runs);
  EXPECT_LE(runs, schedules);
  EXPECT_LT(runs, schedules) << "nothing was coalesced";
  for (Shared& s : shared) s.bh.reset();
}

TEST_P(BottomHalfStress, OneShotsFromManyThreadsRunOnceEach) {
  std::atomic<int> ran{0};
  std::atomic<int> alive{0};
  const int each = rounds(50'000);
  {
    IOThread home(options("home"));
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&] {
        for (int i = 0; i < each; ++i) {
          schedule_oneshot(home.context(), [&ran, token = Tracked(alive)] { ran.fetch_add(1); });
        }
      });
    }
    for (auto& thread : threads) thread.join();
  }
  EXPECT_EQ(ran, each * kThreads);
  EXPECT_EQ(alive, 0);
}

TEST_P(BottomHalfStress, SchedulesCancelsAndDeletesFromManyThreads) {
  std::atomic<int> alive{0};
  std::atomic<std::uint64_t> scheduled{0};
  std::atomic<std::uint64_t> ran{0};
  std::atomic<std::uint64_t> deleted_while_scheduled{0};
  std::atomic<std::uint64_t> deleted_in_callback{0};
  {
    IOThread home(options("home"));
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        TestRandom random(kSeed * 10 + t);
        std::array<std::unique_ptr<BottomHalf>, 8> mine;
        for (int i = 0; i < rounds(100'000); ++i) {
          auto& bh = mine[random.below(8)];
          if (!bh) {
            bh = std::make_unique<BottomHalf>(home.context(),
                                              [&ran, token = Tracked(alive)] { ran.fetch_add(1); });
          }
          switch (random.below(6)) {
            case 0:
              bh->cancel();
              break;
            case 1:
              bh->schedule();
              ++scheduled;
              bh.reset();
              ++deleted_while_scheduled;
              break;
            case 2:
              bh->schedule_idle();
              ++scheduled;
              break;
            case 3: {
              // One that deletes itself.
              auto* self = new std::unique_ptr<BottomHalf>;
              *self =
                  std::make_unique<BottomHalf>(home.context(), [&, self, token = Tracked(alive)] {
                    ran.fetch_add(1);
                    deleted_in_callback.fetch_add(1);
                    delete self;
                  });
              // The pointer belongs to the callback once that is scheduled.
              BottomHalf& target = **self;
              ++scheduled;
              target.schedule();
              break;
            }
            default:
              bh->schedule();
              ++scheduled;
          }
        }
      });
    }
    for (auto& thread : threads) thread.join();
    home.context().run([] {});
  }
  std::printf("seed %d: %lu schedules, %lu runs, %lu deleted while scheduled, %lu by themselves\n",
              kSeed, scheduled.load(), ran.load(), deleted_while_scheduled.load(),
              deleted_in_callback.load());
  EXPECT_LE(ran.load(), scheduled.load());
  EXPECT_GT(ran.load(), 0u);
  EXPECT_GT(deleted_while_scheduled.load(), 0u);
  EXPECT_GT(deleted_in_callback.load(), 0u);
  EXPECT_EQ(alive, 0);
}

}  // namespace
}  // namespace roost
