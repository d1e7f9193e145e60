// SPDX-License-Identifier: MIT
#include "roost/nbd/protocol.h"

#include <cerrno>

namespace roost::nbd {

std::uint32_t to_nbd_error(int errno_value) noexcept {
  switch (errno_value) {
    case 0:
      return 0;
    case EPERM:
    case EROFS:
      return kErrorPerm;
    case ENOMEM:
      return kErrorNoMem;
    case EINVAL:
      return kErrorInval;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return kErrorNoSpc;
    case EOVERFLOW:
      return kErrorOverflow;
    case ENOTSUP:
      return kErrorNotSup;
    case ESHUTDOWN:
      return kErrorShutdown;
    default:
      return kErrorIo;
  }
}

}  // namespace roost::nbd
