// SPDX-License-Identifier: MIT
#include "roost/export/nbd_server.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "export/nbd_connection.h"
#include "roost/aio/bottom_half.h"
#include "roost/base/check.h"
#include "roost/io/socket_channel.h"

namespace roost {

namespace {

// Clients accepted in one turn before other descriptors get theirs.
constexpr int kMaxAccepts = 16;

// How long to leave clients in the queue when there are no descriptors for them.
constexpr std::int64_t kAcceptRetryNs = 100'000'000;

nbd::ExportInfo describe_export(std::uint64_t id, const NbdServer::Export& exported) {
  // Every connection reads and writes through the same page cache, so what one has been told is
  // written, a flush on any makes durable.
  std::uint16_t flags = nbd::kTransmissionHasFlags | nbd::kTransmissionSendFlush |
                        nbd::kTransmissionSendFua | nbd::kTransmissionCanMultiConn |
                        nbd::kTransmissionSendCache | nbd::kTransmissionSendDf |
                        nbd::kTransmissionBlockStatusPayload;
  if (exported.read_only || exported.disk->read_only()) {
    flags |= nbd::kTransmissionReadOnly;
  } else {
    flags |= nbd::kTransmissionSendTrim | nbd::kTransmissionSendWriteZeroes;
    if (exported.disk->can_zero_fast()) flags |= nbd::kTransmissionSendFastZero;
    if (exported.allow_resize && exported.disk->can_resize()) {
      flags |= nbd::kTransmissionSendResize;
    }
  }
  return {.id = id,
          .name = exported.name,
          .size = exported.disk->size(),
          .transmission_flags = flags,
          .min_block = exported.min_block,
          .preferred_block = exported.preferred_block,
          .max_payload = exported.max_payload,
          .description = exported.description};
}

}  // namespace

struct NbdServer::Listener {
  Listener(NbdServer& owner, ListenSocket s)
      : server(owner),
        socket(std::move(s)),
        retry(*owner.options_.main_context, [this] { watch(); }) {
    watch();
  }
  ~Listener() { server.options_.main_context->remove_fd_handler(socket.fd()); }

  void watch() {
    server.options_.main_context->set_fd_handler(
        socket.fd(), {.read = [this] { server.accept_some(*this); }, .write = {}, .poll = {}});
  }

  NbdServer& server;
  ListenSocket socket;
  Timer retry;
};

NbdServer::NbdServer(Options options, std::vector<Export> exports)
    : options_(std::move(options)), visible_exports_(std::make_shared<const nbd::ExportSet>()) {
  ROOST_CHECK(!options_.io_contexts.empty(), "a server needs an I/O context");
  ROOST_CHECK(options_.credentials || options_.tls == nbd::TlsPolicy::kUnsupported ||
                  options_.tls == nbd::TlsPolicy::kForbidden,
              "a server that does TLS needs credentials");
  for (std::size_t i = 0; i < options_.io_contexts.size(); ++i) {
    memory_.push_back(std::make_unique<BufferCache>());
  }
  for (Export& exported : exports) {
    const Result<void> added = add_export(std::move(exported));
    ROOST_CHECK(added, "{}", added.error().message());
  }
}

NbdServer::~NbdServer() {
  ROOST_CHECK(connections() == 0, "server destroyed with {} connections", connections());
}

// ---- Exports

bool NbdServer::ActiveExport::used() const {
  return std::ranges::any_of(clients, [](unsigned count) { return count > 0; });
}

NbdServer::ActiveExport* NbdServer::find_export(std::string_view name) {
  const auto found = std::ranges::find_if(
      exports_, [&](const auto& exported) { return exported->config.name == name; });
  return found == exports_.end() ? nullptr : found->get();
}

void NbdServer::publish_exports() {
  std::vector<nbd::ExportInfo> infos;
  for (const auto& exported : exports_) {
    if (!exported->hidden) infos.push_back(describe_export(exported->id, exported->config));
  }
  visible_exports_ = std::make_shared<const nbd::ExportSet>(std::move(infos));
}

Result<void> NbdServer::add_export(Export exported) {
  if (const auto good = nbd::check_export(describe_export(0, exported)); !good) return good;
  std::lock_guard lock(mutex_);
  if (find_export(exported.name)) {
    return fail(EEXIST, "a second export '" + exported.name + "'");
  }
  exports_.push_back(std::make_unique<ActiveExport>(next_export_id_++, std::move(exported),
                                                    options_.io_contexts.size()));
  publish_exports();
  return {};
}

Result<void> NbdServer::hide_export(std::string_view name) {
  std::lock_guard lock(mutex_);
  ActiveExport* const exported = find_export(name);
  if (!exported) return fail(ENOENT, "export '" + std::string(name) + "'");
  exported->hidden = true;
  publish_exports();
  return {};
}

Result<void> NbdServer::remove_export(std::string_view name, Removal removal,
                                      std::function<void()> on_gone) {
  std::lock_guard lock(mutex_);
  ActiveExport* const exported = find_export(name);
  if (!exported) return fail(ENOENT, "export '" + std::string(name) + "'");
  exported->on_gone.push_back(std::move(on_gone));
  exported->removed = true;
  exported->hidden = true;
  publish_exports();
  if (removal == Removal::kNow) {
    for (const auto& [number, served] : connections_) {
      if (served.place.exported == exported) served.connection->disconnect();
    }
  }
  forget_if_unused(*exported);
  return {};
}

// The callbacks are posted, even on the main thread: nothing of the caller's is called back into.
void NbdServer::forget_if_unused(ActiveExport& exported) {
  if (!exported.removed || exported.used()) return;
  for (auto& call : exported.on_gone) {
    if (call) schedule_oneshot(*options_.main_context, std::move(call));
  }
  std::erase_if(exports_, [&](const auto& each) { return each.get() == &exported; });
}

std::shared_ptr<const nbd::ExportSet> NbdServer::visible_exports() const {
  std::lock_guard lock(mutex_);
  return visible_exports_;
}

// The client has chosen an export, which may have gone since it was shown.
NbdServer::Entry NbdServer::enter(NbdConnection& connection, std::uint64_t export_id,
                                  Place& place) {
  std::lock_guard lock(mutex_);
  const auto found =
      std::ranges::find_if(exports_, [&](const auto& each) { return each->id == export_id; });
  if (found == exports_.end() || (*found)->hidden) return Entry::kGone;
  ActiveExport& exported = **found;
  if (exported.resizing) return Entry::kBusy;
  const auto least = std::ranges::min_element(exported.clients);
  ++*least;
  place = {&exported, static_cast<std::size_t>(least - exported.clients.begin())};
  connections_.find(connection.number())->second.place = place;
  return Entry::kEntered;
}

// Requests of the client that asks are out of the way. Those of others cannot be beyond the end
// when the disk grows; a disk that others use does not shrink.
Result<void> NbdServer::begin_resize(ActiveExport& exported, std::uint64_t new_size) {
  BlockDriver& disk = *exported.config.disk;
  std::lock_guard lock(mutex_);
  unsigned clients = 0;
  for (const auto& each : exports_) {
    if (each->config.disk != &disk) continue;
    if (each->resizing) return fail(EPERM, "resize " + disk.name() + ": it is being resized");
    for (const unsigned count : each->clients) clients += count;
  }
  if (new_size < disk.size() && clients > 1) {
    return fail(EPERM, "shrink " + disk.name() + ": others use it");
  }
  for (const auto& each : exports_) {
    if (each->config.disk == &disk) each->resizing = true;
  }
  return {};
}

void NbdServer::end_resize(ActiveExport& exported) {
  std::lock_guard lock(mutex_);
  for (const auto& each : exports_) {
    if (each->config.disk == exported.config.disk) each->resizing = false;
  }
  publish_exports();
}

// ---- Clients

void NbdServer::listen(ListenSocket socket) {
  listeners_.push_back(std::make_unique<Listener>(*this, std::move(socket)));
}

void NbdServer::accept_some(Listener& listener) {
  for (int i = 0; i < kMaxAccepts; ++i) {
    UniqueFd client(
        ::accept4(listener.socket.fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (client) {
      try {
        serve(std::move(client));
      } catch (const std::bad_alloc&) {
        log("a client is turned away: out of memory");
      }
      continue;
    }
    if (out_of_descriptors(errno)) {
      log(Error(errno, "accept on " + listener.socket.address().text()).message());
      options_.main_context->remove_fd_handler(listener.socket.fd());
      listener.retry.arm_after(kAcceptRetryNs);
      return;
    }
    // A client that gave up while it was queued is none; otherwise the queue is empty.
    if (errno != ECONNABORTED && errno != EINTR) return;
  }
}

void NbdServer::serve(UniqueFd client) {
  const int on = 1;
  // Fails on unix sockets, which do not delay anything.
  ::setsockopt(client.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  const std::string peer = describe_peer(client.get());
  serve(std::make_unique<SocketChannel>(std::move(client), peer));
}

void NbdServer::serve(std::unique_ptr<Channel> client) {
  auto connection = std::make_shared<NbdConnection>(*this, std::move(client), next_connection_++);
  Coroutine* const co = Coroutine::create(NbdConnection::run(connection), "nbd connection");
  bool welcome = false;
  bool full = false;
  try {
    std::lock_guard lock(mutex_);
    full = options_.max_connections > 0 && connections_.size() >= options_.max_connections;
    welcome =
        !stopping_ && !full && connections_.try_emplace(connection->number(), connection).second;
  } catch (...) {
    Coroutine::destroy(co);
    throw;
  }
  if (!welcome) {
    Coroutine::destroy(co);
    if (full) {
      log(connection->peer() + ": turned away: there are " +
          std::to_string(options_.max_connections) + " clients already");
    }
    return;
  }
  AioContext& context = *options_.io_contexts[next_context_++ % options_.io_contexts.size()];
  co_schedule(context, *co);
}

void NbdServer::connection_ended(NbdConnection& connection) {
  std::lock_guard lock(mutex_);
  const auto found = connections_.find(connection.number());
  const Place place = found->second.place;
  connections_.erase(found);
  if (place.exported) {
    --place.exported->clients[place.context];
    forget_if_unused(*place.exported);
  }
  if (stopping_ && connections_.empty() && on_idle_) {
    schedule_oneshot(*options_.main_context, std::exchange(on_idle_, nullptr));
  }
}

void NbdServer::stop(std::function<void()> on_idle) {
  listeners_.clear();
  std::lock_guard lock(mutex_);
  stopping_ = true;
  for (const auto& [number, served] : connections_) served.connection->stop();
  if (connections_.empty()) {
    schedule_oneshot(*options_.main_context, std::move(on_idle));
  } else {
    on_idle_ = std::move(on_idle);
  }
}

void NbdServer::disconnect_all() {
  std::lock_guard lock(mutex_);
  for (const auto& [number, served] : connections_) served.connection->disconnect();
}

std::size_t NbdServer::connections() const {
  std::lock_guard lock(mutex_);
  return connections_.size();
}

}  // namespace roost
