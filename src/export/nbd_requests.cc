// SPDX-License-Identifier: MIT
// The requests of a connection are run, and their replies made, queued and sent.
#include <algorithm>
#include <array>
#include <cerrno>
#include <new>
#include <vector>

#include "export/extents.h"
#include "export/nbd_connection.h"
#include "export/nbd_payload.h"
#include "roost/base/bytes.h"

namespace roost {

namespace {

// Replies in one send: what IOV_MAX allows and more than a client has in flight.
constexpr std::size_t kMaxRepliesPerSend = 256;

// Lines about failed requests that one connection may write to the log.
constexpr unsigned kMaxLoggedErrors = 8;

// How many extents a long read asks for.
constexpr std::size_t kSparseReadExtents = 32;

// Reads from here on are sent from the page cache without a copy, where that is possible: below,
// the copy costs less than the calls.
constexpr std::uint64_t kSentFromCache = 64 << 10;

// What one CACHE reads ahead: a request of 28 bytes shall not push everything else out of the
// cache.
constexpr std::uint64_t kMostCached = 64 << 20;

Result<void> out_of_memory() { return fail(ENOMEM, "out of memory"); }  // short: needs none itself

}  // namespace

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
