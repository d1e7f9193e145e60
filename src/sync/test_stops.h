// SPDX-License-Identifier: MIT
// What stress tests share whose waits are ended by a thread that requests stops at any moment.
//
// Threads: the bodies run on three contexts, the stops are requested on the test's thread.
// Lifetime: run() returns when all of them have ended.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <coroutine>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <mutex>
#include <stop_token>
#include <thread>
#include <utility>
#include <vector>

#include "base/test_build.h"
#include "roost/aio/iothread.h"
#include "roost/coro/task.h"

namespace roost {

/// The stop source that a coroutine's wait is to be ended by, for the thread that does so.
class StopSlot {
 public:
  std::stop_token renew() {
    std::lock_guard lock(mutex_);
    source_ = std::stop_source();
    return source_.get_token();
  }
  void request_stop() {
    std::unique_lock lock(mutex_);
    std::stop_source source = source_;
    lock.unlock();  // the callbacks may enter coroutines
    source.request_stop();
  }

 private:
  std::mutex mutex_;
  std::stop_source source_;
};

/// What happened to a wait that a stop may end.
struct Seen {
  bool waited = false;   // it suspended
  bool stopped = false;  // a stop was requested after it had looked first and before it resumed
};

/// Awaits `wait` and notes what happened. It looks before the stop callback is gone: a stop that it
/// sees had its effect on the wait, or came when that was granted already.
template <class Wait>
class Watched {
 public:
  Watched(Wait wait, std::stop_token stop, Seen& seen)
      : wait_(std::move(wait)), stop_(std::move(stop)), seen_(seen) {}

  auto operator co_await() && noexcept {
    return Awaiter{std::move(wait_).operator co_await(), stop_, seen_};
  }

 private:
  using Inner = decltype(std::declval<Wait>().operator co_await());

  struct Awaiter {
    Inner inner;
    std::stop_token& stop;
    Seen& seen;

    bool await_ready() { return inner.await_ready(); }
    template <class Promise>
    void await_suspend(std::coroutine_handle<Promise> frame) {
      seen.waited = true;
      inner.await_suspend(frame);
    }
    auto await_resume() {
      seen.stopped = stop.stop_requested();
      return inner.await_resume();
    }
  };

  Wait wait_;
  std::stop_token stop_;
  Seen& seen_;
};

/// How the waits of a test ended, on all threads.
struct WaitCounts {
  std::atomic<std::uint64_t> waited{0};
  std::atomic<std::uint64_t> cancelled{0};     // while they waited
  std::atomic<std::uint64_t> granted_late{0};  // the stop came, but to one on its way to resume

  void count(const Seen& seen, bool granted) {
    if (!seen.waited) return;
    waited.fetch_add(1, std::memory_order_relaxed);
    if (!granted) cancelled.fetch_add(1, std::memory_order_relaxed);
    if (granted && seen.stopped) granted_late.fetch_add(1, std::memory_order_relaxed);
  }
  bool both_ways(std::uint64_t enough = 20) const {
    return cancelled > enough && granted_late > enough;
  }
  void print(const char* what) const {
    std::printf("%s: %lu waits, %lu cancelled, %lu granted although they were stopped\n", what,
                waited.load(), cancelled.load(), granted_late.load());
  }
};

/// Goes on until the rare paths were reached, and fails if they were not after half a minute.
class StopsAtAnyMoment : public testing::Test {
 protected:
  static constexpr int kThreads = 3;
  static constexpr int kCoroutines = 12;
  static constexpr auto kMinTime = std::chrono::milliseconds(200);
  static constexpr auto kMaxTime = std::chrono::seconds(30);

  virtual AioContextOptions context_options() const { return {}; }

  // Runs body(i) in kCoroutines coroutines until `reached` has come true, while another thread
  // requests stops.
  void run(const std::function<Task<>(int)>& body, const std::function<bool()>& reached) {
    std::vector<std::unique_ptr<IOThread>> threads;
    for (int i = 0; i < kThreads; ++i) {
      threads.push_back(std::make_unique<IOThread>(context_options()));
    }
    const auto root = [&](int i) -> Task<> {
      co_await body(i);
      ended_.fetch_add(1);
    };
    for (int i = 0; i < kCoroutines; ++i) contexts_[i] = &threads[i % kThreads]->context();
    for (int i = 0; i < kCoroutines; ++i) spawn(*contexts_[i], root(i));
    const auto start = std::chrono::steady_clock::now();
    TestRandom random(7);
    for (;;) {
      slots_[random.below(kCoroutines)].request_stop();
      if (random.below(4) == 0) std::this_thread::yield();
      if (random.below(16) == 0) std::this_thread::sleep_for(std::chrono::microseconds(20));
      const auto age = std::chrono::steady_clock::now() - start;
      if (age > kMaxTime || (age > kMinTime && reached())) break;
    }
    stop_ = true;
    // Those that wait to be woken by others end by their stops.
    while (ended_ < kCoroutines) {
      for (StopSlot& slot : slots_) slot.request_stop();
      std::this_thread::yield();
    }
    EXPECT_TRUE(reached()) << "the rare paths were not reached";
  }

  std::array<StopSlot, kCoroutines> slots_;
  std::array<AioContext*, kCoroutines> contexts_{};  // where each body starts
  std::atomic<bool> stop_{false};
  std::atomic<int> ended_{0};
};

}  // namespace roost
