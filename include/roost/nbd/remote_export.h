// SPDX-License-Identifier: MIT
// RemoteExport: an export of an NBD server, over connections that come back when they are lost.
//
//   RemoteExportOptions options;
//   options.contexts = {&context};
//   auto disk = co_await RemoteExport::open(connect, options);
//   Result<void> done = co_await (*disk)->read(4096, buffer);
//   Result<void> kept = co_await (*disk)->close();
//
// A request goes over a connection of its own context, if there is one; else any, in turn. While
// one is down, the others serve; while all are, requests wait. A lost connection is made again, at
// once, then after 100 ms, twice as long each time, and is given up after a time. Where all are
// given up, requests fail with the last error.
//
// What becomes of requests when a connection is lost:
//
// - Reads, BLOCK_STATUS, CACHE and FLUSH are sent again. (Not one that may be why connections are
//   lost: ten times it was the oldest that a lost one had not answered.)
// - Writes (WRITE, WRITE_ZEROES, TRIM) that were acknowledged, but not covered by a FLUSH that
//   succeeded, nor by FUA, may be lost: the server may have been restarted. They are kept, up to
//   `keep_bytes`, and sent again before a connection that came back is used, and while no other
//   request is in flight: what of them no later write has written over, so that what is there never
//   goes back to what was there before. They go in portions with a FLUSH behind each, where the
//   server has it, so that a line that breaks often carries all of them in the end. A server that
//   still answers over another connection was not restarted; nothing is sent again then.
//   (Connections to one export are to one server, or to several that lose their writes together.)
// - What of them was not kept may be lost as well: the next FLUSH after the reconnect fails, once,
//   with EIO, and says so; if there is none, close() does. So it does about what was kept and could
//   not be sent again.
// - A connection may be lost while writes are sent again over it: from then on only connections
//   that were begun later are used. (A server that still has such a write under way may carry it
//   out later than what came after it; if that is to be excluded, Connect waits until it has not.)
// - A write that was not acknowledged fails with ECONNRESET: it may have been carried out. With
//   `replay_writes` it is sent again, and nothing that overlaps it is sent before. (A server that
//   still has it under way over a connection that only seems lost may then carry it out later than
//   what came after it.)
// - RESIZE fails with ECONNRESET.
//
// An export that comes back with another size, with fewer abilities, with other metadata contexts,
// or read-only, is another one: all fails with EMEDIUMTYPE from then on.
//
// Stopping a request: as NbdClient, and ECANCELED while it waits to be sent.
//
// Threads: open(), requests and close() in coroutines on any context; the rest from any thread.
// Lifetime: the contexts outlive it; close() it before it goes (the destructor aborts otherwise);
// requests end before. Buffers stay until their request returns.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stop_token>
#include <string>
#include <vector>

#include "roost/base/platform.h"
#include "roost/base/random.h"
#include "roost/base/result.h"
#include "roost/coro/task.h"
#include "roost/nbd/client.h"
#include "roost/sync/co_queue.h"
#include "roost/sync/stop_scope.h"

namespace roost::nbd {

struct RemoteExportOptions {
  /// Where connections live, one after the other.
  std::vector<AioContext*> contexts{};
  /// In all; 0: one for each context. A server that does not allow several gets one.
  unsigned connections = 0;
  /// How long a lost connection is tried to be made again, from its loss on, or from the last kept
  /// write that got through for good; 0: not at all.
  std::int64_t reconnect_timeout_ns = 60'000'000'000;
  /// Between the second try and the third; twice as long each time, up to the second of these.
  std::int64_t first_delay_ns = 100'000'000;
  std::int64_t longest_delay_ns = 10'000'000'000;
  /// Of acknowledged writes that may have to be sent again; 0: none.
  std::uint64_t keep_bytes = 64 << 20;
  /// Send writes again that were not acknowledged.
  bool replay_writes = false;
  /// How long close() waits for a server, be it sent kept writes or not, and a connection that came
  /// back for another to answer.
  std::int64_t goodbye_timeout_ns = 5'000'000'000;
  /// Delays vary by a quarter, so that clients that lost one server do not come back at once.
  std::uint64_t seed = 1;
};

class KeptWrites;

class RemoteExport {
 public:
  /// Makes a connection, on the current context.
  using Connect = std::function<Task<Result<std::unique_ptr<NbdClient>>>(std::stop_token)>;

  /// EMEDIUMTYPE: the connections disagree about what the export is.
  static Task<Result<std::unique_ptr<RemoteExport>>> open(Connect connect,
                                                          const RemoteExportOptions& options,
                                                          std::stop_token stop = {});
  ~RemoteExport();
  RemoteExport(const RemoteExport&) = delete;
  RemoteExport& operator=(const RemoteExport&) = delete;

  /// What was agreed on at first. Constant; size() is what has changed since.
  const NbdClient::Outcome& outcome() const noexcept { return outcome_; }
  std::uint64_t size() const noexcept { return size_.load(std::memory_order_acquire); }
  bool offers(std::uint16_t transmission_flag) const noexcept {
    return (outcome_.transmission_flags & transmission_flag) != 0;
  }

  // Requests, as NbdClient has them.
  Task<Result<void>> read(std::uint64_t offset, std::span<std::byte> to, std::stop_token stop = {});
  Task<Result<void>> writev(std::uint64_t offset, std::span<const iovec> from,
                            std::uint16_t flags = 0, std::stop_token stop = {});
  Task<Result<void>> flush(std::stop_token stop = {});
  Task<Result<void>> trim(std::uint64_t offset, std::uint64_t length, std::uint16_t flags = 0,
                          std::stop_token stop = {});
  Task<Result<void>> zero(std::uint64_t offset, std::uint64_t length, std::uint16_t flags = 0,
                          std::stop_token stop = {});
  Task<Result<void>> cache(std::uint64_t offset, std::uint64_t length, std::stop_token stop = {});
  Task<Result<std::vector<ContextExtents>>> block_status(std::uint64_t offset, std::uint64_t length,
                                                         std::uint16_t flags = 0,
                                                         std::stop_token stop = {});
  /// ENOTSUP with more than one connection: the others would not know.
  Task<Result<void>> resize(std::uint64_t size, std::stop_token stop = {});

  /// Takes leave of the server, for as long as goodbye_timeout_ns allows, and gives up what
  /// waits. To be called once. It closes in any case; EIO: writes that were acknowledged may be
  /// lost, and no flush has said so.
  Task<Result<void>> close();

  /// A snapshot for messages and tests.
  struct Statistics {
    std::uint64_t lost = 0;          // connections
    std::uint64_t reconnected = 0;   // of them
    std::uint64_t replayed = 0;      // writes that were acknowledged and sent again
    std::uint64_t kept_bytes = 0;    // now
    std::uint64_t unkept_bytes = 0;  // written since the last flush, and not kept
  };
  Statistics statistics() const;
  std::size_t connections() const noexcept { return connections_.size(); }

 private:
  using Mutex = RealPlatform::Mutex;
  using Client = std::shared_ptr<NbdClient>;
  struct Request;
  struct Connection;

  RemoteExport(Connect connect, const RemoteExportOptions& options);

  Task<Result<void>> run(Request& request, std::stop_token stop);
  Task<Result<Client>> admit(Request& request, std::stop_token stop);
  static Task<Result<void>> send(NbdClient& client, Request& request, std::stop_token stop);
  bool sent(Request& request, const Client& client, Result<void>& done);
  Client choose();
  bool overtakes(const Request& request) const;
  void lose(Connection& connection);
  void send_again(Request& request);
  std::optional<Error> all_given_up() const;

  Task<void> look_after(Connection& connection);
  Task<void> reconnect(Connection& connection);
  Task<Result<void>> come_back(Connection& connection, Client client, std::uint64_t broken_before);
  Task<Result<void>> replay(Connection& connection, Client client, std::uint64_t broken_before,
                            StopScope& scope, bool& over);
  Task<Result<void>> send_kept(Connection& connection, NbdClient& client);
  Task<bool> another_answers(std::stop_token stop);
  Task<bool> answers(NbdClient& client, std::stop_token stop);
  Task<Result<void>> cut_off_late(Connection& connection, Client client, std::stop_token stop,
                                  const bool& over);
  Task<void> say_goodbye(Client client, std::int64_t timeout_ns);
  Result<void> compare(const NbdClient& client) const;

  const Connect connect_;
  const RemoteExportOptions options_;
  NbdClient::Outcome outcome_;                            // constant once it is open
  std::atomic<std::uint64_t> size_{0};                    // any thread reads; resize() writes
  std::atomic<std::size_t> turn_{0};                      // any thread
  std::vector<std::unique_ptr<Connection>> connections_;  // constant once it is open
  StopScope closing_scope_;
  const std::unique_ptr<KeptWrites> kept_;  // the mutex guards what is in it

  mutable Mutex mutex_;  // guards the following, and the connections
  bool closing_ = false;
  bool closed_ = false;
  bool server_has_all_ = false;       // it was there when closing_ began, or was sent all since
  std::size_t keepers_ = 0;           // coroutines that look after connections
  bool exclusive_ = false;            // kept writes are sent again: no request begins
  std::optional<Error> failure_;      // the export is another one
  std::optional<Error> lost_writes_;  // for the next flush
  // How often a connection was lost that a kept write was being sent again over.
  std::uint64_t broken_replays_ = 0;
  std::size_t portion_;  // of kept writes that is sent again before a flush
  std::uint64_t numbers_ = 0;
  std::vector<Request*> flying_;  // those that a connection has
  std::vector<Request*> again_;   // writes that have to be sent again, the oldest first
  Statistics statistics_;

  CoQueue changed_{"a connection to an NBD server"};
  CoQueue work_{"the loss of an NBD connection"};
};

}  // namespace roost::nbd
