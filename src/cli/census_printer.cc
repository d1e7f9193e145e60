// SPDX-License-Identifier: MIT
#include "cli/census_printer.h"

#include <fmt/format.h>

#include "cli/runtime.h"
#include "roost/aio/census_report.h"

namespace roost::cli {

CensusPrinter::~CensusPrinter() {
  if (thread_.joinable()) thread_.join();
}

void CensusPrinter::print() {
  if (running_.exchange(true)) return;
  if (thread_.joinable()) thread_.join();
  thread_ = std::thread([this] {
    const auto census = take_census();
    report(fmt::format("{} coroutines\n{}", census.size(), to_text(census)));
    running_ = false;
  });
}

}  // namespace roost::cli
