// SPDX-License-Identifier: MIT
// What the tests of channels share: two contexts polled by the test's own thread, tasks whose
// results are kept, and bytes.
//
// Threads: the test's.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "roost/aio/aio_context.h"
#include "roost/coro/task.h"
#include "roost/io/channel.h"

namespace roost {

inline std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}
inline std::span<std::byte> room_of(std::string& text) {
  return std::as_writable_bytes(std::span(text));
}

class ChannelTest : public testing::Test {
 public:
  static std::shared_ptr<AioContext> make_context(std::string name) {
    AioContextOptions options;
    options.name = std::move(name);
    options.poll_max_ns = 0;  // all on one thread: busy waiting would be in vain
    return AioContext::create(options);
  }

  /// Begins `task` as a coroutine on `context`; its result comes to `result`.
  template <class T>
  void start_on(AioContext& context, Task<T> task, std::optional<T>& result,
                const char* name = "test") {
    const ContextScope scope(context);
    Coroutine::create(keep(std::move(task), result), name)->enter();
  }
  template <class T>
  void start(Task<T> task, std::optional<T>& result, const char* name = "test") {
    start_on(a(), std::move(task), result, name);
  }

  /// Polls until there is a result; what has not come after ten seconds does not come.
  template <class T>
  void finish(const std::optional<T>& result) {
    const std::int64_t give_up_at = real_clock().now_ns() + 10'000'000'000;
    while (!result && real_clock().now_ns() < give_up_at) {
      a().poll(false);
      b().poll(false);
    }
    ASSERT_TRUE(result) << "it has not ended";
  }

  template <class T>
  void run(Task<T> task, std::optional<T>& result) {
    start(std::move(task), result);
    finish(result);
  }

  /// Polls until nothing happens any more, at this moment.
  void settle() {
    for (int quiet = 0; quiet < 3; ++quiet) {
      while (a().poll(false) || b().poll(false)) quiet = 0;
    }
  }

  AioContext& a() { return *a_; }
  AioContext& b() { return *b_; }

 private:
  template <class T>
  static Task<void> keep(Task<T> task, std::optional<T>& result) {
    result.emplace(co_await std::move(task));
  }

  const std::shared_ptr<AioContext> a_ = make_context("a");
  const std::shared_ptr<AioContext> b_ = make_context("b");
};

}  // namespace roost
