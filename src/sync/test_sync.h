// SPDX-License-Identifier: MIT
// What the tests of locks and queues share: contexts polled by the test's own thread.
//
// Threads: the test's.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <stop_token>
#include <string>

#include "roost/aio/aio_context.h"
#include "roost/coro/task.h"

namespace roost {

class SyncTest : public testing::Test {
 protected:
  static std::shared_ptr<AioContext> make_context(std::string name) {
    AioContextOptions options;
    options.name = std::move(name);
    options.event_loop = EventLoop::kEpoll;
    options.poll_max_ns = 0;  // all on one thread: busy waiting would be in vain
    return AioContext::create(options);
  }

  /// Polls the contexts until nothing happens any more.
  void settle() {
    while (a().poll(false) || b().poll(false) || c().poll(false)) {
    }
  }

  AioContext& a() { return *a_; }
  AioContext& b() { return *b_; }
  AioContext& c() { return *c_; }

  const std::shared_ptr<AioContext> a_ = make_context("a");
  const std::shared_ptr<AioContext> b_ = make_context("b");
  const std::shared_ptr<AioContext> c_ = make_context("c");
  std::string order_;  // what happened, a letter each
};

}  // namespace roost
