// SPDX-License-Identifier: MIT
// An echo server on a unix socket.
//
//   echo_server PATH   serves until it is interrupted; try `socat - UNIX-CONNECT:PATH`
//   echo_server        serves three clients of its own, and ends
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "roost/aio/bottom_half.h"
#include "roost/aio/io.h"
#include "roost/aio/iothread.h"
#include "roost/aio/unique_fd.h"
#include "roost/coro/task.h"

namespace {

using roost::AioContext;
using roost::Task;
using roost::UniqueFd;

[[noreturn]] void die(const char* what) {
  std::perror(what);
  std::exit(1);
}

// Sends all of `bytes`; false if the peer has gone.
Task<bool> send_all(int fd, std::span<std::byte> bytes) {
  while (!bytes.empty()) {
    iovec part{bytes.data(), bytes.size()};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    // I/O gives the bytes done, which may be fewer than asked for, or a negative errno.
    const std::int64_t sent = co_await roost::io_sendmsg(fd, message);
    if (sent < 0) co_return false;
    bytes = bytes.subspan(static_cast<std::size_t>(sent));
  }
  co_return true;
}

// One connection: a coroutine that owns its descriptor. It reads as if it blocked; in truth the
// thread serves the others while this one waits.
Task<void> serve(UniqueFd connection, AioContext* main, unsigned* ended) {
  std::array<std::byte, 4096> buffer;
  for (;;) {
    const std::int64_t received = co_await roost::io_recv(connection.get(), buffer);
    if (received <= 0) break;  // the end, or an error: either way it is over
    const auto bytes = std::span(buffer).first(static_cast<std::size_t>(received));
    if (!co_await send_all(connection.get(), bytes)) break;
  }
  // The count belongs to main's thread, so that thread changes it.
  roost::schedule_oneshot(*main, [ended] { ++*ended; });
}

sockaddr_un address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    errno = ENAMETOOLONG;
    die(path.c_str());
  }
  std::memcpy(address.sun_path, path.c_str(), path.size());
  return address;
}

UniqueFd listen_on(const std::string& path) {
  const sockaddr_un address = address_of(path);
  UniqueFd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  ::unlink(path.c_str());
  if (::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) < 0 ||
      ::listen(listener.get(), 16) < 0) {
    die(path.c_str());
  }
  return listener;
}

// An ordinary blocking client, for the test run.
void talk(const std::string& path, int number) {
  const sockaddr_un address = address_of(path);
  const UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) < 0) {
    die("connect");
  }
  std::string line = "client " + std::to_string(number) + ":";
  const char* separator = " ";
  for (int i = 0; i < 3; ++i) {
    char answer[5];
    if (::send(fd.get(), "hello", 5, MSG_NOSIGNAL) != 5 ||
        ::recv(fd.get(), answer, 5, MSG_WAITALL) != 5) {
      die("client");
    }
    line += separator + std::string(answer, 5);
    separator = ", ";
  }
  std::puts(line.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  const bool forever = argc > 1;
  const std::string path =
      forever ? argv[1] : "/tmp/roost-echo-" + std::to_string(::getpid()) + ".sock";
  const UniqueFd listener = listen_on(path);

  // Connections are spread over two threads; main() only accepts.
  std::vector<std::unique_ptr<roost::IOThread>> threads;
  for (const char* name : {"echo 1", "echo 2"}) {
    threads.push_back(std::make_unique<roost::IOThread>(roost::AioContextOptions{.name = name}));
  }

  const auto context = AioContext::create({.name = "main"});
  const roost::ContextScope scope(*context);  // handlers are set on the context that is current
  unsigned accepted = 0;
  unsigned ended = 0;
  const auto accept_one = [&] {
    UniqueFd connection(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!connection) return;
    roost::IOThread& thread = *threads[accepted++ % threads.size()];
    roost::spawn(thread.context(), serve(std::move(connection), context.get(), &ended),
                 "connection");
  };
  context->set_fd_handler(listener.get(), {.read = accept_one});

  if (forever) {
    std::printf("listening on %s\n", path.c_str());
    for (;;) context->poll(true);
  }

  std::thread clients([&] {
    for (int number = 1; number <= 3; ++number) talk(path, number);
  });
  // A thread may go once nothing waits on it any more: here, when every connection has ended.
  while (ended < 3) context->poll(true);
  clients.join();
  context->remove_fd_handler(listener.get());
  ::unlink(path.c_str());
  std::printf("%u clients served\n", ended);
}
