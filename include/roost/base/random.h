// SPDX-License-Identifier: MIT
// Random numbers, passed in, so that whoever chose the seed can have them again.
//
// Threads: one at a time.
#pragma once

#include <cstdint>

namespace roost {

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014): the
/// same numbers on every machine and with every compiler. Not for secrets.
class Random {
 public:
  explicit Random(std::uint64_t seed) noexcept : state_(seed) {}

  /// Spreads a word over all its bits; one to one.
  static constexpr std::uint64_t mix(std::uint64_t word) noexcept {
    word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9;
    word = (word ^ (word >> 27)) * 0x94d049bb133111eb;
    return word ^ (word >> 31);
  }

  /// The next 64 bits.
  std::uint64_t next() noexcept { return mix(state_ += 0x9e3779b97f4a7c15); }

  /// From 0 up to, but not including, `end`, which is at least 1 and at most 2^32.
  std::uint64_t below(std::uint64_t end) noexcept { return ((next() >> 32) * end) >> 32; }

  /// From `least` to `most`, both included; at most 2^32 - 1 apart.
  std::int64_t between(std::int64_t least, std::int64_t most) noexcept {
    return least + static_cast<std::int64_t>(below(static_cast<std::uint64_t>(most - least) + 1));
  }

  /// True once in `n` times on average; never for 0.
  bool one_in(std::uint64_t n) noexcept { return n > 0 && below(n) == 0; }

 private:
  std::uint64_t state_;
};

}  // namespace roost
