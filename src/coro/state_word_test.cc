// SPDX-License-Identifier: MIT
// Every transition of the state word that is allowed, and every one that is refused.
#include "roost/coro/state_word.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <vector>

namespace roost {
namespace {

using Word = StateWord<RealPlatform>;
using Outcome = Word::EntryOutcome;

constexpr std::uint32_t kHere = 3;
constexpr std::uint32_t kElsewhere = 9;

// A word in each state, reached by legal transitions.
void make(Word& word, CoState state, bool owned = false) {
  switch (state) {
    case CoState::kIdle:
      break;
    case CoState::kWaiting:
      word.claim_direct(kHere);
      word.suspend(true);
      break;
    case CoState::kRunning:
      word.claim_direct(kHere);
      break;
    case CoState::kScheduled:
      if (owned) make(word, CoState::kWaiting);
      EXPECT_TRUE(word.schedule(kHere, owned).won);
      break;
    case CoState::kListed:
      if (owned) make(word, CoState::kWaiting);
      EXPECT_TRUE(word.list(owned).won);
      break;
    case CoState::kEnded:
      word.claim_direct(kHere);
      word.end();
      break;
    case CoState::kInspected:
      EXPECT_TRUE(word.begin_inspection(word.peek()));
      break;
  }
  EXPECT_EQ(word.peek().state(), state);
  EXPECT_EQ(word.peek().owned(), owned);
}

struct Start {
  CoState state;
  bool owned;
};
const std::vector<Start> kAllStarts = {{CoState::kIdle, false},     {CoState::kWaiting, false},
                                       {CoState::kRunning, false},  {CoState::kScheduled, false},
                                       {CoState::kScheduled, true}, {CoState::kListed, false},
                                       {CoState::kListed, true},    {CoState::kEnded, false}};

// `operation` is refused, and changes nothing, in every state but those named.
void expect_only_from(const std::vector<Start>& allowed,
                      const std::function<bool(Word&)>& operation) {
  for (const Start& start : kAllStarts) {
    Word word(kHere);
    make(word, start.state, start.owned);
    const auto before = word.peek().bits();
    const bool may = std::ranges::any_of(
        allowed, [&](const Start& s) { return s.state == start.state && s.owned == start.owned; });
    EXPECT_EQ(operation(word), may) << to_string(start.state) << " owned " << start.owned;
    if (!may) {
      EXPECT_EQ(word.peek().bits(), before) << to_string(start.state);
    }
  }
}

TEST(StateWord, StartsIdleOnItsContextWithNothingOutstanding) {
  const Word word(kHere);
  EXPECT_EQ(word.peek().state(), CoState::kIdle);
  EXPECT_EQ(word.peek().context(), kHere);
  EXPECT_EQ(word.peek().entries(), 0u);
  EXPECT_FALSE(word.peek().embedded());
}

TEST(StateWord, ADirectEntryTakesIdleAndScheduledOnes) {
  expect_only_from({{CoState::kIdle, false}, {CoState::kScheduled, false}},
                   [](Word& word) { return word.claim_direct(kElsewhere).won; });
}

TEST(StateWord, AScheduleByAHolderTakesIdleOnes) {
  expect_only_from({{CoState::kIdle, false}},
                   [](Word& word) { return word.schedule(kElsewhere, false).won; });
}

TEST(StateWord, AScheduleByThePrimitiveTakesWaitingOnes) {
  expect_only_from({{CoState::kWaiting, false}},
                   [](Word& word) { return word.schedule(kElsewhere, true).won; });
}

TEST(StateWord, ListingByAHolderTakesIdleOnes) {
  expect_only_from({{CoState::kIdle, false}}, [](Word& word) { return word.list(false).won; });
}

TEST(StateWord, ListingByThePrimitiveTakesWaitingOnes) {
  expect_only_from({{CoState::kWaiting, false}}, [](Word& word) { return word.list(true).won; });
}

TEST(StateWord, AWakeUpAtHomeTakesIdleOnesAndThePrimitivesWaitingOnes) {
  expect_only_from({{CoState::kIdle, false}},
                   [](Word& word) { return word.claim_suspended(kHere, false).won; });
  expect_only_from({{CoState::kWaiting, false}},
                   [](Word& word) { return word.claim_suspended(kHere, true).won; });
}

TEST(StateWord, AClaimSaysWhatItSaw) {
  Word word(kHere);
  make(word, CoState::kScheduled);
  const auto refused = word.schedule(kElsewhere, false);
  EXPECT_EQ(refused.seen.state(), CoState::kScheduled);
  EXPECT_EQ(refused.seen.context(), kHere);
}

TEST(StateWord, ADirectEntryMovesTheContext) {
  Word word(kHere);
  EXPECT_TRUE(word.claim_direct(kElsewhere).won);
  EXPECT_EQ(word.peek().state(), CoState::kRunning);
  EXPECT_EQ(word.peek().context(), kElsewhere);
}

TEST(StateWord, ALiveEntryRunsAndIsAccountedFor) {
  Word word(kHere);
  const auto schedule = word.schedule(kElsewhere, false);
  EXPECT_TRUE(schedule.embedded);
  EXPECT_EQ(word.peek().entries(), 1u);
  EXPECT_TRUE(word.peek().embedded());
  EXPECT_EQ(word.claim_entry(kElsewhere, schedule.generation, true), Outcome::kRun);
  EXPECT_EQ(word.peek().state(), CoState::kRunning);
  EXPECT_EQ(word.peek().context(), kElsewhere);
  EXPECT_EQ(word.peek().entries(), 0u);
  EXPECT_FALSE(word.peek().embedded());
}

TEST(StateWord, AnEntryOfAWaitRunsAndNoLongerBelongsToThePrimitive) {
  Word word(kHere);
  make(word, CoState::kWaiting);
  const auto schedule = word.schedule(kHere, true);
  EXPECT_TRUE(word.peek().owned());
  EXPECT_EQ(word.claim_entry(kHere, schedule.generation, true), Outcome::kRun);
  EXPECT_FALSE(word.peek().owned());
}

TEST(StateWord, ADirectEntryMakesTheQueuedEntryStale) {
  Word word(kHere);
  const auto schedule = word.schedule(kHere, false);
  EXPECT_TRUE(word.claim_direct(kHere).won);
  EXPECT_EQ(word.peek().entries(), 1u);
  EXPECT_EQ(word.claim_entry(kHere, schedule.generation, true), Outcome::kStale);
  EXPECT_EQ(word.peek().state(), CoState::kRunning);
  EXPECT_EQ(word.peek().entries(), 0u);
}

TEST(StateWord, ScheduledAgainWithAStaleEntryTheNewOneIsNotEmbeddedAndOnlyItRuns) {
  Word word(kHere);
  const auto first = word.schedule(kHere, false);
  word.claim_direct(kHere);
  word.suspend(false);
  const auto second = word.schedule(kHere, false);
  EXPECT_TRUE(second.won);
  EXPECT_FALSE(second.embedded);
  EXPECT_NE(second.generation, first.generation);
  EXPECT_EQ(word.peek().entries(), 2u);
  EXPECT_EQ(word.claim_entry(kHere, first.generation, true), Outcome::kStale);
  EXPECT_EQ(word.peek().state(), CoState::kScheduled);
  EXPECT_FALSE(word.peek().embedded());
  EXPECT_EQ(word.claim_entry(kHere, second.generation, false), Outcome::kRun);
  // The embedded entry came back, and is used again.
  word.suspend(false);
  EXPECT_TRUE(word.schedule(kHere, false).embedded);
}

TEST(StateWord, AnEntryDoesNotRunOnAnotherContextThanItsSchedule) {
  Word word(kHere);
  const auto schedule = word.schedule(kElsewhere, false);
  EXPECT_EQ(word.claim_entry(kHere, schedule.generation, true), Outcome::kStale);
  EXPECT_EQ(word.peek().state(), CoState::kScheduled);
}

TEST(StateWord, WhoeverDropsTheLastEntryOfAnEndedCoroutineFreesTheBlock) {
  Word word(kHere);
  const auto first = word.schedule(kHere, false);
  word.claim_direct(kHere);
  word.suspend(false);
  const auto second = word.schedule(kElsewhere, false);
  word.claim_direct(kHere);
  EXPECT_FALSE(word.end()) << "entries are outstanding";
  EXPECT_EQ(word.claim_entry(kElsewhere, second.generation, false), Outcome::kStale);
  EXPECT_EQ(word.claim_entry(kHere, first.generation, true), Outcome::kFreeBlock);
}

TEST(StateWord, WithoutEntriesTheEndFreesTheBlock) {
  Word word(kHere);
  make(word, CoState::kRunning);
  EXPECT_TRUE(word.end());
  EXPECT_EQ(word.peek().state(), CoState::kEnded);
}

TEST(StateWord, ReferencesKeepTheBlockLikeEntries) {
  Word word(kHere);
  EXPECT_TRUE(word.add_ref());
  EXPECT_TRUE(word.add_ref());
  make(word, CoState::kRunning);
  EXPECT_FALSE(word.end());
  EXPECT_FALSE(word.drop_ref());
  EXPECT_TRUE(word.drop_ref());
}

TEST(StateWord, ASuspensionWithReferencesKeepsThem) {
  Word word(kHere);
  make(word, CoState::kRunning);
  EXPECT_TRUE(word.add_ref());
  word.suspend(true);
  EXPECT_EQ(word.peek().state(), CoState::kWaiting);
  EXPECT_EQ(word.peek().entries(), 1u);
  EXPECT_FALSE(word.drop_ref());
}

TEST(StateWord, ADroppedEntryIsAccountedForWithoutATurn) {
  Word word(kHere);
  word.schedule(kHere, false);
  word.claim_direct(kHere);
  EXPECT_FALSE(word.drop_entry(true));
  EXPECT_EQ(word.peek().entries(), 0u);
  EXPECT_FALSE(word.peek().embedded());
  EXPECT_EQ(word.peek().state(), CoState::kRunning);
}

TEST(StateWord, AListedOneRunsOrIsHandedToTheQueue) {
  Word listed(kHere);
  make(listed, CoState::kListed);
  listed.claim_listed(kHere);
  EXPECT_EQ(listed.peek().state(), CoState::kRunning);

  Word handed(kHere);
  make(handed, CoState::kListed, true);
  const auto schedule = handed.reschedule_listed(kHere);
  EXPECT_TRUE(schedule.won);
  EXPECT_TRUE(handed.peek().owned()) << "the wait still belongs to the primitive";
  EXPECT_FALSE(handed.claim_direct(kHere).won);
  EXPECT_EQ(handed.claim_entry(kHere, schedule.generation, true), Outcome::kRun);
}

TEST(StateWord, AMoveSuspendsAndSchedulesInOneStep) {
  Word word(kHere);
  make(word, CoState::kRunning);
  const auto move = word.suspend_scheduled(kElsewhere);
  EXPECT_TRUE(move.won);
  EXPECT_TRUE(move.embedded);
  EXPECT_EQ(word.peek().state(), CoState::kScheduled);
  EXPECT_EQ(word.peek().context(), kElsewhere);
  EXPECT_EQ(word.claim_entry(kElsewhere, move.generation, true), Outcome::kRun);
  // With a reference outstanding, which others may count at the same time.
  EXPECT_TRUE(word.add_ref());
  const auto again = word.suspend_scheduled(kHere);
  EXPECT_TRUE(again.won);
  EXPECT_EQ(word.peek().entries(), 2u);
  EXPECT_EQ(word.claim_entry(kHere, again.generation, true), Outcome::kRun);
  EXPECT_FALSE(word.drop_ref());
}

TEST(StateWord, RefusesMoreEntriesThanItCanCount) {
  Word word(kHere);
  for (std::uint32_t i = 0; i < CoStateValue::kMaxEntries; ++i) ASSERT_TRUE(word.add_ref());
  EXPECT_FALSE(word.add_ref());
  EXPECT_FALSE(word.schedule(kHere, false).won);
  EXPECT_EQ(word.peek().state(), CoState::kIdle);
  make(word, CoState::kRunning);
  EXPECT_FALSE(word.suspend_scheduled(kHere).won);
  EXPECT_EQ(word.peek().state(), CoState::kRunning);
  word.suspend(false);
  word.list(false);
  EXPECT_FALSE(word.reschedule_listed(kHere).won);
  word.claim_listed(kHere);
  for (std::uint32_t i = 0; i < CoStateValue::kMaxEntries; ++i) word.drop_ref();
  EXPECT_EQ(word.peek().entries(), 0u);
  EXPECT_EQ(word.peek().context(), kHere) << "the count has spilled over";
}

TEST(StateWord, TheHighestContextFits) {
  Word word(CoStateValue::kMaxContexts - 1);
  EXPECT_EQ(word.peek().context(), CoStateValue::kMaxContexts - 1);
  const auto schedule = word.schedule(CoStateValue::kMaxContexts - 1, false);
  EXPECT_EQ(word.peek().generation(), schedule.generation);
  EXPECT_EQ(word.claim_entry(CoStateValue::kMaxContexts - 1, schedule.generation, true),
            Outcome::kRun);
}

TEST(StateWord, ANewCoroutineInTheSameBlockHasANewGeneration) {
  Word word(kHere);
  const auto first = word.peek();
  word.claim_direct(kHere);
  EXPECT_TRUE(word.end());
  word.begin(kElsewhere);
  EXPECT_EQ(word.peek().state(), CoState::kIdle);
  EXPECT_EQ(word.peek().context(), kElsewhere);
  EXPECT_NE(word.peek().generation(), first.generation());
  EXPECT_FALSE(word.begin_inspection(first)) << "the state of the coroutine before";
}

TEST(StateWord, OnlyAnIdleCoroutineCanBeInspected) {
  expect_only_from({{CoState::kIdle, false}},
                   [](Word& word) { return word.begin_inspection(word.peek()); });
}

TEST(StateWord, AnInspectionLeavesEverythingAsItWas) {
  Word word(kHere);
  EXPECT_TRUE(word.add_ref());
  const auto before = word.peek();
  EXPECT_TRUE(word.begin_inspection(before));
  EXPECT_TRUE(word.add_ref()) << "references come and go meanwhile";
  EXPECT_FALSE(word.drop_ref());
  word.end_inspection();
  EXPECT_EQ(word.peek().bits(), before.bits());
}

}  // namespace
}  // namespace roost
