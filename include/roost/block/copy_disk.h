// SPDX-License-Identifier: MIT
// Copying one disk to another, and comparing two, with many requests in flight on several contexts.
//
// Threads: in a coroutine, on any context. Lifetime: the disks, the contexts and the counter
// outlive the task.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stop_token>
#include <vector>

#include "roost/block/block_driver.h"

namespace roost {

class AioContext;

struct CopyOptions {
  /// Where requests are made.
  std::vector<AioContext*> contexts;
  /// Requests in flight on each context, each with a buffer of its own.
  unsigned depth = 16;
  /// The longest read or write, in bytes: a power of two, at least 4096.
  std::size_t request_size = 256 << 10;
  /// The destination reads as zeroes already: what is zero in the source is left alone.
  bool target_is_zero = false;
  /// Look for zeroes in data, in units of 4 KiB, and make holes of them.
  bool detect_zeroes = true;
  /// Makes it end early, with ECANCELED.
  std::stop_token stop = {};
  /// Counts bytes that are done with, if not null. Any thread may look.
  std::atomic<std::uint64_t>* progress = nullptr;
};

/// What was done, in bytes.
struct CopyReport {
  std::uint64_t written = 0;
  std::uint64_t zeroed = 0;   // made zero
  std::uint64_t skipped = 0;  // zero, and known to be so in the destination
};

/// Copies all of `from` to the beginning of `to`. Parts come in any order; does not flush.
/// REQUIRES: `to` is as large, and may be written.
Task<Result<CopyReport>> copy_disk(BlockDriver& from, BlockDriver& to, CopyOptions options);

/// Compares all of `one` with the beginning of `other`: the offset of a 4 KiB block that differs,
/// the lowest that was found before it ended; nothing if they are equal.
Task<Result<std::optional<std::uint64_t>>> compare_disks(BlockDriver& one, BlockDriver& other,
                                                         CopyOptions options);

}  // namespace roost
