// SPDX-License-Identifier: MIT
// A pair of channels in memory: what is written to one is read from the other.
//
// Threads and lifetime: as every Channel; the two ends may be on different contexts, and go in any
// order: an end whose other one is gone reads what was written, then the end of the stream.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>

#include "roost/io/channel.h"

namespace roost {

/// `capacity`: bytes that may be written and not yet read, each way.
std::pair<std::unique_ptr<Channel>, std::unique_ptr<Channel>> make_memory_channels(
    std::size_t capacity = 256 << 10);

}  // namespace roost
