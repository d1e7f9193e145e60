// SPDX-License-Identifier: MIT
// The census: what is said of coroutines in each state, and their await chains.
#include "roost/coro/census.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "coro/test_context.h"
#include "roost/coro/task.h"

namespace roost {
namespace {

class Census : public testing::Test {
 protected:
  static const CoroutineInfo* find(const std::vector<CoroutineInfo>& list, const Coroutine* co) {
    const auto found = std::ranges::find(list, co, &CoroutineInfo::id);
    return found == list.end() ? nullptr : &*found;
  }

  TestContext context_{1, "one"};
  TestContext other_{2, "two"};
  TestScope scope_{context_};
};

Task<void> nothing() { co_return; }

TEST_F(Census, ANewCoroutineIsListedWithItsNameAndWhereItWasMade) {
  Coroutine* co = Coroutine::create(nothing(), "newborn");
  const unsigned line = __LINE__ - 1;
  const auto list = list_coroutines();
  const auto* info = find(list, co);
  ASSERT_NE(info, nullptr);
  EXPECT_STREQ(info->name, "newborn");
  EXPECT_EQ(info->state, CoState::kIdle);
  EXPECT_EQ(info->context, context_.index());
  EXPECT_EQ(info->waits_for, nullptr);
  EXPECT_EQ(info->created_at.line(), line);
  EXPECT_NE(std::string(info->created_at.file_name()).find("census_test.cc"), std::string::npos);
  EXPECT_EQ(info->awaits_at.line(), 0u);
  co->enter();
}

TEST_F(Census, OneThatEndedIsNotListedAnyMore) {
  Coroutine* co = Coroutine::create(nothing(), "gone");
  co->enter();
  EXPECT_EQ(find(list_coroutines(), co), nullptr);
}

TEST_F(Census, OneThatEndedWithAReferenceLeftIsNotListed) {
  Coroutine* co = Coroutine::create(nothing(), "referred to");
  CoroutineRef ref(*co);
  co->enter();
  EXPECT_EQ(find(list_coroutines(), co), nullptr);
}

Task<void> innermost(unsigned& line) {
  line = __LINE__ + 1;
  co_await suspend_waiting("a test", PublishNothing{});
}

Task<int> middle(unsigned& inner_line, unsigned& line) {
  line = __LINE__ + 1;
  co_await innermost(inner_line);
  co_return 1;
}

Task<void> outermost(unsigned (&lines)[3]) {
  lines[2] = __LINE__ + 1;
  co_await middle(lines[0], lines[1]);
}

TEST_F(Census, AWaitingOneShowsWhatForAndEveryAwaitOfItsChain) {
  unsigned lines[3] = {};
  Coroutine* co = Coroutine::create(outermost(lines), "deep");
  co->enter();
  const auto list = list_coroutines_here();
  const auto* info = find(list, co);
  ASSERT_NE(info, nullptr);
  EXPECT_EQ(info->state, CoState::kWaiting);
  EXPECT_STREQ(info->waits_for, "a test");
  EXPECT_EQ(info->awaits_at.line(), lines[0]);
  ASSERT_EQ(info->await_chain.size(), 3u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(info->await_chain[i].line(), lines[i]);
  const char* const functions[] = {"innermost", "middle", "outermost"};
  for (int i = 0; i < 3; ++i) {
    EXPECT_NE(std::string(info->await_chain[i].function_name()).find(functions[i]),
              std::string::npos);
  }
  wake_waiter(*co);
}

Task<void> yields_once(unsigned& line) {
  line = __LINE__ + 1;
  co_await yield();
}

Task<void> parent_of_yield(unsigned& inner, unsigned& line) {
  line = __LINE__ + 1;
  co_await yields_once(inner);
}

TEST_F(Census, AnIdleOneShowsItsChainAndIsNotDisturbed) {
  unsigned inner = 0;
  unsigned line = 0;
  Coroutine* co = Coroutine::create(parent_of_yield(inner, line), "idle");
  co->enter();
  for (int i = 0; i < 3; ++i) {
    const auto list = list_coroutines_here();
    const auto* info = find(list, co);
    ASSERT_NE(info, nullptr);
    EXPECT_EQ(info->state, CoState::kIdle);
    ASSERT_EQ(info->await_chain.size(), 2u);
    EXPECT_EQ(info->await_chain[0].line(), inner);
    EXPECT_EQ(info->await_chain[1].line(), line);
    EXPECT_EQ(co->state(), CoState::kIdle);
  }
  co->enter();
}

TEST_F(Census, AScheduledOneShowsItsChainWhereItWillRun) {
  unsigned inner = 0;
  unsigned line = 0;
  Coroutine* co = Coroutine::create(parent_of_yield(inner, line), "scheduled");
  co->enter();
  co_schedule(context_, *co);
  const unsigned scheduled_line = __LINE__ - 1;
  {
    const auto list = list_coroutines_here();
    const auto* info = find(list, co);
    ASSERT_NE(info, nullptr);
    EXPECT_EQ(info->state, CoState::kScheduled);
    EXPECT_EQ(info->placed_at.line(), scheduled_line);
    EXPECT_EQ(info->await_chain.size(), 2u);
  }
  EXPECT_EQ(context_.run(), 1);
}

TEST_F(Census, OneScheduledElsewhereIsListedWithoutAChain) {
  unsigned inner = 0;
  unsigned line = 0;
  Coroutine* co = Coroutine::create(parent_of_yield(inner, line), "leaving");
  co->enter();
  co_schedule(other_, *co);
  const auto list = list_coroutines_here();
  const auto* info = find(list, co);
  ASSERT_NE(info, nullptr);
  EXPECT_EQ(info->context, other_.index());
  EXPECT_TRUE(info->await_chain.empty());
  EXPECT_EQ(info->awaits_at.line(), inner) << "known from atomics alone";
  EXPECT_EQ(other_.run(), 1);
}

TEST_F(Census, OnlyThoseAtHomeHereAreListedHere) {
  Coroutine* here = Coroutine::create(nothing(), "here");
  TestScope elsewhere(other_);
  Coroutine* there = Coroutine::create(nothing(), "there");
  const auto list = list_coroutines_here();
  EXPECT_EQ(find(list, here), nullptr);
  EXPECT_NE(find(list, there), nullptr);
  here->enter();
  there->enter();
}

TEST_F(Census, ARunningOneShowsItsChainToItself) {
  std::vector<CoroutineInfo> list;
  std::size_t own = 0;
  Coroutine::Place places[4];
  const auto child = [&]() -> Task<void> {
    co_await std::suspend_never{};
    list = list_coroutines_here();
    own = own_await_chain(places, 4);
  };
  const auto body = [&]() -> Task<void> { co_await child(); };
  Coroutine* co = Coroutine::create(body(), "introspective");
  co->enter();
  const auto* info = find(list, co);
  ASSERT_NE(info, nullptr);
  EXPECT_EQ(info->state, CoState::kRunning);
  EXPECT_EQ(info->await_chain.size(), 2u);
  EXPECT_EQ(own, 2u);
  EXPECT_EQ(places[0].line(), info->await_chain[0].line());
}

TEST_F(Census, OutsideOfACoroutineThereIsNoOwnChain) {
  Coroutine::Place places[1];
  EXPECT_EQ(own_await_chain(places, 1), 0u);
}

TEST_F(Census, ABlockThatIsUsedAgainShowsItsNewCoroutineOnly) {
  unsigned inner = 0;
  unsigned line = 0;
  Coroutine* first = Coroutine::create(parent_of_yield(inner, line), "first");
  first->enter();
  first->enter();
  Coroutine* second = Coroutine::create(nothing(), "second");
  const auto list = list_coroutines();
  const auto* info = find(list, second);
  ASSERT_NE(info, nullptr);
  EXPECT_STREQ(info->name, "second");
  EXPECT_EQ(info->awaits_at.line(), 0u) << "left over from the one before";
  EXPECT_EQ(info->placed_at.line(), 0u);
  second->enter();
}

TEST_F(Census, ManyAreAllFound) {
  constexpr int kCount = 5000;
  std::vector<Coroutine*> all;
  for (int i = 0; i < kCount; ++i) all.push_back(Coroutine::create(nothing(), "one of many"));
  const auto list = list_coroutines();
  EXPECT_EQ(
      std::ranges::count_if(
          list, [](const CoroutineInfo& info) { return std::string(info.name) == "one of many"; }),
      kCount);
  for (Coroutine* co : all) co->enter();
}

TEST_F(Census, LocksAreCounted) {
  const auto body = [&]() -> Task<void> {
    Coroutine::self()->lock_taken();
    co_await yield();
    Coroutine::self()->lock_released();
  };
  Coroutine* co = Coroutine::create(body(), "locker");
  co->enter();
  const auto list = list_coroutines();
  ASSERT_NE(find(list, co), nullptr);
  EXPECT_EQ(find(list, co)->locks, 1u);
  co->enter();
}

TEST_F(Census, ACoroutineThatEndsWithALockAborts) {
  const auto body = []() -> Task<void> {
    Coroutine::self()->lock_taken();
    co_return;
  };
  EXPECT_DEATH(Coroutine::create(body(), "careless")->enter(),
               "coroutine 'careless' ended with 1 of its coroutine locks held");
}

}  // namespace
}  // namespace roost
