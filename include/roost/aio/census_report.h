// SPDX-License-Identifier: MIT
// The census across contexts: asks each living context for its coroutines, await chains included,
// and takes what atomics tell of those whose context does not answer in time, or goes meanwhile.
//
// Threads: any that may block. Asking costs a context one callback.
// Lifetime: the report is a copy.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "roost/coro/census.h"

namespace roost {

struct CoroutineReport {
  CoroutineInfo info;
  /// Name of the context it runs, last ran or is scheduled on; empty if that is gone.
  std::string context;
  /// How long it has been suspended, or since it was made if it has not run; to a millisecond or
  /// so. -1: unknown, since before its loop first looked at its clock.
  std::int64_t age_ns = 0;
  /// Whether its home answered; where not, its await chain is missing.
  bool answered = false;
};

/// Waits up to `timeout_ns` for the contexts. Blocks: aborts inside a coroutine.
std::vector<CoroutineReport> take_census(std::int64_t timeout_ns = 1'000'000'000);

/// A paragraph a coroutine:
///
///     coroutine 'request' (0x7f...) on iothread0: waiting for I/O, 12 ms
///       created at src/export/nbd_reader.cc:138 (...)
///       awaits at  src/block/file_disk.cc:55 (...)
///                  src/export/nbd_requests.cc:91 (...)
std::string to_text(const std::vector<CoroutineReport>& census);

}  // namespace roost
