// SPDX-License-Identifier: MIT
// A task that has until a moment in time: a StopScope with a deadline.
#include <sys/socket.h>

#include <array>
#include <cstdio>
#include <stop_token>

#include "roost/aio/aio_context.h"
#include "roost/aio/io.h"
#include "roost/aio/unique_fd.h"
#include "roost/base/result.h"
#include "roost/coro/task.h"
#include "roost/sync/stop_scope.h"

namespace {

using roost::Result;
using roost::Task;

Task<Result<std::int64_t>> receive(int fd, std::stop_token stop) {
  std::array<std::byte, 64> buffer;
  const std::int64_t got = co_await roost::io_recv(fd, buffer, 0, stop);
  if (got < 0) co_return roost::fail(static_cast<int>(-got), "recv");
  co_return got;
}

Task<void> ask(int fd, std::int64_t patience_ns, std::stop_token stop) {
  roost::StopScope scope(stop);  // stopped by the caller's token as well
  const std::int64_t deadline_ns = roost::AioContext::current()->clock().now_ns() + patience_ns;
  const Result<std::int64_t> got =
      co_await roost::with_deadline(deadline_ns, scope, receive(fd, scope.token()));
  if (got) {
    std::printf("%d bytes\n", static_cast<int>(*got));
  } else {
    std::printf("%s\n", got.error().message().c_str());
  }
}

Task<void> ask_twice(int near, int far, bool* done) {
  co_await ask(near, 10'000'000, {});  // nobody answers within 10 ms
  if (::send(far, "answer", 6, MSG_NOSIGNAL) != 6) std::puts("send failed");
  co_await ask(near, 60'000'000'000, {});
  *done = true;
}

}  // namespace

int main() {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0) return 1;
  const roost::UniqueFd near(ends[0]), far(ends[1]);
  const auto context = roost::AioContext::create({.name = "main"});
  const roost::ContextScope scope(*context);
  bool done = false;
  roost::spawn(*context, ask_twice(near.get(), far.get(), &done), "asker");
  context->poll_until(done);
}

// Output:
// recv: Connection timed out
// 6 bytes
