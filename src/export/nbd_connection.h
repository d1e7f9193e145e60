// SPDX-License-Identifier: MIT
// One NBD client.
//
// Three kinds of coroutine work on it, all on one context at a time: the reader negotiates, moves
// to its final context, receives and parses; a coroutine for each request runs it; the sender sends
// whatever replies are ready in one call.
//
//   receive ──▶ parser ──▶ request coroutine ──▶ disk ──▶ reply queue ──▶ sender ──▶ one sendmsg
//                 │   (waits while the client is over its limits)             │
//                 └────────────────◀── a sent reply gives its place back ─────┘
//
// Its life and the negotiation are in nbd_connection.cc, the reader in nbd_reader.cc, all that runs
// and answers a request in nbd_requests.cc.
//
// Threads: the context the reader is on; stop() and disconnect() from any thread.
// Lifetime: the server's set and the reader's frame each hold a shared_ptr; requests and the sender
// have ended before the reader does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "export/buffer_cache.h"
#include "roost/aio/timer.h"
#include "roost/export/nbd_server.h"
#include "roost/io/channel.h"
#include "roost/nbd/transmission.h"
#include "roost/sync/stop_scope.h"

namespace roost {

class NbdConnection : public std::enable_shared_from_this<NbdConnection> {
 public:
  NbdConnection(NbdServer& server, std::unique_ptr<Channel> channel, std::uint64_t number);
  ~NbdConnection();

  /// The reader: serves the client to its end. The root task of the connection's coroutine.
  static Task<void> run(std::shared_ptr<NbdConnection> self);

  /// No more requests are read; those that were read are answered.
  void stop() noexcept;

  /// Nothing is sent any more, either.
  void disconnect() noexcept;

  /// Of the server's connections, in the order in which they came.
  std::uint64_t number() const noexcept { return number_; }

  /// Who it is, for messages.
  const std::string& peer() const noexcept { return peer_; }

 private:
  struct Chunk;
  struct Reply;
  struct WritePayload;
  struct Disconnection;

  // What one BLOCK_STATUS may bring.
  static constexpr std::size_t kMaxStatusExtents = 4096;
  static constexpr std::size_t kMaxStatusBytes =
      nbd::StatusEncoder::status_size(nbd::ReplyStyle::kExtended, kMaxStatusExtents);

  Task<Result<void>> start_tls(std::stop_token stop);
  Task<bool> negotiate();
  Task<Result<void>> negotiate(nbd::ServerNegotiation& negotiation,
                               std::span<const std::byte>& input, std::stop_token stop);
  Task<Result<void>> enter_export(std::uint64_t id, std::stop_token stop);
  Task<void> transmit();
  Task<void> read_requests();
  Task<bool> accept_write(std::span<const std::byte>& input, const nbd::Request& request);
  Task<bool> accept_status_query(std::span<const std::byte>& input, const nbd::Request& request);
  Task<void> sender();

  Task<void> run_read(nbd::Request request);
  Task<void> run_sparse_read(nbd::Request request);
  Task<void> run_write(nbd::Request request, WritePayload payload);
  Task<void> run_status(nbd::Request request, std::size_t bytes_held);
  Task<void> run_other(nbd::Request request);
  Task<void> run_resize(nbd::Request request);

  bool over_limits(std::size_t bytes) const noexcept;
  void take_place(std::size_t bytes) noexcept;
  void give_place_back(std::size_t bytes) noexcept;
  template <class Make>
  void start(const nbd::Request& request, std::size_t bytes_held, Make make);
  int judge(const nbd::Request& request, std::string_view& why) noexcept;
  Reply* make_data_reply(const nbd::Request& request, std::uint64_t offset, std::uint64_t length,
                         std::size_t bytes_held, bool last) noexcept;
  Reply* make_chunk(const nbd::Request& request, nbd::ChunkType type, std::size_t payload,
                    std::size_t bytes_held, bool last) noexcept;
  void reply_error(const nbd::Request& request, int error, std::size_t bytes_held,
                   std::string_view message = {},
                   std::optional<std::uint64_t> where = std::nullopt) noexcept;
  void reply_result(const nbd::Request& request, const Result<void>& result, std::size_t bytes_held,
                    std::optional<std::uint64_t> where = std::nullopt);
  void queue(Reply* reply) noexcept;
  void give_up(std::string_view why) noexcept;
  template <class Message>
  void log(Message message) noexcept;
  void wake_sender() noexcept;
  void wake_reader() noexcept;
  void schedule_reader() noexcept;
  nbd::ReplyStyle style() const noexcept { return limits_.reply_style; }
  bool receiving() const noexcept { return !stop_.stopped(); }

  NbdServer& server_;
  const std::uint64_t number_;
  const std::string peer_;

  // Any thread. The second is stopped with the first.
  StopScope disconnect_;                 // writing
  StopScope stop_{disconnect_.token()};  // reading

  // The connection's context.
  AioContext* context_ = nullptr;
  std::unique_ptr<Channel> channel_;  // null during the handshake of TLS
  bool encrypted_ = false;
  bool sends_files_ = false;  // the channel takes what is in the page cache as it is
  NbdServer::Place place_;
  BufferCache* memory_ = nullptr;  // of the context: for replies and what is received
  BlockDriver* disk_ = nullptr;
  std::string export_name_;
  nbd::ExportLimits limits_;  // its size as of the last request
  nbd::RequestParser parser_;
  std::shared_ptr<Chunk> chunk_;         // being received into; writes in flight share it
  std::span<const std::byte> unparsed_;  // received beyond the negotiation
  bool large_writes_ = false;            // the last receive brought one
  Coroutine* reader_ = nullptr;
  bool reader_waits_ = false;  // for places, or for everything to end
  Coroutine* sender_ = nullptr;
  bool sender_waits_ = false;
  bool sender_ends_ = false;  // the reader wants it to end once nothing is in flight
  bool dead_ = false;         // nothing can be sent any more
  Reply* first_reply_ = nullptr;
  Reply* last_reply_ = nullptr;
  unsigned requests_in_flight_ = 0;  // read, reply not yet sent
  std::size_t bytes_in_flight_ = 0;
  unsigned logged_errors_ = 0;
};

// A line with the names of the export and the peer in front; none if there is no memory for it.
template <class Message>
void NbdConnection::log(Message message) noexcept {
  try {
    server_.log((disk_ ? "export '" + export_name_ + "': " : "") + peer_ + ": " + message());
  } catch (const std::bad_alloc&) {
  }
}

}  // namespace roost
