// SPDX-License-Identifier: MIT
// NbdServer: offers disks to NBD clients, from several I/O threads.
//
// Each client gets a coroutine that negotiates, then moves to the context that has the fewest
// clients of that export, and reads requests there; each request is a coroutine of its own.
//
// Exports come and go while clients are busy. A hidden one takes no new clients; a removed one goes
// when its last client has gone, which may be told to go at once. Its disk may be destroyed when
// remove_export() has called back, not before.
//
// Threads: constructed, used and destroyed on the thread that polls the main context. Connections
// run on the I/O contexts; what they share with the server is guarded by its mutex.
// Lifetime: contexts, disks (of exports that were not removed) and the log function outlive the
// server. Before it is destroyed, stop()
// it and poll the main context until that has called back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "roost/aio/aio_context.h"
#include "roost/base/platform.h"
#include "roost/block/block_driver.h"
#include "roost/io/listener.h"
#include "roost/nbd/negotiation.h"

namespace roost {

class BufferCache;
class Channel;
class NbdConnection;
class TlsCredentials;

/// What one client may hold at a time, so that it costs its own connection and no more.
struct NbdLimits {
  unsigned requests_in_flight = 128;
  /// Payload and reply bytes; a single request may go beyond it.
  std::size_t bytes_in_flight = 64u << 20;
  std::int64_t handshake_timeout_ns = 10'000'000'000;
};

/// The server. The file's head says which thread it belongs to.
class NbdServer {
 public:
  /// A disk, under the name that clients ask for.
  struct Export {
    std::string name;  // empty: the default export
    BlockDriver* disk;
    std::string description{};
    bool read_only = false;     // although the disk is not
    bool allow_resize = false;  // by clients, if the disk can
    // Requests that do not keep to these are refused, whether the client asked for them or not.
    std::uint32_t min_block = nbd::kDefaultMinBlock;
    std::uint32_t preferred_block = nbd::kDefaultPreferredBlock;
    std::uint32_t max_payload = nbd::kMaxPayload;
  };

  /// What happens to the clients of an export that is removed.
  enum class Removal : std::uint8_t {
    kWhenUnused,  // they go on until they leave by themselves
    // They are disconnected; requests in flight are finished first. One that waits until its client
    // may have it in flight is not begun.
    kNow,
  };

  struct Options {
    AioContext* main_context;
    std::vector<AioContext*> io_contexts;  // at least one
    NbdLimits limits{};
    /// Clients at one time; one more is turned away, with a line in the log. 0: any number.
    std::size_t max_connections = 0;
    /// kAllowed and kRequired need credentials of a server.
    nbd::TlsPolicy tls = nbd::TlsPolicy::kUnsupported;
    std::shared_ptr<const TlsCredentials> credentials = nullptr;
    /// Whether a client whose TLS has told who it is (TlsChannel::peer_name()) may come in; empty:
    /// all may. Called from any thread.
    std::function<bool(const std::string&)> authorize = nullptr;
    /// One line, without its end. Called from any thread.
    std::function<void(const std::string&)> log;
  };

  /// Clients of `exports` are served on `options.io_contexts`, once there are any.
  /// REQUIRES: add_export() takes each of `exports`.
  NbdServer(Options options, std::vector<Export> exports);
  ~NbdServer();
  NbdServer(const NbdServer&) = delete;
  NbdServer& operator=(const NbdServer&) = delete;

  /// Offers one more. EEXIST if there is one of that name, be it hidden or on its way out; EINVAL
  /// if the protocol does not let it be offered like this.
  Result<void> add_export(Export exported);

  /// Takes no new clients for it any more; those it has go on. ENOENT if there is none.
  Result<void> hide_export(std::string_view name);

  /// Hides it, and calls `on_gone` on the main context once no client and no request uses its disk.
  /// Again with kNow: those that it waits for are disconnected; both calls' `on_gone` are called.
  /// ENOENT if there is none.
  Result<void> remove_export(std::string_view name, Removal removal, std::function<void()> on_gone);

  /// Starts to accept clients on `socket`.
  void listen(ListenSocket socket);

  /// Serves a client that is already connected: by a socket, or by any channel, whose name is the
  /// client's in messages.
  void serve(UniqueFd client);
  void serve(std::unique_ptr<Channel> client);

  /// Stops accepting and reading requests; those that were read are finished and answered. Calls
  /// `on_idle` on the main context once every connection is closed.
  void stop(std::function<void()> on_idle);

  /// Closes all connections, answered or not. After stop(), for clients that do not read.
  void disconnect_all();

  /// Clients that are connected now. Any thread.
  std::size_t connections() const;

 private:
  friend class NbdConnection;
  class TlsCredentials;

  struct Listener;

  // What is offered, or was and is still in use.
  struct ActiveExport {
    ActiveExport(std::uint64_t number, Export e, std::size_t contexts)
        : id(number), config(std::move(e)), clients(contexts) {}

    const std::uint64_t id;  // never used again
    const Export config;
    // The rest is guarded by mutex_.
    std::vector<unsigned> clients;  // on each context
    bool hidden = false;
    bool removed = false;   // goes with its last client
    bool resizing = false;  // its disk: takes no new clients meanwhile
    std::vector<std::function<void()>> on_gone{};

    bool used() const;
  };

  // Where a client is; nowhere while it negotiates.
  struct Place {
    ActiveExport* exported = nullptr;
    std::size_t context = 0;  // its place in io_contexts
  };

  struct Served {
    std::shared_ptr<NbdConnection> connection;
    Place place{};
  };

  enum class Entry : std::uint8_t { kEntered, kGone, kBusy };

  void accept_some(Listener& listener);
  void log(const std::string& line) const { options_.log(line); }

  // For connections, on their contexts.
  std::shared_ptr<const nbd::ExportSet> visible_exports() const;
  Entry enter(NbdConnection& connection, std::uint64_t export_id, Place& place);
  Result<void> begin_resize(ActiveExport& exported, std::uint64_t new_size);
  void end_resize(ActiveExport& exported);
  void connection_ended(NbdConnection& connection);

  // REQUIRES: mutex_ is held.
  ActiveExport* find_export(std::string_view name);
  void publish_exports();
  void forget_if_unused(ActiveExport& exported);

  const Options options_;

  std::vector<std::unique_ptr<BufferCache>> memory_;  // one a context, used only there

  // Main thread.
  std::vector<std::unique_ptr<Listener>> listeners_;
  std::size_t next_context_ = 0;
  std::uint64_t next_connection_ = 1;
  std::uint64_t next_export_id_ = 1;

  mutable RealPlatform::Mutex mutex_;  // guards the rest
  // By number: what is done to all of them is done in the order in which they came.
  std::map<std::uint64_t, Served> connections_;
  std::vector<std::unique_ptr<ActiveExport>> exports_;
  std::shared_ptr<const nbd::ExportSet> visible_exports_;  // what new clients are told
  bool stopping_ = false;
  std::function<void()> on_idle_;
};

}  // namespace roost
