// SPDX-License-Identifier: MIT
// libFuzzer target: the NBD handshake against any client.
#include <cstddef>
#include <cstdint>
#include <span>

#include "nbd/fuzz_checks.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  roost::nbd::check_negotiation(std::as_bytes(std::span(data, size)));
  return 0;
}
