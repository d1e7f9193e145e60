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
#include "roost/base/result.h"
#include "roost/io/listener.h"
#include "roost/nbd/negotiation.h"

namespace roost::cli {

struct ServeOptions {
  std::vector<std::string> disks;  // [NAME=]DISK
  std::vector<SocketAddress> listen;  // beside the sockets that a service manager has passed
  nbd::TlsPolicy tls = nbd::TlsPolicy::kUnsupported;
  std::string tls_directory;           // with certificates; empty: none
  std::string tls_psk;                 // file of pre-shared keys; empty: none
  bool tls_verify_peer = false;        // clients have to have a certificate
  std::vector<std::string> tls_allow;  // names of clients that may come in; empty: all
  unsigned iothreads = 2;
  EventLoop event_loop = EventLoop::kAuto;
  FileIo file_io = FileIo::kAuto;
  bool direct = false;  // files past the page cache
  std::int64_t poll_max_us = 100;
  std::int64_t handshake_timeout_s = 10;
  std::size_t max_connections = 0;  // 0: any number
  bool read_only = false;
  bool allow_resize = false;      // by clients
  std::uint64_t create_size = 0;  // 0: do not create
  std::string trace;              // where to write what was traced; empty: nothing is
  std::int64_t stall_ms = 0;      // 0: nobody looks
  bool json = false;
  bool explain = false;  // say how to connect
};

/// Whether `disks` make sense, before any is opened: what they are, and under which names.
Result<void> check_disks(const std::vector<std::string>& disks);

/// REQUIRES: check_disks() is content. Returns the exit status: 0 after a clean stop, 1 after an
/// error, which it has reported.
int serve(const ServeOptions& options);

}  // namespace roost::cli
