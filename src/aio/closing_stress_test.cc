// SPDX-License-Identifier: MIT
// A context goes while others are still posting to it.
//
// Invariants: a push either is in what take() or close() returns, or reports that it is closed; and
// a producer that owes a signal can still give it, although what it posted was run already, by a
// context that had other reasons to wake up and is about to go.
#include <gtest/gtest.h>
#include <sys/eventfd.h>

#include <array>
#include <atomic>
#include <barrier>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "aio/test_loop.h"
#include "base/test_build.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/event_notifier.h"
#include "roost/aio/inbox.h"

namespace roost {
namespace {

struct Letter {
  RealPlatform::Shared<Letter*> next;
  int from = 0;
  int number = 0;
};

using LetterBox = Inbox<RealPlatform, Letter>;

// What take() and close() return, as a vector, whatever they return it as.
std::vector<Letter*> list(LetterBox::List letters) {
  std::vector<Letter*> result;
  for (Letter* letter = letters.oldest; letter; letter = letter->next.get()) {
    result.push_back(letter);
  }
  return result;
}

TEST(ClosingStress, EveryPushToAnInboxArrivesOnceOrIsRefused) {
  constexpr int kProducers = 3;
  constexpr int kEach = 20;
  const int kRounds = rounds(10'000);
  std::uint64_t arrived_by_take = 0;
  std::uint64_t arrived_by_close = 0;
  std::uint64_t refused = 0;
  std::uint64_t owed = 0;

  struct Round {
    LetterBox inbox;
    std::atomic<int> signals{0};
    std::array<std::array<Letter, kEach>, kProducers> letters;
    std::array<int, kProducers> queued{};  // each producer's, read after the round
    std::array<int, kProducers> owed{};
  };
  std::unique_ptr<Round> round;
  bool done = false;
  std::barrier sync(kProducers + 1);
  std::vector<std::thread> producers;
  for (int p = 0; p < kProducers; ++p) {
    producers.emplace_back([&, p] {
      TestRandom random(p);
      for (;;) {
        sync.arrive_and_wait();
        if (done) return;
        for (int i = 0; i < kEach; ++i) {
          Letter& letter = round->letters[p][i];
          letter.from = p;
          letter.number = i;
          for (auto n = random.below(30); n > 0; --n) RealPlatform::cpu_relax();
          const auto outcome = round->inbox.push(letter);
          if (outcome == LetterBox::Push::kClosed) break;
          ++round->queued[p];
          if (outcome == LetterBox::Push::kWakeOwed) {
            ++round->owed[p];
            round->signals.fetch_add(1);
          }
        }
        sync.arrive_and_wait();
      }
    });
  }
  TestRandom random(77);
  for (int r = 0; r < kRounds; ++r) {
    round = std::make_unique<Round>();
    std::array<int, kProducers> next{};
    int expected_signals = 0;
    const auto read = [&](LetterBox::List letters) {
      const auto all = list(letters);
      for (Letter* letter : all) EXPECT_EQ(letter->number, next[letter->from]++);
      return all.size();
    };
    sync.arrive_and_wait();
    const auto turns = random.below(40);
    for (std::uint32_t i = 0; i < turns; ++i) {
      arrived_by_take += read(round->inbox.take());
      if (round->inbox.try_sleep()) {
        for (auto n = random.below(400); n > 0; --n) RealPlatform::cpu_relax();
        if (random.below(8) == 0) std::this_thread::yield();
        if (round->inbox.wake_up()) ++expected_signals;
      }
    }
    arrived_by_close += read(round->inbox.close());
    // As a context does: it goes only when it has got what it is owed.
    while (round->signals.load() < expected_signals) std::this_thread::yield();
    ASSERT_TRUE(list(round->inbox.take()).empty());
    sync.arrive_and_wait();
    ASSERT_EQ(round->signals.load(), expected_signals);
    for (int p = 0; p < kProducers; ++p) {
      ASSERT_EQ(next[p], round->queued[p]);
      refused += round->queued[p] < kEach;
      owed += round->owed[p];
    }
  }
  done = true;
  sync.arrive_and_wait();
  for (auto& producer : producers) producer.join();
  std::printf("taken %lu, found at close %lu, producers refused %lu, signals owed %lu\n",
              arrived_by_take, arrived_by_close, refused, owed);
  EXPECT_GT(arrived_by_take, 0u);
  EXPECT_GT(arrived_by_close, 0u);
  EXPECT_GT(refused, 0u);
  EXPECT_GT(owed, 0u);
}

// The write to the eventfd of a context that was just freed. The context sleeps; the first poster
// finds it sleeping and owes it a signal; before it gives it, the second has woken the context by
// other means, which runs both entries and goes.
class ClosingStress : public OnEachLoop {};
ROOST_ON_EACH_LOOP(ClosingStress);

struct Post : CallbackEntry {
  explicit Post(int& counter) noexcept : CallbackEntry(&arrive), count(&counter) {}
  static bool arrive(CallbackEntry& entry) noexcept {
    ++*static_cast<Post&>(entry).count;
    return true;
  }
  int* count;
};

TEST_P(ClosingStress, AWriteToTheEventfdOfAContextThatWasJustFreed) {
  constexpr int kPosters = 2;
  const int kRounds = rounds(3000);
  AioContext* target = nullptr;
  EventNotifier knock;
  int arrived = 0;
  std::array<std::unique_ptr<Post>, kPosters> posts;
  std::array<std::atomic<bool>, kPosters> posting{};
  bool done = false;  // read after start
  std::atomic<int> start{0};
  std::atomic<int> finished{0};
  std::uint64_t refused = 0;

  std::vector<std::thread> posters;
  for (int p = 0; p < kPosters; ++p) {
    posters.emplace_back([&, p] {
      TestRandom random(p + 5);
      for (int r = 1;; ++r) {
        while (start.load() < r) std::this_thread::yield();
        if (done) return;
        for (auto n = random.below(r % 2 ? 300 : 10'000); n > 0; --n) RealPlatform::cpu_relax();
        if (p == 0) knock.set();  // another reason to wake up
        posting[p].store(true);
        if (!target->post(*posts[p])) ++refused;
        posting[p].store(false);
        finished.fetch_add(1);
      }
    });
  }
  int destroyed_during_post = 0;
  std::uint64_t sleeps = 0;
  // On a busy machine the posters may not meet the context in time for long: go on until they did.
  int r = 1;
  for (; r <= kRounds || (destroyed_during_post == 0 && r <= 20 * kRounds); ++r) {
    auto o = options("brief");
    o.poll_max_ns = 0;
    auto context = AioContext::create(o);
    arrived = 0;
    for (auto& post : posts) post = std::make_unique<Post>(arrived);
    {
      ContextScope scope(*context);
      context->set_event_notifier(knock, [] {});
      context->poll(false);  // makes the back end, so that the next poll sleeps at once
      target = context.get();
      start.store(r);
      while (arrived < kPosters) context->poll(true);
      context->remove_event_notifier(knock);
    }
    for (auto& p : posting) destroyed_during_post += p.load();
    sleeps += context->statistics().sleeps;
    context.reset();
    // Nobody touches the next context before everybody has left this one.
    while (finished.load() < r * kPosters) std::this_thread::yield();
  }
  done = true;
  start.store(r);
  for (auto& poster : posters) poster.join();
  std::printf("%d contexts went, %d of them while a poster was still in post(); slept %lu times\n",
              r - 1, destroyed_during_post, sleeps);
  EXPECT_EQ(refused, 0u);
  EXPECT_GT(destroyed_during_post, 0);
  EXPECT_GT(sleeps, 0u);
}

}  // namespace
}  // namespace roost
