// SPDX-License-Identifier: MIT
// What a connection receives: it is parsed, and a coroutine started for each request.
#include <algorithm>
#include <array>
#include <cerrno>
#include <new>
#include <optional>

#include "export/nbd_connection.h"
#include "export/nbd_payload.h"

namespace roost {

namespace {

// A write from here on gets all of its data in one piece of memory of its own. Who sends one most
// often sends another: the next receive takes little more than the request, so that the data is
// received, and not copied, to where the disk takes it from.
constexpr std::size_t kLargeWrite = 64 << 10;
constexpr std::size_t kSmallReceive = 4 << 10;

// Reads from here on are worth a question for zeroes that need not be sent.
constexpr std::uint64_t kSparseRead = 64 << 10;

}  // namespace

bool NbdConnection::over_limits(std::size_t bytes) const noexcept {
  const NbdLimits& limits = server_.options_.limits;
  return requests_in_flight_ >= limits.requests_in_flight ||
         (bytes_in_flight_ > 0 && bytes_in_flight_ + bytes > limits.bytes_in_flight);
}

void NbdConnection::take_place(std::size_t bytes) noexcept {
  ++requests_in_flight_;
  bytes_in_flight_ += bytes;
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
        } else if (chunk_->room().size() < Chunk::kSize / 2) {
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
    // There is no place for it, and nobody to be answered.
    if (dead_) break;
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

}  // namespace roost
