// SPDX-License-Identifier: MIT
// A foreign library that calls back on a thread of its own: a completion token.
#include "roost/coro/completion.h"

#include <cstdio>
#include <thread>

#include "roost/aio/aio_context.h"
#include "roost/base/result.h"
#include "roost/coro/task.h"

namespace foreign {

class Thermometer {
 public:
  // Calls `done` from a thread of its own, before or after this function has returned.
  void measure(void (*done)(void* opaque, int degrees), void* opaque) {
    thread_ = std::jthread([=] { done(opaque, 21); });
  }

 private:
  std::jthread thread_;
};

}  // namespace foreign

namespace {

using roost::Task;

void on_measured(void* opaque, int degrees) {
  // Once for each release(). The coroutine goes on at home, not in here.
  roost::CompletionToken<int>::from_opaque(opaque).fire(degrees);
}

Task<void> measure(foreign::Thermometer* thermometer, bool* done) {
  roost::Completion<int> measured("a thermometer");
  thermometer->measure(&on_measured, measured.token().release());
  const roost::Result<int> degrees = co_await measured.wait();
  std::printf("%d degrees\n", degrees.value());

  // A token that is dropped unanswered ends the wait, too.
  roost::Completion<int> forgotten("another thermometer");
  { const roost::CompletionToken<int> dropped = forgotten.token(); }
  const roost::Result<int> none = co_await forgotten.wait();
  std::printf("%s\n", none.error().message().c_str());
  *done = true;
}

}  // namespace

int main() {
  foreign::Thermometer thermometer;
  const auto context = roost::AioContext::create({.name = "main"});
  const roost::ContextScope scope(*context);
  bool done = false;
  roost::spawn(*context, measure(&thermometer, &done), "measuring");
  context->poll_until(done);
}

// Output:
// 21 degrees
// another thermometer (dropped unanswered): Operation canceled
