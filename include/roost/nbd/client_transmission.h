// SPDX-License-Identifier: MIT
// The client's side of the NBD transmission phase: requests into bytes, a byte stream into the
// messages of replies, and whether what came is an answer to what was asked.
//
//   ReplyMessage message;
//   while (parser.next(input, message) == ReplyParser::Event::kMessage) {
//     request = that of message.cookie;               // none: the server lies, close
//     const ReplyChecker::Verdict verdict = request.checker.check(message);
//     if (verdict.payload_size > 0) {
//       parser.expect_payload(verdict.payload_size);  // only a simple reply does not tell its own
//       kData:   parser.take_payload(input) to verdict.at of the buffer; receive the rest,
//                parser.payload_left() bytes, straight there; parser.payload_received(count)
//       kStatus: give what take_payload(input) brings to checker.take_status(), until none is left
//       kSkip:   parser.skip_payload(): next() throws it away as it comes
//     }
//     if (verdict.action is kZeroes) fill that part of the buffer
//     if (verdict.fatal) close, with checker.fault()
//     if (message.done()) checker.finish(): the request's result
//   }
//   // kNeedInput: input is used up, receive more. kFailed: log parser.failure(), close.
//
// The parser fails on what cannot be cut into messages, or what no request could be answered with:
// the connection is lost. The checker tells two kinds of lies apart. Fatal ones leave in doubt what
// the server is talking about (the wrong kind of reply, the wrong offset in an extended header, a
// chunk behind the last one). The others (parts that overlap, reach beyond the request or are
// missing; descriptors that do not add up) spoil the one request, with EPROTO; the connection can
// go on.
//
// Threads: none of their own; a parser and a checker belong to one thread at a time.
// Lifetime: the spans that a parser hands out are parts of the caller's input.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "roost/base/check.h"
#include "roost/base/result.h"
#include "roost/nbd/client_negotiation.h"
#include "roost/nbd/protocol.h"

namespace roost::nbd {

/// The errno value for the error field of a reply. What the protocol does not know counts as
/// EINVAL, as it asks.
int from_nbd_error(std::uint32_t error) noexcept;

/// A request as the client sees it, whatever headers were negotiated.
struct ClientRequest {
  Command command{};
  std::uint16_t flags = 0;  // without kCommandPayloadLen, which encode_request() adds
  std::uint64_t cookie = 0;
  std::uint64_t offset = 0;  // RESIZE: the new size
  std::uint64_t length = 0;

  bool operator==(const ClientRequest&) const = default;
};

/// "READ 4096+512", for log lines.
std::string to_string(const ClientRequest& request);

inline constexpr std::size_t kMaxRequestHeader = kExtendedRequestSize;

/// The most a request's length may be under the headers that were negotiated.
constexpr std::uint64_t longest_request(ReplyStyle style) {
  return style == ReplyStyle::kExtended ? ~std::uint64_t{0} : 0xffffffff;
}

/// Writes the header of a request and returns its size. The data of a WRITE follows it.
/// REQUIRES: request.length <= longest_request(style).
std::size_t encode_request(std::span<std::byte, kMaxRequestHeader> to, ReplyStyle style,
                           const ClientRequest& request);

/// One simple reply, or one chunk of a structured or extended one.
struct ReplyMessage {
  enum class Kind : std::uint8_t { kSimple, kChunk };

  Kind kind = Kind::kSimple;
  std::uint16_t flags = kReplyDone;  // kReply...
  ChunkType type = ChunkType::kNone;
  std::uint64_t cookie = 0;
  std::optional<std::uint64_t> request_offset{};  // of an extended reply's header

  std::uint32_t error = 0;       // of a simple reply or an error chunk, in the protocol's numbers
  std::string message{};         // of an error chunk
  std::uint64_t offset = 0;      // OFFSET_DATA, OFFSET_HOLE, ERROR_OFFSET
  std::uint32_t hole_size = 0;   // OFFSET_HOLE
  std::uint32_t context_id = 0;  // BLOCK_STATUS, BLOCK_STATUS_EXT

  /// Bytes that follow: the data of OFFSET_DATA, the descriptors of BLOCK_STATUS and ..._EXT.
  /// Behind a simple reply to a READ the data follows that was asked for; only the asker knows.
  std::uint32_t payload_size = 0;

  bool done() const noexcept { return (flags & kReplyDone) != 0; }
  bool is_error() const noexcept {
    return kind == Kind::kSimple ? error != 0
                                 : (static_cast<std::uint16_t>(type) & kChunkErrorBit) != 0;
  }
};

/// Cuts a byte stream into messages and their payloads; see the top of this file.
///
/// It fails for good on: a magic that was not negotiated; an unknown type of chunk (unless it is an
/// error); the wrong length for the type; NONE without DONE; an error of 0; an empty hole; a
/// message longer than the chunk or 4096 bytes; data of more than 32 MiB or 2^20 descriptors in one
/// chunk.
class ReplyParser {
 public:
  enum class Event : std::uint8_t { kNeedInput, kMessage, kFailed };

  static constexpr std::uint32_t kMaxDescriptors = 1u << 20;
  /// Error chunks may have fields of later versions behind those that are known.
  static constexpr std::uint32_t kMaxErrorSize = 2 * kMaxString;

  explicit ReplyParser(ReplyStyle style) : style_(style) {}

  /// Takes the next message, without its payload, off the front of `input`. Everything of `input`
  /// was taken on kNeedInput; a message that is cut by the end of `input` goes on with the next.
  /// REQUIRES: the payload of the message before was taken, received or given to skip_payload().
  Event next(std::span<const std::byte>& input, ReplyMessage& message);

  /// The simple reply that next() gave brings `count` bytes of data. For a chunk that knows its
  /// payload, `count` must be that.
  void expect_payload(std::uint32_t count) {
    ROOST_CHECK(payload_left_ == 0 || payload_left_ == count, "a payload of {} bytes, not {}",
                payload_left_, count);
    payload_left_ = count;
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

  /// The stream may end here: no message is half received.
  bool at_boundary() const noexcept { return buffer_.empty() && payload_left_ == 0 && !failed(); }

  bool failed() const noexcept { return !failure_.empty(); }

  /// What the server did, in one line: "the server ...". REQUIRES: failed().
  const std::string& failure() const;

 private:
  /// How many bytes, from its beginning, a message needs to be known further; 0 if it failed.
  std::size_t needed(std::span<const std::byte> have);
  std::size_t needed_behind_header(std::span<const std::byte> have, std::size_t header_size);
  void parse(std::span<const std::byte> bytes, ReplyMessage& message);
  std::size_t lie(std::string what);

  const ReplyStyle style_;
  std::vector<std::byte> buffer_;  // the beginning of a message that was cut
  std::uint32_t payload_left_ = 0;
  bool skipping_ = false;
  std::string failure_;
};

/// The parts of a range of bytes that were seen, each once. Bounded memory, whatever the order.
class Coverage {
 public:
  enum class Added : std::uint8_t { kNew, kOverlaps, kTooScattered };

  static constexpr std::size_t kMaxPieces = 4096;

  /// REQUIRES: size > 0, and at + size does not wrap around.
  Added add(std::uint64_t at, std::uint64_t size);

  std::uint64_t total() const noexcept { return total_; }

 private:
  struct Piece {
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
  };

  // Pieces that do not touch, in order: the first alone (empty if there is none), or all in more_.
  Piece first_;
  std::vector<Piece> more_;
  std::uint64_t total_ = 0;
};

/// A part of an export for which a metadata context says the same.
struct StatusExtent {
  std::uint64_t length = 0;
  std::uint64_t flags = 0;

  bool operator==(const StatusExtent&) const = default;
};

/// What one metadata context says from the offset of a BLOCK_STATUS on; extents in a row with the
/// same flags are one.
struct ContextStatus {
  std::uint32_t context_id = 0;
  std::vector<StatusExtent> extents{};

  bool operator==(const ContextStatus&) const = default;
};

/// Follows the reply to one request.
class ReplyChecker {
 public:
  enum class Action : std::uint8_t {
    kNothing,
    kData,    // the payload belongs `at` bytes into the buffer
    kZeroes,  // `size` bytes, `at` bytes into the buffer, are zero
    kStatus,  // the payload goes to take_status()
    kSkip,    // the payload goes nowhere
  };

  struct Verdict {
    Action action = Action::kNothing;
    bool fatal = false;  // the connection cannot go on, fault() says why
    std::uint64_t at = 0;
    std::uint64_t size = 0;
    std::uint32_t payload_size = 0;
  };

  /// `contexts` are those that were negotiated, and must outlive the checker.
  ReplyChecker(const ClientRequest& request, ReplyStyle style,
               std::span<const MetaContext> contexts = {});

  Verdict check(const ReplyMessage& message);

  /// Takes a part of the payload of the message that was checked last.
  void take_status(std::span<const std::byte> part);

  /// A message that was done() has come, with its payload.
  bool done() const noexcept { return done_; }

  /// The result, once the reply is complete: the server's error if it sent one, EPROTO if it lied,
  /// else success. REQUIRES: done().
  Result<void> finish();

  /// What the server did that is against the protocol: "the server ...". Empty if nothing.
  const std::string& fault() const noexcept { return fault_; }

  /// Where the server says the error is, if it says so.
  std::optional<std::uint64_t> error_offset() const noexcept { return error_offset_; }

  /// Of a BLOCK_STATUS that succeeded: each context once.
  std::vector<ContextStatus>& status() noexcept { return status_; }

  const ClientRequest& request() const noexcept { return request_; }

 private:
  static constexpr std::size_t kMaxErrorOffsets = 64;

  Verdict check_chunk(const ReplyMessage& message);
  Verdict check_content(const ReplyMessage& message, std::uint64_t size);
  Verdict check_status(const ReplyMessage& message);
  void check_error(const ReplyMessage& message);
  void take_descriptor(const std::byte* at);
  Verdict lie_fatally(const ReplyMessage& message, std::string what);
  void lie(std::string what);
  bool within_request(std::uint64_t offset, std::uint64_t size) const;

  ClientRequest request_;
  ReplyStyle style_;
  std::span<const MetaContext> contexts_;

  bool started_ = false;  // something of the reply was seen
  bool done_ = false;
  std::string fault_;

  int error_ = 0;  // an errno value
  std::string error_message_;
  std::optional<std::uint64_t> error_offset_;
  std::vector<std::uint64_t> error_offsets_;

  Coverage coverage_;
  std::size_t content_chunks_ = 0;

  // BLOCK_STATUS: the last of status_ is being filled while status_left_ > 0.
  std::vector<ContextStatus> status_;
  std::uint32_t status_left_ = 0;
  std::uint64_t status_total_ = 0;
  std::size_t descriptors_ = 0;
  bool base_context_ = false;
  std::byte cut_[16] = {};  // the first cut_size_ bytes of a descriptor
  std::size_t cut_size_ = 0;
};

}  // namespace roost::nbd
