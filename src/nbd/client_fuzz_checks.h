// SPDX-License-Identifier: MIT
// What must hold for any bytes a server could send to a client. fuzz/nbd_client.cc calls this with
// bytes it makes up, client_corpus_test.cc with the inputs under fuzz/corpus/nbd_client/.
//
// Threads: pure functions.
#pragma once

#include <cstddef>
#include <span>

namespace roost::nbd {

/// 1 byte: what the client wishes for, or, with bit 7 set, the headers that were negotiated; 4
/// bytes: how to cut the stream and take payloads; the server's stream.
///
/// A handshake says and ends the same wherever the stream is cut, sends options in their order and
/// once each, never goes on without a TLS that is required, and its outcome keeps to the protocol.
/// Messages, payloads and the verdict on each of a few requests agree with a plain reading.
void check_client(std::span<const std::byte> input);

}  // namespace roost::nbd
