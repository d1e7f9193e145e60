// SPDX-License-Identifier: MIT
// The smallest event loop: one context, polled by main().
#include <cstdio>

#include "roost/aio/aio_context.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/timer.h"
#include "roost/coro/task.h"

namespace {

// A coroutine is a function that returns a Task. It may stop at each co_await, and others run until
// it goes on. (Its arguments live as long as it does; a pointer must point at something that does.)
roost::Task<void> greet(bool* done) {
  std::puts("hello from a coroutine");
  co_await roost::sleep_for(10'000'000);  // nanoseconds; the thread is free meanwhile
  std::puts("and again, 10 ms later");
  *done = true;
}

}  // namespace

int main() {
  const auto context = roost::AioContext::create({.name = "main"});

  // A bottom half is a callback for the next iteration. Both this and spawn() work from any thread.
  roost::schedule_oneshot(*context, [] { std::puts("the bottom half runs"); });
  bool done = false;
  roost::spawn(*context, greet(&done), "greeter");
  std::puts("now");

  // An event loop is a loop: each poll is one iteration, and waits if there is nothing to do.
  while (!done) context->poll(true);
  std::puts("bye");
}
