// SPDX-License-Identifier: MIT
// Several tasks at a time: the results of all, or that of the first.
#include "roost/sync/when.h"

#include <cstdio>
#include <stop_token>
#include <string>
#include <utility>
#include <vector>

#include "roost/aio/aio_context.h"
#include "roost/aio/timer.h"
#include "roost/base/result.h"
#include "roost/coro/task.h"
#include "roost/sync/stop_scope.h"

namespace {

using roost::Result;
using roost::Task;

Task<Result<std::string>> ask(const char* server, std::int64_t delay_ns, std::stop_token stop) {
  const Result<void> slept = co_await roost::sleep_for(delay_ns, stop);
  if (!slept) co_return std::unexpected(slept.error());
  co_return std::string("answer of ") + server;
}

Task<void> ask_all(bool* done) {
  roost::StopScope all;
  const auto both = co_await roost::when_all(all, ask("one", 2'000'000, all.token()),
                                             ask("two", 1'000'000, all.token()));
  const auto& [one, two] = both.value();
  std::printf("%s, %s\n", one.c_str(), two.c_str());

  // The winner stops the others, which have ended, too, when this returns.
  roost::StopScope any;
  std::vector<Task<Result<std::string>>> tasks;
  tasks.push_back(ask("far", 3'600'000'000'000, any.token()));
  tasks.push_back(ask("near", 1'000'000, any.token()));
  auto first = co_await roost::when_any(any, std::move(tasks));
  std::printf("number %zu: %s\n", first.index(), first.value()->c_str());
  *done = true;
}

}  // namespace

int main() {
  const auto context = roost::AioContext::create({.name = "main"});
  const roost::ContextScope scope(*context);
  bool done = false;
  roost::spawn(*context, ask_all(&done), "asking");
  context->poll_until(done);
}

// Output:
// answer of one, answer of two
// number 1: answer of near
