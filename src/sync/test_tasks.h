// SPDX-License-Identifier: MIT
// What the tests of structured concurrency share: tasks that count what became of them, and a
// context that the test polls by hand on a clock that it owns.
//
// Threads: the fixture belongs to the test's thread; Log is written on any.
#pragma once

#include <atomic>
#include <stdexcept>
#include <stop_token>
#include <string>
#include <utility>

#include "aio/test_loop.h"
#include "roost/base/result.h"
#include "roost/coro/completion.h"
#include "roost/coro/task.h"

namespace roost {

/// What became of a test's tasks.
struct Log {
  std::atomic<int> started{0};
  std::atomic<int> stopped{0};  // ended by their stop token
  std::atomic<int> ended{0};    // in any way
  std::atomic<int> running{0};
  std::atomic<int> most{0};    // running at the same time
  std::atomic<int> frames{0};  // alive

  // Lives in a task's frame, as an argument.
  class Frame {
   public:
    explicit Frame(Log& log) : log_(&log) { ++log_->frames; }
    Frame(Frame&& other) noexcept : log_(std::exchange(other.log_, nullptr)) {}
    Frame& operator=(Frame&&) = delete;
    ~Frame() {
      if (log_) --log_->frames;
    }

   private:
    Log* log_;
  };

  void begin() {
    ++started;
    const int now = ++running;
    int seen = most.load();
    while (seen < now && !most.compare_exchange_weak(seen, now)) {
    }
  }
  void end() {
    --running;
    ++ended;
  }
};

inline Task<Result<void>> succeed_at_once() { co_return Result<void>(); }

inline Task<Result<void>> fail_at_once(int code, std::string doing = "failing") {
  co_return fail(code, std::move(doing));
}

inline Task<void> throw_at_once(std::string what) {
  throw std::runtime_error(what);
  co_return;
}

/// Ends with ECANCELED once `stop` is requested, and never by itself.
inline Task<Result<void>> until_stopped(std::stop_token stop, Log& log, Log::Frame) {
  log.begin();
  Completion<> never("what never comes");
  const auto token = never.token();
  Result<void> result = co_await never.wait(stop);
  ++log.stopped;
  log.end();
  co_return result;
}
inline Task<Result<void>> until_stopped(std::stop_token stop, Log& log) {
  return until_stopped(std::move(stop), log, Log::Frame(log));
}

/// Waits until somebody fires `go`, whatever is stopped meanwhile; gives what it was fired with.
template <class T>
Task<Result<T>> until_fired(Completion<T>& go, Log& log) {
  log.begin();
  Result<T> result = co_await go.wait();
  log.end();
  co_return result;
}

class StructuredTest : public StillLoopTest {
 protected:
  /// Runs `task` as a coroutine up to its first suspension.
  void start(Task<void> task) { Coroutine::create(std::move(task), "parent")->enter(); }
};

}  // namespace roost
