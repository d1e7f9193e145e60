// SPDX-License-Identifier: MIT
// Listening sockets, and what service managers hand over.
//
// Threads: ListenSocket is a value of one thread; accept() in one coroutine at a time.
// Lifetime: a ListenSocket outlives its accept().
#pragma once

#include <functional>
#include <memory>
#include <stop_token>
#include <string>
#include <vector>

#include "roost/aio/unique_fd.h"
#include "roost/base/result.h"
#include "roost/coro/task.h"
#include "roost/io/socket_address.h"

namespace roost {

struct ResolvedAddress;

/// A listening socket, non-blocking. A unix socket's file is removed with it, if it is still the
/// one that was made here.
class ListenSocket {
 public:
  /// Binds and listens, on the first address of the host that can be had; blocks for name
  /// resolution. A socket file that nobody listens on is replaced, one that somebody listens on is
  /// EADDRINUSE.
  static Result<ListenSocket> open(const SocketAddress& address);

  /// As open(), on every address of the host.
  static Result<std::vector<ListenSocket>> open_all(const SocketAddress& address);

  /// Takes a socket that listens already. Its file, if it has one, is not removed.
  static Result<ListenSocket> adopt(UniqueFd fd);

  ListenSocket(ListenSocket&&) noexcept = default;
  ListenSocket& operator=(ListenSocket&&) = delete;
  ~ListenSocket();

  int fd() const noexcept { return fd_.get(); }

  /// The address that clients use: with the port that was picked.
  const SocketAddress& address() const noexcept { return address_; }

  /// The NBD URI of an export, "" for the default one.
  std::string uri(std::string_view export_name, bool tls = false) const {
    return address_.nbd_uri(export_name, tls);
  }

  /// The next connection, non-blocking; on the context of the awaiting coroutine. Where there are
  /// no descriptors, or is no memory, for it, that is reported to `report`, if not null, and it
  /// stays in the queue while accept() waits and tries again.
  Task<Result<UniqueFd>> accept(std::stop_token stop = {},
                                const std::function<void(const Error&)>* report = nullptr) const;

 private:
  ListenSocket(UniqueFd fd, SocketAddress address)
      : fd_(std::move(fd)), address_(std::move(address)) {}

  static Result<ListenSocket> open_at(const SocketAddress& where, const ResolvedAddress& address,
                                      bool only_v6);

  UniqueFd fd_;
  SocketAddress address_;
  unsigned long device_ = 0;  // of the socket's file; inode 0: not ours
  unsigned long inode_ = 0;
};

/// Whether an errno of accept(2) says that there is no room for the connection now.
bool out_of_descriptors(int error) noexcept;

/// The listening sockets that a service manager has passed to this process (LISTEN_FDS, for the
/// process LISTEN_PID, from descriptor 3 on); none if there are none. Takes them: the variables are
/// removed, so that no child takes them for its own. EINVAL: the variables make no sense, or a
/// descriptor is no listening stream socket.
Result<std::vector<ListenSocket>> take_activated_sockets();

}  // namespace roost
