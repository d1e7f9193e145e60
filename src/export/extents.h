// SPDX-License-Identifier: MIT
// What a disk says about its extents, in the terms of the protocol.
//
// Threads: pure functions.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "roost/block/block_driver.h"

namespace roost {

/// The same extents with their ends at multiples of `block`, neighbours that are alike merged. A
/// block of which the parts differ is only what all of them are. A part of a block at the end is
/// dropped, unless there is nothing else: then it is a block of data.
/// REQUIRES: `extents` is not empty and begins at a multiple of `block`.
std::vector<Extent> align_extents(std::span<const Extent> extents, std::uint64_t block);

/// A piece of a read: zeroes that need not be sent, or data.
struct ReadPiece {
  std::uint64_t offset;
  std::uint64_t length;
  bool zero;

  bool operator==(const ReadPiece&) const = default;
};

/// `length` bytes from `offset` on, in pieces. What `extents` do not cover is data, and so are
/// zeroes that are too few to be worth a chunk.
std::vector<ReadPiece> split_read(std::uint64_t offset, std::uint64_t length,
                                  std::span<const Extent> extents);

/// The least zeroes that split_read() makes a piece of their own.
inline constexpr std::uint64_t kLeastZeroes = 4096;

}  // namespace roost
