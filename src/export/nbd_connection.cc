// SPDX-License-Identifier: MIT
#include "export/nbd_connection.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <vector>

#include "export/extents.h"
#include "roost/aio/stop_relay.h"
#include "roost/base/bytes.h"
#include "roost/io/tls.h"

namespace roost {

namespace {

// One receive: a full queue of small requests, and of small writes with their data.
constexpr std::size_t kChunkSize = 128 << 10;

// A write from here on gets all of its data in one piece of memory of its own. Who sends one most
// often sends another: the next receive takes little more than the request, so that the data is
// received, and not copied, to where the disk takes it from.
constexpr std::size_t kLargeWrite = 64 << 10;
constexpr std::size_t kSmallReceive = 4 << 10;

// Replies in one send: what IOV_MAX allows and more than a client has in flight.
constexpr std::size_t kMaxRepliesPerSend = 256;

// Lines about failed requests that one connection may write to the log.
constexpr unsigned kMaxLoggedErrors = 8;

// How long a client may take to fetch its last replies.
constexpr std::int64_t kLingerNs = 5'000'000'000;

// Reads from here on are worth a question for zeroes that need not be sent, and how many extents to
// ask for.
constexpr std::uint64_t kSparseRead = 64 << 10;
constexpr std::size_t kSparseReadExtents = 32;

// Reads from here on are sent from the page cache without a copy, where that is possible: below,
// the copy costs less than the calls.
constexpr std::uint64_t kSentFromCache = 64 << 10;

// What one CACHE reads ahead: a request of 28 bytes shall not push everything else out of the
// cache.
constexpr std::uint64_t kMostCached = 64 << 20;

// What one BLOCK_STATUS may bring.
constexpr std::size_t kMaxStatusExtents = 4096;
constexpr std::size_t kMaxStatusBytes =
    nbd::StatusEncoder::status_size(nbd::ReplyStyle::kExtended, kMaxStatusExtents);

// How often a client looks whether the export it has chosen is still being resized.
constexpr std::int64_t kEnterRetryNs = 1'000'000;

Result<void> out_of_memory() { return fail(ENOMEM, "out of memory"); }  // short: needs none itself

}  // namespace

// What a receive filled. Writes whose data is in it keep it until they are done.
struct NbdConnection::Chunk {
  std::size_t filled;
  std::byte bytes[kChunkSize];

  std::span<std::byte> room() { return std::span(bytes).subspan(filled); }
};

// A reply, or a chunk of one, as it goes out: header and payload in one piece of memory. The header
// ends on a cache line, since copying to the payload is quicker where that starts on one.
struct alignas(BufferCache::kAlignment) NbdConnection::Reply {
  Reply* next = nullptr;
  std::uint32_t size;         // header and payload to send
  std::uint32_t bytes_held;   // of the connection's limit
  std::uint32_t memory_size;  // of all of it
  std::uint8_t header_size;   // at the end of `header`
  bool last;                  // chunk of its request, which is answered then
  bool from_file;             // what follows it is a part of a file, in place of a payload
  std::byte unused;
  std::byte header[nbd::kMaxDataHeader];

  static Reply* make(BufferCache& cache, std::size_t header_size, std::size_t payload,
                     std::size_t held, bool last = true) {
    const std::size_t memory_size = sizeof(Reply) + payload;
    void* const memory = cache.take(memory_size);
    if (!memory) return nullptr;
    auto* const reply = ::new (memory) Reply;
    // A payload is at most kMaxPayload and a few bytes.
    reply->size = static_cast<std::uint32_t>(header_size + payload);
    reply->bytes_held = static_cast<std::uint32_t>(held);
    reply->memory_size = static_cast<std::uint32_t>(memory_size);
    reply->header_size = static_cast<std::uint8_t>(header_size);
    reply->last = last;
    reply->from_file = false;
    return reply;
  }
  // A header, behind which a part of a file is sent.
  static Reply* make(BufferCache& cache, std::size_t header_size, FilePart part, std::size_t held,
                     bool last) {
    Reply* const reply = make(cache, header_size, sizeof part, held, last);
    if (!reply) return nullptr;
    reply->size = static_cast<std::uint32_t>(header_size);
    reply->from_file = true;
    ::new (reply + 1) FilePart(part);
    return reply;
  }
  static void free(BufferCache& cache, Reply* reply) noexcept {
    cache.give_back(reply, reply->memory_size);
  }

  const FilePart& file_part() const noexcept {
    return *std::launder(reinterpret_cast<const FilePart*>(this + 1));
  }
  std::byte* bytes() noexcept { return header + sizeof header - header_size; }
  std::span<std::byte> payload() noexcept {
    return {reinterpret_cast<std::byte*>(this + 1), std::size_t{size} - header_size};
  }
};

// The data of a WRITE, where the socket put it: the part that came with the request in the chunk,
// the rest in memory of its own; or all of it there.
struct NbdConnection::WritePayload {
  explicit WritePayload(BufferCache& c) noexcept : cache(&c) {}
  WritePayload(WritePayload&& other) noexcept
      : chunk(std::move(other.chunk)),
        front(other.front),
        rest(std::exchange(other.rest, {})),
        cache(other.cache) {}
  WritePayload& operator=(WritePayload&&) = delete;
  ~WritePayload() {
    if (!rest.empty()) cache->give_back(rest.data(), rest.size());
  }

  // False: there is no memory. REQUIRES: `size` is above 0; only once.
  bool take_rest(std::size_t size) noexcept {
    auto* const memory = static_cast<std::byte*>(cache->take(size));
    if (memory) rest = {memory, size};
    return memory;
  }

  std::shared_ptr<Chunk> chunk;
  std::span<const std::byte> front;
  std::span<std::byte> rest;
  BufferCache* cache;
};

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

// A line with the names of the export and the peer in front; none if there is no memory for it.
template <class Message>
void NbdConnection::log(Message message) noexcept {
  try {
    server_.log((disk_ ? "export '" + export_name_ + "': " : "") + peer_ + ": " + message());
  } catch (const std::bad_alloc&) {
  }
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
  chunk_->filled = kChunkSize;  // until unparsed_ is used up

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

// ---- Places: what a client has in flight

bool NbdConnection::over_limits(std::size_t bytes) const noexcept {
  const NbdLimits& limits = server_.options_.limits;
  return requests_in_flight_ >= limits.requests_in_flight ||
         (bytes_in_flight_ > 0 && bytes_in_flight_ + bytes > limits.bytes_in_flight);
}

void NbdConnection::take_place(std::size_t bytes) noexcept {
  ++requests_in_flight_;
  bytes_in_flight_ += bytes;
}

void NbdConnection::give_place_back(std::size_t bytes) noexcept {
  --requests_in_flight_;
  bytes_in_flight_ -= bytes;
}

// Not woken but scheduled: it gets its turn after everything that is ready now.
void NbdConnection::wake_sender() noexcept {
  if (std::exchange(sender_waits_, false)) co_schedule(*context_, *sender_);
}

void NbdConnection::wake_reader() noexcept {
  if (std::exchange(reader_waits_, false)) co_wake(*reader_);
}

// ---- The reader

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

Task<void> NbdConnection::read_requests() {
  std::span<const std::byte> input = unparsed_;
  bool done = false;
  while (!done && receiving() && !dead_) {
    nbd::Request request;
    switch (parser_.next(input, request)) {
      case nbd::RequestParser::Event::kFailed:
        give_up(parser_.failure());
        done = true;
        continue;
      case nbd::RequestParser::Event::kNeedInput: {
        // All input is used up; whoever still needs a part of the chunk shares it.
        if (chunk_.use_count() == 1) {
          chunk_->filled = 0;
        } else if (chunk_->room().size() < kChunkSize / 2) {
          chunk_.reset();  // the next may be the same memory
          chunk_ = std::allocate_shared_for_overwrite<Chunk>(BufferCacheAllocator<Chunk>(*memory_));
          chunk_->filled = 0;
        }
        std::span<std::byte> room = chunk_->room();
        if (std::exchange(large_writes_, false)) room = room.first(kSmallReceive);
        const Result<std::size_t> n = co_await channel_->read(room, stop_.token());
        if (!n || *n == 0) {
          done = true;
          if (receiving() && (!n || !parser_.at_boundary())) {
            give_up(n ? "vanished in the middle of a request" : n.error().message());
          }
          continue;
        }
        input = room.first(*n);
        chunk_->filled += *n;
        continue;
      }
      case nbd::RequestParser::Event::kRequest:
        break;
    }

    if (request.command == nbd::Command::kDisc) break;
    std::string_view why;
    const int error = judge(request, why);
    // The payload may be no more than the parser lets pass, a read no more than is allowed.
    std::size_t bytes = request.payload_size();
    if (!error && request.command == nbd::Command::kRead) bytes = request.length;
    if (!error && request.command == nbd::Command::kBlockStatus) bytes = kMaxStatusBytes;
    // A resize wants nothing else under way.
    const bool alone = !error && request.command == nbd::Command::kResize;
    while ((over_limits(bytes) || (alone && requests_in_flight_ > 0)) && !dead_) {
      reader_waits_ = true;
      co_await yield();
    }
    take_place(bytes);
    if (error) {
      parser_.skip_payload();
      reply_error(request, error, bytes, why);
      continue;
    }
    switch (request.command) {
      case nbd::Command::kRead:
        if (request.length >= kSparseRead && style() != nbd::ReplyStyle::kSimple && !request.df()) {
          start(request, bytes, [&] { return run_sparse_read(request); });
        } else {
          start(request, bytes, [&] { return run_read(request); });
        }
        break;
      case nbd::Command::kWrite:
        if (request.length > 0) {
          done = !co_await accept_write(input, request);
        } else {
          start(request, bytes, [&] { return run_other(request); });
        }
        break;
      case nbd::Command::kBlockStatus:
        if (request.payload_size() > 0) {
          done = !co_await accept_status_query(input, request);
        } else {
          start(request, bytes, [&] { return run_status(request, bytes); });
        }
        break;
      case nbd::Command::kResize:
        co_await run_resize(request);
        break;
      default:
        start(request, bytes, [&] { return run_other(request); });
        break;
    }
  }
}

// validate(), for a disk whose size may have changed since the last request.
int NbdConnection::judge(const nbd::Request& request, std::string_view& why) noexcept {
  limits_.size = disk_->size();
  limits_.former_size = std::max(limits_.former_size, limits_.size);
  return nbd::validate(request, limits_, &why);
}

// Runs what `make` makes in a coroutine of its own, or answers that there is no memory for it.
template <class Make>
void NbdConnection::start(const nbd::Request& request, std::size_t bytes_held, Make make) {
  Coroutine* co = nullptr;
  try {
    co = Coroutine::create(make(), "nbd request");
  } catch (const std::bad_alloc&) {
    reply_error(request, ENOMEM, bytes_held);
    return;
  }
  co->enter();
}

Task<bool> NbdConnection::accept_write(std::span<const std::byte>& input,
                                       const nbd::Request& request) {
  WritePayload payload(*memory_);
  payload.front = parser_.take_payload(input);
  const std::size_t missing = parser_.payload_left();
  large_writes_ = request.length >= kLargeWrite;
  // What came with the request is copied where that is little.
  const bool copied = large_writes_ && missing > 0 && payload.front.size() <= kSmallReceive;
  const std::size_t in_front = copied ? payload.front.size() : 0;
  if (missing > 0) {
    if (!payload.take_rest(in_front + missing)) {
      parser_.skip_payload();
      reply_error(request, ENOMEM, request.length);
      co_return true;
    }
    if (copied) {
      std::ranges::copy(payload.front, payload.rest.begin());
      payload.front = {};
    }
  }
  if (!payload.front.empty()) payload.chunk = chunk_;
  if (missing > 0) {
    // Received straight to where the disk takes it from.
    const Result<void> received =
        co_await channel_->read_full(payload.rest.subspan(in_front), stop_.token());
    if (!received) {
      if (receiving()) give_up("vanished in the middle of a write");
      give_place_back(request.length);  // there is nobody to answer
      co_return false;
    }
    parser_.payload_received(static_cast<std::uint32_t>(missing));
  }
  start(request, request.length, [&] { return run_write(request, std::move(payload)); });
  co_return true;
}

// The range's length is in the payload.
Task<bool> NbdConnection::accept_status_query(std::span<const std::byte>& input,
                                              const nbd::Request& request) {
  std::array<std::byte, nbd::kStatusQuerySize> query;
  const std::span<const std::byte> front = parser_.take_payload(input);
  std::ranges::copy(front, query.begin());
  const std::span<std::byte> rest = std::span(query).subspan(front.size());
  if (!rest.empty()) {
    const Result<void> received = co_await channel_->read_full(rest, stop_.token());
    if (!received) {
      if (receiving()) give_up("vanished in the middle of a request");
      give_place_back(kMaxStatusBytes);
      co_return false;
    }
    parser_.payload_received(static_cast<std::uint32_t>(rest.size()));
  }
  const std::optional<nbd::Request> wanted =
      nbd::parse_status_query(request, query, nbd::kBaseAllocationId);
  std::string_view why = "a metadata context that was not negotiated";
  const int error = wanted ? judge(*wanted, why) : EINVAL;
  if (error) {
    reply_error(request, error, kMaxStatusBytes, why);
  } else {
    start(request, kMaxStatusBytes, [&] { return run_status(*wanted, kMaxStatusBytes); });
  }
  co_return true;
}

// ---- Requests

// Room for data from `offset` on, behind a header that is complete; or, where the data can go from
// the page cache to the socket, no room but where it is. Null: no memory.
NbdConnection::Reply* NbdConnection::make_data_reply(const nbd::Request& request,
                                                     std::uint64_t offset, std::uint64_t length,
                                                     std::size_t bytes_held, bool last) noexcept {
  const bool simple = style() == nbd::ReplyStyle::kSimple;
  const std::size_t chunk_header = nbd::chunk_header_size(style());
  const std::size_t header_size = simple ? nbd::kSimpleReplySize : chunk_header + 8;
  std::optional<FileLocation> cached;
  if (sends_files_ && length >= kSentFromCache) cached = disk_->in_page_cache(offset, length);
  Reply* const reply =
      cached ? Reply::make(*memory_, header_size, FilePart{cached->fd, cached->offset, length},
                           bytes_held, last)
             : Reply::make(*memory_, header_size, length, bytes_held, last);
  if (!reply) return nullptr;
  if (simple) {
    nbd::encode_simple_reply(
        std::span<std::byte, nbd::kSimpleReplySize>(reply->bytes(), nbd::kSimpleReplySize), 0,
        request.cookie);
  } else {
    nbd::encode_chunk_header(reply->bytes(), style(), request, last ? nbd::kReplyDone : 0,
                             nbd::ChunkType::kOffsetData, static_cast<std::uint32_t>(length + 8));
    store_be(reply->bytes() + chunk_header, offset);
  }
  return reply;
}

// A chunk whose payload is still to be filled in. Null: no memory.
NbdConnection::Reply* NbdConnection::make_chunk(const nbd::Request& request, nbd::ChunkType type,
                                                std::size_t payload, std::size_t bytes_held,
                                                bool last) noexcept {
  Reply* const reply =
      Reply::make(*memory_, nbd::chunk_header_size(style()), payload, bytes_held, last);
  if (reply) {
    nbd::encode_chunk_header(reply->bytes(), style(), request, last ? nbd::kReplyDone : 0, type,
                             static_cast<std::uint32_t>(payload));
  }
  return reply;
}

Task<void> NbdConnection::run_read(nbd::Request request) {
  if (request.length == 0 && style() != nbd::ReplyStyle::kSimple) {
    reply_error(request, 0, 0);  // a chunk of no data is not allowed
    co_return;
  }
  Reply* reply = make_data_reply(request, request.offset, request.length, request.length, true);
  if (!reply) {
    reply_error(request, ENOMEM, request.length);
    co_return;
  }
  Result<void> result;
  try {
    if (!reply->from_file) result = co_await disk_->read(request.offset, reply->payload());
  } catch (const std::bad_alloc&) {
    result = out_of_memory();
  }
  if (!result) {
    Reply::free(*memory_, reply);
    reply_result(request, result, request.length);
    co_return;
  }
  queue(reply);
}

// Zeroes go as a few bytes that say so, data as it is read. The last chunk gives the place back.
Task<void> NbdConnection::run_sparse_read(nbd::Request request) {
  std::vector<ReadPiece> pieces;
  try {
    const Result<std::vector<Extent>> extents =
        co_await disk_->block_status(request.offset, request.length, kSparseReadExtents);
    // Whatever is wrong, reading will show it.
    if (extents) pieces = split_read(request.offset, request.length, *extents);
  } catch (const std::bad_alloc&) {
    pieces.clear();
  }
  if (pieces.empty() || (pieces.size() == 1 && !pieces[0].zero)) {
    co_await run_read(request);
    co_return;
  }
  for (const ReadPiece& piece : pieces) {
    const bool last = &piece == &pieces.back();
    const std::size_t held = last ? request.length : 0;
    Reply* reply = piece.zero ? make_chunk(request, nbd::ChunkType::kOffsetHole,
                                           nbd::kOffsetHoleSize, held, last)
                              : make_data_reply(request, piece.offset, piece.length, held, last);
    if (!reply) {
      reply_error(request, ENOMEM, request.length);
      co_return;
    }
    Result<void> result;
    if (piece.zero) {
      nbd::encode_offset_hole(reply->payload().first<nbd::kOffsetHoleSize>(), piece.offset,
                              static_cast<std::uint32_t>(piece.length));
    } else if (!reply->from_file) {
      try {
        result = co_await disk_->read(piece.offset, reply->payload());
      } catch (const std::bad_alloc&) {
        result = out_of_memory();
      }
    }
    if (!result) {
      Reply::free(*memory_, reply);
      reply_result(request, result, request.length, piece.offset);
      co_return;
    }
    queue(reply);
  }
}

Task<void> NbdConnection::run_status(nbd::Request request, std::size_t bytes_held) {
  Result<std::vector<Extent>> extents;
  const std::size_t most = request.req_one() ? 1 : kMaxStatusExtents;
  try {
    // A block may consist of several extents.
    extents = co_await disk_->block_status(request.offset, request.length,
                                           limits_.min_block > 1 ? kMaxStatusExtents : most);
    if (extents && limits_.min_block > 1) *extents = align_extents(*extents, limits_.min_block);
  } catch (const std::bad_alloc&) {
    extents = fail(ENOMEM, "out of memory");
  }
  if (!extents) {
    reply_result(request, std::unexpected(std::move(extents.error())), bytes_held);
    co_return;
  }
  const std::size_t count = std::min(extents->size(), most);
  Reply* const reply =
      make_chunk(request, nbd::StatusEncoder::type(style()),
                 nbd::StatusEncoder::status_size(style(), count), bytes_held, true);
  if (!reply) {
    reply_error(request, ENOMEM, bytes_held);
    co_return;
  }
  nbd::StatusEncoder status(reply->payload().data(), style(), nbd::kBaseAllocationId,
                            static_cast<std::uint32_t>(count));
  for (const Extent& extent : std::span(*extents).first(count)) {
    status.put(extent.length,
               (extent.hole ? nbd::kStateHole : 0) | (extent.zero ? nbd::kStateZero : 0));
  }
  queue(reply);
}

// The reader runs it itself, so that nothing comes after it meanwhile.
Task<void> NbdConnection::run_resize(nbd::Request request) {
  Result<void> result = server_.begin_resize(*place_.exported, request.offset);
  if (result) {
    try {
      result = co_await disk_->resize(request.offset);
      if (result && request.fua()) result = co_await disk_->flush();
    } catch (const std::bad_alloc&) {
      result = out_of_memory();
    }
    server_.end_resize(*place_.exported);
  }
  reply_result(request, result, 0);
}

Task<void> NbdConnection::run_write(nbd::Request request, WritePayload payload) {
  std::array<iovec, 2> pieces{
      iovec{const_cast<std::byte*>(payload.front.data()), payload.front.size()},
      iovec{payload.rest.data(), payload.rest.size()}};
  std::span<const iovec> data = pieces;
  if (payload.front.empty()) data = data.last(1);
  if (payload.rest.empty()) data = data.first(1);
  Result<void> result;
  try {
    result = co_await disk_->write(request.offset, data, request.fua());
  } catch (const std::bad_alloc&) {
    result = out_of_memory();
  }
  reply_result(request, result, request.length);
}

Task<void> NbdConnection::run_other(nbd::Request request) {
  Result<void> result;
  try {
    if (request.command == nbd::Command::kFlush) {
      result = co_await disk_->flush();
    } else if (request.command == nbd::Command::kTrim) {
      result = co_await disk_->discard(request.offset, request.length);
      if (result && request.fua()) result = co_await disk_->flush();
    } else if (request.command == nbd::Command::kWriteZeroes) {
      const ZeroFlags flags{
          .may_unmap = !request.no_hole(), .fua = request.fua(), .fast = request.fast_zero()};
      result = co_await disk_->write_zeroes(request.offset, request.length, flags);
    } else if (request.command == nbd::Command::kCache) {
      result = co_await disk_->cache(request.offset, std::min(request.length, kMostCached));
    }
  } catch (const std::bad_alloc&) {
    result = out_of_memory();
  }
  if (!result && result.error().code() == ENOTSUP && request.fast_zero()) {
    // What it asked to know: nothing for the log.
    reply_error(request, ENOTSUP, 0, "not faster than a write");
    co_return;
  }
  reply_result(request, result, request.payload_size());
}

// `where` a read went wrong, if a part of it may have been answered.
void NbdConnection::reply_result(const nbd::Request& request, const Result<void>& result,
                                 std::size_t bytes_held, std::optional<std::uint64_t> where) {
  if (result) return reply_error(request, 0, bytes_held);
  if (logged_errors_ < kMaxLoggedErrors) {
    ++logged_errors_;
    log([&] {
      return result.error().message() +
             (logged_errors_ == kMaxLoggedErrors ? " (the last one shown)" : "");
    });
  }
  int error = result.error().code();
  // The protocol keeps this word for zeroes that are not quick.
  if (error == ENOTSUP && request.command != nbd::Command::kResize) error = EINVAL;
  std::string message;
  try {
    if (style() != nbd::ReplyStyle::kSimple) message = result.error().message();
  } catch (const std::bad_alloc&) {
  }
  reply_error(request, error, bytes_held, message, where);
}

// The end of a request that brings no data: an error, or 0.
void NbdConnection::reply_error(const nbd::Request& request, int error, std::size_t bytes_held,
                                std::string_view message,
                                std::optional<std::uint64_t> where) noexcept {
  const std::uint32_t code = nbd::to_nbd_error(error);
  Reply* reply = nullptr;
  if (style() == nbd::ReplyStyle::kSimple ||
      (code == 0 && style() == nbd::ReplyStyle::kStructured &&
       request.command != nbd::Command::kRead)) {
    reply = Reply::make(*memory_, nbd::kSimpleReplySize, 0, bytes_held);
    if (reply) {
      nbd::encode_simple_reply(
          std::span<std::byte, nbd::kSimpleReplySize>(reply->bytes(), nbd::kSimpleReplySize), code,
          request.cookie);
    }
  } else if (code == 0) {
    reply = make_chunk(request, nbd::ChunkType::kNone, 0, bytes_held, true);
  } else {
    message = nbd::fit_message(message);
    reply = make_chunk(request, where ? nbd::ChunkType::kErrorOffset : nbd::ChunkType::kError,
                       nbd::error_size(message, where.has_value()), bytes_held, true);
    if (reply) nbd::encode_error(reply->payload().data(), code, message, where);
  }
  if (!reply) {
    // Not even a few bytes: the client cannot be told, so it has to go.
    give_up("out of memory");
    give_place_back(bytes_held);
    wake_sender();
    wake_reader();
    return;
  }
  queue(reply);
}

// ---- The sender

void NbdConnection::queue(Reply* reply) noexcept {
  (last_reply_ ? last_reply_->next : first_reply_) = reply;
  last_reply_ = reply;
  wake_sender();
}

Task<void> NbdConnection::sender() {
  std::array<iovec, kMaxRepliesPerSend> pieces;
  for (;;) {
    if (!first_reply_) {
      if (sender_ends_ && requests_in_flight_ == 0) break;
      sender_waits_ = true;
      co_await yield();
      continue;
    }
    std::size_t count = 0;
    const FilePart* part = nullptr;  // of the last one
    for (Reply* reply = first_reply_; reply && !part && count < pieces.size();
         reply = reply->next) {
      pieces[count++] = iovec{reply->bytes(), reply->size};
      if (reply->from_file) part = &reply->file_part();
    }
    if (!dead_) {
      const std::span<iovec> unsent(pieces.data(), count);
      Result<void> sent = co_await channel_->writev_in_place(unsent, disconnect_.token());
      if (sent && part) sent = co_await channel_->send_file(*part, disconnect_.token());
      if (!sent) {
        const int error = sent.error().code();
        if (error != EPIPE && error != ECONNRESET && error != ECANCELED) {
          give_up(sent.error().message());
        }
        dead_ = true;
        channel_->abort();
      }
    }

    for (std::size_t i = 0; i < count; ++i) {
      Reply* const reply = first_reply_;
      first_reply_ = reply->next;
      if (!first_reply_) last_reply_ = nullptr;
      if (reply->last) give_place_back(reply->bytes_held);
      Reply::free(*memory_, reply);
    }
    wake_reader();
  }
  sender_ = nullptr;
  wake_reader();
}

}  // namespace roost
