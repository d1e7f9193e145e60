// SPDX-License-Identifier: MIT
// What must hold for any bytes a client could send. The fuzzers under fuzz/ call these with bytes
// they make up, corpus_test.cc with the inputs that are checked in under fuzz/corpus/.
//
// An input is a little setup (which exports, how to cut the stream) and then the client's stream.
// A broken invariant aborts and says which.
//
// Threads: pure functions.
#pragma once

#include <cstddef>
#include <span>

namespace roost::nbd {

/// 1 byte: which exports, and what about TLS; 4 bytes: how to cut the stream and drain the output;
/// the stream. The replies, the end and what was consumed must agree with a plain reading of the
/// protocol, and must not depend on the cuts; the output stays bounded. A run ends where TLS
/// starts.
void check_negotiation(std::span<const std::byte> input);

/// 1 byte: which export, and how it replies; 4 bytes: how to cut the stream and take payloads; the
/// stream. Requests and payloads must be where a plain reading of the stream finds them, whatever
/// the cuts; the verdict on each request must be one the protocol has.
void check_transmission(std::span<const std::byte> input);

}  // namespace roost::nbd
