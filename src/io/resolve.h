// SPDX-License-Identifier: MIT
// From a SocketAddress to what bind(2) and connect(2) take.
//
// Threads: any.
#pragma once

#include <sys/socket.h>

#include <stop_token>
#include <vector>

#include "roost/base/result.h"
#include "roost/coro/task.h"
#include "roost/io/socket_address.h"

namespace roost {

struct ResolvedAddress {
  sockaddr_storage storage{};
  socklen_t length = 0;

  const sockaddr* get() const noexcept { return reinterpret_cast<const sockaddr*>(&storage); }
  int family() const noexcept { return storage.ss_family; }
};

/// All addresses of a host. Blocks while a name is resolved; `passive`: to listen on.
Result<std::vector<ResolvedAddress>> resolve_now(const SocketAddress& address, bool passive);

/// As resolve_now(), to connect to. A name is resolved on a thread of its own, which a stop leaves
/// behind.
Task<Result<std::vector<ResolvedAddress>>> resolve(const SocketAddress& address,
                                                   std::stop_token stop);

}  // namespace roost
