// SPDX-License-Identifier: MIT
// A coroutine that goes to where the data is, and comes back.
#include <cstdio>
#include <future>
#include <string>

#include "roost/aio/iothread.h"
#include "roost/coro/task.h"

namespace {

using roost::AioContext;
using roost::Task;

// Only touched on its own context, so it needs no lock.
struct Counter {
  AioContext* home;
  int value = 0;
};

Task<int> increment(Counter* counter) {
  AioContext& caller = *AioContext::current();
  co_await roost::move_to(*counter->home);
  const int value = ++counter->value;
  co_await roost::move_to(caller);
  co_return value;
}

Task<void> count(Counter* counter, std::promise<std::string>* result) {
  const int value = co_await increment(counter);
  result->set_value(AioContext::current()->name() + " counted " + std::to_string(value));
}

}  // namespace

int main() {
  std::promise<std::string> result;
  roost::IOThread left({.name = "left"}), right({.name = "right"});
  Counter counter{&right.context()};
  roost::spawn(left.context(), count(&counter, &result), "counting");
  std::puts(result.get_future().get().c_str());
}

// Output:
// left counted 1
