// SPDX-License-Identifier: MIT
// Where a server listens: "unix:PATH" or "tcp:HOST:PORT" (an IPv6 HOST in brackets).
//
// Threads: values.
#pragma once

#include <string>
#include <string_view>

#include "roost/aio/unique_fd.h"
#include "roost/base/result.h"

namespace roost {

/// Where a server listens, taken apart.
struct ListenAddress {
  bool unix_socket = true;
  std::string path{};  // of a unix socket
  std::string host{};  // of TCP, without brackets
  std::string port{};  // of TCP, a number; "0" picks a free one

  /// EINVAL, with what is wrong with `text` in words. Resolves no names.
  static Result<ListenAddress> parse(const std::string& text);

  /// As parse() takes it.
  std::string text() const;
};

/// A listening socket, non-blocking. A unix socket's file is removed with it, if it is still the
/// one that was made here.
class ListenSocket {
 public:
  /// Binds and listens; blocks for name resolution. A socket file that nobody listens on is
  /// replaced, one that somebody listens on is EADDRINUSE.
  static Result<ListenSocket> open(const ListenAddress& address);

  ListenSocket(ListenSocket&&) noexcept = default;
  ListenSocket& operator=(ListenSocket&&) = delete;
  ~ListenSocket();

  int fd() const noexcept { return fd_.get(); }

  /// The address that clients use: with the port that was picked.
  const ListenAddress& address() const noexcept { return address_; }

  /// The NBD URI of an export, "" for the default one.
  std::string uri(std::string_view export_name) const;

 private:
  ListenSocket(UniqueFd fd, ListenAddress address)
      : fd_(std::move(fd)), address_(std::move(address)) {}

  UniqueFd fd_;
  ListenAddress address_;
  unsigned long device_ = 0;  // of the socket's file
  unsigned long inode_ = 0;
};

/// The client behind an accepted socket, for log lines: "unix client (pid 123)", "127.0.0.1:4711".
std::string describe_peer(int fd);

}  // namespace roost
