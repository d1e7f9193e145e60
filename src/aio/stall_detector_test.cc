// SPDX-License-Identifier: MIT
// The stall detector: who is reported, how often, and who is not. The tests own its clock and make
// it look; what stalls waits for the test.
#include "roost/aio/stall_detector.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "roost/aio/aio_context.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/iothread.h"
#include "roost/aio/unique_fd.h"
#include "roost/base/clock.h"
#include "roost/coro/task.h"

namespace roost {
namespace {

constexpr std::int64_t kThresholdNs = 100'000'000;

// GCC 12's ThreadSanitizer keeps a signal that comes at certain moments of the thread that it is
// for, and never delivers it, however often that thread calls poll() afterwards. Clang's does not.
#if defined(__SANITIZE_THREAD__) && !defined(__clang__)
#define ROOST_NEEDS_SIGNALS() GTEST_SKIP() << "signals to other threads get lost here"
#else
#define ROOST_NEEDS_SIGNALS() static_assert(true)
#endif

class Pipe {
 public:
  Pipe() {
    int ends[2] = {};
    EXPECT_EQ(::pipe(ends), 0);
    from_ = UniqueFd(ends[0]);
    to_ = UniqueFd(ends[1]);
  }
  int to() const { return to_.get(); }

  void put(char c) const { EXPECT_EQ(::write(to_.get(), &c, 1), 1); }
  // Blocks, in poll(): GCC's ThreadSanitizer lets signal handlers run there, and not within read().
  char take() const {
    pollfd from{.fd = from_.get(), .events = POLLIN, .revents = 0};
    while (::poll(&from, 1, -1) < 0 && errno == EINTR) {
    }
    char c = 0;
    EXPECT_EQ(::read(from_.get(), &c, 1), 1);
    return c;
  }
  std::string line() const {
    std::string text;
    for (char c = take(); c != '\n'; c = take()) text += c;
    return text;
  }

 private:
  UniqueFd from_;
  UniqueFd to_;
};

pid_t own_tid() { return static_cast<pid_t>(::syscall(SYS_gettid)); }

// Waits until a thread of this process sleeps in the kernel.
void wait_until_asleep(pid_t tid) {
  const std::string path = "/proc/self/task/" + std::to_string(tid) + "/stat";
  for (;;) {
    std::string text;
    std::getline(std::ifstream(path), text);
    // The state stands behind the name, which is in parentheses.
    const auto end = text.rfind(')');
    if (end != std::string::npos && text.substr(end, 3) == ") S") return;
    std::this_thread::yield();
  }
}

class Stalls : public testing::Test {
 protected:
  AioContextOptions options(std::string name) {
    AioContextOptions o;
    o.name = std::move(name);
    o.stall_detector = &detector_;
    return o;
  }

  // Lets more than the threshold pass, and has the detector look as often as it should.
  void let_time_pass() {
    for (int looks = 0; looks < 8; ++looks) {
      clock_.advance_ns(detector_.period_ns());
      detector_.look();
    }
  }

  // The report that has been asked for, up to and without the stack.
  std::string next_report() {
    std::string text;
    for (;;) {
      const std::string line = reports_.line();
      if (line.find("the stack") != std::string::npos) return text;
      text += line + "\n";
    }
  }

  // The handler may still be writing the stack.
  void wait_for_reports(std::uint64_t count) {
    while (detector_.reports() < count) std::this_thread::yield();
  }

  ManualClock clock_;
  Pipe reports_;
  StallDetector detector_{
      {.threshold_ns = kThresholdNs, .fd = reports_.to(), .clock = &clock_, .own_thread = false}};
  Pipe began_;
  Pipe release_;
};

Task<void> stall(Pipe& began, Pipe& release) {
  co_await std::suspend_never{};
  began.put('!');
  release.take();
}

Task<void> call_stall(Pipe& began, Pipe& release, unsigned& line) {
  line = __LINE__ + 1;
  co_await stall(began, release);
}

TEST_F(Stalls, ACoroutineThatBlocksItsThreadIsReportedOnceWithItsNameAndPlaces) {
  ROOST_NEEDS_SIGNALS();
  IOThread thread(options("busy one"));
  unsigned line = 0;
  unsigned created = 0;
  schedule_oneshot(thread.context(), [&] {
    created = __LINE__ + 1;
    Coroutine::create(call_stall(began_, release_, line), "blocker")->enter();
  });
  began_.take();
  let_time_pass();
  const std::string report = next_report();
  EXPECT_NE(report.find("context 'busy one' has not got on for 1"), std::string::npos) << report;
  EXPECT_NE(report.find("coroutine 'blocker'"), std::string::npos) << report;
  const auto place = [](unsigned at) {
    return "stall_detector_test.cc:" + std::to_string(at) + " ";
  };
  EXPECT_NE(report.find(place(created)), std::string::npos) << report;
  EXPECT_NE(report.find("awaits at"), std::string::npos) << report;
  EXPECT_NE(report.find(place(line)), std::string::npos) << report;
  EXPECT_NE(report.find("call_stall"), std::string::npos) << report;

  wait_for_reports(1);
  for (int i = 0; i < 10; ++i) let_time_pass();
  release_.put('!');
  thread.context().run([] {});
  EXPECT_EQ(detector_.reports(), 1u);
}

TEST_F(Stalls, EachStallIsReported) {
  ROOST_NEEDS_SIGNALS();
  IOThread thread(options("io"));
  for (std::uint64_t stalls = 1; stalls <= 3; ++stalls) {
    schedule_oneshot(thread.context(), [&] {
      began_.put('!');
      release_.take();
    });
    began_.take();
    let_time_pass();
    EXPECT_NE(next_report().find("a callback runs"), std::string::npos);
    wait_for_reports(stalls);
    release_.put('!');
    thread.context().run([] {});
  }
  EXPECT_EQ(detector_.reports(), 3u);
}

TEST_F(Stalls, ABlockedContextDoesNotHideAnotherOne) {
  ROOST_NEEDS_SIGNALS();
  IOThread one(options("one"));
  IOThread two(options("two"));
  for (IOThread* thread : {&one, &two}) {
    schedule_oneshot(thread->context(), [&] {
      began_.put('!');
      release_.take();
    });
  }
  began_.take();
  began_.take();
  let_time_pass();
  wait_for_reports(2);
  release_.put('!');
  release_.put('!');
  one.context().run([] {});
  two.context().run([] {});
  EXPECT_EQ(detector_.reports(), 2u);
}

TEST_F(Stalls, AContextThatSleepsDoesNotStall) {
  IOThread thread(options("sleeper"));
  wait_until_asleep(thread.context().run(own_tid));
  for (int i = 0; i < 10; ++i) let_time_pass();
  thread.context().run([] {});
  EXPECT_EQ(detector_.reports(), 0u);
}

TEST_F(Stalls, AContextThatNobodyPollsDoesNotStall) {
  const auto context = AioContext::create(options("by hand"));
  ContextScope scope(*context);
  context->poll(false);
  let_time_pass();
  context->poll(false);
  let_time_pass();
  EXPECT_EQ(detector_.reports(), 0u);
}

TEST_F(Stalls, OneThatIsPolledByHandStallsWithinAPoll) {
  const auto context = AioContext::create(options("by hand"));
  ContextScope scope(*context);
  schedule_oneshot(*context, [&] { let_time_pass(); });
  while (context->poll(false)) {
  }
  EXPECT_EQ(detector_.reports(), 1u);
  EXPECT_NE(next_report().find("context 'by hand'"), std::string::npos);
}

TEST_F(Stalls, APollNestedInACallbackIsProgress) {
  const auto context = AioContext::create(options("by hand"));
  ContextScope scope(*context);
  schedule_oneshot(*context, [&] {
    for (int looks = 0; looks < 20; ++looks) {
      clock_.advance_ns(detector_.period_ns());
      detector_.look();
      context->poll(false);
    }
  });
  while (context->poll(false)) {
  }
  EXPECT_EQ(detector_.reports(), 0u);
}

TEST_F(Stalls, ACallbackThatPollsAnotherContextStallsItsOwn) {
  const auto outer = AioContext::create(options("outer"));
  const auto inner = AioContext::create(options("inner"));
  ContextScope scope(*outer);
  schedule_oneshot(*outer, [&] {
    schedule_oneshot(*inner, [&] { let_time_pass(); });
    while (inner->poll(false)) {
    }
  });
  while (outer->poll(false)) {
  }
  // Neither gets on, and both are named.
  EXPECT_EQ(detector_.reports(), 2u);
  const std::string reports = next_report() + next_report();
  EXPECT_NE(reports.find("context 'outer'"), std::string::npos) << reports;
  EXPECT_NE(reports.find("context 'inner'"), std::string::npos) << reports;
}

TEST_F(Stalls, AWaitForTheContextLockIsNoStall) {
  const auto context = AioContext::create(options("held off"));
  std::promise<void> acquired;
  std::promise<pid_t> polls;
  std::jthread holder([&] {
    const ContextGuard guard(*context);
    acquired.set_value();
    wait_until_asleep(polls.get_future().get());
    for (int i = 0; i < 10; ++i) let_time_pass();
  });
  acquired.get_future().wait();
  ContextScope scope(*context);
  polls.set_value(own_tid());
  context->poll(false);
  EXPECT_EQ(context->statistics().lock_waits, 1u);
  EXPECT_EQ(detector_.reports(), 0u);
}

TEST_F(Stalls, TimeThatTheDetectorItselfMissedDoesNotCount) {
  const auto context = AioContext::create(options("by hand"));
  ContextScope scope(*context);
  schedule_oneshot(*context, [&] {
    detector_.look();
    // As when the whole process was stopped.
    clock_.advance_ns(1000 * kThresholdNs);
    detector_.look();
  });
  while (context->poll(false)) {
  }
  EXPECT_EQ(detector_.reports(), 0u);
}

TEST_F(Stalls, AThreadMayEndWhileItsReportIsAskedFor) {
  const UniqueFd nowhere(::open("/dev/null", O_WRONLY));
  StallDetector detector(
      {.threshold_ns = kThresholdNs, .fd = nowhere.get(), .clock = &clock_, .own_thread = false});
  for (int round = 0; round < 50; ++round) {
    AioContextOptions o;
    o.stall_detector = &detector;
    IOThread thread(o);
    schedule_oneshot(thread.context(), [&] { began_.put('!'); });
    thread.stop();
    began_.take();
    // It gets on, and ends, meanwhile.
    for (int looks = 0; looks < 8; ++looks) {
      clock_.advance_ns(detector.period_ns());
      detector.look();
    }
  }
}

TEST(StallDetectorThread, LooksByItself) {
  ROOST_NEEDS_SIGNALS();
  Pipe reports;
  StallDetector detector({.threshold_ns = 4'000'000, .fd = reports.to()});
  AioContextOptions options;
  options.name = "io";
  options.stall_detector = &detector;
  IOThread thread(options);
  // Until the report is there.
  thread.context().run([&] { EXPECT_NE(reports.line().find("context 'io'"), std::string::npos); });
}

}  // namespace
}  // namespace roost
