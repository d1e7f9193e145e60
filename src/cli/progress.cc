// SPDX-License-Identifier: MIT
#include "cli/progress.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>

#include "roost/aio/aio_context.h"

namespace roost::cli {

namespace {

constexpr std::int64_t kIntervalNs = 200'000'000;

ProgressStyle choose(ProgressStyle style) {
  if (style != ProgressStyle::kAuto) return style;
  return ::isatty(STDERR_FILENO) ? ProgressStyle::kBar : ProgressStyle::kNone;
}

std::size_t terminal_width() {
  winsize size{};
  const bool known = ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  return known ? size.ws_col : 80;
}

void write_out(const std::string& text) {
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, text.data(), text.size());
}

}  // namespace

std::string human_size(double bytes) {
  constexpr std::array kUnits{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  std::size_t unit = 0;
  while (bytes >= 1024 && unit + 1 < kUnits.size()) {
    bytes /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{:.0f} B", bytes) : fmt::format("{:.1f} {}", bytes, kUnits[unit]);
}

Progress::Progress(AioContext& context, std::string what, std::uint64_t total, ProgressStyle style)
    : context_(context),
      what_(std::move(what)),
      total_(total),
      style_(choose(style)),
      began_ns_(context.clock().now_ns()),
      timer_(context, [this] { show(false); }) {
  if (style_ != ProgressStyle::kNone) timer_.arm_after(kIntervalNs);
}

Progress::~Progress() {
  if (style_ != ProgressStyle::kNone) show(true);
}

void Progress::show(bool last) {
  const std::uint64_t done = done_.load(std::memory_order_relaxed);
  const double seconds = static_cast<double>(context_.clock().now_ns() - began_ns_) / 1e9;
  const double part = total_ > 0 ? static_cast<double>(done) / static_cast<double>(total_) : 1;
  const double rate = seconds > 0 ? static_cast<double>(done) / seconds : 0;
  if (style_ == ProgressStyle::kJson) {
    write_out(fmt::format(R"({{"stage":"{}","done":{},"total":{},"seconds":{:.3f}}})"
                          "\n",
                          what_, done, total_, seconds));
  } else {
    const std::string numbers =
        fmt::format(" {:3.0f} %  {} of {}  {}/s", part * 100, human_size(static_cast<double>(done)),
                    human_size(static_cast<double>(total_)), human_size(rate));
    const std::size_t width = terminal_width();
    const std::size_t used = what_.size() + 4 + numbers.size();
    const std::size_t room = width > used + 4 ? width - used : 4;
    const auto filled = static_cast<std::size_t>(part * static_cast<double>(room));
    write_out(fmt::format("\r{} [{:#<{}}{:.<{}}]{}{}", what_, "", filled, "", room - filled,
                          numbers, last ? "\n" : ""));
  }
  if (!last) timer_.arm_after(kIntervalNs);
}

}  // namespace roost::cli
