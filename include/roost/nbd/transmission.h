// SPDX-License-Identifier: MIT
// The server's side of the NBD transmission phase: requests out of a byte stream, what is wrong
// with a request, and the headers of replies and of their chunks.
//
// A receive loop over RequestParser, without copies or allocations:
//
//   std::span<const std::byte> input = what one receive brought;
//   Request request;
//   while (parser.next(input, request) == RequestParser::Event::kRequest) {
//     if (request.command == Command::kDisc) stop reading;
//     const int error = validate(request, limits);
//     if (request.payload_size() > 0) {      // a WRITE: its data follows; or see StatusQuery
//       if (error) {
//         parser.skip_payload();             // next() throws it away as it comes
//       } else {
//         buffer = request.payload_size() bytes;
//         already = parser.take_payload(input);   // a part of input: copy it to the buffer
//         receive parser.payload_left() bytes straight into the rest of the buffer;
//         parser.payload_received(count);         // says how many went past the parser
//       }
//     }
//     answer with the error, or run the request
//   }
//   // kNeedInput: input is used up, receive more. kFailed: log parser.failure(), close.
//
// Instead of receiving past the parser, take_payload() may be called with each new input.
//
// Threads: none of their own; a parser belongs to one thread at a time.
// Lifetime: the spans that a parser hands out are parts of the caller's input.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "roost/base/bytes.h"
#include "roost/base/check.h"
#include "roost/nbd/protocol.h"

namespace roost::nbd {

struct Request {
  std::uint16_t flags = 0;  // kCommand...
  Command command{};
  bool extended = false;     // it came with an extended header
  std::uint64_t cookie = 0;  // comes back in the reply, means nothing to the server
  std::uint64_t offset = 0;  // RESIZE: the new size
  std::uint64_t length = 0;  // of the payload, if there is one; otherwise of the range

  bool fua() const noexcept { return (flags & kCommandFua) != 0; }
  bool no_hole() const noexcept { return (flags & kCommandNoHole) != 0; }
  bool df() const noexcept { return (flags & kCommandDf) != 0; }
  bool req_one() const noexcept { return (flags & kCommandReqOne) != 0; }
  bool fast_zero() const noexcept { return (flags & kCommandFastZero) != 0; }
  bool payload_len() const noexcept { return (flags & kCommandPayloadLen) != 0; }

  /// How many bytes of data follow the request. Behind a compact header only WRITE carries any,
  /// behind an extended one whatever says so.
  std::uint64_t payload_size() const noexcept {
    return (extended ? payload_len() : command == Command::kWrite) ? length : 0;
  }

  bool operator==(const Request&) const = default;
};

/// Nothing if the magic is wrong: then client and server no longer agree where requests begin,
/// and the connection is lost.
inline std::optional<Request> parse_request(std::span<const std::byte, kRequestSize> from) {
  const std::byte* const at = from.data();
  if (load_be<std::uint32_t>(at) != kRequestMagic) return std::nullopt;
  return Request{.flags = load_be<std::uint16_t>(at + 4),
                 .command = Command{load_be<std::uint16_t>(at + 6)},
                 .cookie = load_be<std::uint64_t>(at + 8),
                 .offset = load_be<std::uint64_t>(at + 16),
                 .length = load_be<std::uint32_t>(at + 24)};
}

/// Likewise for an extended header.
inline std::optional<Request> parse_extended_request(
    std::span<const std::byte, kExtendedRequestSize> from) {
  const std::byte* const at = from.data();
  if (load_be<std::uint32_t>(at) != kExtendedRequestMagic) return std::nullopt;
  return Request{.flags = load_be<std::uint16_t>(at + 4),
                 .command = Command{load_be<std::uint16_t>(at + 6)},
                 .extended = true,
                 .cookie = load_be<std::uint64_t>(at + 8),
                 .offset = load_be<std::uint64_t>(at + 16),
                 .length = load_be<std::uint64_t>(at + 24)};
}

/// BLOCK_STATUS with a payload: how long the range is, and which contexts are of interest. There is
/// only base:allocation to name, and to name it twice is an error, so that one size is right.
inline constexpr std::size_t kStatusQuerySize = 12;

/// The request with the range's length instead of the payload's, and without the payload flag; to
/// be validated again. Nothing if it names a context that was not agreed on.
inline std::optional<Request> parse_status_query(
    const Request& request, std::span<const std::byte, kStatusQuerySize> payload,
    std::uint32_t context_id) {
  if (load_be<std::uint32_t>(payload.data() + 8) != context_id) return std::nullopt;
  Request result = request;
  result.flags &= static_cast<std::uint16_t>(~kCommandPayloadLen);
  result.length = load_be<std::uint64_t>(payload.data());
  return result;
}

/// `error` is a value of the protocol (to_nbd_error), 0 for success. The data of a successful
/// READ follows the header.
inline void encode_simple_reply(std::span<std::byte, kSimpleReplySize> to, std::uint32_t error,
                                std::uint64_t cookie) noexcept {
  store_be(to.data(), kSimpleReplyMagic);
  store_be(to.data() + 4, error);
  store_be(to.data() + 8, cookie);
}

// ---- Chunks: of structured and of extended replies

/// How long the header of a chunk is. REQUIRES: not kSimple.
constexpr std::size_t chunk_header_size(ReplyStyle style) noexcept {
  return style == ReplyStyle::kExtended ? kExtendedReplySize : kStructuredReplySize;
}

/// The most a header and the fixed part of its payload take that stand before data.
inline constexpr std::size_t kMaxDataHeader = kExtendedReplySize + 8;

/// The header of a chunk with `length` bytes of payload, chunk_header_size() bytes at `to`.
/// REQUIRES: `style` is not kSimple.
inline void encode_chunk_header(std::byte* to, ReplyStyle style, const Request& request,
                                std::uint16_t flags, ChunkType type,
                                std::uint32_t length) noexcept {
  const bool extended = style == ReplyStyle::kExtended;
  store_be(to, extended ? kExtendedReplyMagic : kStructuredReplyMagic);
  store_be(to + 4, flags);
  store_be(to + 6, std::to_underlying(type));
  store_be(to + 8, request.cookie);
  if (extended) {
    store_be(to + 16, request.offset);
    store_be(to + 24, std::uint64_t{length});
  } else {
    store_be(to + 16, length);
  }
}

/// The payload of OFFSET_HOLE. The one of OFFSET_DATA is its first field, and the data.
inline constexpr std::size_t kOffsetHoleSize = 12;
inline void encode_offset_hole(std::span<std::byte, kOffsetHoleSize> to, std::uint64_t offset,
                               std::uint32_t length) noexcept {
  store_be(to.data(), offset);
  store_be(to.data() + 8, length);
}

/// The payload of BLOCK_STATUS or, for extended replies, BLOCK_STATUS_EXT, with its `count`
/// descriptors of one context: status_size() bytes at `to`, of which put() writes the next
/// descriptor.
class StatusEncoder {
 public:
  static constexpr std::size_t status_size(ReplyStyle style, std::size_t count) noexcept {
    return style == ReplyStyle::kExtended ? 8 + 16 * count : 4 + 8 * count;
  }
  static constexpr ChunkType type(ReplyStyle style) noexcept {
    return style == ReplyStyle::kExtended ? ChunkType::kBlockStatusExt : ChunkType::kBlockStatus;
  }

  StatusEncoder(std::byte* to, ReplyStyle style, std::uint32_t context_id,
                std::uint32_t count) noexcept
      : at_(to), extended_(style == ReplyStyle::kExtended) {
    store_be(at_, context_id);
    at_ += 4;
    if (!extended_) return;
    store_be(at_, count);
    at_ += 4;
  }

  /// REQUIRES: 0 < length, which fits 32 bits unless replies are extended.
  void put(std::uint64_t length, std::uint32_t state) noexcept {
    if (extended_) {
      store_be(at_, length);
      store_be(at_ + 8, std::uint64_t{state});
      at_ += 16;
    } else {
      store_be(at_, static_cast<std::uint32_t>(length));
      store_be(at_ + 4, state);
      at_ += 8;
    }
  }

 private:
  std::byte* at_;
  bool extended_;
};

/// The payload of ERROR or, where `offset` says where it went wrong, of ERROR_OFFSET: error_size()
/// bytes at `to`. `error` is a value of the protocol, not 0.
/// REQUIRES: the message has no more than kMaxString bytes.
inline std::size_t error_size(std::string_view message, bool has_offset) noexcept {
  return 6 + message.size() + (has_offset ? 8 : 0);
}
inline void encode_error(std::byte* to, std::uint32_t error, std::string_view message,
                         std::optional<std::uint64_t> offset = std::nullopt) noexcept {
  store_be(to, error);
  store_be(to + 4, static_cast<std::uint16_t>(message.size()));
  if (!message.empty()) std::memcpy(to + 6, message.data(), message.size());
  if (offset) store_be(to + 6 + message.size(), *offset);
}

/// `message` as far as a reply may carry it, not cut within a UTF-8 character.
std::string_view fit_message(std::string_view message) noexcept;

/// What the client was told about the export it talks to.
struct ExportLimits {
  std::uint64_t size = 0;
  /// The largest size the client has known: what lies beyond `size`, but not beyond this, was cut
  /// off by a RESIZE.
  std::uint64_t former_size = 0;
  std::uint16_t transmission_flags = kTransmissionHasFlags;
  /// Requests that are not multiples of this are refused. Leave it at 1 where the export can
  /// serve any request, whatever was advertised.
  std::uint32_t min_block = 1;
  std::uint32_t max_payload = kMaxPayload;
  ReplyStyle reply_style = ReplyStyle::kSimple;
  bool base_allocation = false;  // the context may be asked for
};

/// Says whether a request may be run: 0, or the errno value to answer with. In this order:
///
///   EINVAL  an unknown command, or one whose transmission flag was not advertised (FLUSH, TRIM,
///           WRITE_ZEROES, CACHE, RESIZE), or BLOCK_STATUS without the context; on a read-only
///           export TRIM, WRITE_ZEROES and RESIZE are EPERM instead
///   EINVAL  a command flag that is unknown, was not advertised, or does not belong to the command:
///           FUA (if advertised) goes with every command, for clients are known to send it with
///           any; NO_HOLE and FAST_ZERO (if advertised) with WRITE_ZEROES; DF (if advertised) READ;
///           REQ_ONE BLOCK_STATUS; PAYLOAD_LEN, behind extended headers only, WRITE and (if
///           advertised) BLOCK_STATUS
///   EINVAL  WRITE behind an extended header without PAYLOAD_LEN
///   EPERM   WRITE, TRIM, WRITE_ZEROES or RESIZE on a read-only export
///   EINVAL  FLUSH with an offset or length
///   EINVAL  BLOCK_STATUS with a payload that is no StatusQuery; whether its range is right can
///           only be told when that has arrived (parse_status_query)
///   ENOSPC  RESIZE to more than 2^63 - 1 bytes; EINVAL to no multiple of min_block
///   EINVAL  READ or WRITE of more than max_payload (others may be longer); EOVERFLOW for a READ
///           that is answered in chunks
///   EINVAL  not a multiple of min_block; BLOCK_STATUS of no bytes
///   EINVAL  READ, TRIM, CACHE or BLOCK_STATUS beyond the end of the export
///   ENOSPC  WRITE or WRITE_ZEROES beyond the end; any of them where a RESIZE moved the end
///
/// A length of 0 is otherwise no error within the export; there is nothing to do then but to reply.
/// DISC is never an error: there is no reply that could say so.
///
/// `*why`, if asked for, says in words what an error other than 0 means; it lives for ever.
int validate(const Request& request, const ExportLimits& limits,
             std::string_view* why = nullptr) noexcept;

/// Cuts a byte stream into requests and their payloads; see the top of this file.
///
/// Two things end it for good: a wrong magic, and too long a payload, for reading that much only to
/// refuse it would be a gift to an attacker. That is more than kMaxPayload bytes behind a compact
/// header, and more than the export's maximum, as the protocol has it, behind an extended one.
class RequestParser {
 public:
  enum class Event : std::uint8_t { kNeedInput, kRequest, kFailed };

  RequestParser() noexcept = default;
  explicit RequestParser(ReplyStyle style, std::uint32_t max_payload = kMaxPayload) noexcept
      : wanted_(style == ReplyStyle::kExtended ? kExtendedRequestSize : kRequestSize),
        max_payload_(style == ReplyStyle::kExtended ? max_payload : kMaxPayload) {}

  /// Takes the next request header off the front of `input`. Everything of `input` was taken on
  /// kNeedInput; a header that is cut by the end of `input` continues with the next one.
  /// REQUIRES: the payload of the request before was taken, received or given to skip_payload().
  Event next(std::span<const std::byte>& input, Request& request) {
    ROOST_CHECK(payload_left_ == 0 || skipping_, "{} bytes of payload are still to be taken",
                payload_left_);
    if (failed_) [[unlikely]] {
      return Event::kFailed;
    }
    if (payload_left_ > 0) {
      take_payload(input);
      if (payload_left_ > 0) return Event::kNeedInput;
    }
    skipping_ = false;
    if (header_size_ == 0 && input.size() >= wanted_) [[likely]] {
      const std::byte* const header = input.data();
      input = input.subspan(wanted_);
      return parse(header, request);
    }
    const std::size_t count = std::min(wanted_ - header_size_, input.size());
    if (count > 0) std::memcpy(header_ + header_size_, input.data(), count);
    header_size_ += count;
    input = input.subspan(count);
    if (header_size_ < wanted_) return Event::kNeedInput;
    header_size_ = 0;
    return parse(header_, request);
  }

  /// Takes what `input` holds of the current payload off its front; possibly nothing.
  std::span<const std::byte> take_payload(std::span<const std::byte>& input) noexcept {
    const auto part = input.first(std::min<std::size_t>(payload_left_, input.size()));
    payload_left_ -= static_cast<std::uint32_t>(part.size());
    input = input.subspan(part.size());
    return part;
  }

  /// Bytes of the current payload that are still to come.
  std::uint32_t payload_left() const noexcept { return payload_left_; }

  /// `count` more bytes of the payload were received without the parser seeing them.
  /// REQUIRES: count <= payload_left(), and no input that was received earlier is left.
  void payload_received(std::uint32_t count) {
    ROOST_CHECK(count <= payload_left_, "received {} bytes of a payload that lacks {}", count,
                payload_left_);
    payload_left_ -= count;
  }

  /// next() shall throw the rest of the current payload away.
  void skip_payload() noexcept { skipping_ = true; }

  /// The stream may end here: no request is half received.
  bool at_boundary() const noexcept { return header_size_ == 0 && payload_left_ == 0; }

  bool failed() const noexcept { return failed_; }

  /// Why the client has to go, in one line. REQUIRES: failed().
  std::string failure() const;

 private:
  bool extended() const noexcept { return wanted_ == kExtendedRequestSize; }

  // REQUIRES: wanted_ bytes at `header`.
  Event parse(const std::byte* header, Request& request) {
    const std::optional<Request> parsed =
        extended() ? parse_extended_request(
                         std::span<const std::byte, kExtendedRequestSize>(header, wanted_))
                   : parse_request(std::span<const std::byte, kRequestSize>(header, wanted_));
    if (!parsed || parsed->payload_size() > max_payload_) [[unlikely]] {
      failed_ = true;
      std::memmove(header_, header, wanted_);  // for failure()
      return Event::kFailed;
    }
    request = *parsed;
    payload_left_ = static_cast<std::uint32_t>(parsed->payload_size());
    return Event::kRequest;
  }

  std::size_t wanted_ = kRequestSize;  // how long a header is
  std::uint32_t max_payload_ = kMaxPayload;
  std::byte header_[kExtendedRequestSize] = {};  // the first header_size_ bytes of a cut header
  std::size_t header_size_ = 0;
  std::uint32_t payload_left_ = 0;
  bool skipping_ = false;
  bool failed_ = false;
};

}  // namespace roost::nbd
