// SPDX-License-Identifier: MIT
// Event notifier: an eventfd that one side sets and the other sees as readable.
//
// Threads: set() from any thread and from signal handlers; test_and_clear() by its one reader.
#pragma once

#include "roost/aio/unique_fd.h"

namespace roost {

/// Something that can be set anywhere, and waited for with poll(2).
class EventNotifier {
 public:
  /// Throws std::system_error.
  EventNotifier();

  /// Any number of times before it is seen once.
  void set() noexcept;

  /// True if it was set since the last call.
  bool test_and_clear() noexcept;

  /// Readable while it is set. Stays the notifier's.
  int fd() const noexcept { return fd_.get(); }

 private:
  UniqueFd fd_;
};

}  // namespace roost
