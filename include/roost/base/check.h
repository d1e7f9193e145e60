// SPDX-License-Identifier: MIT
// Checks for programming errors. They stay on in release builds: a broken invariant in a block
// layer costs data, so the process stops and says what it found.
//
// Threads: any. Nothing here is for errors that a user, a peer or a disk can cause; those are
// values (roost/base/result.h).
#pragma once

#include <fmt/core.h>

#include <source_location>
#include <string>
#include <string_view>
#include <utility>

namespace roost {

/// Prints "roost: <message>" to stderr and aborts.
[[noreturn]] void panic(std::string_view message) noexcept;

/// "file.cc:12 (function)", for messages that name a place.
std::string describe(const std::source_location& place);

/// panic() of a formatted message; `format` is checked at compile time.
template <class... Args>
[[noreturn, gnu::cold, gnu::noinline]] void panicf(fmt::format_string<Args...> format,
                                                   Args&&... args) {
  panic(fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace roost

/// Aborts with the expression, the place and a formatted message unless `condition` holds.
#define ROOST_CHECK(condition, ...)                                                   \
  do {                                                                                \
    if (!(condition)) [[unlikely]]                                                    \
      ::roost::panicf("{}:{}: check '{}' failed: {}", __FILE__, __LINE__, #condition, \
                      ::fmt::format(__VA_ARGS__));                                    \
  } while (false)
