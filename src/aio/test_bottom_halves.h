// SPDX-License-Identifier: MIT
// Scenarios for TestMachine: several threads schedule, cancel and delete bottom halves of one
// context.
//
// Invariants: a schedule that is not cancelled is followed by a run that sees what its scheduler
// wrote before; nothing runs more often than it was scheduled; one-shots run exactly once; nothing
// runs after its deletion on the home thread, and every callback is destroyed.
#pragma once

#include <array>
#include <atomic>
#include <memory>

#include "aio/test_machine.h"
#include "base/test_build.h"
#include "roost/aio/bottom_half.h"

namespace roost {

// Counts the callbacks that exist.
struct TrackedCallback {
  explicit TrackedCallback(std::atomic<int>& counter) : alive(&counter) { alive->fetch_add(1); }
  TrackedCallback(const TrackedCallback& other) : alive(other.alive) { alive->fetch_add(1); }
  TrackedCallback& operator=(const TrackedCallback&) = delete;
  ~TrackedCallback() { alive->fetch_sub(1); }
  std::atomic<int>* alive;
};

struct BottomHalfCounts {
  std::uint64_t schedules = 0;
  std::uint64_t runs = 0;
  std::uint64_t deleted_while_scheduled = 0;
  std::uint64_t deleted_in_callback = 0;
  int alive = 0;  // callbacks left over
};

/// Schedules are coalesced but never lost: waits until the last one of each has been seen.
inline BottomHalfCounts coalesce_bottom_halves(TestMachine& machine, int threads, int each,
                                               std::uint64_t seed) {
  struct Shared {
    std::atomic<std::uint64_t> written{0};
    std::uint64_t seen = 0;  // home thread
    std::uint64_t runs = 0;
    std::unique_ptr<BottomHalf> bh;
  };
  constexpr int kShared = 8;
  std::array<Shared, kShared> shared;
  auto home = machine.add_context("home");
  for (Shared& s : shared) {
    s.bh = std::make_unique<BottomHalf>(*home, [&] {
      s.seen = s.written.load(std::memory_order_relaxed);  // the schedule itself orders it
      ++s.runs;
      machine.note("bottom half", s.seen, s.runs);
    });
  }
  for (int t = 0; t < threads; ++t) {
    machine.add_thread("scheduler", [&, t] {
      TestRandom random(seed + static_cast<std::uint64_t>(t));
      for (int i = 0; i < each; ++i) {
        Shared& s = shared[random.below(kShared)];
        s.written.fetch_add(1, std::memory_order_relaxed);
        machine.interrupt();
        random.below(8) ? s.bh->schedule() : s.bh->schedule_idle();
      }
    });
  }
  machine.join_threads();
  // Each was scheduled after its last write; idle ones may take 10 ms.
  BottomHalfCounts counts;
  counts.schedules = static_cast<std::uint64_t>(each) * static_cast<std::uint64_t>(threads);
  for (Shared& s : shared) {
    machine.wait_until([&] { return home->run([&] { return s.seen; }) == s.written.load(); });
    counts.runs += home->run([&] { return s.runs; });
  }
  for (Shared& s : shared) s.bh.reset();
  return counts;
}

/// One-shots from several threads. Runs are to be as many as schedules.
inline BottomHalfCounts run_oneshots(TestMachine& machine, int threads, int each) {
  std::atomic<std::uint64_t> ran{0};
  std::atomic<int> alive{0};
  auto home = machine.add_context("home");
  for (int t = 0; t < threads; ++t) {
    machine.add_thread("scheduler", [&] {
      for (int i = 0; i < each; ++i) {
        schedule_oneshot(*home, [&ran, token = TrackedCallback(alive)] { ran.fetch_add(1); });
        machine.interrupt();
      }
    });
  }
  machine.join_threads();
  home.reset();
  BottomHalfCounts counts;
  counts.schedules = static_cast<std::uint64_t>(each) * static_cast<std::uint64_t>(threads);
  counts.runs = ran;
  counts.alive = alive;
  return counts;
}

/// Everything that may be done to a bottom half, by threads that own some each.
inline BottomHalfCounts mix_bottom_halves(TestMachine& machine, int threads, int each,
                                          std::uint64_t seed) {
  std::atomic<int> alive{0};
  std::atomic<std::uint64_t> scheduled{0};
  std::atomic<std::uint64_t> ran{0};
  std::atomic<std::uint64_t> deleted_while_scheduled{0};
  std::atomic<std::uint64_t> deleted_in_callback{0};
  auto home = machine.add_context("home");
  for (int t = 0; t < threads; ++t) {
    machine.add_thread("owner", [&, t] {
      TestRandom random(seed + static_cast<std::uint64_t>(t));
      std::array<std::unique_ptr<BottomHalf>, 8> mine;
      for (int i = 0; i < each; ++i) {
        machine.interrupt();
        auto& bh = mine[random.below(8)];
        if (!bh) {
          bh = std::make_unique<BottomHalf>(
              *home, [&ran, token = TrackedCallback(alive)] { ran.fetch_add(1); });
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
            *self = std::make_unique<BottomHalf>(*home, [&, self, token = TrackedCallback(alive)] {
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
  machine.join_threads();
  home->run([] {});
  home.reset();
  return {.schedules = scheduled,
          .runs = ran,
          .deleted_while_scheduled = deleted_while_scheduled,
          .deleted_in_callback = deleted_in_callback,
          .alive = alive};
}

}  // namespace roost
