// SPDX-License-Identifier: MIT
// Iterations of a context: progress, nesting, notify, order, sleeping and busy waiting.
#include "roost/aio/aio_context.h"

#include <gtest/gtest.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "aio/test_loop.h"
#include "base/test_build.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/event_notifier.h"
#include "roost/aio/iothread.h"
#include "roost/aio/poll_budget.h"
#include "roost/aio/timer.h"

namespace roost {
namespace {

std::int64_t thread_cpu_ns() {
  timespec now;
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return now.tv_sec * 1'000'000'000 + now.tv_nsec;
}

class Contexts : public LoopTest {};
class StillContexts : public StillLoopTest {};
ROOST_ON_EACH_LOOP(StillContexts);
ROOST_ON_EACH_LOOP(Contexts);

TEST_P(Contexts, TheBackEndIsTheOneAskedFor) {
  EXPECT_STREQ(context().back_end_name(), GetParam() == EventLoop::kIoUring ? "io_uring" : "epoll");
  context().poll(false);
  EXPECT_STREQ(context().back_end_name(), GetParam() == EventLoop::kIoUring ? "io_uring" : "epoll");
}

TEST_P(Contexts, AFreshOneHasNothingToDo) { EXPECT_FALSE(poll_some()); }

TEST_P(Contexts, CurrentIsTheInnermostScope) {
  EXPECT_EQ(AioContext::current(), &context());
  auto other = AioContext::create(options("other"));
  {
    ContextScope inner(*other);
    EXPECT_EQ(AioContext::current(), other.get());
  }
  EXPECT_EQ(AioContext::current(), &context());
  AioContext* seen = nullptr;
  schedule_oneshot(*other, [&] { seen = AioContext::current(); });
  other->poll(true);
  EXPECT_EQ(seen, other.get());
  EXPECT_EQ(AioContext::current(), &context());
  std::thread([] { EXPECT_EQ(AioContext::current(), nullptr); }).join();
}

TEST_P(Contexts, EachLivingOneHasItsOwnIndex) {
  auto a = AioContext::create(options("a"));
  auto b = AioContext::create(options("b"));
  EXPECT_NE(a->index(), b->index());
  EXPECT_NE(a->index(), context().index());
  EXPECT_EQ(a->name(), "a");
}

TEST_P(Contexts, TheyAreKeptByReferences) {
  auto a = AioContext::create(options("a"));
  std::weak_ptr<AioContext> watched = a;
  auto second = a;
  a.reset();
  EXPECT_FALSE(watched.expired());
  second.reset();
  EXPECT_TRUE(watched.expired());
}

TEST_P(Contexts, ThousandsInARowDoNotRunOutOfAnything) {
  for (int i = 0; i < rounds(6000); ++i) {
    auto c = AioContext::create(options("brief"));
    if (i % 16 == 0) c->poll(false);
  }
}

// ---- notify

TEST_P(Contexts, ANotifiedPollDoesNotBlock) {
  context().notify();
  EXPECT_FALSE(context().poll(true));
}

TEST_P(Contexts, ANotifyFromAnotherThreadBeforeThePollKeepsItFromBlocking) {
  std::thread([&] { context().notify(); }).join();
  EXPECT_FALSE(context().poll(true));
}

TEST_P(Contexts, NotifiesAreCoalesced) {
  for (int i = 0; i < 100; ++i) context().notify();
  EXPECT_FALSE(context().poll(true));
  // The next blocking poll is not kept from waiting.
  bool fired = false;
  Timer timer(context(), [&] { fired = true; });
  timer.arm_after(20'000'000);
  int iterations = 0;
  poll_until([&] { return ++iterations, fired; });
  EXPECT_LE(iterations, 4);
}

// The classic: the loop looks at a flag, finds it unset, and polls; meanwhile another thread sets
// the flag and notifies. Wherever the notify falls, the poll must return.
TEST_P(Contexts, LostWakeUpNotifyBetweenTheLookAtAFlagAndThePoll) {
  constexpr int kRounds = rounds(20'000);
  std::atomic<int> flag{0};
  std::atomic<int> seen{0};
  std::thread other([&] {
    TestRandom random(1);
    for (int i = 1; i <= kRounds; ++i) {
      while (seen.load() < i - 1) {
      }
      for (auto n = random.below(2000); n > 0; --n) RealPlatform::cpu_relax();
      flag.store(i);
      context().notify();
    }
  });
  for (int i = 1; i <= kRounds; ++i) {
    while (flag.load() < i) context().poll(true);
    seen.store(i);
  }
  other.join();
}

TEST_P(Contexts, NotifyFromACallbackKeepsTheNextPollFromBlocking) {
  schedule_oneshot(context(), [&] { context().notify(); });
  EXPECT_TRUE(context().poll(true));
  EXPECT_FALSE(context().poll(true));
}

// ---- Progress

TEST_P(Contexts, EnteringACoroutineIsProgress) {
  bool ran = false;
  const auto body = [&]() -> Task<void> {
    ran = true;
    co_return;
  };
  spawn(context(), body());
  EXPECT_FALSE(ran);
  EXPECT_TRUE(context().poll(true));
  EXPECT_TRUE(ran);
}

TEST_P(Contexts, AStaleEntryIsNoProgress) {
  const auto body = []() -> Task<void> { co_return; };
  Coroutine* co = Coroutine::create(body());
  co_schedule(context(), *co);
  co->enter();  // cancels the schedule
  EXPECT_FALSE(poll_some());
}

// ---- Nesting

// The outer poll has taken three entries and runs the first. A nested blocking poll must go on
// with them instead of sleeping.
TEST_P(StillContexts, NestedPollSleepingWhileItsCallerHoldsTheBatchOfEntries) {
  std::string order;
  schedule_oneshot(context(), [&] {
    order += '1';
    EXPECT_TRUE(context().poll(true));
    EXPECT_TRUE(order.ends_with("3"));
  });
  schedule_oneshot(context(), [&] { order += '2'; });
  schedule_oneshot(context(), [&] { order += '3'; });
  EXPECT_TRUE(context().poll(true));
  EXPECT_EQ(order, "123");
}

// The same with descriptors: all are ready in one wait.
TEST_P(Contexts, NestedPollSleepingWhileItsCallerHoldsTheBatchOfReadyDescriptors) {
  std::array<EventNotifier, 3> notifiers;
  int calls = 0;
  for (auto& notifier : notifiers) {
    context().set_event_notifier(notifier, [&] {
      if (++calls == 1) {
        while (calls < 3) context().poll(true);
      }
    });
  }
  poll_some(3);
  for (auto& notifier : notifiers) notifier.set();
  poll_until([&] { return calls == 3; });
  for (auto& notifier : notifiers) context().remove_event_notifier(notifier);
}

// A callback of a descriptor runs after a sleep. Where it polls, blocking, that poll has to sleep
// as well instead of going round and round.
TEST_P(Contexts, ABlockingPollNestedInADescriptorCallbackSleeps) {
  EventNotifier notifier;
  int iterations = 0;
  bool done = false;
  context().set_event_notifier(notifier, [&] {
    bool fired = false;
    Timer timer(context(), [&] { fired = true; });
    timer.arm_after(20'000'000);
    poll_until([&] { return ++iterations, fired; });
    done = true;
  });
  poll_some(3);
  std::thread thread([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // so that the loop is asleep
    notifier.set();
  });
  poll_until([&] { return done; });
  thread.join();
  EXPECT_LE(iterations, 5);
  context().remove_event_notifier(notifier);
}

// While callbacks run after a sleep, other threads' pushes must neither be lost nor leave the
// context believing that it sleeps.
TEST_P(Contexts, APushDuringADescriptorCallbackIsServedByANestedPoll) {
  EventNotifier notifier;
  bool done = false;
  context().set_event_notifier(notifier, [&] {
    std::atomic<int> posted{0};
    for (int i = 0; i < 3; ++i) {
      std::thread thread([&] { schedule_oneshot(context(), [&] { ++posted; }); });
      while (posted <= i) context().poll(true);
      thread.join();
    }
    done = true;
  });
  poll_some(3);
  std::thread thread([&] { notifier.set(); });
  poll_until([&] { return done; });
  thread.join();
  context().remove_event_notifier(notifier);
}

TEST_P(Contexts, PollsNestDeeply) {
  constexpr int kDepth = 100;
  int depth = 0;
  int deepest = 0;
  std::function<void()> dive = [&] {
    deepest = std::max(deepest, ++depth);
    if (depth < kDepth) {
      schedule_oneshot(context(), dive);
      context().poll(true);
    }
    --depth;
  };
  schedule_oneshot(context(), dive);
  poll_until([&] { return deepest == kDepth; });
  EXPECT_EQ(depth, 0);
}

TEST_P(Contexts, ACoroutineMayPollWithoutBlocking) {
  bool inner = false;
  bool done = false;
  const auto body = [&]() -> Task<void> {
    schedule_oneshot(context(), [&] { inner = true; });
    while (!inner) context().poll(false);
    done = true;
    co_return;
  };
  spawn(context(), body());
  context().poll(true);
  EXPECT_TRUE(done);
}

TEST_P(Contexts, OneContextsCallbackPollsAnother) {
  auto other = AioContext::create(options("other"));
  std::string order;
  schedule_oneshot(*other, [&] { order += 'o'; });
  schedule_oneshot(context(), [&] {
    order += '(';
    other->poll(true);
    order += ')';
  });
  context().poll(true);
  EXPECT_EQ(order, "(o)");
}

// ---- Order

// What one thread posts to one context is run in the order it was posted, from outside (inbox) and
// from inside (the fast path) alike.
TEST_P(Contexts, OrderIsKeptBetweenTheInboxAndTheFastPath) {
  auto other = AioContext::create(options("other"));
  std::vector<int> order;
  const auto post = [&](int i) { schedule_oneshot(*other, [&, i] { order.push_back(i); }); };
  int n = 0;
  for (int round = 0; round < 10; ++round) {
    post(n++);  // from outside
    {
      ContextScope inside(*other);
      post(n++);
      {
        ContextScope outside(context());
        post(n++);
        {
          ContextScope inside_again(*other);
          post(n++);
        }
        post(n++);
      }
      post(n++);
    }
    post(n++);
    if (round % 3 == 0) other->poll(false);
  }
  while (order.size() < static_cast<std::size_t>(n)) other->poll(true);
  for (int i = 0; i < n; ++i) EXPECT_EQ(order[i], i);
}

TEST_P(Contexts, OrderIsKeptWhenANestedPollOfAnotherContextPosts) {
  auto other = AioContext::create(options("other"));
  std::vector<int> order;
  const auto post = [&](int i) { schedule_oneshot(context(), [&, i] { order.push_back(i); }); };
  schedule_oneshot(context(), [&] {
    post(0);
    schedule_oneshot(*other, [&] { post(1); });
    other->poll(true);
    post(2);
  });
  poll_until([&] { return order.size() == 3; });
  EXPECT_EQ(order, (std::vector<int>{0, 1, 2}));
}

TEST_P(Contexts, OrderIsKeptFromEachOfSeveralThreads) {
  constexpr int kThreads = 3;
  constexpr int kEach = rounds(20'000);
  std::array<int, kThreads> next{};
  int total = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kEach; ++i) {
        schedule_oneshot(context(), [&, t, i] {
          EXPECT_EQ(next[t]++, i);
          ++total;
        });
      }
    });
  }
  poll_until([&] { return total == kThreads * kEach; });
  for (auto& thread : threads) thread.join();
}

// ---- Coroutines across contexts

TEST_P(Contexts, AWakeFromAnotherThreadBringsTheCoroutineHome) {
  Coroutine* sleeper = nullptr;
  AioContext* woke_on = nullptr;
  std::atomic<bool> parked{false};
  const auto body = [&]() -> Task<void> {
    co_await suspend([at = &sleeper, flag = &parked](Coroutine& co) noexcept {
      *at = &co;
      flag->store(true);
    });
    woke_on = AioContext::current();
  };
  Coroutine::create(body())->enter();
  std::thread thread([&] {
    while (!parked.load()) {
    }
    co_wake(*sleeper);
  });
  poll_until([&] { return woke_on != nullptr; });
  thread.join();
  EXPECT_EQ(woke_on, &context());
}

TEST_P(Contexts, MoveToRunsTheRestOnTheOtherContext) {
  IOThread thread(options("other"));
  std::vector<AioContext*> path;
  std::atomic<bool> back{false};
  const auto body = [&]() -> Task<void> {
    path.push_back(AioContext::current());
    co_await move_to(thread.context());
    path.push_back(AioContext::current());
    EXPECT_EQ(Coroutine::self()->home(), &thread.context());
    co_await move_to(context());
    path.push_back(AioContext::current());
    back = true;
  };
  spawn(context(), body());
  poll_until([&] { return back.load(); });
  EXPECT_EQ(path, (std::vector<AioContext*>{&context(), &thread.context(), &context()}));
}

TEST_P(Contexts, MoveToTheOwnContextLetsTheOthersRun) {
  std::string order;
  const auto body = [&](char name) -> Task<void> {
    for (int i = 0; i < 3; ++i) {
      order += name;
      co_await move_to(context());
    }
  };
  spawn(context(), body('a'));
  spawn(context(), body('b'));
  poll_until([&] { return order.size() == 6; });
  poll_some();
  EXPECT_EQ(order, "ababab");
}

// A enters B, B is scheduled meanwhile and ends, and B's turn comes: the queued entry must neither
// resume nor touch a frame that is gone.
TEST_P(Contexts, ACoroutineFreedWhileItsScheduleIsQueuedBEndsInsideAAndItsTurnComes) {
  int ran = 0;
  const auto b_body = [&]() -> Task<void> {
    ++ran;
    co_return;
  };
  Coroutine* b = Coroutine::create(b_body(), "b");
  const auto a_body = [&]() -> Task<void> {
    b->enter();  // ends within
    co_return;
  };
  co_schedule(context(), *b);
  Coroutine::create(a_body(), "a")->enter();
  EXPECT_EQ(ran, 1);
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(ran, 1);
}

TEST_P(Contexts, RescheduledElsewhereWhileAStaleEntryIsQueuedHere) {
  auto other = AioContext::create(options("other"));
  std::vector<AioContext*> path;
  const auto body = [&]() -> Task<void> {
    for (int i = 0; i < 3; ++i) {
      path.push_back(AioContext::current());
      co_await yield();
    }
  };
  Coroutine* co = Coroutine::create(body());
  co_schedule(context(), *co);
  co->enter();               // stale here: 1
  co_schedule(*other, *co);  // pooled entry
  other->poll(true);
  EXPECT_EQ(path.size(), 2u);
  EXPECT_FALSE(poll_some());  // drops the stale one
  co_schedule(context(), *co);
  EXPECT_TRUE(poll_some());
  EXPECT_EQ(path, (std::vector<AioContext*>{&context(), other.get(), &context()}));
  Coroutine::destroy(co);
}

TEST_P(StillContexts, RescheduledHereWhileItsStaleEntryIsQueuedHereItKeepsTheLaterPlace) {
  std::string order;
  const auto body = [&]() -> Task<void> {
    order += 'c';
    co_await yield();
    order += 'C';
  };
  Coroutine* co = Coroutine::create(body());
  co_schedule(context(), *co);
  schedule_oneshot(context(), [&] { order += '|'; });
  co->enter();
  co_schedule(context(), *co);
  poll_some();
  EXPECT_EQ(order, "c|C");
}

TEST_P(Contexts, StaleEntriesOfManyContextsOutliveTheCoroutine) {
  std::vector<std::shared_ptr<AioContext>> others;
  for (int i = 0; i < 8; ++i) others.push_back(AioContext::create(options("other")));
  int steps = 0;
  const auto body = [&]() -> Task<void> {
    for (int i = 0; i < 16; ++i) {
      ++steps;
      if (i < 15) co_await yield();
    }
  };
  Coroutine* co = Coroutine::create(body());
  for (int i = 0; i < 16; ++i) {
    co_schedule(*others[i % 8], *co);
    co->enter();
  }
  EXPECT_EQ(steps, 16);
  for (auto& other : others) {
    for (int i = 0; i < 5; ++i) EXPECT_FALSE(other->poll(false));
  }
}

// ---- Sleeping and busy waiting

TEST_P(Contexts, WithPollMaxZeroItNeverSpins) {
  auto o = options("quiet");
  o.poll_max_ns = 0;
  IOThread thread(o);
  // Short sleeps, which would teach another context to spin.
  for (int i = 0; i < 200; ++i) thread.context().run([] {});
  const auto statistics = thread.context().run([&] { return thread.context().statistics(); });
  EXPECT_EQ(statistics.spins_paid, 0u);
  EXPECT_EQ(statistics.spins_in_vain, 0u);
  EXPECT_GT(statistics.sleeps, 0u);
}

TEST_P(Contexts, ShortWaitsTeachItToSpinAndSpinningPays) {
  PollBudget budget(1000);
  auto o = options("eager");
  o.poll_max_ns = 5'000'000;
  o.poll_budget = &budget;
  IOThread thread(o);
  AioContext::Statistics statistics;
  for (int i = 0; i < 100'000 && statistics.spins_paid < 5; ++i) {
    statistics = thread.context().run([&] { return thread.context().statistics(); });
  }
  EXPECT_GE(statistics.spins_paid, 5u);
}

TEST_P(Contexts, ABudgetThatIsUsedUpKeepsItFromSpinning) {
  PollBudget budget(1);  // one CPU: never
  auto o = options("modest");
  o.poll_budget = &budget;
  IOThread thread(o);
  for (int i = 0; i < 200; ++i) thread.context().run([] {});
  const auto statistics = thread.context().run([&] { return thread.context().statistics(); });
  EXPECT_EQ(statistics.spins_paid + statistics.spins_in_vain, 0u);
}

// Busy polling that burns idle CPU: after traffic that taught it to spin, an idle context goes to
// sleep once and stays there.
TEST_P(Contexts, BusyPollingThatBurnsIdleCpu) {
  PollBudget budget(1000);
  auto o = options("idle");
  o.poll_budget = &budget;
  IOThread thread(o);
  for (int i = 0; i < 2000; ++i) thread.context().run([] {});
  struct Sample {
    std::int64_t cpu_ns;
    std::uint64_t sleeps;
  };
  const auto sample = [&] { return Sample{thread_cpu_ns(), thread.context().statistics().sleeps}; };
  const Sample before = thread.context().run(sample);
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  const Sample after = thread.context().run(sample);
  // At most one busy wait of poll_max_ns, and then nothing.
  EXPECT_LT(after.cpu_ns - before.cpu_ns, kSanitized ? 10'000'000 : 2'000'000);
  EXPECT_LE(after.sleeps - before.sleeps, 3u);
}

// Nor does one that has something to do now and then: a wait that no busy wait could have caught
// must not teach it to spin.
TEST_P(Contexts, BusyPollingThatBurnsTheCpuOfAnAlmostIdleContext) {
  PollBudget budget(1000);
  auto o = options("almost idle");
  o.poll_budget = &budget;
  IOThread thread(o);
  const std::int64_t before = thread.context().run(thread_cpu_ns);
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    thread.context().run([] {});
  }
  const std::int64_t after = thread.context().run(thread_cpu_ns);
  EXPECT_LT(after - before, kSanitized ? 60'000'000 : 10'000'000) << "of 200 ms";
}

TEST_P(Contexts, LostWakeUpsWhenSleepingRacesWithPosting) {
  constexpr int kRounds = rounds(20'000);
  auto o = options("sleeper");
  o.poll_max_ns = 0;
  IOThread thread(o);
  std::atomic<int> arrived{0};
  TestRandom random(3);
  for (int i = 1; i <= kRounds; ++i) {
    schedule_oneshot(thread.context(), [&] { arrived.fetch_add(1); });
    for (auto n = random.below(400); n > 0; --n) RealPlatform::cpu_relax();
    if (i % 4 == 0) {
      while (arrived.load() < i) std::this_thread::yield();
    }
  }
  while (arrived.load() < kRounds) std::this_thread::yield();
  const auto statistics = thread.context().run([&] { return thread.context().statistics(); });
  EXPECT_GT(statistics.sleeps, static_cast<std::uint64_t>(kRounds) / 100);
}

// ---- run()

TEST_P(Contexts, RunReturnsWhatTheFunctionReturned) {
  IOThread thread(options("worker"));
  EXPECT_EQ(thread.context().run([&] { return AioContext::current(); }), &thread.context());
  EXPECT_EQ(*thread.context().run([] { return std::make_unique<int>(7); }), 7);
  bool called = false;
  thread.context().run([&] { called = true; });
  EXPECT_TRUE(called);
}

TEST_P(Contexts, RunThrowsWhatTheFunctionThrew) {
  IOThread thread(options("worker"));
  EXPECT_THROW(thread.context().run([]() -> int { throw std::runtime_error("no"); }),
               std::runtime_error);
  EXPECT_THROW(thread.context().run([] { throw 5; }), int);
  EXPECT_EQ(thread.context().run([] { return 1; }), 1);
}

TEST_P(Contexts, RunOnTheCurrentContextCallsAtOnce) {
  std::string order;
  schedule_oneshot(context(), [&] { order += 'q'; });
  context().run([&] { order += 'r'; });
  poll_some();
  EXPECT_EQ(order, "rq");
}

}  // namespace
}  // namespace roost
