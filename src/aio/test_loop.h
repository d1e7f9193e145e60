// SPDX-License-Identifier: MIT
// What tests of event loops share: a fixture whose tests run once on each back end, on a context
// that the test polls by hand.
//
// Threads: the fixture's context belongs to the test's thread.
// Lifetime: tests remove what they set before they end; the context checks that.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <ostream>
#include <string>

#include "roost/aio/aio_context.h"
#include "roost/aio/back_end.h"

namespace roost {

inline void PrintTo(EventLoop loop, std::ostream* out) {
  *out << (loop == EventLoop::kIoUring ? "io_uring" : "epoll");
}

inline std::string event_loop_name(const testing::TestParamInfo<EventLoop>& info) {
  return info.param == EventLoop::kIoUring ? "IoUring" : "Epoll";
}

/// On every back end that this machine allows.
class OnEachLoop : public testing::TestWithParam<EventLoop> {
 protected:
  void SetUp() override {
    if (GetParam() == EventLoop::kIoUring && !io_uring_available()) {
      GTEST_SKIP() << "the kernel refuses io_uring";
    }
  }

  AioContextOptions options(std::string name = "loop") const {
    AioContextOptions o;
    o.name = std::move(name);
    o.event_loop = GetParam();
    return o;
  }
};

/// With a context that is current for the whole test.
class LoopTest : public OnEachLoop {
 protected:
  void SetUp() override {
    OnEachLoop::SetUp();
    if (IsSkipped()) return;
    context_ = AioContext::create(loop_options());
    scope_.emplace(*context_);
  }

  virtual AioContextOptions loop_options() { return options(); }

  void TearDown() override {
    scope_.reset();
    context_.reset();
  }

  AioContext& context() { return *context_; }

  /// Polls until `done()`; a test that never gets there runs into its time limit.
  template <class Predicate>
  void poll_until(Predicate done) {
    while (!done()) context_->poll(true);
  }

  /// Iterations that do not wait, for "and nothing else happens".
  bool poll_some(int iterations = 20) {
    bool progress = false;
    for (int i = 0; i < iterations; ++i) progress |= context_->poll(false);
    return progress;
  }

  std::shared_ptr<AioContext> context_;
  std::optional<ContextScope> scope_;
};

/// On a clock that stands still unless the test advances it: how many entries an iteration runs
/// does not depend on how fast the machine is.
class StillLoopTest : public LoopTest {
 protected:
  AioContextOptions loop_options() override {
    auto o = options();
    o.clock = &clock_;
    return o;
  }
  ManualClock clock_;
};

#define ROOST_ON_EACH_LOOP(fixture) \
  INSTANTIATE_TEST_SUITE_P(         \
      Loops, fixture, ::testing::Values(EventLoop::kIoUring, EventLoop::kEpoll), event_loop_name)

}  // namespace roost
