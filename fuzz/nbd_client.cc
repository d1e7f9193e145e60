// SPDX-License-Identifier: MIT
// libFuzzer target: the NBD client against any server.
#include <cstddef>
#include <cstdint>
#include <span>

#include "nbd/client_fuzz_checks.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  roost::nbd::check_client(std::as_bytes(std::span(data, size)));
  return 0;
}
