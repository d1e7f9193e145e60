// SPDX-License-Identifier: MIT
#include "roost/nbd/transmission.h"

#include <fmt/format.h>

#include <cerrno>
#include <limits>

namespace roost::nbd {
namespace {

constexpr bool writes(Command command) {
  return command == Command::kWrite || command == Command::kTrim ||
         command == Command::kWriteZeroes || command == Command::kResize;
}

}  // namespace

std::string_view fit_message(std::string_view message) noexcept {
  if (message.size() <= kMaxString) return message;
  std::size_t size = kMaxString;
  // Bytes 10xxxxxx continue a character.
  while (size > 0 && (static_cast<unsigned char>(message[size]) & 0xc0) == 0x80) --size;
  return message.substr(0, size);
}

int validate(const Request& request, const ExportLimits& limits, std::string_view* why) noexcept {
  const bool read_only = (limits.transmission_flags & kTransmissionReadOnly) != 0;
  const auto offers = [&](std::uint16_t flag) { return (limits.transmission_flags & flag) != 0; };
  const auto refuse = [&](int error, std::string_view reason) {
    if (why) *why = reason;
    return error;
  };

  std::uint16_t allowed_flags = offers(kTransmissionSendFua) ? kCommandFua : 0;
  bool offered = true;
  bool carries_data = false;
  int beyond_end = EINVAL;
  switch (request.command) {
    case Command::kRead:
      carries_data = true;
      if (offers(kTransmissionSendDf)) allowed_flags |= kCommandDf;
      break;
    case Command::kWrite:
      carries_data = true;
      beyond_end = ENOSPC;
      if (request.extended) allowed_flags |= kCommandPayloadLen;
      break;
    case Command::kDisc:
      return 0;
    case Command::kFlush:
      offered = offers(kTransmissionSendFlush);
      break;
    case Command::kTrim:
      offered = offers(kTransmissionSendTrim);
      break;
    case Command::kCache:
      offered = offers(kTransmissionSendCache);
      break;
    case Command::kWriteZeroes:
      offered = offers(kTransmissionSendWriteZeroes);
      beyond_end = ENOSPC;
      allowed_flags |= kCommandNoHole;
      if (offers(kTransmissionSendFastZero)) allowed_flags |= kCommandFastZero;
      break;
    case Command::kBlockStatus:
      offered = limits.base_allocation;
      allowed_flags |= kCommandReqOne;
      if (request.extended && offers(kTransmissionBlockStatusPayload)) {
        allowed_flags |= kCommandPayloadLen;
      }
      break;
    case Command::kResize:
      offered = offers(kTransmissionSendResize);
      break;
    default:
      return refuse(EINVAL, "unknown command");
  }
  const bool forbidden = read_only && writes(request.command);
  if (!offered && !forbidden) return refuse(EINVAL, "the command was not negotiated");
  if (request.flags & ~allowed_flags) {
    return refuse(EINVAL, "a command flag that is unknown, unfitting or was not negotiated");
  }
  if (request.command == Command::kWrite && request.extended && !request.payload_len()) {
    return refuse(EINVAL, "a write without payload");
  }
  if (forbidden) return refuse(EPERM, "the export is read-only");
  const auto misaligned = [&](std::uint64_t value) {
    return limits.min_block > 1 && value % limits.min_block != 0;
  };
  switch (request.command) {
    case Command::kFlush:
      if (request.offset == 0 && request.length == 0) return 0;
      return refuse(EINVAL, "a flush has no offset and no length");
    case Command::kResize:
      if (request.offset > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
        return refuse(ENOSPC, "the new size is beyond any disk's");
      }
      if (misaligned(request.offset)) {
        return refuse(EINVAL, "the new size is no multiple of the minimum block size");
      }
      return 0;
    case Command::kBlockStatus:
      if (request.payload_len()) {
        if (request.length == kStatusQuerySize) return 0;
        return refuse(EINVAL, "the payload does not name the one context, once");
      }
      if (request.length == 0) return refuse(EINVAL, "there is no status of no bytes");
      break;
    default:
      break;
  }
  if (carries_data && request.length > limits.max_payload) {
    const bool in_chunks =
        request.command == Command::kRead && limits.reply_style != ReplyStyle::kSimple;
    return refuse(in_chunks ? EOVERFLOW : EINVAL, "longer than the maximum payload");
  }
  if (misaligned(request.offset) || misaligned(request.length)) {
    return refuse(EINVAL, "no multiple of the minimum block size");
  }
  // Not offset + length: that can wrap around.
  const auto beyond = [&](std::uint64_t size) {
    return request.length > size || request.offset > size - request.length;
  };
  if (beyond(limits.size)) {
    const bool was_cut_off = limits.former_size > limits.size && !beyond(limits.former_size);
    return refuse(was_cut_off ? ENOSPC : beyond_end, "beyond the end of the export");
  }
  return 0;
}

std::string RequestParser::failure() const {
  ROOST_CHECK(failed_, "the request stream has not failed");
  const auto magic = load_be<std::uint32_t>(header_);
  if (magic != (extended() ? kExtendedRequestMagic : kRequestMagic)) {
    return fmt::format("wrong magic {:#010x} before a request", magic);
  }
  if (!extended()) {
    return fmt::format("a write of {} bytes, the most is {}", load_be<std::uint32_t>(header_ + 24),
                       max_payload_);
  }
  return fmt::format("a payload of {} bytes, the most is {}", load_be<std::uint64_t>(header_ + 24),
                     max_payload_);
}

}  // namespace roost::nbd
