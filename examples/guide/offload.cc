// SPDX-License-Identifier: MIT
// Work that blocks, or takes long, on a thread of its own, while the event loop goes on.
#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "roost/aio/aio_context.h"
#include "roost/aio/thread_pool.h"
#include "roost/coro/task.h"

namespace {

using roost::Task;

Task<void> work(roost::ThreadPool* pool, bool* done) {
  std::vector<int> numbers(1000);
  std::iota(numbers.begin(), numbers.end(), 1);

  // The callable has a name, and stays in the frame while a worker calls it.
  auto add = [&numbers] { return std::accumulate(numbers.begin(), numbers.end(), 0); };
  std::printf("sum %d\n", co_await pool->run(add));  // and back at home

  auto refuse = []() -> int { throw std::runtime_error("no such file"); };
  try {
    co_await pool->run(refuse);
  } catch (const std::runtime_error& error) {
    std::printf("the worker threw: %s\n", error.what());
  }
  *done = true;
}

}  // namespace

int main() {
  roost::ThreadPool pool(4);  // at most four threads, started as needed
  const auto context = roost::AioContext::create({.name = "main"});
  const roost::ContextScope scope(*context);
  bool done = false;
  roost::spawn(*context, work(&pool, &done), "worker's customer");
  context->poll_until(done);
}

// Output:
// sum 500500
// the worker threw: no such file
