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

namespace roost {

namespace {

// Clients accepted in one turn before other descriptors get theirs.
constexpr int kMaxAccepts = 16;

// How long to leave clients in the queue when there are no descriptors for them.
constexpr std::int64_t kAcceptRetryNs = 100'000'000;

nbd::ExportInfo describe_export(const NbdServer::Export& exported) {
  // Every connection reads and writes through the same page cache, so what one has been told is
  // written, a flush on any makes durable.
  std::uint16_t flags = nbd::kTransmissionHasFlags | nbd::kTransmissionSendFlush |
                        nbd::kTransmissionSendFua | nbd::kTransmissionCanMultiConn;
  if (exported.disk->read_only()) {
    flags |= nbd::kTransmissionReadOnly;
  } else {
    flags |= nbd::kTransmissionSendTrim | nbd::kTransmissionSendWriteZeroes;
  }
  return {.name = exported.name, .size = exported.disk->size(), .transmission_flags = flags};
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
    : options_(std::move(options)), exports_(std::move(exports)) {
  ROOST_CHECK(!options_.io_contexts.empty(), "a server needs an I/O context");
  for (const Export& exported : exports_) export_infos_.push_back(describe_export(exported));
  for (std::size_t i = 0; i < options_.io_contexts.size(); ++i) {
    reply_memory_.push_back(std::make_unique<BufferCache>());
  }
  clients_.assign(exports_.size(), std::vector<unsigned>(options_.io_contexts.size()));
}

NbdServer::~NbdServer() {
  ROOST_CHECK(connections() == 0, "server destroyed with {} connections", connections());
}

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
    if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
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
  auto connection = std::make_shared<NbdConnection>(*this, std::move(client));
  Coroutine* const co = Coroutine::create(NbdConnection::run(connection), "nbd connection");
  bool welcome = false;
  try {
    std::lock_guard lock(mutex_);
    welcome = !stopping_ && connections_.insert(connection).second;
  } catch (...) {
    Coroutine::destroy(co);
    throw;
  }
  if (!welcome) {
    Coroutine::destroy(co);
    return;
  }
  AioContext& context = *options_.io_contexts[next_context_++ % options_.io_contexts.size()];
  co_schedule(context, *co);
}

std::size_t NbdServer::choose_context(std::size_t export_index) {
  std::lock_guard lock(mutex_);
  std::vector<unsigned>& counts = clients_[export_index];
  const auto least = std::min_element(counts.begin(), counts.end());
  ++*least;
  return static_cast<std::size_t>(least - counts.begin());
}

void NbdServer::connection_ended(NbdConnection& connection) {
  std::lock_guard lock(mutex_);
  if (const auto place = connection.place()) {
    const auto context =
        std::find(options_.io_contexts.begin(), options_.io_contexts.end(), place->context);
    --clients_[place->export_index]
              [static_cast<std::size_t>(context - options_.io_contexts.begin())];
  }
  connections_.erase(connection.shared_from_this());
  if (stopping_ && connections_.empty() && on_idle_) {
    schedule_oneshot(*options_.main_context, std::exchange(on_idle_, nullptr));
  }
}

void NbdServer::stop(std::function<void()> on_idle) {
  listeners_.clear();
  std::lock_guard lock(mutex_);
  stopping_ = true;
  for (const auto& connection : connections_) connection->stop();
  if (connections_.empty()) {
    schedule_oneshot(*options_.main_context, std::move(on_idle));
  } else {
    on_idle_ = std::move(on_idle);
  }
}

void NbdServer::disconnect_all() {
  std::lock_guard lock(mutex_);
  for (const auto& connection : connections_) connection->disconnect();
}

std::size_t NbdServer::connections() const {
  std::lock_guard lock(mutex_);
  return connections_.size();
}

}  // namespace roost
