// SPDX-License-Identifier: MIT
// A disk that an NBD server has: over one connection, or, where the server allows it, several, each
// on a context of its own. Connections that are lost are made again.
//
// Threads and errors: as every BlockDriver. open_nbd_disk() in a coroutine.
// Lifetime: the contexts outlive the disk, which is closed before it goes.
#pragma once

#include <cstdint>
#include <memory>
#include <stop_token>
#include <vector>

#include "roost/block/block_driver.h"
#include "roost/nbd/target.h"

namespace roost {

class AioContext;

struct NbdDiskOptions {
  /// Where connections live, one after the other. Requests take a connection of their own context,
  /// if there is one.
  std::vector<AioContext*> contexts;
  /// In all; 0: one for each context. A server that does not allow several gets one.
  unsigned connections = 0;
  bool read_only = false;
  /// How long a lost connection is tried to be made again; 0: not at all. What becomes of requests
  /// meanwhile, nbd/remote_export.h says.
  std::int64_t reconnect_timeout_ns = 60'000'000'000;
  /// Send writes again that were not acknowledged when a connection was lost; they fail otherwise.
  bool replay_writes = false;
};

/// Connects. EMEDIUMTYPE: the connections disagree about what the export is.
Task<Result<std::unique_ptr<BlockDriver>>> open_nbd_disk(nbd::NbdTarget target,
                                                         NbdDiskOptions options,
                                                         std::stop_token stop = {});

}  // namespace roost
