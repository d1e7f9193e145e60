// SPDX-License-Identifier: MIT
// NbdTarget: the server and export that a URI names, with what TLS needs, ready to be connected to.
//
// Threads: constant once parsed; connect() and query() in coroutines on any context, any number at
// a time. Lifetime: outlives its connects.
#pragma once

#include <memory>
#include <stop_token>
#include <string>
#include <string_view>

#include "roost/base/result.h"
#include "roost/coro/task.h"
#include "roost/io/socket_address.h"
#include "roost/nbd/client.h"
#include "roost/nbd/uri.h"

namespace roost {
class TlsCredentials;
}

namespace roost::nbd {

class NbdTarget {
 public:
  /// Reads the keys and certificates that the URI names; blocks. Without any, "nbds" believes what
  /// the system trusts. ENOTSUP: a kind of TLS that is not done (anonymous).
  static Result<NbdTarget> parse(std::string_view uri);

  const NbdUri& uri() const noexcept { return uri_; }
  /// As parse() was given it, for messages.
  const std::string& text() const noexcept { return text_; }

  /// Connects and does the handshakes. The export, the mode and TLS of `wishes` are the URI's.
  Task<Result<std::unique_ptr<NbdClient>>> connect(ClientWishes wishes,
                                                   std::stop_token stop = {}) const;

  /// Asks, as query_nbd_server() does; `wishes` says what for. Its export and TLS are the URI's.
  Task<Result<NbdClient::Outcome>> query(ClientWishes wishes, std::stop_token stop = {}) const;

 private:
  NbdTarget() = default;

  Task<Result<std::unique_ptr<Channel>>> dial(std::stop_token stop) const;
  NbdClientOptions options(ClientWishes wishes) const;

  std::string text_;
  NbdUri uri_;
  SocketAddress address_;
  std::shared_ptr<const TlsCredentials> credentials_;  // null: without TLS
};

/// Where the server is that `uri` means.
SocketAddress address_of(const NbdUri& uri);

/// Whether `text` begins like an NBD URI.
bool looks_like_nbd_uri(std::string_view text) noexcept;

}  // namespace roost::nbd
