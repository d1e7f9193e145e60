// SPDX-License-Identifier: MIT
// The life of a connection: the negotiation, the way to its context, the end.
#include "export/nbd_connection.h"

#include <cerrno>
#include <cstddef>
#include <new>

#include "export/nbd_payload.h"
#include "roost/aio/stop_relay.h"
#include "roost/io/tls.h"

namespace roost {

namespace {

// How long a client may take to fetch its last replies.
constexpr std::int64_t kLingerNs = 5'000'000'000;

// How often a client looks whether the export it has chosen is still being resized.
constexpr std::int64_t kEnterRetryNs = 1'000'000;

}  // namespace

NbdConnection::NbdConnection(NbdServer& server, std::unique_ptr<Channel> channel,
                             std::uint64_t number)
    : server_(server), number_(number), peer_(channel->name()), channel_(std::move(channel)) {}

NbdConnection::~NbdConnection() {
  static_assert(offsetof(Reply, header) + nbd::kMaxDataHeader == sizeof(Reply));
}

void NbdConnection::stop() noexcept { stop_.request_stop(); }

void NbdConnection::disconnect() noexcept { disconnect_.request_stop(); }

// Only the first reason is worth a line: what follows is its consequence.
void NbdConnection::give_up(std::string_view why) noexcept {
  if (dead_) return;
  dead_ = true;
  log([&] { return std::string(why) + "; connection closed"; });
  if (channel_) channel_->abort();
}

Task<void> NbdConnection::run(std::shared_ptr<NbdConnection> self) {
  self->reader_ = Coroutine::self();
  self->context_ = AioContext::current();
  try {
    const bool transmission = co_await self->negotiate();
    if (transmission) co_await self->transmit();
  } catch (const std::bad_alloc&) {
    self->give_up("out of memory");
  }
  self->server_.connection_ended(*self);
}

// ---- The negotiation

// The server's side of the handshake; from then on, what is received and sent is encrypted.
Task<Result<void>> NbdConnection::start_tls(std::stop_token stop) {
  auto secure = co_await TlsChannel::handshake(std::move(channel_), server_.options_.credentials,
                                               {}, std::move(stop));
  if (!secure) co_return std::unexpected(secure.error());
  const std::string& who = (*secure)->peer_name();
  channel_ = std::move(*secure);
  encrypted_ = true;
  if (server_.options_.authorize && !server_.options_.authorize(who)) {
    co_return fail(EACCES, "client '" + who + "' is not authorised");
  }
  co_return Result<void>();
}

// An error is the client's: it has gone, or what it did is no TLS.
Task<Result<void>> NbdConnection::negotiate(nbd::ServerNegotiation& negotiation,
                                            std::span<const std::byte>& input,
                                            std::stop_token stop) {
  using State = nbd::ServerNegotiation::State;
  bool heard_of = false;
  for (;;) {
    input = input.subspan(negotiation.feed(input));
    const State state = negotiation.state();
    // Before the client is told that it has what it chose.
    if (state == State::kTransmission) {
      const Result<void> entered = co_await enter_export(negotiation.selection().export_id, stop);
      if (!entered) co_return entered;
    }
    if (!negotiation.output().empty()) {
      const Result<void> sent = co_await channel_->write_full(negotiation.output(), stop);
      if (!sent) co_return sent;
      negotiation.drain_output(negotiation.output().size());
      // There may be more of it.
      if (state == State::kNegotiating) continue;
    }
    if (state == State::kStartTls) {
      const Result<void> secured = co_await start_tls(stop);
      if (!secured) co_return secured;
      negotiation.tls_started();
    } else if (state != State::kNegotiating) {
      co_return Result<void>();
    } else if (input.empty()) {
      const Result<std::size_t> n = co_await channel_->read(chunk_->bytes, stop);
      if (!n) co_return std::unexpected(n.error());
      // One that never said a word has only looked whether somebody is there: nothing for the log.
      if (*n == 0) co_return fail(heard_of ? ECONNRESET : ECANCELED, "negotiate with " + peer_);
      heard_of = true;
      input = std::span<const std::byte>(chunk_->bytes, *n);
    }
  }
}

Task<bool> NbdConnection::negotiate() {
  using State = nbd::ServerNegotiation::State;
  StopScope patience(stop_.token());
  patience.set_deadline(context_->clock().now_ns() + server_.options_.limits.handshake_timeout_ns);
  nbd::ServerNegotiation negotiation([this] { return server_.visible_exports(); },
                                     server_.options_.tls);
  chunk_ = std::make_shared_for_overwrite<Chunk>();
  std::span<const std::byte> input;
  const Result<void> ended = co_await negotiate(negotiation, input, patience.token());
  patience.clear_deadline();
  const int error = ended ? 0 : ended.error().code();
  if (!ended && patience.reason() == StopScope::Reason::kDeadline) {
    give_up("negotiation timed out");
  } else if (negotiation.state() == State::kFinished) {
    // It may not wait for our goodbye.
  } else if (error == ECONNRESET || error == EPIPE) {
    give_up("vanished during the negotiation");
  } else if (!ended && error != ECANCELED) {
    give_up(ended.error().message());
  } else if (ended && negotiation.state() == State::kFailed) {
    give_up(negotiation.failure());
  }
  if (!ended || negotiation.state() != State::kTransmission) co_return false;

  const nbd::ServerNegotiation::Selection& chosen = negotiation.selection();
  const NbdServer::Export& exported = place_.exported->config;
  disk_ = exported.disk;
  export_name_ = exported.name;
  limits_ = {.size = chosen.size,
             .former_size = chosen.size,
             .transmission_flags = chosen.transmission_flags,
             .min_block = chosen.min_block,
             .max_payload = chosen.max_payload,
             .reply_style = chosen.reply_style,
             .base_allocation = chosen.base_allocation};
  parser_ = nbd::RequestParser(chosen.reply_style, chosen.max_payload);
  unparsed_ = input;
  chunk_->filled = Chunk::kSize;  // until unparsed_ is used up

  AioContext& home = *server_.options_.io_contexts[place_.context];
  memory_ = server_.memory_[place_.context].get();
  sends_files_ = channel_->can_send_files();
  co_await move_to(home);
  context_ = &home;
  co_return true;
}

Task<Result<void>> NbdConnection::enter_export(std::uint64_t id, std::stop_token stop) {
  for (;;) {
    const NbdServer::Entry entry = server_.enter(*this, id, place_);
    if (entry == NbdServer::Entry::kEntered) co_return Result<void>();
    if (entry == NbdServer::Entry::kGone) co_return fail(ENOENT, "the export it chose has gone");
    const Result<void> slept = co_await sleep_for(kEnterRetryNs, stop);
    if (!slept) co_return slept;
  }
}

// ---- Transmission

// Brings a disconnect() home. It may be called with the server's mutex held, by the home thread
// too: so nobody is entered.
struct NbdConnection::Disconnection : StopRelay {
  explicit Disconnection(NbdConnection& c)
      : StopRelay(
            *c.context_,
            [](StopRelay& relay) noexcept {
              NbdConnection& self = static_cast<Disconnection&>(relay).connection;
              self.dead_ = true;
              self.channel_->abort();
              self.schedule_reader();
            },
            [](StopRelay& relay) noexcept {
              auto& self = static_cast<Disconnection&>(relay);
              self.arrived = true;
              self.connection.schedule_reader();
            }),
        connection(c) {
    watch(c.disconnect_.token());
  }

  NbdConnection& connection;
  bool arrived = false;
};

void NbdConnection::schedule_reader() noexcept {
  if (std::exchange(reader_waits_, false)) co_schedule(*context_, *reader_);
}

Task<void> NbdConnection::transmit() {
  Disconnection disconnection(*this);
  sender_ = Coroutine::create(sender(), "nbd sender");
  sender_->enter();
  try {
    co_await read_requests();
  } catch (const std::bad_alloc&) {
    give_up("out of memory");
  }
  // The sender ends once every request that was read is answered, or cannot be.
  sender_ends_ = true;
  wake_sender();
  while (sender_) {
    reader_waits_ = true;
    co_await yield();
  }
  if (!disconnection.ended()) {
    while (!disconnection.arrived) {
      reader_waits_ = true;
      co_await yield();
    }
  }
  // Nobody on this context is being answered, nor has anything to be written: what is kept is of no
  // use for now.
  chunk_.reset();
  if (memory_->taken() == 0) memory_->clear();
  if (dead_) co_return;
  if (encrypted_) {
    // The protocol wants the session ended. One that is not read is not missed.
    const Result<void> ended = co_await channel_->shutdown(StreamEnd::kWrite, disconnect_.token());
    if (!ended) co_return;
  }
  co_await channel_->linger(kLingerNs, disconnect_.token());
}

}  // namespace roost
