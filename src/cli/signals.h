// SPDX-License-Identifier: MIT
// Signals: those that a command heeds, as a descriptor.
//
// They have to be blocked before any thread starts, so that every thread inherits that.
//
// Threads: the main thread. Lifetime: they stay blocked when it goes.
#pragma once

#include <initializer_list>

#include "roost/aio/unique_fd.h"

namespace roost::cli {

/// Keeps a signal pending, until somebody heeds it, where it would end the process.
void hold_back(int number) noexcept;

class Signals {
 public:
  /// Throws std::system_error.
  explicit Signals(std::initializer_list<int> numbers);

  int fd() const noexcept { return fd_.get(); }

  /// The number of the next one; 0: none.
  int take() noexcept;

 private:
  UniqueFd fd_;
};

}  // namespace roost::cli
