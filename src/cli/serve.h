// SPDX-License-Identifier: MIT
// `roost serve`: offers disks over NBD until it is told to stop.
//
// Threads: runs on the main thread, which polls the main context; clients are served by the I/O
// threads it starts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "roost/aio/aio_context.h"

namespace roost::cli {

struct ServeOptions {
  std::vector<std::string> disks;   // [NAME=]DISK
  std::vector<std::string> listen;  // unix:PATH, tcp:HOST:PORT
  unsigned iothreads = 2;
  EventLoop event_loop = EventLoop::kAuto;
  std::int64_t poll_max_us = 100;
  std::int64_t handshake_timeout_s = 10;
  bool read_only = false;
  std::string create_size;  // empty: do not create
  bool json = false;
  bool explain = false;  // say how to connect
};

/// Returns the exit status: 0 after a clean stop, 1 after an error, which it has reported.
int serve(const ServeOptions& options);

}  // namespace roost::cli
