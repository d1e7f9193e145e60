// SPDX-License-Identifier: MIT
// NbdServer: offers disks to NBD clients, from several I/O threads.
//
// Each client gets a coroutine that negotiates, then moves to the context that has the fewest
// clients of that export, and reads requests there; each request is a coroutine of its own.
//
// Threads: constructed, used and destroyed on the thread that polls the main context. Connections
// run on the I/O contexts; what they share with the server is guarded by its mutex.
// Lifetime: contexts, disks and the log function outlive the server. Before it is destroyed, stop()
// it and poll the main context until that has called back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_set>
#include <vector>

#include "roost/aio/aio_context.h"
#include "roost/block/block_driver.h"
#include "roost/io/listener.h"
#include "roost/nbd/negotiation.h"

namespace roost {

class BufferCache;
class NbdConnection;

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
  };

  struct Options {
    AioContext* main_context;
    std::vector<AioContext*> io_contexts;  // at least one
    NbdLimits limits{};
    /// One line, without its end. Called from any thread.
    std::function<void(const std::string&)> log;
  };

  /// Clients of `exports` are served on `options.io_contexts`, once there are any.
  NbdServer(Options options, std::vector<Export> exports);
  ~NbdServer();
  NbdServer(const NbdServer&) = delete;
  NbdServer& operator=(const NbdServer&) = delete;

  /// Starts to accept clients on `socket`.
  void listen(ListenSocket socket);

  /// Serves a client that is already connected. Takes the descriptor.
  void serve(UniqueFd client);

  /// Stops accepting and reading requests; those that were read are finished and answered. Calls
  /// `on_idle` on the main context once every connection is closed.
  void stop(std::function<void()> on_idle);

  /// Closes all connections, answered or not. After stop(), for clients that do not read.
  void disconnect_all();

  /// Clients that are connected now. Any thread.
  std::size_t connections() const;

 private:
  friend class NbdConnection;

  struct Listener;

  void accept_some(Listener& listener);
  std::size_t choose_context(std::size_t export_index);  // its place in io_contexts
  void connection_ended(NbdConnection& connection);
  void log(const std::string& line) const { options_.log(line); }

  const Options options_;
  const std::vector<Export> exports_;
  std::vector<nbd::ExportInfo> export_infos_;  // constant once constructed

  std::vector<std::unique_ptr<BufferCache>> reply_memory_;  // one a context, used only there

  // Main thread.
  std::vector<std::unique_ptr<Listener>> listeners_;
  std::size_t next_context_ = 0;

  mutable std::mutex mutex_;  // guards the rest
  std::unordered_set<std::shared_ptr<NbdConnection>> connections_;
  std::vector<std::vector<unsigned>> clients_;  // [export][context]
  bool stopping_ = false;
  std::function<void()> on_idle_;
};

}  // namespace roost
