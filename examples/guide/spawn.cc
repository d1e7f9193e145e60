// SPDX-License-Identifier: MIT
// A context, a coroutine on it, and a task that the coroutine awaits.
#include <cstdio>
#include <string>

#include "roost/aio/aio_context.h"
#include "roost/coro/task.h"

namespace {

using roost::Task;

// A coroutine function returns a Task. Calling it makes the frame; co_await runs it.
Task<int> twice(int number) { co_return 2 * number; }

// What is passed by value lives in the frame. `done` points at something that outlives it.
Task<void> greet(std::string whom, bool* done) {
  const int answer = co_await twice(21);  // a call: still the same coroutine
  std::printf("hello %s: %d\n", whom.c_str(), answer);
  *done = true;
}

}  // namespace

int main() {
  const auto context = roost::AioContext::create({.name = "main"});
  const roost::ContextScope scope(*context);

  bool done = false;
  roost::spawn(*context, greet("world", &done), "greeter");
  std::puts("spawned, not started");

  context->poll_until(done);  // the event loop: until somebody sets `done`
}

// Output:
// spawned, not started
// hello world: 42
