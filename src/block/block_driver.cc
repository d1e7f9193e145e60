// SPDX-License-Identifier: MIT
// What a disk does that knows no better.
#include "roost/block/block_driver.h"

#include <cerrno>

namespace roost {

Task<Result<std::vector<Extent>>> BlockDriver::block_status(std::uint64_t, std::uint64_t length,
                                                            std::size_t) {
  co_return std::vector<Extent>(1, Extent{.length = length, .hole = false, .zero = false});
}

std::optional<FileLocation> BlockDriver::in_page_cache(std::uint64_t, std::uint64_t) {
  return std::nullopt;
}

Task<Result<void>> BlockDriver::cache(std::uint64_t, std::uint64_t) { co_return Result<void>(); }

Task<Result<void>> BlockDriver::resize(std::uint64_t) {
  co_return fail(ENOTSUP, "resize " + name());
}

Task<Result<void>> BlockDriver::close() { co_return Result<void>(); }

}  // namespace roost
