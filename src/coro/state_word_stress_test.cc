// SPDX-License-Identifier: MIT
// Two threads decide at the same moment who resumes a coroutine: the turn of its entry, and a
// direct entry by the holder of a reference.
//
// Invariant: exactly one of them wins, and every entry and reference is counted once.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <thread>

#include "base/test_build.h"
#include "roost/coro/state_word.h"

namespace roost {
namespace {

using Word = StateWord<RealPlatform>;
using Outcome = Word::EntryOutcome;

constexpr std::uint32_t kQueue = 1;
constexpr std::uint32_t kDirect = 2;

TEST(StateWordStress, ATurnAndADirectEntryAtTheSameMomentExactlyOneWins) {
  const int kRounds = rounds(300'000);
  Word word(kQueue);
  ASSERT_TRUE(word.add_ref());
  std::atomic<int> round{0};
  std::atomic<int> answered{0};
  std::atomic<bool> direct_won{false};
  const auto wait_for = [](const std::atomic<int>& what, int value) {
    for (int spins = 0; what.load(std::memory_order_acquire) < value; ++spins) {
      if (spins > 1000) std::this_thread::yield();
    }
  };
  std::thread direct([&] {
    TestRandom random(1);
    for (int r = 1; r <= kRounds; ++r) {
      wait_for(round, r);
      for (auto n = random.below(8); n > 0; --n) RealPlatform::cpu_relax();
      direct_won.store(word.claim_direct(kDirect).won, std::memory_order_relaxed);
      answered.store(r, std::memory_order_release);
    }
  });
  TestRandom random(2);
  int by_turn = 0;
  int by_direct = 0;
  int errors = 0;
  for (int r = 1; r <= kRounds; ++r) {
    const auto schedule = word.schedule(kQueue, false);
    if (!schedule.won || !schedule.embedded) ++errors;
    round.store(r, std::memory_order_release);
    for (auto n = random.below(8); n > 0; --n) RealPlatform::cpu_relax();
    if (r % 64 == 0) std::this_thread::yield();  // for machines with one CPU
    const auto outcome = word.claim_entry(kQueue, schedule.generation, true);
    wait_for(answered, r);
    const bool turn = outcome == Outcome::kRun;
    const bool other = direct_won.load(std::memory_order_relaxed);
    by_turn += turn;
    by_direct += other;
    const CoStateValue now = word.peek();
    if (turn == other || now.state() != CoState::kRunning || now.entries() != 1 ||
        now.context() != (turn ? kQueue : kDirect)) {
      ++errors;
    }
    word.suspend(false);
  }
  direct.join();
  std::printf("%d rounds: %d won by the turn, %d by the direct entry\n", kRounds, by_turn,
              by_direct);
  EXPECT_EQ(errors, 0);
  EXPECT_GT(by_turn, 0);
  EXPECT_GT(by_direct, 0);
}

// A reference goes while the coroutine suspends, moves and ends: no count is lost.
TEST(StateWordStress, ReferencesThatComeAndGoDuringTransitionsAreAllCounted) {
  const int kAtLeast = rounds(300'000);
  const int kAtMost = 1000 * kAtLeast;  // the other thread may have to wait for a CPU
  constexpr std::uint64_t kEnough = 100;
  Word word(kQueue);
  ASSERT_TRUE(word.add_ref());  // the other thread's, from which it makes more
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> pairs{0};
  std::thread other([&] {
    while (!stop.load(std::memory_order_relaxed)) {
      if (!word.add_ref() || word.drop_ref()) {
        ADD_FAILURE();
        return;
      }
      pairs.fetch_add(1, std::memory_order_relaxed);
    }
  });
  int errors = 0;
  const auto go_on = [&](int r) {
    return r < kAtLeast || (r < kAtMost && pairs.load(std::memory_order_relaxed) <= kEnough);
  };
  for (int r = 0; go_on(r); ++r) {
    if (!word.claim_direct(kDirect).won) ++errors;
    const auto move = word.suspend_scheduled(kQueue);
    if (!move.won) ++errors;
    if (word.claim_entry(kQueue, move.generation, move.embedded) != Outcome::kRun) ++errors;
    word.suspend(false);
  }
  stop = true;
  other.join();
  std::printf("%lu references came and went\n", static_cast<unsigned long>(pairs.load()));
  EXPECT_EQ(errors, 0);
  EXPECT_EQ(word.peek().entries(), 1u);
  EXPECT_GT(pairs, kEnough);
}

// Whoever holds an idle coroutine never finds it taken by a census, only later.
TEST(StateWordStress, AnInspectionDelaysItsHolderAndNothingElse) {
  const int kAtLeast = rounds(30'000);
  const int kAtMost = 100 * kAtLeast;
  constexpr std::uint64_t kEnough = 200;
  Word word(kQueue);
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> inspections{0};
  std::atomic<std::uint64_t> overtaken{0};
  int frame = 0;  // plain: stands for what the state hands over
  std::atomic<int> sum{0};
  std::thread inspector([&] {
    while (!stop.load(std::memory_order_relaxed)) {
      const CoStateValue seen = word.peek();
      if (seen.state() != CoState::kIdle) continue;
      if (!word.begin_inspection(seen)) {
        ++overtaken;
        continue;
      }
      sum.fetch_add(frame, std::memory_order_relaxed);
      word.end_inspection();
      ++inspections;
    }
  });
  int errors = 0;
  const auto go_on = [&](int r) {
    return r < kAtLeast || (r < kAtMost && (inspections.load(std::memory_order_relaxed) < kEnough ||
                                            overtaken.load(std::memory_order_relaxed) == 0));
  };
  for (int r = 0; go_on(r); ++r) {
    const auto schedule = word.schedule(kQueue, false);
    if (!schedule.won) ++errors;
    if (word.claim_entry(kQueue, schedule.generation, schedule.embedded) != Outcome::kRun) ++errors;
    frame = r;
    word.suspend(false);
    if (!word.claim_direct(kDirect).won) ++errors;
    frame = -r;
    word.suspend(false);
    if (r % 64 == 0) std::this_thread::yield();
  }
  stop = true;
  inspector.join();
  std::printf("%lu inspections, %lu were overtaken\n", inspections.load(), overtaken.load());
  EXPECT_EQ(errors, 0);
  EXPECT_GE(inspections, kEnough);
  EXPECT_GT(overtaken, 0u);
}

}  // namespace
}  // namespace roost
