// SPDX-License-Identifier: MIT
// Event notifier: an eventfd that one side sets and the other sees as readable.
//
// Threads: set() from any thread and from signal handlers; test_and_clear() by its one reader.
#pragma once

#include "roost/aio/unique_fd.h"

namespace roost {

class EventNotifier {
 public:
  /// Throws std::system_error.
  EventNotifier();

  void set() noexcept;

  /// True if it was set since the last call.
  bool test_and_clear() noexcept;

  int fd() const noexcept { return fd_.get(); }

 private:
  UniqueFd fd_;
};

}  // namespace roost
