// SPDX-License-Identifier: MIT
#include "nbd/client_connection.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "roost/aio/aio_context.h"
#include "roost/base/check.h"

namespace roost::nbd {
namespace {

std::size_t size_of(const PendingRequest& pending) {
  return pending.request.command == Command::kWrite
             ? static_cast<std::size_t>(pending.request.length)
             : 0;
}

}  // namespace

std::vector<iovec> pieces_of(std::span<const iovec> data, std::uint64_t at, std::uint64_t size) {
  std::vector<iovec> pieces;
  for (const iovec& piece : data) {
    if (at >= piece.iov_len) {
      at -= piece.iov_len;
      continue;
    }
    if (size == 0) break;
    const std::uint64_t count = std::min<std::uint64_t>(piece.iov_len - at, size);
    pieces.push_back({static_cast<std::byte*>(piece.iov_base) + at, count});
    at = 0;
    size -= count;
  }
  ROOST_CHECK(size == 0, "{} bytes are missing in a buffer", size);
  return pieces;
}

ClientConnection::ClientConnection(std::unique_ptr<Channel> channel, Outcome outcome,
                                   std::vector<std::byte> received)
    : size(outcome.size),
      channel_(std::move(channel)),
      outcome_(std::move(outcome)),
      buffer_(kBufferSize),
      received_(std::move(received)) {}

void ClientConnection::start() {
  CoContext& here = *Coroutine::self()->home();
  {
    const std::lock_guard lock(mutex_);
    loops_ = 2;
  }
  spawn(here, send_loop(shared_from_this()), "NBD client, sending");
  spawn(here, receive_loop(shared_from_this()), "NBD client, receiving");
}

Error ClientConnection::words(const PendingRequest& pending, int code,
                              std::string_view what) const {
  return Error(code, fmt::format("{}: {}: {}", name(), to_string(pending.request), what));
}

// ---- the callers ----

Task<Result<void>> ClientConnection::run(Pending pending, std::stop_token stop, WhenStopped when) {
  std::unique_lock lock(mutex_);
  if (failure_) {
    co_return std::unexpected(words(*pending, failure_->code(), failure_->doing()));
  }
  if (leaving_) co_return std::unexpected(words(*pending, ESHUTDOWN, "the connection ends"));
  if (stop.stop_requested()) co_return std::unexpected(words(*pending, ECANCELED, "not sent"));
  pending->request.cookie = next_cookie_++;
  pending->queued = true;
  in_flight_.emplace(pending->request.cookie, pending);
  queue_.push_back(pending);
  lock.unlock();
  work_.wake_one();
  lock.lock();
  while (!pending->answered || pending->in_use()) {
    if (pending->stopped) {
      if (pending->queued) {
        std::erase(queue_, pending);
        in_flight_.erase(pending->request.cookie);
        const bool idle = leaving_ && in_flight_.empty();
        lock.unlock();
        if (idle) work_.wake_all();
        co_return std::unexpected(words(*pending, ECANCELED, "not sent"));
      }
      if (when == WhenStopped::kLeave && !pending->in_use()) {
        pending->left = true;
        co_return std::unexpected(words(*pending, EINPROGRESS, "left, it may still be done"));
      }
      co_await pending->changed.wait(lock);
    } else {
      const Result<void> waited = co_await pending->changed.wait(lock, stop);
      pending->stopped = !waited;
    }
  }
  co_return std::move(pending->result);
}

Task<void> ClientConnection::leave(std::stop_token stop) {
  std::unique_lock lock(mutex_);
  leaving_ = true;
  lock.unlock();
  work_.wake_all();
  lock.lock();
  bool stopped = false;
  while (loops_ > 0) {
    if (stopped) {
      co_await ended_.wait(lock);
      continue;
    }
    const Result<void> waited = co_await ended_.wait(lock, stop);
    if (waited) continue;
    stopped = true;
    lock.unlock();
    fail_all(Error(ESHUTDOWN, "the connection was cut off"));
    co_await cut_off();
    lock.lock();
  }
}

Result<void> ClientConnection::state() const {
  const std::lock_guard lock(mutex_);
  if (failure_) return fail(failure_->code(), fmt::format("{}: {}", name(), failure_->doing()));
  return {};
}

bool ClientConnection::ended() const {
  const std::lock_guard lock(mutex_);
  return loops_ == 0;
}

std::size_t ClientConnection::in_flight() const {
  const std::lock_guard lock(mutex_);
  return in_flight_.size();
}

void ClientConnection::answer(const Pending& pending, Result<void> result) {
  {
    const std::lock_guard lock(mutex_);
    if (in_flight_.erase(pending->request.cookie) == 0) return;  // failed with its connection
    if (!result) {
      // It says so once, and to whoever asks; a client has to leave then.
      leaving_ |= result.error().code() == ESHUTDOWN;
      result = std::unexpected(
          Error(result.error().code(), fmt::format("{}: {}", name(), result.error().doing())));
    }
    pending->result = std::move(result);
    pending->answered = true;
  }
  pending->changed.wake_all();
  wake_sender_to_leave();
}

void ClientConnection::wake_sender_to_leave() {
  bool idle = false;
  {
    const std::lock_guard lock(mutex_);
    idle = leaving_ && in_flight_.empty();
  }
  if (idle) work_.wake_all();
}

void ClientConnection::fail_all(const Error& error) {
  std::unordered_map<std::uint64_t, Pending> lost;
  {
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = error;
    queue_.clear();
    lost = std::exchange(in_flight_, {});
    for (auto& [cookie, pending] : lost) {
      pending->queued = false;
      pending->result = std::unexpected(words(*pending, failure_->code(), failure_->doing()));
      pending->answered = true;
    }
  }
  for (auto& [cookie, pending] : lost) pending->changed.wake_all();
  work_.wake_all();
}

Task<Result<void>> ClientConnection::move_to(AioContext& to) {
  const CoMutex::Guard guard = co_await place_.lock();
  co_return co_await channel_->move_to(to);
}

Task<void> ClientConnection::cut_off() {
  AioContext& home = *AioContext::current();
  {
    const CoMutex::Guard guard = co_await place_.lock();
    // What waits may only be ended where the channel is.
    AioContext* const there = channel_->context();
    if (there && there != AioContext::current()) co_await roost::move_to(*there);
    channel_->abort();
  }
  if (&home != AioContext::current()) co_await roost::move_to(home);
}

Task<void> ClientConnection::end_loop() {
  co_await cut_off();
  {
    const std::lock_guard lock(mutex_);
    --loops_;
  }
  ended_.wake_all();
}

// ---- the sender ----

Task<void> ClientConnection::send_loop(std::shared_ptr<ClientConnection> self) {
  const Result<void> sent = co_await self->send();
  self->fail_all(sent ? Error(ESHUTDOWN, "the connection has ended") : sent.error());
  co_await self->end_loop();
}

Task<Result<void>> ClientConnection::send() {
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      while (queue_.empty() && !failure_ && !(leaving_ && in_flight_.empty())) {
        co_await work_.wait(lock);
      }
      if (failure_) co_return Result<void>();
      take_batch();
    }
    if (batch_.empty()) break;
    Result<void> sent;
    std::span<const iovec> rest(pieces_);
    while (sent && !rest.empty()) {
      const auto part = rest.first(std::min(rest.size(), kMaxPieces));
      rest = rest.subspan(part.size());
      sent = co_await channel_->writev_full(part);
    }
    {
      const std::lock_guard lock(mutex_);
      std::erase_if(batch_, [](const Pending& pending) {
        pending->sending = false;
        return !pending->answered && !pending->stopped;
      });
    }
    // These were answered but not let go of; or their callers want to leave.
    for (const Pending& pending : batch_) pending->changed.wake_all();
    batch_.clear();
    if (!sent) co_return sent;
  }
  std::array<std::byte, kMaxRequestHeader> header;
  const ClientRequest goodbye = {.command = Command::kDisc};
  const std::size_t header_size = encode_request(header, outcome_.headers, goodbye);
  const Result<void> sent = co_await channel_->write_full(std::span(header).first(header_size));
  if (sent) (void)co_await channel_->shutdown(StreamEnd::kWrite);
  co_return Result<void>();
}

void ClientConnection::take_batch() {
  pieces_.clear();
  std::size_t bytes = 0;
  while (!queue_.empty() && pieces_.size() < kMaxPieces && bytes < kMaxBatchBytes) {
    PendingRequest& pending = *queue_.front();
    const std::size_t header_size =
        encode_request(pending.header, outcome_.headers, pending.request);
    pieces_.push_back({pending.header.data(), header_size});
    bytes += header_size + size_of(pending);
    if (pending.request.command == Command::kWrite) {
      pieces_.insert(pieces_.end(), pending.data.begin(), pending.data.end());
    }
    pending.checker.emplace(pending.request, outcome_.headers, outcome_.contexts);
    pending.queued = false;
    pending.sending = true;
    batch_.push_back(std::move(queue_.front()));
    queue_.pop_front();
  }
}

// ---- the receiver ----

Task<void> ClientConnection::receive_loop(std::shared_ptr<ClientConnection> self) {
  const Result<void> received = co_await self->receive();
  self->fail_all(received.error());
  co_await self->end_loop();
}

ClientConnection::Pending ClientConnection::find(std::uint64_t cookie) {
  const std::lock_guard lock(mutex_);
  const auto found = in_flight_.find(cookie);
  // The number of a request that was not sent is a guess.
  return found == in_flight_.end() || found->second->queued ? nullptr : found->second;
}

bool ClientConnection::begin_receiving(PendingRequest& pending) {
  const std::lock_guard lock(mutex_);
  // Answered: by the end of the connection, in the sender.
  pending.receiving = !pending.left && !pending.answered;
  return pending.receiving;
}

void ClientConnection::end_receiving(PendingRequest& pending) {
  bool wake = false;
  {
    const std::lock_guard lock(mutex_);
    pending.receiving = false;
    wake = pending.answered || pending.stopped;
  }
  if (wake) pending.changed.wake_all();
}

Task<Result<void>> ClientConnection::receive() {
  ReplyParser parser(outcome_.headers);
  ReplyMessage message;
  std::span<const std::byte> input(received_);
  for (;;) {
    const ReplyParser::Event event = parser.next(input, message);
    if (event == ReplyParser::Event::kFailed) co_return fail(EPROTO, parser.failure());
    if (event == ReplyParser::Event::kNeedInput) {
      const Result<void> more = co_await receive_some(input);
      if (!more) co_return more;
      continue;
    }
    const Pending pending = find(message.cookie);
    if (!pending) {
      co_return fail(EPROTO, fmt::format("the server replied to a request that was not made, "
                                         "cookie {}",
                                         message.cookie));
    }
    ReplyChecker& checker = *pending->checker;
    const ReplyChecker::Verdict verdict = checker.check(message);
    if (verdict.fatal) {
      co_return fail(EPROTO,
                     fmt::format("{}, answering {}", checker.fault(), to_string(pending->request)));
    }
    if (verdict.payload_size > 0) parser.expect_payload(verdict.payload_size);
    Result<void> taken;
    switch (verdict.action) {
      case ReplyChecker::Action::kNothing:
        break;
      case ReplyChecker::Action::kSkip:
        parser.skip_payload();
        break;
      case ReplyChecker::Action::kZeroes:
        if (begin_receiving(*pending)) {
          for (const iovec& piece : pieces_of(pending->data, verdict.at, verdict.size)) {
            std::memset(piece.iov_base, 0, piece.iov_len);
          }
          end_receiving(*pending);
        }
        break;
      case ReplyChecker::Action::kData:
        if (!begin_receiving(*pending)) {
          parser.skip_payload();
          break;
        }
        taken = co_await receive_data(*pending, verdict.at, input, parser);
        end_receiving(*pending);
        break;
      case ReplyChecker::Action::kStatus:
        while (taken && parser.payload_left() > 0) {
          if (input.empty()) taken = co_await receive_some(input);
          checker.take_status(parser.take_payload(input));
        }
        break;
    }
    if (!taken) co_return taken;
    if (message.done()) {
      Result<void> result = checker.finish();
      if (result) pending->status = std::move(checker.status());
      answer(pending, std::move(result));
    }
  }
}

Task<Result<void>> ClientConnection::receive_some(std::span<const std::byte>& input) {
  const Result<std::size_t> got = co_await channel_->read(buffer_);
  if (!got) co_return std::unexpected(got.error());
  if (*got == 0) co_return fail(ECONNRESET, "the server closed the connection");
  input = std::span(buffer_).first(*got);
  co_return Result<void>();
}

Task<Result<void>> ClientConnection::receive_data(PendingRequest& pending, std::uint64_t at,
                                                  std::span<const std::byte>& input,
                                                  ReplyParser& parser) {
  std::span<const std::byte> part = parser.take_payload(input);
  for (const iovec& piece : pieces_of(pending.data, at, part.size())) {
    std::memcpy(piece.iov_base, part.data(), piece.iov_len);
    part = part.subspan(piece.iov_len);
    at += piece.iov_len;
  }
  const std::uint32_t left = parser.payload_left();
  if (left == 0) co_return Result<void>();
  const std::vector<iovec> pieces = pieces_of(pending.data, at, left);
  const Result<void> read = co_await channel_->readv_full(pieces);
  if (read) parser.payload_received(left);
  co_return read;
}

}  // namespace roost::nbd
