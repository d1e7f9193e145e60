// SPDX-License-Identifier: MIT
#include "roost/base/result.h"

#include <system_error>

namespace roost {

std::string Error::message() const {
  // generic_category formats without the shared buffer of strerror().
  return doing_ + ": " + std::generic_category().message(code_);
}

}  // namespace roost
