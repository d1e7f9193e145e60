// SPDX-License-Identifier: MIT
// The census across contexts: those that answer, those that do not, and what is left behind.
#include "roost/aio/census_report.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <semaphore>
#include <thread>
#include <vector>

#include "aio/test_loop.h"
#include "roost/aio/iothread.h"
#include "roost/aio/timer.h"

namespace roost {
namespace {

const CoroutineReport* find(const std::vector<CoroutineReport>& census, const char* name) {
  const auto found = std::ranges::find_if(
      census, [&](const CoroutineReport& r) { return std::string(r.info.name) == name; });
  return found == census.end() ? nullptr : &*found;
}

Task<void> waits(Coroutine*& self, std::binary_semaphore& ready) {
  self = Coroutine::self();
  co_await suspend([ready = &ready](Coroutine&) noexcept { ready->release(); });
}

Task<void> waits_deeper(Coroutine*& self, std::binary_semaphore& ready) {
  co_await waits(self, ready);
}

TEST(CensusReport, AContextOnAnotherThreadAnswersWithItsAwaitChains) {
  IOThread thread({.name = "answering"});
  Coroutine* co = nullptr;
  std::binary_semaphore ready{0};
  spawn(thread.context(), waits_deeper(co, ready), "distant");
  ready.acquire();
  const auto census = take_census(60'000'000'000);
  const auto* report = find(census, "distant");
  ASSERT_NE(report, nullptr);
  EXPECT_TRUE(report->answered);
  EXPECT_EQ(report->context, "answering");
  EXPECT_EQ(report->info.await_chain.size(), 2u);
  const std::string text = to_text(census);
  EXPECT_NE(text.find("coroutine 'distant'"), std::string::npos);
  EXPECT_NE(text.find("on answering: idle"), std::string::npos);
  EXPECT_NE(text.find("census_report_test.cc"), std::string::npos);
  co_schedule(thread.context(), *co);
}

TEST(CensusReport, OneThatDoesNotAnswerIsReportedFromAtomics) {
  const auto unpolled = AioContext::create({.name = "silent"});
  Coroutine* co = nullptr;
  std::binary_semaphore ready{0};
  {
    ContextScope scope(*unpolled);
    Coroutine::create(waits_deeper(co, ready), "silent one")->enter();
  }
  const auto census = take_census(1'000'000);
  const auto* report = find(census, "silent one");
  ASSERT_NE(report, nullptr);
  EXPECT_FALSE(report->answered);
  EXPECT_EQ(report->context, "silent");
  EXPECT_TRUE(report->info.await_chain.empty());
  EXPECT_NE(report->info.awaits_at.line(), 0u);
  EXPECT_NE(to_text(census).find("its context did not answer"), std::string::npos);
  ContextScope scope(*unpolled);
  co->enter();
}

// Whoever asks it what time it is can be waited for.
class TellingClock final : public Clock {
 public:
  std::int64_t now_ns() const noexcept override {
    asked_ = true;
    asked_.notify_all();
    return real_clock().now_ns();
  }
  void wait_until_asked() const noexcept { asked_.wait(false); }

 private:
  mutable std::atomic<bool> asked_{false};
};

TEST(CensusReport, OneThatGoesMeanwhileIsNotWaitedFor) {
  constexpr std::int64_t kAnHourNs = 3'600'000'000'000;
  auto leaving = AioContext::create({.name = "leaving"});
  TellingClock clock;
  std::vector<CoroutineReport> census;
  std::thread asks([&] {
    // It answers itself, with its own clock, once it has asked all others.
    const auto own = AioContext::create({.name = "own", .clock = &clock});
    ContextScope scope(*own);
    census = take_census(kAnHourNs);
  });
  clock.wait_until_asked();
  leaving.reset();
  asks.join();
  EXPECT_TRUE(census.empty());
}

TEST(CensusReport, ItsOwnContextAnswersAtOnce) {
  ManualClock clock;
  clock.advance_ns(1'000'000'000);
  const auto context = AioContext::create({.name = "own", .clock = &clock});
  ContextScope scope(*context);
  context->poll(false);
  Coroutine* co = nullptr;
  std::binary_semaphore ready{0};
  Coroutine::create(waits_deeper(co, ready), "aging")->enter();
  clock.advance_ns(5'000'000'000);
  const auto census = take_census(0);
  const auto* report = find(census, "aging");
  ASSERT_NE(report, nullptr);
  EXPECT_TRUE(report->answered);
  EXPECT_NEAR(static_cast<double>(report->age_ns), 5e9, 2e6);
  co->enter();
}

TEST(CensusReport, OneWhoseLoopHasNotLookedAtItsClockHasNoAge) {
  const auto context = AioContext::create({.name = "new"});
  ContextScope scope(*context);
  Coroutine* co = nullptr;
  std::binary_semaphore ready{0};
  Coroutine::create(waits(co, ready), "early")->enter();
  const auto census = take_census(0);
  const auto* report = find(census, "early");
  ASSERT_NE(report, nullptr);
  EXPECT_EQ(report->age_ns, -1);
  EXPECT_NE(to_text(census).find("on new: idle\n"), std::string::npos) << to_text(census);
  co->enter();
}

TEST(CensusReport, ItDoesNotBlockACoroutine) {
  const auto context = AioContext::create({});
  ContextScope scope(*context);
  const auto body = []() -> Task<void> {
    take_census();
    co_return;
  };
  EXPECT_DEATH(Coroutine::create(body(), "curious")->enter(),
               "a census would block inside coroutine 'curious'");
}

TEST(CensusReport, AContextThatGoesSaysWhoseHomeItWas) {
  const auto other = AioContext::create({.name = "other"});
  Coroutine* co = nullptr;
  std::binary_semaphore ready{0};
  testing::internal::CaptureStderr();
  {
    const auto context = AioContext::create({.name = "leaving"});
    ContextScope scope(*context);
    Coroutine::create(waits(co, ready), "homeless")->enter();
  }
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_NE(said.find("context 'leaving' goes while coroutine 'homeless'"), std::string::npos);
  ContextScope scope(*other);
  co->enter();
}

TEST(CensusReport, AContextThatGoesNamesTheFirstOfMany) {
  constexpr int kMany = 25;
  const auto other = AioContext::create({.name = "other"});
  std::vector<Coroutine*> all(kMany);
  const auto body = [](Coroutine*& me) -> Task<void> {
    me = Coroutine::self();
    co_await yield();
  };
  testing::internal::CaptureStderr();
  {
    const auto context = AioContext::create({.name = "leaving"});
    ContextScope scope(*context);
    for (Coroutine*& co : all) Coroutine::create(body(co), "homeless")->enter();
  }
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_EQ(std::ranges::count(said, '\n'), 11);
  EXPECT_NE(said.find("goes while 15 more coroutines live there"), std::string::npos) << said;
  ContextScope scope(*other);
  for (Coroutine* co : all) co->enter();
}

TEST(CensusReportDeath, ACoroutineThatNeverEndedIsReportedAtExit) {
  const auto leak = [] {
    const auto context = AioContext::create({});
    ContextScope scope(*context);
    Coroutine* co = nullptr;
    std::binary_semaphore ready{0};
    Coroutine::create(waits(co, ready), "forgotten")->enter();
    std::exit(3);
  };
  EXPECT_EXIT(leak(), testing::ExitedWithCode(3),
              "coroutine 'forgotten', created at .* never ended");
}

}  // namespace
}  // namespace roost
