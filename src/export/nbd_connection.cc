// SPDX-License-Identifier: MIT
#include "export/nbd_connection.h"

#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <new>

#include "roost/aio/io.h"

namespace roost {

namespace {

// One receive: a full queue of small requests, and of small writes with their data.
constexpr std::size_t kChunkSize = 128 << 10;

// Replies in one send: what IOV_MAX allows and more than a client has in flight.
constexpr std::size_t kMaxRepliesPerSend = 256;

// Lines about failed requests that one connection may write to the log.
constexpr unsigned kMaxLoggedErrors = 8;

// How long a client may take to fetch its last replies, how often to look, and how long nothing
// must have come from one that had more to say: longer than its kernel waits to try again.
constexpr std::int64_t kLingerNs = 5'000'000'000;
constexpr std::int64_t kLingerStepNs = 2'000'000;
constexpr int kLingerQuietSteps = 150;

Result<void> out_of_memory() { return fail(ENOMEM, "out of memory"); }  // short: needs none itself

}  // namespace

// What a receive filled. Writes whose data is in it keep it until they are done.
struct NbdConnection::Chunk {
  std::size_t filled;
  std::byte bytes[kChunkSize];

  std::span<std::byte> room() { return std::span(bytes).subspan(filled); }
};

// A reply as it goes out: header and payload in one piece of memory. The header ends on a cache
// line, since copying to the payload is quicker where that starts on one.
struct alignas(BufferCache::kAlignment) NbdConnection::Reply {
  Reply* next = nullptr;
  std::size_t size;         // header and payload to send
  std::size_t bytes_held;   // of the connection's limit
  std::size_t memory_size;  // of all of it
  std::byte unused[16];
  std::byte header[nbd::kSimpleReplySize];

  static Reply* make(BufferCache& cache, std::size_t payload, std::size_t held) {
    const std::size_t memory_size = sizeof(Reply) + payload;
    void* const memory = cache.take(memory_size);
    if (!memory) return nullptr;
    auto* const reply = ::new (memory) Reply;
    reply->size = nbd::kSimpleReplySize + payload;
    reply->bytes_held = held;
    reply->memory_size = memory_size;
    return reply;
  }
  static void free(BufferCache& cache, Reply* reply) noexcept {
    cache.give_back(reply, reply->memory_size);
  }

  std::byte* bytes() noexcept { return header; }
  std::span<std::byte> payload() noexcept {
    return {reinterpret_cast<std::byte*>(this + 1), size - nbd::kSimpleReplySize};
  }
  void set_header(int error, std::uint64_t cookie) noexcept {
    const std::uint32_t code = error ? nbd::to_nbd_error(error) : 0;
    if (code) size = nbd::kSimpleReplySize;  // no data behind an error
    nbd::encode_simple_reply(header, code, cookie);
  }
};

// The data of a WRITE, where the socket put it: the part that came with the request in the chunk,
// the rest in memory of its own.
struct NbdConnection::WritePayload {
  std::shared_ptr<Chunk> chunk;
  std::span<const std::byte> front;
  std::unique_ptr<std::byte, decltype(&std::free)> rest{nullptr, &std::free};
  std::size_t rest_size = 0;
};

NbdConnection::NbdConnection(NbdServer& server, UniqueFd socket)
    : server_(server), socket_(std::move(socket)), peer_(describe_peer(socket_.get())) {}

NbdConnection::~NbdConnection() = default;

void NbdConnection::stop() noexcept {
  stopping_.store(true, std::memory_order_relaxed);
  // Ends a receive that waits; a system call orders the store well enough for the reader's next.
  ::shutdown(socket_.get(), SHUT_RD);
}

void NbdConnection::disconnect() noexcept {
  stopping_.store(true, std::memory_order_relaxed);
  disconnected_.store(true);
  ::shutdown(socket_.get(), SHUT_RDWR);
}

// Only the first reason is worth a line: what follows is its consequence.
void NbdConnection::give_up(std::string_view why) noexcept {
  if (dead_) return;
  dead_ = true;
  log([&] { return std::string(why) + "; connection closed"; });
  ::shutdown(socket_.get(), SHUT_RDWR);
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

Task<bool> NbdConnection::send_all(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    iovec piece{const_cast<std::byte*>(bytes.data()), bytes.size()};
    msghdr message{};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    const std::int64_t n = co_await io_sendmsg(socket_.get(), message);
    if (n < 0) co_return false;
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
  co_return true;
}

Task<bool> NbdConnection::negotiate() {
  using State = nbd::ServerNegotiation::State;
  bool timed_out = false;
  Timer timeout(*context_, [this, &timed_out] {
    timed_out = true;
    ::shutdown(socket_.get(), SHUT_RDWR);
  });
  timeout.arm_after(server_.options_.limits.handshake_timeout_ns);

  nbd::ServerNegotiation negotiation(server_.export_infos_);
  chunk_ = std::make_shared_for_overwrite<Chunk>();
  std::span<const std::byte> input;
  bool lost = false;
  bool heard_of = false;
  while (negotiation.state() == State::kNegotiating && !lost) {
    input = input.subspan(negotiation.feed(input));
    if (!negotiation.output().empty()) {
      lost = !co_await send_all(negotiation.output());
      negotiation.drain_output(negotiation.output().size());
    } else if (negotiation.state() == State::kNegotiating) {
      const std::int64_t n = co_await io_recv(socket_.get(), chunk_->bytes);
      lost = n <= 0;
      if (!lost) {
        heard_of = true;
        input = std::span<const std::byte>(chunk_->bytes, static_cast<std::size_t>(n));
      }
    }
  }
  if (!lost && !negotiation.output().empty()) lost = !co_await send_all(negotiation.output());
  timeout.cancel();

  if (timed_out) {
    give_up("negotiation timed out");
  } else if (negotiation.state() == State::kFailed) {
    give_up(negotiation.failure());
  } else if (lost && heard_of && receiving()) {
    give_up("vanished during the negotiation");
  }
  if (lost || negotiation.state() != State::kTransmission) co_return false;

  const nbd::ServerNegotiation::Selection& chosen = negotiation.selection();
  const NbdServer::Export& exported = server_.exports_[chosen.export_index];
  disk_ = exported.disk;
  export_name_ = exported.name;
  limits_.size = disk_->size();
  limits_.transmission_flags = chosen.transmission_flags;
  unparsed_ = input;
  chunk_->filled = kChunkSize;  // until unparsed_ is used up

  const std::size_t number = server_.choose_context(chosen.export_index);
  AioContext& home = *server_.options_.io_contexts[number];
  reply_memory_ = server_.reply_memory_[number].get();
  place_ = Place{chosen.export_index, &home};
  co_await move_to(home);
  context_ = &home;
  co_return true;
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

Task<void> NbdConnection::transmit() {
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
  // Nobody on this context is being answered: what is kept is of no use for now.
  if (reply_memory_->taken() == 0) reply_memory_->clear();
  if (!dead_) co_await see_replies_off();
}

// Closing a TCP socket that holds, or still gets, unread data resets the connection, and what was
// sent may be lost on either side: reads and forgets what comes until there is quiet and our side
// has arrived, for as long as a client may take for that. The end of our side comes last, by the
// close: once it is sent, data that comes resets the connection, too. (What a unix socket has sent
// has arrived.)
Task<void> NbdConnection::see_replies_off() {
  int domain = 0;
  socklen_t length = sizeof domain;
  ::getsockopt(socket_.get(), SOL_SOCKET, SO_DOMAIN, &domain, &length);
  const bool unix_socket = domain == AF_UNIX;
  bool asked_for_more = false;
  int quiet_steps = 0;
  for (std::int64_t waited_ns = 0; waited_ns < kLingerNs && !disconnected_.load();
       waited_ns += kLingerStepNs) {
    ++quiet_steps;
    while (::recv(socket_.get(), chunk_->bytes, kChunkSize, MSG_DONTWAIT) > 0) {
      asked_for_more = true;
      quiet_steps = 0;
    }
    int unsent = 0;
    const bool arrived =
        unix_socket || ::ioctl(socket_.get(), SIOCOUTQ, &unsent) < 0 || unsent == 0;
    const bool quiet = unix_socket || !asked_for_more || quiet_steps >= kLingerQuietSteps;
    if (arrived && quiet) break;
    co_await sleep_for(kLingerStepNs);
  }
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
          chunk_ = std::make_shared_for_overwrite<Chunk>();
          chunk_->filled = 0;
        }
        const std::span<std::byte> room = chunk_->room();
        const std::int64_t n = co_await io_recv(socket_.get(), room);
        if (n <= 0) {
          done = true;
          if (receiving() && (n < 0 || !parser_.at_boundary())) {
            give_up(n < 0 ? Error(static_cast<int>(-n), "receive").message()
                          : "vanished in the middle of a request");
          }
          continue;
        }
        input = room.first(static_cast<std::size_t>(n));
        chunk_->filled += static_cast<std::size_t>(n);
        continue;
      }
      case nbd::RequestParser::Event::kRequest:
        break;
    }

    if (request.command == nbd::Command::kDisc) break;
    const int error = nbd::validate(request, limits_);
    const std::size_t bytes =
        request.command == nbd::Command::kRead && !error ? request.length : request.payload_size();
    while (over_limits(bytes) && !dead_) {
      reader_waits_ = true;
      co_await yield();
    }
    take_place(bytes);
    if (error) {
      parser_.skip_payload();
      reply_error(request, error, bytes);
    } else if (request.command == nbd::Command::kRead) {
      start(request, bytes, [&] { return run_read(request); });
    } else if (request.command == nbd::Command::kWrite && request.length > 0) {
      done = !co_await accept_write(input, request);
    } else {
      start(request, bytes, [&] { return run_other(request); });
    }
  }
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
  WritePayload payload;
  payload.chunk = chunk_;
  payload.front = parser_.take_payload(input);
  payload.rest_size = parser_.payload_left();
  if (payload.rest_size > 0) {
    // Received straight to where the disk takes it from.
    payload.rest.reset(static_cast<std::byte*>(std::malloc(payload.rest_size)));
    if (!payload.rest) {
      parser_.skip_payload();
      reply_error(request, ENOMEM, request.length);
      co_return true;
    }
    std::span<std::byte> missing(payload.rest.get(), payload.rest_size);
    while (!missing.empty()) {
      const std::int64_t n = co_await io_recv(socket_.get(), missing, MSG_WAITALL);
      if (n <= 0) {
        if (receiving()) give_up("vanished in the middle of a write");
        give_place_back(request.length);  // there is nobody to answer
        co_return false;
      }
      missing = missing.subspan(static_cast<std::size_t>(n));
    }
    parser_.payload_received(static_cast<std::uint32_t>(payload.rest_size));
  }
  start(request, request.length, [&] { return run_write(request, std::move(payload)); });
  co_return true;
}

// ---- Requests

Task<void> NbdConnection::run_read(nbd::Request request) {
  Reply* reply = Reply::make(*reply_memory_, request.length, request.length);
  if (!reply) {
    reply_error(request, ENOMEM, request.length);
    co_return;
  }
  Result<void> result;
  try {
    result = co_await disk_->read(request.offset, reply->payload());
  } catch (const std::bad_alloc&) {
    result = out_of_memory();
  }
  if (!result) {
    Reply::free(*reply_memory_, reply);
    reply_result(request, result, request.length);
    co_return;
  }
  reply->set_header(0, request.cookie);
  queue(reply);
}

Task<void> NbdConnection::run_write(nbd::Request request, WritePayload payload) {
  std::array<iovec, 2> pieces{
      iovec{const_cast<std::byte*>(payload.front.data()), payload.front.size()},
      iovec{payload.rest.get(), payload.rest_size}};
  std::span<const iovec> data = pieces;
  if (payload.front.empty()) data = data.last(1);
  if (payload.rest_size == 0) data = data.first(1);
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
      const ZeroFlags flags{.may_unmap = !request.no_hole(), .fua = request.fua()};
      result = co_await disk_->write_zeroes(request.offset, request.length, flags);
    }
  } catch (const std::bad_alloc&) {
    result = out_of_memory();
  }
  reply_result(request, result, request.payload_size());
}

void NbdConnection::reply_result(const nbd::Request& request, const Result<void>& result,
                                 std::size_t bytes_held) {
  if (!result && logged_errors_ < kMaxLoggedErrors) {
    ++logged_errors_;
    log([&] {
      return result.error().message() +
             (logged_errors_ == kMaxLoggedErrors ? " (the last one shown)" : "");
    });
  }
  reply_error(request, result ? 0 : result.error().code(), bytes_held);
}

void NbdConnection::reply_error(const nbd::Request& request, int error, std::size_t bytes_held) {
  Reply* reply = Reply::make(*reply_memory_, 0, bytes_held);
  if (!reply) {
    // Not even sixteen bytes: the client cannot be told, so it has to go.
    give_up("out of memory");
    give_place_back(bytes_held);
    wake_sender();
    wake_reader();
    return;
  }
  reply->set_header(error, request.cookie);
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
    Reply* const first = first_reply_;
    std::size_t count = 0;
    std::size_t left = 0;
    for (Reply* reply = first; reply && count < pieces.size(); reply = reply->next) {
      pieces[count++] = iovec{reply->bytes(), reply->size};
      left += reply->size;
    }

    std::span<iovec> unsent(pieces.data(), count);
    while (left > 0 && !dead_) {
      msghdr message{};
      message.msg_iov = unsent.data();
      message.msg_iovlen = unsent.size();
      const std::int64_t n = co_await io_sendmsg(socket_.get(), message, MSG_WAITALL);
      if (n < 0) {
        if (n != -EPIPE && n != -ECONNRESET) {
          give_up(Error(static_cast<int>(-n), "send").message());
        }
        dead_ = true;
        ::shutdown(socket_.get(), SHUT_RDWR);
        break;
      }
      left -= static_cast<std::size_t>(n);
      for (auto sent = static_cast<std::size_t>(n); sent > 0 && left > 0;) {
        iovec& piece = unsent.front();
        const std::size_t part = std::min(sent, piece.iov_len);
        piece.iov_base = static_cast<std::byte*>(piece.iov_base) + part;
        piece.iov_len -= part;
        sent -= part;
        if (piece.iov_len == 0) unsent = unsent.subspan(1);
      }
    }

    for (std::size_t i = 0; i < count; ++i) {
      Reply* const reply = first_reply_;
      first_reply_ = reply->next;
      if (!first_reply_) last_reply_ = nullptr;
      give_place_back(reply->bytes_held);
      Reply::free(*reply_memory_, reply);
    }
    wake_reader();
  }
  sender_ = nullptr;
  wake_reader();
}

}  // namespace roost
