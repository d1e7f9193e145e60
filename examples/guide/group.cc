// SPDX-License-Identifier: MIT
// Children that never outlive their group: at most two run at a time, the first failure stops all.
#include <cerrno>
#include <cstdio>
#include <stop_token>
#include <string>

#include "roost/aio/aio_context.h"
#include "roost/aio/timer.h"
#include "roost/base/result.h"
#include "roost/coro/task.h"
#include "roost/sync/task_group.h"

namespace {

using roost::Result;
using roost::Task;

Task<Result<void>> copy(int chunk, int bad_chunk, int* copied, std::stop_token stop) {
  const Result<void> slept = co_await roost::sleep_for(1'000'000, stop);  // stands for the I/O
  if (!slept) co_return slept;
  if (chunk == bad_chunk) co_return roost::fail(EIO, "chunk " + std::to_string(chunk));
  ++*copied;
  co_return Result<void>();
}

Task<Result<void>> copy_all(int chunks, int bad_chunk, int* copied) {
  roost::TaskGroup group({.name = "copy", .max_running = 2});
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (!co_await group.room()) break;  // stopped: a child has failed
    group.spawn(copy(chunk, bad_chunk, copied, group.stop_token()));
  }
  co_return co_await group.join();  // every child has ended, `copied` may go
}

Task<void> copy_twice(bool* done) {
  for (const int bad_chunk : {-1, 3}) {
    int copied = 0;
    const Result<void> result = co_await copy_all(8, bad_chunk, &copied);
    std::printf("%s; all were copied: %s\n", result ? "success" : result.error().message().c_str(),
                copied == 8 ? "yes" : "no");
  }
  *done = true;
}

}  // namespace

int main() {
  const auto context = roost::AioContext::create({.name = "main"});
  const roost::ContextScope scope(*context);
  bool done = false;
  roost::spawn(*context, copy_twice(&done), "copying");
  context->poll_until(done);
}

// Output:
// success; all were copied: yes
// chunk 3: Input/output error; all were copied: no
