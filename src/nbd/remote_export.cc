// SPDX-License-Identifier: MIT
#include "roost/nbd/remote_export.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <mutex>
#include <utility>

#include "nbd/kept_writes.h"
#include "roost/aio/aio_context.h"
#include "roost/aio/timer.h"
#include "roost/base/check.h"
#include "roost/sync/task_group.h"
#include "roost/sync/when.h"

namespace roost::nbd {

namespace {

// A request that loses every connection it is sent over may be why.
constexpr int kMostLosses = 10;
// Kept writes that are sent again at a time, and between two flushes.
constexpr std::uint32_t kReplayDepth = 16;
constexpr std::size_t kLargestPortion = 64;
constexpr std::uint64_t kLargestPortionBytes = 8 << 20;

bool is_write(Command command) {
  return command == Command::kWrite || command == Command::kWriteZeroes ||
         command == Command::kTrim;
}

Task<Result<void>> send_piece(NbdClient& client, KeptWrites::Piece piece) {
  const std::uint16_t flags = piece.of->what.flags;
  switch (piece.of->what.command) {
    case Command::kWrite: {
      const iovec data = as_iovec(piece.data());
      co_return co_await client.writev(piece.offset, std::span(&data, 1), flags);
    }
    case Command::kWriteZeroes:
      co_return co_await client.zero(piece.offset, piece.length, flags);
    default:
      co_return co_await client.trim(piece.offset, piece.length, flags);
  }
}

Error may_be_lost() {
  return {EIO, "writes that were acknowledged before the connection was lost may be lost"};
}

// No two of them overlap: in any order.
Task<Result<void>> send_pieces(NbdClient& client, std::span<const KeptWrites::Piece> pieces) {
  TaskGroup group({.name = "kept writes", .max_running = kReplayDepth});
  for (const KeptWrites::Piece& piece : pieces) {
    if (!co_await group.room()) break;
    group.spawn(send_piece(client, piece));
  }
  co_return co_await group.join();
}

}  // namespace

struct RemoteExport::Request {
  ClientRequest what;
  std::span<const iovec> data{};
  std::vector<ContextExtents> extents{};  // of a BLOCK_STATUS that succeeded
  // Guarded by mutex_.
  std::uint64_t number = 0;  // in the order in which they were first sent
  std::uint64_t turn = 0;    // in which they were last sent
  Client over{};             // while it is in flight
  bool again = false;        // in again_
  int losses = 0;
  KeptWrites::Mark covers{};  // of a FLUSH
};

struct RemoteExport::Connection {
  AioContext* context;  // the one it lives on
  // Guarded by mutex_.
  Client client{};  // null: lost
  Client lost{};    // until its coroutine has taken care of it
  bool is_lost = false;
  bool proven = false;  // it has answered something since it was made
  std::optional<Error> given_up{};
  // Its coroutine.
  Random random;
  std::int64_t outage_began_ns = 0;
  std::int64_t delay_ns = 0;
};

RemoteExport::RemoteExport(Connect connect, const RemoteExportOptions& options)
    : connect_(std::move(connect)),
      options_(options),
      kept_(std::make_unique<KeptWrites>(options.keep_bytes)),
      portion_(kLargestPortion) {}

RemoteExport::~RemoteExport() {
  ROOST_CHECK(closed_ || connections_.empty(), "a remote export goes without close()");
}

Result<void> RemoteExport::compare(const NbdClient& client) const {
  const auto differs = [](std::string what) {
    return fail(EMEDIUMTYPE, "the export has changed: " + what);
  };
  const NbdClient::Outcome& now = client.outcome();
  if (client.size() != size()) {
    return differs(fmt::format("{} bytes instead of {}", client.size(), size()));
  }
  std::uint16_t before = outcome_.transmission_flags;
  if (connections_.size() < 2) before &= static_cast<std::uint16_t>(~kTransmissionCanMultiConn);
  const auto missing = static_cast<std::uint16_t>(before & ~now.transmission_flags);
  if (missing & kTransmissionCanMultiConn) return differs("several connections are not allowed");
  const std::uint16_t no_ability = kTransmissionReadOnly | kTransmissionRotational;
  if (missing & ~no_ability) {
    return differs(fmt::format("flags {:#x} instead of {:#x}", now.transmission_flags,
                               outcome_.transmission_flags));
  }
  if (now.transmission_flags & ~outcome_.transmission_flags & kTransmissionReadOnly) {
    return differs("it is read-only");
  }
  const auto same_name = [](const MetaContext& a, const MetaContext& b) {
    return a.name == b.name;
  };
  if (!std::ranges::equal(now.contexts, outcome_.contexts, same_name)) {
    return differs("other metadata contexts");
  }
  if (now.min_block > outcome_.min_block) {
    return differs(fmt::format("blocks of at least {} bytes", now.min_block));
  }
  return {};
}

Task<Result<std::unique_ptr<RemoteExport>>> RemoteExport::open(Connect connect,
                                                               const RemoteExportOptions& options,
                                                               std::stop_token stop) {
  ROOST_CHECK(!options.contexts.empty(), "a remote export needs a context");
  AioContext& home = *AioContext::current();
  std::unique_ptr<RemoteExport> self(new RemoteExport(std::move(connect), options));
  std::size_t wanted = options.connections ? options.connections : self->options_.contexts.size();
  std::vector<Client> clients;
  Result<void> good;
  while (good && clients.size() < wanted) {
    AioContext& context = *self->options_.contexts[clients.size() % self->options_.contexts.size()];
    if (AioContext::current() != &context) co_await move_to(context);
    auto connecting = self->connect_(stop);
    Result<std::unique_ptr<NbdClient>> client = co_await std::move(connecting);
    if (!client) {
      good = std::unexpected(std::move(client.error()));
      break;
    }
    if (!(*client)->offers(kTransmissionCanMultiConn)) wanted = 1;
    clients.push_back(std::move(*client));
    if (clients.size() == 1) {
      self->outcome_ = clients.front()->outcome();
      self->size_ = clients.front()->size();
    } else if (clients.back()->outcome().transmission_flags != self->outcome_.transmission_flags ||
               clients.back()->size() != self->size()) {
      good = fail(EMEDIUMTYPE, "the export changes from connection to connection");
    }
  }
  if (!good) {
    for (Client& client : clients) {
      co_await self->say_goodbye(std::move(client), options.goodbye_timeout_ns);
    }
    if (AioContext::current() != &home) co_await move_to(home);
    co_return std::unexpected(good.error());
  }
  for (std::size_t i = 0; i < clients.size(); ++i) {
    self->connections_.push_back(std::make_unique<Connection>(
        Connection{.context = self->options_.contexts[i % self->options_.contexts.size()],
                   .client = std::move(clients[i]),
                   .random = Random(Random::mix(self->options_.seed + i))}));
  }
  self->keepers_ = self->connections_.size();
  for (const auto& connection : self->connections_) {
    spawn(*connection->context, self->look_after(*connection), "NBD connection");
  }
  if (AioContext::current() != &home) co_await move_to(home);
  co_return std::move(self);
}

Task<Result<void>> RemoteExport::close() {
  std::unique_lock lock(mutex_);
  closing_ = true;
  server_has_all_ = std::ranges::any_of(
      connections_, [](const auto& one) { return one->client && one->client->state(); });
  lock.unlock();
  closing_scope_.request_stop();
  work_.wake_all();
  changed_.wake_all();
  lock.lock();
  while (keepers_ > 0) co_await changed_.wait(lock);
  closed_ = true;
  const bool unflushed = kept_->bytes() > 0 || kept_->unkept_bytes() > 0;
  if (!lost_writes_ && unflushed && !server_has_all_) lost_writes_ = may_be_lost();
  if (!lost_writes_) co_return Result<void>();
  co_return fail(lost_writes_->code(), lost_writes_->doing());
}

RemoteExport::Statistics RemoteExport::statistics() const {
  const std::lock_guard lock(mutex_);
  Statistics now = statistics_;
  now.kept_bytes = kept_->bytes();
  now.unkept_bytes = kept_->unkept_bytes();
  return now;
}

// ---- requests

// With the mutex held. Null: there is none at the moment.
RemoteExport::Client RemoteExport::choose() {
  // Relaxed: any number will do.
  const std::size_t turn = turn_.fetch_add(1, std::memory_order_relaxed);
  const AioContext* const here = AioContext::current();
  const std::size_t count = connections_.size();
  Client any;
  for (std::size_t i = 0; i < count; ++i) {
    Connection& one = *connections_[(turn + i) % count];
    // What is sent over one that is known to be lost would count as perhaps carried out.
    if (one.client && !one.client->state()) lose(one);
    if (!one.client) continue;
    if (one.context == here) return one.client;
    if (!any) any = one.client;
  }
  return any;
}

// With the mutex held; the caller wakes work_.
void RemoteExport::lose(Connection& connection) {
  Request* oldest = nullptr;
  for (Request* const one : flying_) {
    if (one->over != connection.client) continue;
    if (!oldest || one->turn < oldest->turn) oldest = one;
    // At once: the others must not overtake them until each has noticed by itself.
    if (is_write(one->what.command) && options_.replay_writes) send_again(*one);
  }
  // Those behind it are not to blame: on a line that breaks often, each would be so in the end.
  if (oldest) ++oldest->losses;
  connection.lost = std::move(connection.client);
  connection.client = nullptr;
  connection.is_lost = true;
  ++statistics_.lost;
}

// With the mutex held.
void RemoteExport::send_again(Request& request) {
  if (std::exchange(request.again, true)) return;
  again_.insert(std::ranges::upper_bound(again_, request.number, {}, &Request::number), &request);
}

// Whether it would come before a write that has to be sent again, and overlaps it.
bool RemoteExport::overtakes(const Request& request) const {
  for (const Request* const one : again_) {
    if (one == &request) return false;
    if (overlap(one->what, request.what)) return true;
  }
  return false;
}

std::optional<Error> RemoteExport::all_given_up() const {
  for (const auto& one : connections_) {
    if (!one->given_up) return std::nullopt;
  }
  return connections_.front()->given_up;
}

Task<Result<RemoteExport::Client>> RemoteExport::admit(Request& request, std::stop_token stop) {
  std::unique_lock lock(mutex_);
  for (;;) {
    const auto refuse = [&](int code, std::string_view why) {
      return fail(code, fmt::format("{}: {}", to_string(request.what), why));
    };
    if (stop.stop_requested()) co_return refuse(ECANCELED, "not sent");
    if (failure_) co_return refuse(failure_->code(), failure_->doing());
    if (closing_) co_return refuse(ESHUTDOWN, "the export is being closed");
    if (!exclusive_ && !overtakes(request)) {
      Client client = choose();
      if (client && request.what.command == Command::kFlush && lost_writes_) {
        const Error told = *std::exchange(lost_writes_, std::nullopt);
        co_return refuse(told.code(), told.doing());
      }
      if (client) {
        request.covers = kept_->mark();
        request.turn = ++numbers_;
        if (request.number == 0) request.number = request.turn;
        request.over = client;
        flying_.push_back(&request);
        lock.unlock();
        work_.wake_all();  // for those that choose() found lost
        co_return std::move(client);
      }
      if (const auto error = all_given_up()) co_return refuse(error->code(), error->doing());
      work_.wake_all();
    }
    const Result<void> waited = co_await changed_.wait(lock, stop);
    if (!waited) co_return refuse(ECANCELED, "not sent");
  }
}

Task<Result<void>> RemoteExport::send(NbdClient& client, Request& request, std::stop_token stop) {
  const ClientRequest& what = request.what;
  switch (what.command) {
    case Command::kRead:
      co_return co_await client.readv(what.offset, request.data, stop);
    case Command::kWrite:
      co_return co_await client.writev(what.offset, request.data, what.flags, stop);
    case Command::kFlush:
      co_return co_await client.flush(stop);
    case Command::kTrim:
      co_return co_await client.trim(what.offset, what.length, what.flags, stop);
    case Command::kWriteZeroes:
      co_return co_await client.zero(what.offset, what.length, what.flags, stop);
    case Command::kCache:
      co_return co_await client.cache(what.offset, what.length, stop);
    case Command::kResize:
      co_return co_await client.resize(what.offset, stop);
    case Command::kBlockStatus: {
      auto extents = co_await client.block_status(what.offset, what.length, what.flags, stop);
      if (!extents) co_return std::unexpected(extents.error());
      request.extents = std::move(*extents);
      co_return Result<void>();
    }
    default:
      break;
  }
  ROOST_CHECK(false, "no request of a remote export: {}", to_string(what));
  co_return Result<void>();
}

// What a request's end means for the others. True: it has to be sent again.
bool RemoteExport::sent(Request& request, const Client& client, Result<void>& done) {
  const Command command = request.what.command;
  bool again = false;
  KeptWrites::Data copy;
  if (done && is_write(command)) copy = kept_->copy(request.what, request.data);
  {
    const std::lock_guard lock(mutex_);
    const auto over =
        std::ranges::find_if(connections_, [&](const auto& one) { return one->client == client; });
    const bool lost = !done && done.error().code() != ECANCELED &&
                      (done.error().code() == ESHUTDOWN || !client->state());
    if (lost && over != connections_.end()) lose(**over);
    request.over = nullptr;
    std::erase(flying_, &request);
    if (done) {
      if (over != connections_.end()) (*over)->proven = true;
      if (is_write(command)) kept_->add(request.what, std::move(copy));
      if (command == Command::kFlush) kept_->flushed(request.covers);
    } else if (lost) {
      const bool may_go_again =
          command != Command::kResize && (!is_write(command) || options_.replay_writes);
      again = may_go_again && request.losses < kMostLosses;
      if (again && is_write(command)) send_again(request);
      if (!may_go_again) {
        done = fail(ECONNRESET, fmt::format("{}, may have been carried out", done.error().doing()));
      }
    }
  }
  work_.wake_all();
  changed_.wake_all();
  return again;
}

Task<Result<void>> RemoteExport::run(Request& request, std::stop_token stop) {
  Result<void> done;
  for (;;) {
    const Result<Client> client = co_await admit(request, stop);
    if (!client) {
      done = std::unexpected(client.error());
      break;
    }
    done = co_await send(**client, request, stop);
    if (!sent(request, *client, done)) break;
  }
  if (request.again) {
    {
      const std::lock_guard lock(mutex_);
      std::erase(again_, &request);
    }
    changed_.wake_all();
    if (!done) {
      const int code = done.error().code() == ECANCELED ? EINPROGRESS : done.error().code();
      done = fail(code, fmt::format("{}, may have been carried out", done.error().doing()));
    }
  }
  co_return done;
}

Task<Result<void>> RemoteExport::read(std::uint64_t offset, std::span<std::byte> to,
                                      std::stop_token stop) {
  const iovec piece = as_iovec(to);
  Request request{.what = {.command = Command::kRead, .offset = offset, .length = to.size()},
                  .data = std::span(&piece, 1)};
  co_return co_await run(request, std::move(stop));
}

Task<Result<void>> RemoteExport::writev(std::uint64_t offset, std::span<const iovec> from,
                                        std::uint16_t flags, std::stop_token stop) {
  Request request{.what = {.command = Command::kWrite,
                           .flags = flags,
                           .offset = offset,
                           .length = total_size(from)},
                  .data = from};
  co_return co_await run(request, std::move(stop));
}

Task<Result<void>> RemoteExport::flush(std::stop_token stop) {
  Request request{.what = {.command = Command::kFlush}};
  co_return co_await run(request, std::move(stop));
}

Task<Result<void>> RemoteExport::trim(std::uint64_t offset, std::uint64_t length,
                                      std::uint16_t flags, std::stop_token stop) {
  Request request{
      .what = {.command = Command::kTrim, .flags = flags, .offset = offset, .length = length}};
  co_return co_await run(request, std::move(stop));
}

Task<Result<void>> RemoteExport::zero(std::uint64_t offset, std::uint64_t length,
                                      std::uint16_t flags, std::stop_token stop) {
  Request request{
      .what = {
          .command = Command::kWriteZeroes, .flags = flags, .offset = offset, .length = length}};
  co_return co_await run(request, std::move(stop));
}

Task<Result<void>> RemoteExport::cache(std::uint64_t offset, std::uint64_t length,
                                       std::stop_token stop) {
  Request request{.what = {.command = Command::kCache, .offset = offset, .length = length}};
  co_return co_await run(request, std::move(stop));
}

Task<Result<std::vector<ContextExtents>>> RemoteExport::block_status(std::uint64_t offset,
                                                                     std::uint64_t length,
                                                                     std::uint16_t flags,
                                                                     std::stop_token stop) {
  Request request{
      .what = {
          .command = Command::kBlockStatus, .flags = flags, .offset = offset, .length = length}};
  const Result<void> done = co_await run(request, std::move(stop));
  if (!done) co_return std::unexpected(done.error());
  co_return std::move(request.extents);
}

Task<Result<void>> RemoteExport::resize(std::uint64_t size, std::stop_token stop) {
  if (connections_.size() > 1) {
    co_return fail(ENOTSUP, "resize an export over several connections");
  }
  Request request{.what = {.command = Command::kResize, .offset = size}};
  const Result<void> done = co_await run(request, std::move(stop));
  if (done) size_.store(size, std::memory_order_release);
  co_return done;
}

// ---- connections

Task<void> RemoteExport::say_goodbye(Client client, std::int64_t timeout_ns) {
  StopScope scope;
  scope.set_deadline(AioContext::current()->clock().now_ns() + timeout_ns);
  co_await client->disconnect(scope.token());
}

// Lives as long as the export, on the connection's context.
Task<void> RemoteExport::look_after(Connection& connection) {
  for (;;) {
    std::unique_lock lock(mutex_);
    while (!connection.is_lost && !closing_) co_await work_.wait(lock);
    if (closing_) break;
    const Client lost = std::exchange(connection.lost, nullptr);
    lock.unlock();
    co_await say_goodbye(lost, 0);
    co_await reconnect(connection);
  }
  Client last;
  Client lost;
  {
    const std::lock_guard lock(mutex_);
    last = std::exchange(connection.client, nullptr);
    lost = std::exchange(connection.lost, nullptr);
  }
  if (lost) co_await say_goodbye(std::move(lost), 0);
  if (last) co_await say_goodbye(std::move(last), options_.goodbye_timeout_ns);
  {
    const std::lock_guard lock(mutex_);
    --keepers_;
    // The last touch: close() may return, and the export go, once the mutex is free.
    changed_.wake_all();
  }
}

Task<void> RemoteExport::reconnect(Connection& connection) {
  const std::stop_token closing = closing_scope_.token();
  const Clock& clock = AioContext::current()->clock();
  // One that has answered nothing since it was made has not ended the outage.
  bool proven = false;
  {
    const std::lock_guard lock(mutex_);
    proven = std::exchange(connection.proven, false);
  }
  if (proven || connection.outage_began_ns == 0) {
    connection.outage_began_ns = clock.now_ns();
    connection.delay_ns = 0;
  }
  Error last(ECONNRESET, "the connection was lost");
  while (options_.reconnect_timeout_ns > 0) {
    const std::int64_t give_up_at = connection.outage_began_ns + options_.reconnect_timeout_ns;
    if (connection.delay_ns > 0) {
      const std::int64_t spread = std::min<std::int64_t>(connection.delay_ns / 4, 1'000'000'000);
      const std::int64_t delay = connection.delay_ns + connection.random.between(-spread, spread);
      if (clock.now_ns() + delay >= give_up_at) break;
      const Result<void> slept = co_await sleep_for(delay, closing);
      if (!slept) co_return;
    }
    connection.delay_ns =
        std::clamp(2 * connection.delay_ns, options_.first_delay_ns, options_.longest_delay_ns);
    std::uint64_t broken_before = 0;
    {
      const std::lock_guard lock(mutex_);
      broken_before = broken_replays_;
    }
    StopScope scope(closing);
    auto connecting = connect_(scope.token());
    Result<std::unique_ptr<NbdClient>> made =
        co_await with_deadline(give_up_at, scope, std::move(connecting));
    if (made) {
      const Client client = std::move(*made);
      auto coming = come_back(connection, client, broken_before);
      const Result<void> back = co_await std::move(coming);
      if (back) co_return;
      last = back.error();
      co_await say_goodbye(client, 0);
      if (last.code() == EMEDIUMTYPE) break;
    } else {
      last = std::move(made.error());
    }
    if (closing.stop_requested()) co_return;
  }
  {
    const std::lock_guard lock(mutex_);
    connection.is_lost = false;
    if (last.code() == EMEDIUMTYPE) failure_ = last;
    connection.given_up = std::move(last);
  }
  changed_.wake_all();
}

// Sends the kept writes, with nothing else in flight, and puts the connection to use.
Task<Result<void>> RemoteExport::come_back(Connection& connection, Client client,
                                           std::uint64_t broken_before) {
  if (Result<void> same = compare(*client); !same) co_return same;
  StopScope scope(closing_scope_.token());
  bool over = false;
  auto replaying = replay(connection, client, broken_before, scope, over);
  auto watching = cut_off_late(connection, client, scope.token(), over);
  co_return co_await when_all(scope, std::move(replaying), std::move(watching));
}

// A server that does not answer is not waited for beyond the end of all patience, nor, by close(),
// for longer than a goodbye takes. Each kept write that a flush has covered begins patience anew.
Task<Result<void>> RemoteExport::cut_off_late(Connection& connection, Client client,
                                              std::stop_token stop, const bool& over) {
  const Clock& clock = AioContext::current()->clock();
  while (!over) {
    const std::int64_t at = connection.outage_began_ns + options_.reconnect_timeout_ns;
    if (clock.now_ns() >= at) {
      co_await say_goodbye(client, 0);
      changed_.wake_all();
      break;
    }
    const Result<void> slept = co_await sleep_until(at, stop);
    if (slept) continue;
    // Closing, unless it is over: the server may answer what it was sent, and is sent no more.
    if (!over) {
      co_await say_goodbye(client, options_.goodbye_timeout_ns);
      changed_.wake_all();
    }
    break;
  }
  co_return Result<void>();
}

Task<bool> RemoteExport::answers(NbdClient& client, std::stop_token stop) {
  // Every server reads, and it changes nothing; an error is an answer, too.
  std::vector<std::byte> buffer(std::max<std::uint64_t>(outcome_.min_block, 1));
  StopScope scope(std::move(stop));
  scope.set_deadline(AioContext::current()->clock().now_ns() + options_.goodbye_timeout_ns);
  auto reading = client.read(0, buffer, scope.token(), WhenStopped::kLeave);
  const Result<void> done = co_await std::move(reading);
  co_return done || (client.state() && !scope.stopped() && done.error().code() != ESHUTDOWN);
}

// Whether the server is the one that has all that is kept. A connection in use was there when that
// was acknowledged, or it was sent again over it: where one answers, nothing was lost, and to send
// it again would only be a risk. Those that do not answer are lost. With exclusive_ set and nothing
// in flight.
Task<bool> RemoteExport::another_answers(std::stop_token stop) {
  std::unique_lock lock(mutex_);
  for (const auto& one : connections_) {
    const Client client = one->client;
    if (!client) continue;
    lock.unlock();
    auto asking = answers(*client, stop);
    const bool answered = co_await std::move(asking);
    if (answered || stop.stop_requested()) co_return answered;
    lock.lock();
    if (one->client == client) lose(*one);
    work_.wake_all();
  }
  co_return false;
}

// What is not covered by a flush has to be sent once more if this connection breaks, too. On a line
// that breaks often, all of it would never get through in one go. So it goes in portions with a
// flush behind each, which become smaller as long as they do not get through.
Task<Result<void>> RemoteExport::send_kept(Connection& connection, NbdClient& client) {
  const std::vector<KeptWrites::Piece> all_pieces = kept_->pieces();
  std::span<const KeptWrites::Piece> pieces(all_pieces);
  bool flushes = offers(kTransmissionSendFlush);
  const KeptWrites::Mark all = kept_->mark();
  while (!pieces.empty()) {
    std::size_t count = 0;
    std::uint64_t bytes = 0;
    std::uint64_t writes = 0;
    while (count < pieces.size() && count < portion_ && bytes < kLargestPortionBytes) {
      if (count == 0 || pieces[count].of != pieces[count - 1].of) ++writes;
      bytes += pieces[count++].length;
    }
    auto sending = send_pieces(client, pieces.first(count));
    const Result<void> good = co_await std::move(sending);
    if (!good) co_return good;
    pieces = pieces.subspan(count);
    // On a good line, the rest is left to the next flush that somebody wants.
    const bool rest = pieces.empty() && portion_ == kLargestPortion;
    Result<void> flushed;
    if (flushes && !rest) flushed = co_await client.flush();
    const std::lock_guard lock(mutex_);
    statistics_.replayed += writes;
    if (!flushes || rest) continue;
    if (!flushed) {
      if (!client.state() || flushed.error().code() == ESHUTDOWN) co_return flushed;
      // The server will not tell of this once more.
      flushes = false;
      lost_writes_ = flushed.error();
      continue;
    }
    kept_->flushed({.acknowledged = pieces.empty() ? all.acknowledged : pieces[0].of->number - 1});
    portion_ = std::min(2 * portion_, kLargestPortion);
    connection.outage_began_ns = AioContext::current()->clock().now_ns();
    connection.delay_ns = 0;
  }
  co_return Result<void>();
}

Task<Result<void>> RemoteExport::replay(Connection& connection, Client client,
                                        std::uint64_t broken_before, StopScope& scope, bool& over) {
  std::unique_lock lock(mutex_);
  while (exclusive_) co_await changed_.wait(lock);
  exclusive_ = true;
  // What is still to be acknowledged by another one would come after what is sent now.
  Result<void> done;
  while (!flying_.empty() && done) {
    if (!client->state()) done = fail(ETIMEDOUT, "requests over other connections do not end");
    if (done) co_await changed_.wait(lock);
  }
  if (done && broken_replays_ != broken_before) {
    done = fail(ECONNRESET, "another connection was lost while writes were sent again over it");
  }
  bool some = done && kept_->bytes() > 0;
  const bool unkept = kept_->unkept_bytes() > 0;
  // Nobody else changes them meanwhile.
  lock.unlock();
  bool lived = false;
  if (done && (unkept || some)) {
    auto asking = another_answers(scope.token());
    lived = co_await std::move(asking);
    if (lived) some = false;
    if (scope.stopped()) done = fail(ESHUTDOWN, "the export is being closed");
  }
  if (done && some) {
    auto sending = send_kept(connection, *client);
    done = co_await std::move(sending);
  }
  lock.lock();
  exclusive_ = false;
  // What it was sent last may still be carried out.
  if (!done && some && !client->state()) {
    ++broken_replays_;
    portion_ = std::max<std::size_t>(portion_ / 2, 1);
  }
  if (done) {
    if (unkept && !lived) {
      kept_->settle();
      lost_writes_ = may_be_lost();
    }
    server_has_all_ = true;
    connection.client = std::move(client);
    connection.is_lost = false;
    ++statistics_.reconnected;
  }
  lock.unlock();
  changed_.wake_all();
  over = true;
  scope.request_stop();
  co_return done;
}

}  // namespace roost::nbd
