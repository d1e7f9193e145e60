// SPDX-License-Identifier: MIT
// The server's side of the NBD transmission phase: requests out of a byte stream, what is wrong
// with a request, and the header of a simple reply.
//
// A receive loop over RequestParser, without copies or allocations:
//
//   std::span<const std::byte> input = what one receive brought;
//   Request request;
//   while (parser.next(input, request) == RequestParser::Event::kRequest) {
//     if (request.command == Command::kDisc) stop reading;
//     const int error = validate(request, limits);
//     if (request.payload_size() > 0) {      // a WRITE: its data follows
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
#include <utility>

#include "roost/base/bytes.h"
#include "roost/base/check.h"
#include "roost/nbd/protocol.h"

namespace roost::nbd {

struct Request {
  std::uint16_t flags = 0;  // kCommand...
  Command command{};
  std::uint64_t cookie = 0;  // comes back in the reply, means nothing to the server
  std::uint64_t offset = 0;
  std::uint32_t length = 0;

  bool fua() const noexcept { return (flags & kCommandFua) != 0; }
  bool no_hole() const noexcept { return (flags & kCommandNoHole) != 0; }

  /// How many bytes of data follow the request. Unknown commands carry none.
  std::uint32_t payload_size() const noexcept { return command == Command::kWrite ? length : 0; }

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

/// `error` is a value of the protocol (to_nbd_error), 0 for success. The data of a successful
/// READ follows the header.
inline void encode_simple_reply(std::span<std::byte, kSimpleReplySize> to, std::uint32_t error,
                                std::uint64_t cookie) noexcept {
  store_be(to.data(), kSimpleReplyMagic);
  store_be(to.data() + 4, error);
  store_be(to.data() + 8, cookie);
}

/// What the client was told about the export it talks to.
struct ExportLimits {
  std::uint64_t size = 0;
  std::uint16_t transmission_flags = kTransmissionHasFlags;
  /// Requests that are not multiples of this are refused. Leave it at 1 where the export can
  /// serve any request, whatever was advertised.
  std::uint32_t min_block = 1;
  std::uint32_t max_payload = kMaxPayload;
};

/// Says whether a request may be run: 0, or the errno value to answer with. In this order:
///
///   EINVAL  an unknown command, or one whose transmission flag was not advertised (FLUSH, TRIM,
///           WRITE_ZEROES, CACHE); on a read-only export TRIM and WRITE_ZEROES are EPERM instead
///   EINVAL  a command flag that is unknown, was not advertised, or does not belong to the command:
///           FUA (if advertised) goes with every command, for clients are known to send it with
///           any; NO_HOLE and FAST_ZERO (if advertised) with WRITE_ZEROES; DF (if advertised) READ
///   EPERM   WRITE, TRIM or WRITE_ZEROES on a read-only export
///   EINVAL  FLUSH with an offset or length
///   EINVAL  READ or WRITE of more than max_payload (TRIM, WRITE_ZEROES and CACHE may be longer)
///   EINVAL  not a multiple of min_block
///   EINVAL  READ, TRIM or CACHE beyond the end of the export
///   ENOSPC  WRITE or WRITE_ZEROES beyond the end
///
/// A length of 0 is no error within the export; there is nothing to do then but to reply.
/// DISC is never an error: there is no reply that could say so.
int validate(const Request& request, const ExportLimits& limits) noexcept;

/// Cuts a byte stream into requests and their payloads; see the top of this file.
///
/// Two things end it for good: a wrong magic, and a WRITE of more than kMaxPayload bytes, for
/// reading that much only to refuse it would be a gift to an attacker.
class RequestParser {
 public:
  enum class Event : std::uint8_t { kNeedInput, kRequest, kFailed };

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
    if (header_size_ == 0 && input.size() >= kRequestSize) [[likely]] {
      const auto header = input.first<kRequestSize>();
      input = input.subspan(kRequestSize);
      return parse(header, request);
    }
    const std::size_t count = std::min(kRequestSize - header_size_, input.size());
    if (count > 0) std::memcpy(header_ + header_size_, input.data(), count);
    header_size_ += count;
    input = input.subspan(count);
    if (header_size_ < kRequestSize) return Event::kNeedInput;
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
  Event parse(std::span<const std::byte, kRequestSize> header, Request& request) {
    const std::optional<Request> parsed = parse_request(header);
    if (!parsed || parsed->payload_size() > kMaxPayload) [[unlikely]] {
      failed_ = true;
      std::memmove(header_, header.data(), kRequestSize);  // for failure()
      return Event::kFailed;
    }
    request = *parsed;
    payload_left_ = parsed->payload_size();
    return Event::kRequest;
  }

  std::byte header_[kRequestSize] = {};  // the first header_size_ bytes of a cut header
  std::size_t header_size_ = 0;
  std::uint32_t payload_left_ = 0;
  bool skipping_ = false;
  bool failed_ = false;
};

}  // namespace roost::nbd
