// SPDX-License-Identifier: MIT
#include "export/extents.h"

#include <algorithm>

namespace roost {

std::vector<Extent> align_extents(std::span<const Extent> extents, std::uint64_t block) {
  std::vector<Extent> aligned;
  const auto add = [&](std::uint64_t length, bool hole, bool zero) {
    if (length == 0) return;
    if (!aligned.empty() && aligned.back().hole == hole && aligned.back().zero == zero) {
      aligned.back().length += length;
    } else {
      aligned.push_back({length, hole, zero});
    }
  };
  std::uint64_t filled = 0;  // of a block that the extents before this one have begun
  bool hole = true;
  bool zero = true;
  for (const Extent& extent : extents) {
    std::uint64_t left = extent.length;
    if (filled > 0) {
      const std::uint64_t part = std::min(left, block - filled);
      filled += part;
      left -= part;
      hole = hole && extent.hole;
      zero = zero && extent.zero;
      if (filled < block) continue;
      add(block, hole, zero);
    }
    filled = left % block;
    add(left - filled, extent.hole, extent.zero);
    hole = extent.hole;
    zero = extent.zero;
  }
  if (aligned.empty()) add(block, false, false);
  return aligned;
}

std::vector<ReadPiece> split_read(std::uint64_t offset, std::uint64_t length,
                                  std::span<const Extent> extents) {
  std::vector<ReadPiece> pieces;
  const auto add = [&](std::uint64_t size, bool zero) {
    if (size == 0) return;
    if (!pieces.empty() && pieces.back().zero == zero) {
      pieces.back().length += size;
    } else {
      pieces.push_back({offset, size, zero});
    }
    offset += size;
    length -= size;
  };
  for (std::size_t i = 0; i < extents.size() && length > 0;) {
    // Neighbours may both be zero and differ in whether they take space.
    std::uint64_t size = 0;
    const bool zero = extents[i].zero;
    for (; i < extents.size() && extents[i].zero == zero; ++i) size += extents[i].length;
    size = std::min(size, length);
    add(size, zero && size >= kLeastZeroes);
  }
  add(length, false);
  return pieces;
}

}  // namespace roost
