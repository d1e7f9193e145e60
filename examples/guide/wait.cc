// SPDX-License-Identifier: MIT
// Waiting for time and for a socket. Failures are values.
#include <sys/socket.h>

#include <array>
#include <cstdio>
#include <span>
#include <string>

#include "roost/aio/aio_context.h"
#include "roost/aio/io.h"
#include "roost/aio/timer.h"
#include "roost/aio/unique_fd.h"
#include "roost/base/result.h"
#include "roost/coro/task.h"

namespace {

using roost::Result;
using roost::Task;

Task<Result<std::string>> receive(int fd) {
  // The kernel writes into the frame, which stays where it is until the await returns.
  std::array<char, 64> buffer;
  const std::int64_t got = co_await roost::io_recv(fd, std::as_writable_bytes(std::span(buffer)));
  if (got < 0) co_return roost::fail(static_cast<int>(-got), "recv");
  co_return std::string(buffer.data(), static_cast<std::size_t>(got));
}

Task<void> listen(int fd, bool* done) {
  std::puts("listening");
  const Result<std::string> text = co_await receive(fd);
  std::printf("heard '%s'\n", text ? text->c_str() : text.error().message().c_str());
  const Result<std::string> nothing = co_await receive(-1);
  std::printf("%s\n", nothing.error().message().c_str());
  *done = true;
}

Task<void> speak(int fd) {
  std::puts("thinking");
  co_await roost::sleep_for(5'000'000);  // nanoseconds; the thread serves others meanwhile
  char text[] = "good morning";
  iovec part{text, sizeof text - 1};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  // May send less than all of it; examples/echo_server.cc has the loop.
  if (co_await roost::io_sendmsg(fd, message) < 0) std::puts("nobody listens");
}

}  // namespace

int main() {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0) return 1;
  const roost::UniqueFd ear(ends[0]), mouth(ends[1]);

  const auto context = roost::AioContext::create({.name = "main"});
  const roost::ContextScope scope(*context);
  bool done = false;
  roost::spawn(*context, listen(ear.get(), &done), "listener");
  roost::spawn(*context, speak(mouth.get()), "speaker");
  context->poll_until(done);
}

// Output:
// listening
// thinking
// heard 'good morning'
// recv: Bad file descriptor
