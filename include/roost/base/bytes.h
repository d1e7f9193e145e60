// SPDX-License-Identifier: MIT
// Big-endian loads and stores, as network protocols want them.
//
// Threads: pure functions. The pointers need no alignment.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace roost {

/// Reads sizeof(T) bytes at `from`, the most significant first.
template <std::unsigned_integral T>
T load_be(const std::byte* from) noexcept {
  T value;
  std::memcpy(&value, from, sizeof value);
  if constexpr (std::endian::native == std::endian::little) value = std::byteswap(value);
  return value;
}

/// Writes sizeof(T) bytes at `to`, the most significant first.
template <std::unsigned_integral T>
void store_be(std::byte* to, T value) noexcept {
  if constexpr (std::endian::native == std::endian::little) value = std::byteswap(value);
  std::memcpy(to, &value, sizeof value);
}

}  // namespace roost
