// SPDX-License-Identifier: MIT
#include "aio/requests.h"

#include <fmt/format.h>

#include <iterator>
#include <string_view>

#include "roost/base/check.h"
#include "roost/coro/census.h"

namespace roost {

std::string who_waits_for_io(const CoContext& context) {
  constexpr unsigned kAtMost = 3;
  std::string text;
  unsigned count = 0;
  for (const CoroutineInfo& info : list_coroutines()) {
    if (info.context != context.index() || !info.waits_for) continue;
    if (std::string_view(info.waits_for) != kWaitsForIo) continue;
    if (++count > kAtMost) continue;
    fmt::format_to(std::back_inserter(text), "{}coroutine '{}', created at {}, waits at {}",
                   count == 1 ? ": " : "; ", info.name, describe(info.created_at),
                   describe(info.awaits_at));
  }
  if (count > kAtMost) {
    fmt::format_to(std::back_inserter(text), "; and {} more", count - kAtMost);
  }
  return text;
}

}  // namespace roost
