// SPDX-License-Identifier: MIT
// How long requests took: a histogram with a bounded relative error, and its picture.
//
// Threads: values; one thread at a time.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>

namespace roost::cli {

/// Counts durations in buckets that are at most a sixty-fourth of their value wide, as Tene's HDR
/// histogram does.
class LatencyHistogram {
 public:
  void add(std::int64_t ns) noexcept {
    const auto value = static_cast<std::uint64_t>(ns > 0 ? ns : 0);
    ++counts_[index_of(value)];
    ++count_;
    sum_ += value;
    if (value > max_) max_ = value;
    if (value < min_) min_ = value;
  }
  void add(const LatencyHistogram& other) noexcept;

  std::uint64_t count() const noexcept { return count_; }
  // In nanoseconds; 0 if there is nothing.
  std::uint64_t min() const noexcept { return count_ ? min_ : 0; }
  std::uint64_t max() const noexcept { return max_; }
  double mean() const noexcept;
  /// The value that `percent` of all are not above, up to the width of its bucket.
  std::uint64_t percentile(double percent) const noexcept;

  /// How many lie in [from, to) nanoseconds, buckets being cut evenly.
  double between(double from, double to) const noexcept;

 private:
  static constexpr unsigned kSubBits = 6;
  static constexpr std::size_t kBuckets = (64 - kSubBits + 1) << kSubBits;

  static constexpr std::size_t index_of(std::uint64_t value) noexcept {
    if (value < (1u << kSubBits)) return value;
    const unsigned shift = static_cast<unsigned>(std::bit_width(value)) - 1 - kSubBits;
    return ((shift + 1) << kSubBits) + ((value >> shift) & ((1u << kSubBits) - 1));
  }
  static constexpr std::uint64_t lowest_of(std::size_t index) noexcept {
    if (index < (1u << kSubBits)) return index;
    const std::size_t shift = (index >> kSubBits) - 1;
    return ((std::uint64_t{1} << kSubBits) + (index & ((1u << kSubBits) - 1))) << shift;
  }
  static constexpr std::uint64_t width_of(std::size_t index) noexcept {
    return index < (1u << kSubBits) ? 1 : std::uint64_t{1} << ((index >> kSubBits) - 1);
  }

  std::array<std::uint64_t, kBuckets> counts_{};
  std::uint64_t count_ = 0;
  std::uint64_t sum_ = 0;
  std::uint64_t min_ = ~std::uint64_t{0};
  std::uint64_t max_ = 0;
};

/// An SVG picture of reads and writes over a logarithmic axis of time. `title` is plain text.
std::string plot_latencies(const std::string& title, const LatencyHistogram& reads,
                           const LatencyHistogram& writes);

}  // namespace roost::cli
