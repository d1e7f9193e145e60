// SPDX-License-Identifier: MIT
#include "roost/base/check.h"

#include <cstdio>
#include <cstdlib>
#include <string>

namespace roost {

void panic(std::string_view message) noexcept {
  std::fprintf(stderr, "roost: %.*s\n", static_cast<int>(message.size()), message.data());
  std::fflush(stderr);
  std::abort();
}

std::string describe(const std::source_location& place) {
  std::string_view file = place.file_name();
  // The last two parts of the path say enough and are the same on every machine.
  if (auto slash = file.rfind('/'); slash != std::string_view::npos && slash > 0) {
    if (auto second = file.rfind('/', slash - 1); second != std::string_view::npos) {
      file.remove_prefix(second + 1);
    }
  }
  return fmt::format("{}:{}", file, place.line());
}

}  // namespace roost
