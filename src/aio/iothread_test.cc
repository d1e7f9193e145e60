// SPDX-License-Identifier: MIT
// I/O threads, the thread pool, the inbox on one thread; and the abort of every misuse of a
// context.
#include "roost/aio/iothread.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "aio/test_loop.h"
#include "base/test_build.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/event_notifier.h"
#include "roost/aio/inbox.h"
#include "roost/aio/io.h"
#include "roost/aio/thread_pool.h"
#include "roost/aio/timer.h"
#include "roost/aio/unique_fd.h"

namespace roost {
namespace {

class IOThreads : public OnEachLoop {};
ROOST_ON_EACH_LOOP(IOThreads);

TEST_P(IOThreads, OneStartsAndStops) {
  IOThread thread(options("worker"));
  EXPECT_EQ(thread.context().name(), "worker");
  thread.stop();
  thread.stop();
  thread.join();
  thread.join();
}

TEST_P(IOThreads, TheDestructorStopsAndJoins) {
  std::weak_ptr<AioContext> context;
  {
    IOThread thread(options());
    context = thread.share_context();
  }
  EXPECT_TRUE(context.expired());
}

TEST_P(IOThreads, WhatWasPostedBeforeTheStopStillRuns) {
  std::atomic<int> ran{0};
  {
    IOThread thread(options());
    for (int i = 0; i < 1000; ++i) schedule_oneshot(thread.context(), [&] { ++ran; });
    thread.stop();
  }
  EXPECT_EQ(ran, 1000);
}

TEST_P(IOThreads, AnIdleOneReturnsTheMemoryOfManyFrames) {
  if (kSanitized) GTEST_SKIP() << "a sanitizer keeps memory of its own";
  IOThread thread(options());
  std::vector<void*> frames(128 << 10);
  thread.context().run([] {});
  const std::size_t before = resident_bytes();
  thread.context().run([&] {
    for (void*& frame : frames) std::memset(frame = allocate_frame(1024), 1, 1024);
    for (void* frame : frames) free_frame(frame, 1024);
  });
  while (resident_bytes() > before + (24 << 20)) std::this_thread::yield();
}

TEST_P(IOThreads, CurrentIsItsContextOnItsThread) {
  IOThread thread(options());
  EXPECT_EQ(AioContext::current(), nullptr);
  AioContext* seen = nullptr;
  std::thread::id id;
  thread.context().run([&] {
    seen = AioContext::current();
    id = std::this_thread::get_id();
  });
  EXPECT_EQ(seen, &thread.context());
  EXPECT_NE(id, std::this_thread::get_id());
}

TEST_P(IOThreads, OneStopsItself) {
  IOThread thread(options());
  schedule_oneshot(thread.context(), [&] { thread.stop(); });
  thread.join();
}

TEST_P(IOThreads, TheContextMayOutliveItsThread) {
  std::shared_ptr<AioContext> context;
  {
    IOThread thread(options());
    context = thread.share_context();
    context->run([] {});
  }
  bool ran = false;
  schedule_oneshot(*context, [&] { ran = true; });
  EXPECT_FALSE(ran);
  context->poll(false);  // this thread takes over
  EXPECT_TRUE(ran);
}

TEST_P(IOThreads, TwoRunCallsOnEachOther) {
  IOThread a(options("a"));
  IOThread b(options("b"));
  EXPECT_EQ(a.context().run([&] { return b.context().run([] { return 42; }); }), 42);
}

TEST_P(IOThreads, ManyStartAndStop) {
  for (int i = 0; i < 50; ++i) {
    IOThread thread(options());
    if (i % 2) thread.context().run([] {});
  }
}

// ---- ThreadPool

struct Job : ThreadPool::Work {
  explicit Job(std::atomic<int>& counter) : done(counter) {
    run = [](ThreadPool::Work& work) noexcept {
      auto& job = static_cast<Job&>(work);
      job.thread = std::this_thread::get_id();
      job.done.fetch_add(1);
    };
  }
  std::atomic<int>& done;
  std::thread::id thread;
};

TEST(ThreadPool, RunsEverythingElsewhere) {
  std::atomic<int> done{0};
  std::vector<std::unique_ptr<Job>> jobs;
  {
    ThreadPool pool(3);
    for (int i = 0; i < 500; ++i) {
      jobs.push_back(std::make_unique<Job>(done));
      pool.submit(*jobs.back());
    }
  }  // waits
  EXPECT_EQ(done, 500);
  for (const auto& job : jobs) EXPECT_NE(job->thread, std::this_thread::get_id());
}

TEST(ThreadPool, OneThatIsNeverUsedGoesQuietly) { ThreadPool pool; }

TEST(ThreadPool, BlockedWorkDoesNotHoldUpTheRest) {
  struct Blocker : ThreadPool::Work {
    std::atomic<bool> entered{false};
    std::atomic<bool> released{false};
  } blocker;
  blocker.run = [](ThreadPool::Work& work) noexcept {
    auto& b = static_cast<Blocker&>(work);
    b.entered = true;
    b.entered.notify_all();
    b.released.wait(false);
  };
  std::atomic<int> done{0};
  Job job(done);
  ThreadPool pool(2);
  pool.submit(blocker);
  blocker.entered.wait(false);
  pool.submit(job);
  while (done == 0) std::this_thread::yield();
  blocker.released = true;
  blocker.released.notify_all();
}

// ---- The inbox, one thread

struct Letter {
  RealPlatform::Shared<Letter*> next;
};
using LetterBox = Inbox<RealPlatform, Letter>;

std::vector<Letter*> list(LetterBox::List letters) {
  std::vector<Letter*> result;
  for (Letter* letter = letters.oldest; letter; letter = letter->next.get()) {
    result.push_back(letter);
  }
  EXPECT_EQ(letters.newest, result.empty() ? nullptr : result.back());
  return result;
}

TEST(Inbox, GivesBackInOrderWhatWasPushed) {
  LetterBox inbox;
  std::array<Letter, 5> letters;
  EXPECT_FALSE(inbox.has_entries());
  EXPECT_TRUE(list(inbox.take()).empty());
  for (Letter& letter : letters) EXPECT_EQ(inbox.push(letter), LetterBox::Push::kQueued);
  EXPECT_TRUE(inbox.has_entries());
  const auto taken = list(inbox.take());
  ASSERT_EQ(taken.size(), 5u);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(taken[i], &letters[i]);
  EXPECT_TRUE(list(inbox.take()).empty());
}

TEST(Inbox, OnlyTheFirstPushToASleepingConsumerOwesAWakeUp) {
  LetterBox inbox;
  std::array<Letter, 3> letters;
  ASSERT_TRUE(inbox.try_sleep());
  EXPECT_EQ(inbox.push(letters[0]), LetterBox::Push::kWakeOwed);
  EXPECT_EQ(inbox.push(letters[1]), LetterBox::Push::kQueued);
  EXPECT_TRUE(inbox.wake_up());
  EXPECT_EQ(list(inbox.take()).size(), 2u);
  EXPECT_EQ(inbox.push(letters[2]), LetterBox::Push::kQueued);
}

TEST(Inbox, DoesNotSleepOnEntries) {
  LetterBox inbox;
  Letter letter;
  (void)inbox.push(letter);
  EXPECT_FALSE(inbox.try_sleep());
  EXPECT_EQ(list(inbox.take()).size(), 1u);
  EXPECT_TRUE(inbox.try_sleep());
  EXPECT_FALSE(inbox.wake_up()) << "nobody owes anything";
}

TEST(Inbox, AClosedOneRefusesAndGaveBackTheRest) {
  LetterBox inbox;
  std::array<Letter, 2> letters;
  (void)inbox.push(letters[0]);
  EXPECT_EQ(list(inbox.close()).size(), 1u);
  EXPECT_EQ(inbox.push(letters[1]), LetterBox::Push::kClosed);
  EXPECT_FALSE(inbox.has_entries());
  EXPECT_TRUE(list(inbox.take()).empty());
  EXPECT_FALSE(inbox.try_sleep());
}

// ---- Misuse. Everything is made within the statement that dies, in a process of its own.

class MisuseDeathTest : public OnEachLoop {};
ROOST_ON_EACH_LOOP(MisuseDeathTest);

Task<void> nothing() { co_return; }
Task<void> yields() { co_await yield(); }

TEST_P(MisuseDeathTest, ABlockingPollInACoroutine) {
  const auto die = [&] {
    auto context = AioContext::create(options());
    ContextScope scope(*context);
    const auto body = [&]() -> Task<void> {
      context->poll(true);
      co_return;
    };
    Coroutine::create(body(), "impatient")->enter();
  };
  EXPECT_DEATH(die(), "blocking poll of context 'loop' would block inside coroutine 'impatient'");
}

TEST_P(MisuseDeathTest, RunningAFunctionElsewhereInACoroutine) {
  const auto die = [&] {
    auto context = AioContext::create(options());
    auto other = AioContext::create(options("other"));
    ContextScope scope(*context);
    const auto body = [&]() -> Task<void> {
      other->run([] {});
      co_return;
    };
    Coroutine::create(body(), "impatient")->enter();
  };
  EXPECT_DEATH(die(), "context 'other' would block inside coroutine 'impatient'");
}

TEST_P(MisuseDeathTest, JoiningAThreadInACoroutine) {
  const auto die = [&] {
    IOThread thread(options("worker"));
    auto context = AioContext::create(options());
    ContextScope scope(*context);
    const auto body = [&]() -> Task<void> {
      thread.join();
      co_return;
    };
    Coroutine::create(body(), "impatient")->enter();
  };
  EXPECT_DEATH(die(), "join of thread 'worker' would block inside coroutine 'impatient'");
}

Task<void> receives(int fd) {
  std::array<std::byte, 8> buffer;
  co_await io_recv(fd, buffer);
}

TEST_P(MisuseDeathTest, StoppingAThreadWhoseCoroutinesWaitForIo) {
  const auto die = [&](int waiting) {
    int ends[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_DGRAM, 0, ends), 0);
    std::vector<UniqueFd> keep;
    for (int fd : ends) keep.emplace_back(fd);
    IOThread thread(options("worker"));
    for (int i = 0; i < waiting; ++i) {
      // Descriptors of their own, since one takes one that receives.
      keep.emplace_back(::dup(ends[0]));
      spawn(thread.context(), receives(keep.back().get()), "receiver");
    }
    thread.stop();
    thread.join();
  };
  EXPECT_DEATH(die(1),
               "context 'worker' gives up its .* with 1 requests in flight: coroutine 'receiver', "
               "created at .*iothread_test.cc:.*, waits at .*iothread_test.cc:");
  EXPECT_DEATH(die(5), "with 5 requests in flight: .*; .*; and 2 more");
}

TEST_P(MisuseDeathTest, DestructionWithACoroutineScheduled) {
  const auto die = [&] {
    auto context = AioContext::create(options());
    spawn(*context, nothing(), "forgotten");
  };
  EXPECT_DEATH(die(), "context 'loop' destroyed while coroutine 'forgotten' is scheduled");
}

TEST_P(MisuseDeathTest, DestructionWithABottomHalfScheduled) {
  const auto die = [&] {
    auto context = AioContext::create(options());
    BottomHalf bh(*context, [] {});
    bh.schedule();
    context.reset();
  };
  EXPECT_DEATH(die(), "context 'loop' destroyed while a bottom half is scheduled");
}

TEST_P(MisuseDeathTest, DestructionWithAnIdleBottomHalfScheduled) {
  const auto die = [&] {
    auto context = AioContext::create(options());
    BottomHalf bh(*context, [] {});
    {
      ContextScope scope(*context);
      schedule_oneshot(*context, [] {});
      bh.schedule_idle();
      context->poll(false);
      bh.schedule_idle();
    }
    context.reset();
  };
  EXPECT_DEATH(die(), "context 'loop' destroyed while a bottom half is scheduled");
}

TEST_P(MisuseDeathTest, DestructionBeforeABottomHalf) {
  const auto die = [&] {
    auto context = AioContext::create(options());
    BottomHalf bh(*context, [] {});
    context.reset();
  };
  EXPECT_DEATH(die(), "context 'loop' destroyed before 1 of its bottom halves");
}

TEST_P(MisuseDeathTest, DestructionWithAOneShotWaiting) {
  const auto die = [&] {
    auto context = AioContext::create(options());
    schedule_oneshot(*context, [] {});
  };
  EXPECT_DEATH(die(), "context 'loop' destroyed while a call to it is waiting");
}

TEST_P(MisuseDeathTest, DestructionWithATimerArmed) {
  const auto die = [&] {
    auto context = AioContext::create(options());
    Timer timer(*context, [] {});
    {
      ContextScope scope(*context);
      timer.arm_after(1'000'000);
    }
    context.reset();
  };
  EXPECT_DEATH(die(), "context 'loop' destroyed while a timer is armed");
}

TEST_P(MisuseDeathTest, DestructionWithAHandlerSet) {
  const auto die = [&] {
    EventNotifier notifier;
    auto context = AioContext::create(options());
    {
      ContextScope scope(*context);
      context->set_event_notifier(notifier, [] {});
      context->poll(false);
    }
    context.reset();
  };
  EXPECT_DEATH(die(), "context 'loop' destroyed while descriptor [0-9]+ has a handler");
}

TEST_P(MisuseDeathTest, AHandlerSetFromOutside) {
  const auto die = [&] {
    auto context = AioContext::create(options());
    context->set_fd_handler(0, {.read = [] {}, .write = nullptr, .poll = nullptr});
  };
  EXPECT_DEATH(die(), "handler of descriptor 0 changed outside of context 'loop'");
}

TEST_P(MisuseDeathTest, ATimerArmedFromOutside) {
  const auto die = [&] {
    auto context = AioContext::create(options());
    Timer timer(*context, [] {});
    timer.arm_after(0);
  };
  EXPECT_DEATH(die(), "timer armed outside of its context 'loop'");
}

// A cancelled or deleted bottom half, a notify and a stale entry are nothing live.
TEST_P(IOThreads, DestructionWithNothingLiveQueuedIsFine) {
  auto context = AioContext::create(options());
  {
    BottomHalf cancelled(*context, [] { FAIL(); });
    cancelled.schedule();
    cancelled.cancel();
    BottomHalf deleted(*context, [] { FAIL(); });
    deleted.schedule();
    context->notify();
    Coroutine* co = Coroutine::create(yields());
    co_schedule(*context, *co);
    ContextScope scope(*context);
    co->enter();
    Coroutine::destroy(co);
  }
  context.reset();
}

TEST(IOThreadRun, WhatGivesAReferenceGivesItThroughARemoteCallToo) {
  IOThread thread({.name = "far"});
  int value = 1;
  const auto get = [&value]() -> int& { return value; };
  int& far = thread.context().run(get);
  EXPECT_EQ(&far, &value);
  const auto context = AioContext::create();
  const ContextScope scope(*context);
  int& near = context->run(get);
  EXPECT_EQ(&near, &value);
}

}  // namespace
}  // namespace roost
