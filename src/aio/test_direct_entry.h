// SPDX-License-Identifier: MIT
// A scenario for TestMachine: direct entry, through CoroutineRef::try_enter, races with the turn of
// a pending schedule on another thread.
//
// Each round: the coroutine suspends; its publish step schedules it on a queue context and then
// tells two rivals, on contexts of their own, that they may try to enter it directly. Invariant:
// exactly one of the three resumes it. When a rival wins, its entry stays queued and is stale: the
// coroutine is scheduled again at once, on the same or another context, and may end, with stale
// entries queued.
#pragma once

#include <array>
#include <atomic>
#include <memory>

#include "aio/test_machine.h"
#include "base/test_build.h"
#include "roost/aio/bottom_half.h"

namespace roost {

class DirectEntryRace {
 public:
  // The coroutine's.
  std::uint64_t won_by_queue = 0;
  std::uint64_t won_by_rival = 0;
  std::uint64_t rescheduled_with_stale_entry = 0;
  std::uint64_t ended_with_stale_entry = 0;

  DirectEntryRace(TestMachine& machine, std::uint64_t seed) : machine_(machine), random_(seed) {
    for (auto& queue : queues_) queue = machine.add_context("queue");
    for (Rival& rival : rivals_) {
      rival.context = machine.add_context("rival");
      rival.attempt = std::make_unique<BottomHalf>(*rival.context, [&rival] {
        // Read before: where it wins, the coroutine's next round begins within the call.
        const int round = rival.round.load();
        if (!rival.ref.try_enter()) rival.has_lost.store(round);
      });
    }
  }

  /// One coroutine, of so many rounds.
  void run(int rounds_each) {
    ended_ = false;
    running_ = true;
    Coroutine* co = Coroutine::create(racer(rounds_each), "racer");
    for (Rival& rival : rivals_) {
      rival.context->run([&] {
        rival.ref = CoroutineRef(*co);
        rival.has_lost = 0;
      });
    }
    co_schedule(*queues_[0], *co);
    machine_.wait_until([this] { return ended_.load(); });
    for (Rival& rival : rivals_) rival.context->run([&] { rival.ref = CoroutineRef(); });
  }

  void finish() {
    for (auto& rival : rivals_) {
      rival.attempt.reset();
      rival.context.reset();
    }
    for (auto& queue : queues_) queue.reset();
  }

  int errors() const { return errors_; }

 private:
  static constexpr int kRivals = 2;
  static constexpr int kQueues = 2;

  struct Rival {
    std::shared_ptr<AioContext> context;
    std::atomic<int> round{0};     // set by the publish step before it schedules the attempt
    std::atomic<int> has_lost{0};  // the round, set by the rival
    CoroutineRef ref;              // its own, on its own thread
    std::unique_ptr<BottomHalf> attempt;
  };

  int rival_here() const {
    for (int i = 0; i < kRivals; ++i) {
      if (AioContext::current() == rivals_[i].context.get()) return i;
    }
    return -1;
  }

  void publish(Coroutine& co, int queue, int round) noexcept {
    if (!running_.exchange(false)) ++errors_;
    // The queue's turn may win at once: from here on the coroutine is not ours.
    co_schedule(*queues_[queue], co);
    machine_.interrupt();
    for (Rival& rival : rivals_) {
      rival.round.store(round);
      rival.attempt->schedule();
    }
  }

  Task<void> racer(int rounds_each) {
    for (int round = 1; round <= rounds_each; ++round) {
      const int queue = static_cast<int>(random_.below(kQueues));
      co_await suspend([this, queue, round](Coroutine& co) noexcept { publish(co, queue, round); });
      if (running_.exchange(true)) ++errors_;  // two resumed it
      const int here = rival_here();
      machine_.note("won", static_cast<std::uint64_t>(here + 1), static_cast<std::uint64_t>(round));
      // A rival that has not tried yet could meet the coroutine in a later suspension, before it is
      // scheduled again; that would be a wrong use, so this round waits for the losers.
      for (int i = 0; i < kRivals; ++i) {
        while (i != here && rivals_[i].has_lost.load() < round) machine_.relax();
      }
      if (here >= 0) {
        ++won_by_rival;
        ++(round == rounds_each ? ended_with_stale_entry : rescheduled_with_stale_entry);
      } else {
        ++won_by_queue;
      }
    }
    running_ = false;
    ended_ = true;
  }

  TestMachine& machine_;
  std::array<Rival, kRivals> rivals_;
  std::array<std::shared_ptr<AioContext>, kQueues> queues_;
  TestRandom random_;  // the coroutine's, while it runs or publishes

  std::atomic<bool> running_{false};
  std::atomic<int> errors_{0};
  std::atomic<bool> ended_{false};
};

}  // namespace roost
