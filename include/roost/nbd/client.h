// SPDX-License-Identifier: MIT
// NbdClient: an export of an NBD server, used by coroutines.
//
//   NbdClientOptions options;
//   options.wishes.export_name = "disk";
//   auto client = co_await NbdClient::connect(std::move(socket), options);
//   Result<void> done = co_await (*client)->read(4096, buffer);
//   co_await (*client)->disconnect();
//
// Many requests may be in flight. What is queued when the connection is free to send goes out in
// one write; one coroutine receives, data straight into the buffers. Reads and writes that are
// longer than the server takes, and other requests that are longer than their header can say, are
// sent in parts, one after the other: a failure may leave the earlier ones done.
//
// Stopping a request is honest about it. ECANCELED: it was not sent, nothing has happened. One that
// was sent is awaited all the same, and its result is the server's; or, with WhenStopped::kLeave,
// it is left with EINPROGRESS: the server may carry it out, now or later. Either way the request
// does not use its buffers any more when it returns. (A request that is just being sent, or whose
// data is just arriving, is left once that is over. Of one in parts, earlier parts may be done:
// ECANCELED of a later part then comes as EINPROGRESS.)
//
// A server that breaks the protocol fails the request with EPROTO, or the connection with all that
// is in flight where it is no longer clear what the server talks about; errors name the server, the
// request and what it did. A request that fails with its connection may have been carried out. When
// the server says that it shuts down (ESHUTDOWN), no more requests start, and the connection ends
// once it is idle.
//
// Threads: requests, disconnect() and move_to() in coroutines on any context; the rest from any
// thread.
// Lifetime: disconnect() it before it goes, also when the connection has failed; the destructor
// aborts otherwise. Requests end before. Buffers stay until their request returns.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <stop_token>
#include <string>
#include <vector>

#include "roost/base/result.h"
#include "roost/coro/task.h"
#include "roost/io/channel.h"
#include "roost/nbd/client_negotiation.h"
#include "roost/nbd/client_transmission.h"

namespace roost {
class AioContext;
}

namespace roost::nbd {

class ClientConnection;

/// Puts TLS over the channel, or fails; the channel is gone then.
using StartTls = std::function<Task<Result<std::unique_ptr<Channel>>>(std::unique_ptr<Channel>,
                                                                      std::stop_token)>;

/// How a client connects. Name the object: GCC 12 destroys a temporary of it within a co_await
/// expression twice.
struct NbdClientOptions {
  ClientWishes wishes{};
  StartTls start_tls{};  // needed unless wishes.tls is kOff
};

/// Asks a server what it offers: for the modes that do not end in transmission. Of a server that
/// cannot tell without (see ClientWishes::Mode::kInfo), takes leave properly.
Task<Result<ClientNegotiation::Outcome>> query_nbd_server(std::unique_ptr<Channel> channel,
                                                          const NbdClientOptions& options,
                                                          std::stop_token stop = {});

/// What to do about a request that was sent when its stop is requested.
enum class WhenStopped : std::uint8_t { kAwait, kLeave };

/// What one metadata context says of an export, from the offset that was asked for.
struct ContextExtents {
  std::string context{};
  std::vector<StatusExtent> extents{};

  bool operator==(const ContextExtents&) const = default;
};

class NbdClient {
 public:
  using Outcome = ClientNegotiation::Outcome;

  /// Does the handshake over `channel`. A stop makes it fail with ECANCELED.
  /// REQUIRES: wishes.mode is kGo.
  static Task<Result<std::unique_ptr<NbdClient>>> connect(std::unique_ptr<Channel> channel,
                                                          const NbdClientOptions& options,
                                                          std::stop_token stop = {});
  ~NbdClient();
  NbdClient(const NbdClient&) = delete;
  NbdClient& operator=(const NbdClient&) = delete;

  /// What was agreed on. Constant; size() is what has changed since.
  const Outcome& outcome() const noexcept;
  std::uint64_t size() const noexcept;
  bool offers(std::uint16_t transmission_flag) const noexcept {
    return (outcome().transmission_flags & transmission_flag) != 0;
  }

  // Requests. EINVAL: beyond the end, or no multiple of the minimum block size. ENOTSUP: the server
  // does not offer it. EROFS: it writes, and the export is read-only. These are not sent. Nor are
  // requests of length 0, which succeed.

  Task<Result<void>> read(std::uint64_t offset, std::span<std::byte> to, std::stop_token stop = {},
                          WhenStopped when = WhenStopped::kAwait);
  Task<Result<void>> readv(std::uint64_t offset, std::span<const iovec> to,
                           std::stop_token stop = {}, WhenStopped when = WhenStopped::kAwait);

  /// `flags`: kCommandFua, where the server offers it.
  Task<Result<void>> writev(std::uint64_t offset, std::span<const iovec> from,
                            std::uint16_t flags = 0, std::stop_token stop = {},
                            WhenStopped when = WhenStopped::kAwait);
  Task<Result<void>> write(std::uint64_t offset, std::span<const std::byte> from,
                           std::uint16_t flags = 0, std::stop_token stop = {},
                           WhenStopped when = WhenStopped::kAwait);

  Task<Result<void>> flush(std::stop_token stop = {}, WhenStopped when = WhenStopped::kAwait);

  /// `flags`: kCommandFua.
  Task<Result<void>> trim(std::uint64_t offset, std::uint64_t length, std::uint16_t flags = 0,
                          std::stop_token stop = {}, WhenStopped when = WhenStopped::kAwait);

  /// `flags`: kCommandFua, kCommandNoHole, kCommandFastZero (ENOTSUP then also says that it would
  /// not be fast).
  Task<Result<void>> zero(std::uint64_t offset, std::uint64_t length, std::uint16_t flags = 0,
                          std::stop_token stop = {}, WhenStopped when = WhenStopped::kAwait);

  Task<Result<void>> cache(std::uint64_t offset, std::uint64_t length, std::stop_token stop = {},
                           WhenStopped when = WhenStopped::kAwait);

  /// What each negotiated metadata context says. The extents begin at `offset`, cover at least one
  /// byte, and perhaps less or more than `length`, but nothing beyond the end of the export.
  /// `flags`: kCommandReqOne.
  Task<Result<std::vector<ContextExtents>>> block_status(std::uint64_t offset, std::uint64_t length,
                                                         std::uint16_t flags = 0,
                                                         std::stop_token stop = {},
                                                         WhenStopped when = WhenStopped::kAwait);

  /// Gives the export another size. REQUIRES: no request is in flight between the old and the new.
  Task<Result<void>> resize(std::uint64_t size, std::stop_token stop = {},
                            WhenStopped when = WhenStopped::kAwait);

  /// Starts no more requests, waits for those in flight, says goodbye and closes. A stop makes it
  /// not wait: what is in flight fails. Once it returned, the client may go. May be called again.
  Task<void> disconnect(std::stop_token stop = {});

  /// Attaches the connection to another context, whatever is in flight.
  Task<Result<void>> move_to(AioContext& to);

  /// Why the connection is of no more use; success: it is.
  Result<void> state() const;

  /// Requests that were begun and have not been answered, for messages and tests.
  std::size_t in_flight() const;

 private:
  explicit NbdClient(std::shared_ptr<ClientConnection> connection);

  Result<void> check(const ClientRequest& request, std::uint16_t needs,
                     std::uint16_t allowed_flags) const;
  std::uint64_t longest_part(Command command) const;
  Task<Result<void>> in_parts(ClientRequest request, std::span<const iovec> data,
                              std::stop_token stop, WhenStopped when);

  const std::shared_ptr<ClientConnection> connection_;
};

}  // namespace roost::nbd
