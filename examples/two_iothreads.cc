// SPDX-License-Identifier: MIT
// Two threads with an event loop each, and a coroutine that goes to and fro between them.
#include <cstdio>
#include <future>

#include "roost/aio/iothread.h"
#include "roost/coro/task.h"

namespace {

constexpr int kTimes = 1000;

roost::Task<void> ball(roost::AioContext* left, roost::AioContext* right,
                       std::promise<const char*>* ended_on) {
  for (int i = 0; i < kTimes; ++i) {
    // From here on the body runs on the other thread. No lock is needed for what only this
    // coroutine uses: it is on one thread at a time, and what it wrote before goes with it.
    co_await roost::move_to(*right);
    co_await roost::move_to(*left);
  }
  ended_on->set_value(roost::AioContext::current()->name().c_str());
}

}  // namespace

int main() {
  roost::IOThread left({.name = "left"});
  roost::IOThread right({.name = "right"});

  std::promise<const char*> ended_on;
  roost::spawn(left.context(), ball(&left.context(), &right.context(), &ended_on), "ball");
  std::printf("the ball went to and fro %d times, and ended on %s\n", kTimes,
              ended_on.get_future().get());

  // run() calls a function on another context and waits for its result.
  const char* loop = left.context().run([&] { return left.context().back_end_name(); });
  std::printf("the loops use %s\n", loop);
}  // the threads stop and are joined
