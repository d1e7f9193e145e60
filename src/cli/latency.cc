// SPDX-License-Identifier: MIT
#include "cli/latency.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace roost::cli {

void LatencyHistogram::add(const LatencyHistogram& other) noexcept {
  for (std::size_t i = 0; i < kBuckets; ++i) counts_[i] += other.counts_[i];
  count_ += other.count_;
  sum_ += other.sum_;
  min_ = std::min(min_, other.min_);
  max_ = std::max(max_, other.max_);
}

double LatencyHistogram::mean() const noexcept {
  return count_ ? static_cast<double>(sum_) / static_cast<double>(count_) : 0;
}

std::uint64_t LatencyHistogram::percentile(double percent) const noexcept {
  const auto wanted =
      static_cast<std::uint64_t>(std::ceil(percent / 100 * static_cast<double>(count_)));
  std::uint64_t seen = 0;
  for (std::size_t i = 0; i < kBuckets; ++i) {
    seen += counts_[i];
    if (counts_[i] > 0 && seen >= wanted) {
      return std::min(lowest_of(i) + width_of(i) - 1, max_);
    }
  }
  return max_;
}

double LatencyHistogram::between(double from, double to) const noexcept {
  double sum = 0;
  for (std::size_t i = 0; i < kBuckets; ++i) {
    if (counts_[i] == 0) continue;
    const auto low = static_cast<double>(lowest_of(i));
    const double high = low + static_cast<double>(width_of(i));
    const double shared = std::min(high, to) - std::max(low, from);
    if (shared > 0) sum += static_cast<double>(counts_[i]) * shared / (high - low);
  }
  return sum;
}

namespace {

constexpr double kWidth = 860;
constexpr double kHeight = 420;
constexpr double kLeft = 60;
constexpr double kRight = 20;
constexpr double kTop = 50;
constexpr double kBottom = 60;
constexpr int kBars = 120;

std::string escaped(const std::string& text) {
  std::string safe;
  for (const char c : text) {
    switch (c) {
      case '&':
        safe += "&amp;";
        break;
      case '<':
        safe += "&lt;";
        break;
      case '>':
        safe += "&gt;";
        break;
      default:
        safe += c;
    }
  }
  return safe;
}

std::string duration(double ns) {
  if (ns < 1e3) return fmt::format("{:.0f} ns", ns);
  if (ns < 1e6) return fmt::format("{:.3g} µs", ns / 1e3);
  if (ns < 1e9) return fmt::format("{:.3g} ms", ns / 1e6);
  return fmt::format("{:.3g} s", ns / 1e9);
}

}  // namespace

std::string plot_latencies(const std::string& title, const LatencyHistogram& reads,
                           const LatencyHistogram& writes) {
  LatencyHistogram all = reads;
  all.add(writes);
  const double low = std::log10(std::max<double>(1, static_cast<double>(all.min())) * 0.9);
  const double high = std::log10(std::max<double>(10, static_cast<double>(all.max())) * 1.1);
  const double inner_width = kWidth - kLeft - kRight;
  const double inner_height = kHeight - kTop - kBottom;
  const auto x_of = [&](double ns) {
    return kLeft + (std::log10(ns) - low) / (high - low) * inner_width;
  };
  const auto edge = [&](int bar) { return std::pow(10, low + (high - low) * bar / kBars); };

  struct Series {
    const LatencyHistogram* histogram;
    const char* name;
    const char* colour;
    std::vector<double> parts{};
  };
  Series series[] = {{&reads, "reads", "#2f6db5"}, {&writes, "writes", "#c4622d"}};
  double highest = 0;
  for (Series& one : series) {
    for (int bar = 0; bar < kBars && one.histogram->count() > 0; ++bar) {
      one.parts.push_back(100 * one.histogram->between(edge(bar), edge(bar + 1)) /
                          static_cast<double>(all.count()));
      highest = std::max(highest, one.parts.back());
    }
  }
  if (highest == 0) highest = 1;

  std::string svg = fmt::format(
      R"(<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}" )"
      R"(font-family="sans-serif" font-size="12">)"
      "\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
      "<text x=\"{2}\" y=\"24\" font-size=\"15\">{3}</text>\n",
      kWidth, kHeight, kLeft, escaped(title));
  const double bottom = kTop + inner_height;
  double legend = kLeft;
  for (const Series& one : series) {
    if (one.parts.empty()) continue;
    for (int bar = 0; bar < kBars; ++bar) {
      const double height = one.parts[static_cast<std::size_t>(bar)] / highest * inner_height;
      if (height < 0.05) continue;
      svg += fmt::format(
          "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" fill=\"{}\" "
          "fill-opacity=\"0.7\"/>\n",
          x_of(edge(bar)), bottom - height, inner_width / kBars, height, one.colour);
    }
    const LatencyHistogram& h = *one.histogram;
    svg += fmt::format(
        "<text x=\"{:.0f}\" y=\"42\" fill=\"{}\">{}: median {}, 99 % {}, 99.9 % {}</text>\n",
        legend, one.colour, one.name, duration(static_cast<double>(h.percentile(50))),
        duration(static_cast<double>(h.percentile(99))),
        duration(static_cast<double>(h.percentile(99.9))));
    legend += inner_width / 2;
  }
  svg += fmt::format("<line x1=\"{0}\" y1=\"{1}\" x2=\"{2}\" y2=\"{1}\" stroke=\"black\"/>\n",
                     kLeft, bottom, kWidth - kRight);
  for (double decade = std::floor(low); decade <= high; ++decade) {
    for (const double step : {1.0, 2.0, 5.0}) {
      const double ns = step * std::pow(10, decade);
      if (ns < std::pow(10, low) || ns > std::pow(10, high)) continue;
      const double x = x_of(ns);
      svg += fmt::format(
          "<line x1=\"{0:.1f}\" y1=\"{1}\" x2=\"{0:.1f}\" y2=\"{2}\" stroke=\"#ccc\"/>\n"
          "<text x=\"{0:.1f}\" y=\"{3}\" text-anchor=\"middle\">{4}</text>\n",
          x, kTop, bottom, bottom + 18, duration(ns));
    }
  }
  svg += fmt::format(
      "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">latency</text>\n"
      "<text x=\"14\" y=\"{}\" transform=\"rotate(-90 14 {})\" text-anchor=\"middle\">"
      "part of all requests, at most {:.2g} %</text>\n</svg>\n",
      kLeft + inner_width / 2, kHeight - 14, kTop + inner_height / 2, kTop + inner_height / 2,
      highest);
  return svg;
}

}  // namespace roost::cli
