// SPDX-License-Identifier: MIT
// Words for the numbers of the protocol and for a peer's strings, as log lines need them.
//
// Threads: pure functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "roost/nbd/protocol.h"

namespace roost::nbd {

/// A peer's string: quoted, printable, cut to a bounded length.
std::string printable(std::string_view text);

std::string option_words(Option option);           // "GO"; a number where it is unknown
std::string reply_type_words(std::uint32_t type);  // "ERR_UNKNOWN"
std::string command_words(Command command);        // "READ"
std::string chunk_type_words(ChunkType type);      // "OFFSET_DATA"

inline std::string_view text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace roost::nbd
