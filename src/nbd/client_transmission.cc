// SPDX-License-Identifier: MIT
#include "roost/nbd/client_transmission.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "nbd/words.h"
#include "roost/base/bytes.h"

namespace roost::nbd {
namespace {

constexpr std::uint32_t kMaxData = kMaxPayload;

std::size_t descriptor_size(ChunkType type) { return type == ChunkType::kBlockStatusExt ? 16 : 8; }

bool is_error(ChunkType type) { return (std::to_underlying(type) & kChunkErrorBit) != 0; }

}  // namespace

int from_nbd_error(std::uint32_t error) noexcept {
  switch (error) {
    case 0:
      return 0;
    case kErrorPerm:
      return EPERM;
    case kErrorIo:
      return EIO;
    case kErrorNoMem:
      return ENOMEM;
    case kErrorNoSpc:
      return ENOSPC;
    case kErrorOverflow:
      return EOVERFLOW;
    case kErrorNotSup:
      return ENOTSUP;
    case kErrorShutdown:
      return ESHUTDOWN;
    default:
      return EINVAL;
  }
}

std::string to_string(const ClientRequest& request) {
  switch (request.command) {
    case Command::kFlush:
    case Command::kDisc:
      return command_words(request.command);
    case Command::kResize:
      return fmt::format("RESIZE to {}", request.offset);
    default:
      return fmt::format("{} {}+{}", command_words(request.command), request.offset,
                         request.length);
  }
}

std::size_t encode_request(std::span<std::byte, kMaxRequestHeader> to, ReplyStyle style,
                           const ClientRequest& request) {
  ROOST_CHECK(request.length <= longest_request(style), "{} is too long", to_string(request));
  const bool extended = style == ReplyStyle::kExtended;
  std::uint16_t flags = request.flags;
  if (extended && request.command == Command::kWrite) flags |= kCommandPayloadLen;
  std::byte* const at = to.data();
  store_be(at, extended ? kExtendedRequestMagic : kRequestMagic);
  store_be(at + 4, flags);
  store_be(at + 6, std::to_underlying(request.command));
  store_be(at + 8, request.cookie);
  store_be(at + 16, request.offset);
  if (extended) {
    store_be(at + 24, request.length);
    return kExtendedRequestSize;
  }
  store_be(at + 24, static_cast<std::uint32_t>(request.length));
  return kRequestSize;
}

// ---- ReplyParser ----

ReplyParser::Event ReplyParser::next(std::span<const std::byte>& input, ReplyMessage& message) {
  ROOST_CHECK(payload_left_ == 0 || skipping_, "{} bytes of payload are still to be taken",
              payload_left_);
  if (failed()) [[unlikely]] {
    return Event::kFailed;
  }
  if (payload_left_ > 0) {
    take_payload(input);
    if (payload_left_ > 0) return Event::kNeedInput;
  }
  skipping_ = false;
  // Looked at in place where the input has all of it.
  if (buffer_.empty()) {
    std::size_t size = 0;
    for (;;) {
      const std::size_t more = needed(input.first(size));
      if (more == 0) return Event::kFailed;
      if (more == size) {
        parse(input.first(size), message);
        input = input.subspan(size);
        return Event::kMessage;
      }
      if (more > input.size()) break;
      size = more;
    }
  }
  for (;;) {
    const std::size_t more = needed(buffer_);
    if (more == 0) return Event::kFailed;
    if (more == buffer_.size()) break;
    const auto part = input.first(std::min(more - buffer_.size(), input.size()));
    buffer_.insert(buffer_.end(), part.begin(), part.end());
    input = input.subspan(part.size());
    if (buffer_.size() < more) return Event::kNeedInput;
  }
  parse(buffer_, message);
  buffer_.clear();
  return Event::kMessage;
}

const std::string& ReplyParser::failure() const {
  ROOST_CHECK(failed(), "the reply stream has not failed");
  return failure_;
}

std::size_t ReplyParser::lie(std::string what) {
  failure_ = "the server " + std::move(what);
  return 0;
}

std::size_t ReplyParser::needed(std::span<const std::byte> have) {
  // A magic is judged as soon as it is there: a stream of something else may be short.
  if (have.size() < 4) return 4;
  const auto magic = load_be<std::uint32_t>(have.data());
  switch (magic) {
    case kSimpleReplyMagic:
      if (style_ == ReplyStyle::kExtended) {
        return lie("sent a simple reply, where extended headers were negotiated");
      }
      return kSimpleReplySize;
    case kStructuredReplyMagic:
      if (style_ == ReplyStyle::kStructured) {
        return have.size() < kStructuredReplySize
                   ? kStructuredReplySize
                   : needed_behind_header(have, kStructuredReplySize);
      }
      return lie(fmt::format("sent a structured reply, where {} were negotiated",
                             style_ == ReplyStyle::kSimple ? "simple ones" : "extended headers"));
    case kExtendedReplyMagic:
      if (style_ == ReplyStyle::kExtended) {
        return have.size() < kExtendedReplySize ? kExtendedReplySize
                                                : needed_behind_header(have, kExtendedReplySize);
      }
      return lie("sent an extended reply, which was not negotiated");
    default:
      return lie(fmt::format("sent the wrong magic {:#010x} before a reply", magic));
  }
}

std::size_t ReplyParser::needed_behind_header(std::span<const std::byte> have,
                                              std::size_t header_size) {
  const std::byte* const header = have.data();
  const bool done = (load_be<std::uint16_t>(header + 4) & kReplyDone) != 0;
  const ChunkType type{load_be<std::uint16_t>(header + 6)};
  const std::uint64_t length = style_ == ReplyStyle::kExtended
                                   ? load_be<std::uint64_t>(header + 24)
                                   : load_be<std::uint32_t>(header + 16);
  const auto wrong_length = [&] {
    return lie(fmt::format("sent {} bytes in a chunk of type {}", length, chunk_type_words(type)));
  };
  const std::span<const std::byte> body = have.subspan(header_size);
  switch (type) {
    case ChunkType::kNone:
      if (length != 0) return wrong_length();
      if (!done) return lie("sent a chunk of type NONE that is not the last one");
      return header_size;
    case ChunkType::kOffsetData:
      if (length < 9 || length > 8 + kMaxData) return wrong_length();
      return header_size + 8;
    case ChunkType::kOffsetHole:
      if (length != 12) return wrong_length();
      if (body.size() == 12 && load_be<std::uint32_t>(body.data() + 8) == 0) {
        return lie("sent a hole of 0 bytes");
      }
      return header_size + 12;
    case ChunkType::kBlockStatus:
      if (style_ == ReplyStyle::kExtended) {
        return lie("sent BLOCK_STATUS, where extended headers ask for BLOCK_STATUS_EXT");
      }
      if (length < 12 || length % 8 != 4 || length > 4 + 8 * std::uint64_t{kMaxDescriptors}) {
        return wrong_length();
      }
      return header_size + 4;
    case ChunkType::kBlockStatusExt:
      if (style_ != ReplyStyle::kExtended) {
        return lie("sent BLOCK_STATUS_EXT without extended headers");
      }
      if (length < 24 || length % 16 != 8 || length > 8 + 16 * std::uint64_t{kMaxDescriptors}) {
        return wrong_length();
      }
      if (body.size() == 8) {
        const auto count = load_be<std::uint32_t>(body.data() + 4);
        if (count != (length - 8) / 16) {
          return lie(fmt::format("announced {} descriptors in {} bytes of BLOCK_STATUS_EXT", count,
                                 length));
        }
      }
      return header_size + 8;
    default:
      break;
  }
  if (!is_error(type)) {
    return lie(fmt::format("sent a chunk of the unknown {}", chunk_type_words(type)));
  }
  const std::size_t tail = type == ChunkType::kErrorOffset ? 8 : 0;
  if (length < 6 + tail || length > kMaxErrorSize) return wrong_length();
  if (body.size() < length) return header_size + length;
  const auto message_size = load_be<std::uint16_t>(body.data() + 4);
  if (message_size > length - 6 - tail || message_size > kMaxString) {
    return lie(fmt::format("announced a message of {} bytes in {} bytes of {}", message_size,
                           length, chunk_type_words(type)));
  }
  if (load_be<std::uint32_t>(body.data()) == 0) {
    return lie(fmt::format("sent {} with the error 0", chunk_type_words(type)));
  }
  return header_size + length;
}

void ReplyParser::parse(std::span<const std::byte> bytes, ReplyMessage& message) {
  const std::byte* const at = bytes.data();
  message.request_offset.reset();
  message.error = 0;
  message.message.clear();
  message.offset = 0;
  message.hole_size = 0;
  message.context_id = 0;
  message.payload_size = 0;
  message.cookie = load_be<std::uint64_t>(at + 8);
  if (load_be<std::uint32_t>(at) == kSimpleReplyMagic) {
    message.kind = ReplyMessage::Kind::kSimple;
    message.flags = kReplyDone;
    message.type = ChunkType::kNone;
    message.error = load_be<std::uint32_t>(at + 4);
    return;
  }
  message.kind = ReplyMessage::Kind::kChunk;
  message.flags = load_be<std::uint16_t>(at + 4);
  message.type = ChunkType{load_be<std::uint16_t>(at + 6)};
  std::size_t header_size = kStructuredReplySize;
  std::uint32_t length = 0;
  if (style_ == ReplyStyle::kExtended) {
    header_size = kExtendedReplySize;
    message.request_offset = load_be<std::uint64_t>(at + 16);
    length = static_cast<std::uint32_t>(load_be<std::uint64_t>(at + 24));  // needed() looked
  } else {
    length = load_be<std::uint32_t>(at + 16);
  }
  const std::byte* const body = at + header_size;
  switch (message.type) {
    case ChunkType::kNone:
      break;
    case ChunkType::kOffsetData:
      message.offset = load_be<std::uint64_t>(body);
      message.payload_size = length - 8;
      break;
    case ChunkType::kOffsetHole:
      message.offset = load_be<std::uint64_t>(body);
      message.hole_size = load_be<std::uint32_t>(body + 8);
      break;
    case ChunkType::kBlockStatus:
      message.context_id = load_be<std::uint32_t>(body);
      message.payload_size = length - 4;
      break;
    case ChunkType::kBlockStatusExt:
      message.context_id = load_be<std::uint32_t>(body);
      message.payload_size = length - 8;
      break;
    default: {
      const auto message_size = load_be<std::uint16_t>(body + 4);
      message.error = load_be<std::uint32_t>(body);
      message.message = text_of(bytes.subspan(header_size + 6, message_size));
      if (message.type == ChunkType::kErrorOffset) {
        message.offset = load_be<std::uint64_t>(body + 6 + message_size);
      }
      break;
    }
  }
  payload_left_ = message.payload_size;
}

// ---- Coverage ----

Coverage::Added Coverage::add(std::uint64_t at, std::uint64_t size) {
  const Piece piece{.begin = at, .end = at + size};
  if (more_.empty()) {
    if (total_ == 0) {
      first_ = piece;
    } else if (piece.begin < first_.end && first_.begin < piece.end) {
      return Added::kOverlaps;
    } else if (piece.begin == first_.end) {
      first_.end = piece.end;
    } else if (piece.end == first_.begin) {
      first_.begin = piece.begin;
    } else {
      more_ = {std::min(first_, piece, [](Piece a, Piece b) { return a.begin < b.begin; }),
               std::max(first_, piece, [](Piece a, Piece b) { return a.begin < b.begin; })};
    }
    total_ += size;
    return Added::kNew;
  }
  const auto next = std::ranges::upper_bound(more_, at, {}, &Piece::begin);
  const bool has_previous = next != more_.begin();
  if (next != more_.end() && next->begin < piece.end) return Added::kOverlaps;
  if (has_previous && std::prev(next)->end > piece.begin) return Added::kOverlaps;
  const bool joins_next = next != more_.end() && next->begin == piece.end;
  if (has_previous && std::prev(next)->end == piece.begin) {
    std::prev(next)->end = joins_next ? next->end : piece.end;
    if (joins_next) more_.erase(next);
  } else if (joins_next) {
    next->begin = piece.begin;
  } else {
    if (more_.size() == kMaxPieces) return Added::kTooScattered;
    more_.insert(next, piece);
  }
  total_ += size;
  return Added::kNew;
}

// ---- ReplyChecker ----

ReplyChecker::ReplyChecker(const ClientRequest& request, ReplyStyle style,
                           std::span<const MetaContext> contexts)
    : request_(request), style_(style), contexts_(contexts) {}

ReplyChecker::Verdict ReplyChecker::check(const ReplyMessage& message) {
  if (done_) return lie_fatally(message, "went on with a reply that was complete");
  const bool first = !std::exchange(started_, true);
  if (message.kind == ReplyMessage::Kind::kChunk) return check_chunk(message);

  done_ = true;
  if (!first) return lie_fatally(message, "sent a simple reply behind chunks of another one");
  if (style_ != ReplyStyle::kSimple && request_.command == Command::kRead) {
    return lie_fatally(message, "sent a simple reply, where a structured one was negotiated");
  }
  if (message.error != 0) {
    check_error(message);
    return {};
  }
  if (request_.command != Command::kRead) return {};
  coverage_.add(request_.offset, request_.length);
  return {.action = Action::kData,
          .size = request_.length,
          .payload_size = static_cast<std::uint32_t>(request_.length)};
}

ReplyChecker::Verdict ReplyChecker::check_chunk(const ReplyMessage& message) {
  done_ = message.done();
  if (message.request_offset && *message.request_offset != request_.offset) {
    return lie_fatally(message, fmt::format("replied with the offset {}", *message.request_offset));
  }
  if (message.is_error()) {
    check_error(message);
    return {};
  }
  switch (message.type) {
    case ChunkType::kNone:
      return {};
    case ChunkType::kOffsetData:
      return check_content(message, message.payload_size);
    case ChunkType::kOffsetHole:
      return check_content(message, message.hole_size);
    default:
      return check_status(message);
  }
}

bool ReplyChecker::within_request(std::uint64_t offset, std::uint64_t size) const {
  return offset >= request_.offset && offset - request_.offset <= request_.length &&
         size <= request_.length - (offset - request_.offset);
}

ReplyChecker::Verdict ReplyChecker::check_content(const ReplyMessage& message, std::uint64_t size) {
  const Verdict skip = {.action = message.payload_size > 0 ? Action::kSkip : Action::kNothing,
                        .payload_size = message.payload_size};
  const auto words = [&] {
    return fmt::format("{} {}+{}", chunk_type_words(message.type), message.offset, size);
  };
  if (request_.command != Command::kRead) {
    return lie_fatally(message, fmt::format("replied with {}", words()));
  }
  if (!within_request(message.offset, size)) {
    lie(fmt::format("sent {}, which is not within", words()));
    return skip;
  }
  for (std::uint64_t error_offset : error_offsets_) {
    if (error_offset >= message.offset && error_offset - message.offset < size) {
      lie(fmt::format("sent {} behind an error at {}", words(), error_offset));
      return skip;
    }
  }
  if (++content_chunks_ > 1 && (request_.flags & kCommandDf)) {
    lie(fmt::format("sent {} as a second part of what must not be cut", words()));
    return skip;
  }
  switch (coverage_.add(message.offset, size)) {
    case Coverage::Added::kNew:
      break;
    case Coverage::Added::kOverlaps:
      lie(fmt::format("sent {}, which it has sent a part of before", words()));
      return skip;
    case Coverage::Added::kTooScattered:
      lie(fmt::format("sent more than {} parts that do not touch", Coverage::kMaxPieces));
      return skip;
  }
  return {.action = message.payload_size > 0 ? Action::kData : Action::kZeroes,
          .at = message.offset - request_.offset,
          .size = size,
          .payload_size = message.payload_size};
}

void ReplyChecker::check_error(const ReplyMessage& message) {
  if (message.type == ChunkType::kErrorOffset) {
    // For RESIZE and FLUSH an offset means nothing.
    if (request_.command == Command::kFlush || request_.command == Command::kResize) {
      lie("sent ERROR_OFFSET, which does not fit the request");
    } else if (!within_request(message.offset, 1)) {
      lie(fmt::format("told of an error at {}, which is not within", message.offset));
    } else {
      if (!error_offset_) error_offset_ = message.offset;
      if (request_.command == Command::kRead && error_offsets_.size() < kMaxErrorOffsets) {
        error_offsets_.push_back(message.offset);
      }
    }
  }
  if (error_ == 0) {
    error_ = from_nbd_error(message.error);
    error_message_ = message.message;
  }
}

ReplyChecker::Verdict ReplyChecker::check_status(const ReplyMessage& message) {
  if (request_.command != Command::kBlockStatus) {
    return lie_fatally(message, fmt::format("replied with {}", chunk_type_words(message.type)));
  }
  const Verdict skip = {.action = Action::kSkip, .payload_size = message.payload_size};
  const auto context = std::ranges::find(contexts_, message.context_id, &MetaContext::id);
  if (context == contexts_.end()) {
    lie(fmt::format("sent the status of the unknown context {}", message.context_id));
    return skip;
  }
  if (std::ranges::find(status_, message.context_id, &ContextStatus::context_id) != status_.end()) {
    lie(fmt::format("sent the status of {} twice", printable(context->name)));
    return skip;
  }
  if ((request_.flags & kCommandReqOne) && message.payload_size != descriptor_size(message.type)) {
    lie(fmt::format("sent {} descriptors, where one was asked for",
                    message.payload_size / descriptor_size(message.type)));
    return skip;
  }
  status_.push_back({.context_id = message.context_id});
  status_left_ = message.payload_size;
  status_total_ = 0;
  descriptors_ = 0;
  cut_size_ = 0;
  base_context_ = context->name.starts_with("base:");
  return {.action = Action::kStatus, .payload_size = message.payload_size};
}

void ReplyChecker::take_status(std::span<const std::byte> part) {
  ROOST_CHECK(part.size() <= status_left_, "{} bytes of descriptors, where {} are missing",
              part.size(), status_left_);
  status_left_ -= static_cast<std::uint32_t>(part.size());
  const std::size_t size = style_ == ReplyStyle::kExtended ? 16 : 8;
  while (!part.empty()) {
    if (cut_size_ == 0 && part.size() >= size) {
      take_descriptor(part.data());
      part = part.subspan(size);
      continue;
    }
    const std::size_t count = std::min(size - cut_size_, part.size());
    std::memcpy(cut_ + cut_size_, part.data(), count);
    cut_size_ += count;
    part = part.subspan(count);
    if (cut_size_ < size) break;
    cut_size_ = 0;
    take_descriptor(cut_);
  }
}

void ReplyChecker::take_descriptor(const std::byte* at) {
  const bool extended = style_ == ReplyStyle::kExtended;
  const StatusExtent extent{
      .length = extended ? load_be<std::uint64_t>(at) : load_be<std::uint32_t>(at),
      .flags = extended ? load_be<std::uint64_t>(at + 8) : load_be<std::uint32_t>(at + 4)};
  if (extent.length == 0) return lie("sent a descriptor of 0 bytes");
  // All but the last have to end before the request does.
  if (status_total_ >= request_.length && descriptors_ > 0) {
    return lie(fmt::format("sent more descriptors behind {} bytes of status", status_total_));
  }
  if ((request_.flags & kCommandReqOne) && extent.length > request_.length) {
    return lie(fmt::format("sent a descriptor of {} bytes, longer than asked for", extent.length));
  }
  if (extent.length > ~std::uint64_t{0} - request_.offset - status_total_) {
    return lie(fmt::format("sent a descriptor of {} bytes, which nothing is", extent.length));
  }
  if (base_context_ && (extent.flags >> 32) != 0) {
    return lie(fmt::format("sent the flags {:#x}, where 32 bits are right", extent.flags));
  }
  ++descriptors_;
  status_total_ += extent.length;
  std::vector<StatusExtent>& extents = status_.back().extents;
  if (!extents.empty() && extents.back().flags == extent.flags) {
    extents.back().length += extent.length;
  } else {
    extents.push_back(extent);
  }
}

Result<void> ReplyChecker::finish() {
  ROOST_CHECK(done_ && status_left_ == 0, "the reply is not complete");
  if (fault_.empty() && error_ == 0) {
    if (request_.command == Command::kRead && coverage_.total() != request_.length) {
      lie(fmt::format("sent only {} bytes and claims success", coverage_.total()));
    } else if (request_.command == Command::kBlockStatus && status_.size() != contexts_.size()) {
      lie(fmt::format("sent the status of {} contexts, not of {}, and claims success",
                      status_.size(), contexts_.size()));
    }
  }
  if (!fault_.empty()) return fail(EPROTO, fmt::format("{}: {}", to_string(request_), fault_));
  if (error_ == 0) return {};
  std::string doing = to_string(request_);
  if (error_offset_) doing += fmt::format(", at {}", *error_offset_);
  if (!error_message_.empty()) doing += ": the server says " + printable(error_message_);
  return fail(error_, std::move(doing));
}

ReplyChecker::Verdict ReplyChecker::lie_fatally(const ReplyMessage& message, std::string what) {
  lie(std::move(what));
  return {.action = message.payload_size > 0 ? Action::kSkip : Action::kNothing,
          .fatal = true,
          .payload_size = message.payload_size};
}

void ReplyChecker::lie(std::string what) {
  if (fault_.empty()) fault_ = "the server " + std::move(what);
}

}  // namespace roost::nbd
