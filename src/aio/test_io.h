// SPDX-License-Identifier: MIT
// What tests of I/O share: sockets, files, and operations that wait.
//
// Threads: the test's.
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <vector>

#include "roost/aio/unique_fd.h"

namespace roost {

struct SocketPair {
  UniqueFd near, far;
};

inline SocketPair socket_pair() {
  std::array<int, 2> ends{};
  EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()), 0);
  return {UniqueFd(ends[0]), UniqueFd(ends[1])};
}

/// A TCP socket that listens on the loopback interface.
struct Listener {
  explicit Listener(int backlog = 8) : fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    EXPECT_EQ(::bind(fd.get(), generic(), length), 0);
    EXPECT_EQ(::listen(fd.get(), backlog), 0);
    EXPECT_EQ(::getsockname(fd.get(), generic(), &length), 0);
  }
  sockaddr* generic() { return reinterpret_cast<sockaddr*>(&address); }

  /// A client that is being connected, or is.
  UniqueFd begin_connect() {
    UniqueFd client(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    [[maybe_unused]] const int result = ::connect(client.get(), generic(), sizeof address);
    return client;
  }

  UniqueFd fd;
  sockaddr_in address{};
};

/// A unix socket that listens, and whose queue is full.
struct FullQueue {
  FullQueue() : fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)) {
    address.sun_family = AF_UNIX;
    // Bound to no name it gets an abstract one.
    EXPECT_EQ(::bind(fd.get(), generic(), sizeof(sa_family_t)), 0);
    EXPECT_EQ(::getsockname(fd.get(), generic(), &length), 0);
    EXPECT_EQ(::listen(fd.get(), 0), 0);
    fill();
  }
  sockaddr* generic() { return reinterpret_cast<sockaddr*>(&address); }

  /// The queue takes one, whose client is gone when it is accepted.
  void fill() {
    const UniqueFd client(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    EXPECT_EQ(::connect(client.get(), generic(), length), 0);
  }

  /// False: the queue is empty.
  bool accept() { return static_cast<bool>(UniqueFd(::accept(fd.get(), nullptr, nullptr))); }

  UniqueFd fd;
  sockaddr_un address{};
  socklen_t length = sizeof address;
};

/// Sends until the socket takes no more; returns how much that was.
inline std::size_t fill(int fd) {
  const std::vector<char> some(1 << 16);
  std::size_t sent = 0;
  for (std::size_t size = some.size(); size > 0; size /= 2) {
    for (;;) {
      const ssize_t n = ::send(fd, some.data(), size, MSG_DONTWAIT | MSG_NOSIGNAL);
      if (n < 0) break;
      sent += static_cast<std::size_t>(n);
    }
  }
  return sent;
}

/// Receives all that is there.
inline std::size_t drain(int fd) {
  std::vector<char> some(1 << 16);
  std::size_t received = 0;
  for (;;) {
    const ssize_t n = ::recv(fd, some.data(), some.size(), MSG_DONTWAIT);
    if (n <= 0) return received;
    received += static_cast<std::size_t>(n);
  }
}

}  // namespace roost
