// SPDX-License-Identifier: MIT
// A context without an event loop, for tests of coroutines: a queue that the test drains.
//
// Threads: post() from any thread; everything else on the test's.
#pragma once

#include <mutex>
#include <string>

#include "roost/coro/context.h"
#include "roost/coro/coroutine.h"

namespace roost {

class TestContext final : public CoContext {
 public:
  explicit TestContext(std::uint32_t index, std::string name = "test")
      : CoContext(index, std::move(name)) {}

  bool post(QueueEntry& entry) noexcept override {
    std::lock_guard lock(mutex_);
    if (closed_) return false;
    foreign_.push(entry);
    return true;
  }

  /// One iteration: what is queued now. Returns how many coroutines ran.
  int run() {
    EntryQueue batch;
    batch.append(added_);
    {
      std::lock_guard lock(mutex_);
      batch.append(foreign_);
    }
    int ran = 0;
    CoContext* const outer = this_thread().context;
    this_thread().context = this;
    while (QueueEntry* entry = batch.pop()) {
      ran += run_entry(this_thread(), *this, static_cast<CoroutineEntry&>(*entry));
    }
    this_thread().context = outer;
    return ran;
  }

  void close() {
    std::lock_guard lock(mutex_);
    closed_ = true;
  }

 private:
  std::mutex mutex_;
  EntryQueue foreign_;
  bool closed_ = false;
};

/// Makes a TestContext current.
class TestScope {
 public:
  explicit TestScope(TestContext& context) : outer_(this_thread().context) {
    this_thread().context = &context;
  }
  ~TestScope() { this_thread().context = outer_; }
  TestScope(const TestScope&) = delete;
  TestScope& operator=(const TestScope&) = delete;

 private:
  CoContext* const outer_;
};

}  // namespace roost
