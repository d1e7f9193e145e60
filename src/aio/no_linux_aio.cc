// SPDX-License-Identifier: MIT
// In place of linux_aio.cc where there is no libaio to build with.

#include <cerrno>
#include <system_error>

#include "aio/file_engine.h"

namespace roost {

std::unique_ptr<FileEngine> make_linux_aio_engine(AioContext&, Requests&, BackEnd&) {
  throw std::system_error(ENOSYS, std::generic_category(), "Linux AIO (built without libaio)");
}

bool linux_aio_available() noexcept { return false; }

}  // namespace roost
