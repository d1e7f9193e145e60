// SPDX-License-Identifier: MIT
// Ending waits early by a std::stop_token, and what is left after that.
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <stop_token>

#include "roost/aio/aio_context.h"
#include "roost/aio/io.h"
#include "roost/aio/timer.h"
#include "roost/aio/unique_fd.h"
#include "roost/coro/task.h"
#include "roost/sync/co_mutex.h"

namespace {

using roost::Task;

Task<void> receive(int fd, std::stop_token stop, bool* ended) {
  std::array<std::byte, 64> buffer;
  const std::int64_t got = co_await roost::io_recv(fd, buffer, 0, stop);
  if (got == -ECANCELED) std::puts("receive: not started, no byte was taken");
  *ended = true;
}

Task<void> lock(roost::CoMutex* mutex, std::stop_token stop) {
  const auto guard = co_await mutex->lock(stop);  // a Result<Guard>
  if (!guard) std::printf("lock: %s\n", guard.error().message().c_str());
}

Task<void> conduct(int near, int far, bool* done) {
  std::stop_source source;
  roost::CoMutex mutex("the mutex");
  auto guard = co_await mutex.lock();
  bool ended = false;
  roost::AioContext& here = *roost::AioContext::current();
  roost::spawn(here, lock(&mutex, source.get_token()), "locker");
  roost::spawn(here, receive(near, source.get_token(), &ended), "receiver");
  co_await roost::sleep_for(1'000'000);

  source.request_stop();  // any thread; it asks, and whoever was asked says what came of it
  while (!ended) co_await roost::sleep_for(1'000'000);

  // The receive that was cancelled has taken nothing: what comes now is for the next one.
  std::array<std::byte, 64> buffer;
  if (::send(far, "hello", 5, MSG_NOSIGNAL) != 5) std::puts("send failed");
  std::printf("the next receive: %d bytes\n",
              static_cast<int>(co_await roost::io_recv(near, buffer)));
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
  roost::spawn(*context, conduct(near.get(), far.get(), &done), "conductor");
  context->poll_until(done);
}

// Output:
// lock: the mutex: Operation canceled
// receive: not started, no byte was taken
// the next receive: 5 bytes
