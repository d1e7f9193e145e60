// SPDX-License-Identifier: MIT
#include "roost/nbd/transmission.h"

#include <fmt/format.h>

#include <cerrno>

namespace roost::nbd {
namespace {

constexpr bool writes(Command command) {
  return command == Command::kWrite || command == Command::kTrim ||
         command == Command::kWriteZeroes;
}

}  // namespace

int validate(const Request& request, const ExportLimits& limits) noexcept {
  const bool read_only = (limits.transmission_flags & kTransmissionReadOnly) != 0;
  const auto offers = [&](std::uint16_t flag) { return (limits.transmission_flags & flag) != 0; };

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
    default:
      return EINVAL;
  }
  const bool forbidden = read_only && writes(request.command);
  if (!offered && !forbidden) return EINVAL;
  if (request.flags & ~allowed_flags) return EINVAL;
  if (forbidden) return EPERM;
  if (request.command == Command::kFlush) {
    return request.offset == 0 && request.length == 0 ? 0 : EINVAL;
  }
  if (carries_data && request.length > limits.max_payload) return EINVAL;
  if (limits.min_block > 1 &&
      (request.offset % limits.min_block != 0 || request.length % limits.min_block != 0)) {
    return EINVAL;
  }
  // Not offset + length: that can wrap around.
  if (request.length > limits.size || request.offset > limits.size - request.length) {
    return beyond_end;
  }
  return 0;
}

std::string RequestParser::failure() const {
  ROOST_CHECK(failed_, "the request stream has not failed");
  const auto magic = load_be<std::uint32_t>(header_);
  if (magic != kRequestMagic) return fmt::format("wrong magic {:#010x} before a request", magic);
  return fmt::format("a write of {} bytes, the most is {}", load_be<std::uint32_t>(header_ + 24),
                     kMaxPayload);
}

}  // namespace roost::nbd
