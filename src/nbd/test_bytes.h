// SPDX-License-Identifier: MIT
// Byte vectors for the codec's tests: written out by hand, glued together, compared readably.
//
// Threads: values and pure functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace roost::nbd {

/// unsigned char, so that GoogleTest prints the bytes of vectors that differ.
using ByteVector = std::vector<std::uint8_t>;

inline ByteVector text(std::string_view s) { return {s.begin(), s.end()}; }

template <class... More>
ByteVector join(ByteVector first, const More&... more) {
  (first.insert(first.end(), more.begin(), more.end()), ...);
  return first;
}

inline ByteVector zeroes(std::size_t count) { return ByteVector(count); }

inline std::span<const std::byte> view(const ByteVector& bytes) {
  return std::as_bytes(std::span(bytes));
}

inline ByteVector copy(std::span<const std::byte> bytes) {
  ByteVector result;
  for (std::byte b : bytes) result.push_back(std::to_integer<std::uint8_t>(b));
  return result;
}

inline ByteVector be32(std::uint32_t v) {
  return {static_cast<std::uint8_t>(v >> 24), static_cast<std::uint8_t>(v >> 16),
          static_cast<std::uint8_t>(v >> 8), static_cast<std::uint8_t>(v)};
}

inline ByteVector be64(std::uint64_t v) {
  return join(be32(static_cast<std::uint32_t>(v >> 32)), be32(static_cast<std::uint32_t>(v)));
}

}  // namespace roost::nbd
