// SPDX-License-Identifier: MIT
// A disk on a descriptor that is open already: what open_file() makes, and tests.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "block/direct_io.h"
#include "roost/aio/unique_fd.h"
#include "roost/block/block_driver.h"

namespace roost {

/// `direct`: how requests have to be aligned, if `fd` was opened with O_DIRECT. `device`: no
/// regular file, so it has neither holes nor another size.
std::unique_ptr<BlockDriver> make_file_disk(std::string name, std::uint64_t size, bool read_only,
                                            UniqueFd fd, std::optional<DirectAlignment> direct,
                                            bool device = false);

}  // namespace roost
