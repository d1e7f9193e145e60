// SPDX-License-Identifier: MIT
// A file descriptor that is closed with its owner.
//
// Threads: a value; one thread at a time.
#pragma once

#include <unistd.h>

#include <utility>

namespace roost {

/// A descriptor, or none (-1). Move-only.
class UniqueFd {
 public:
  UniqueFd() noexcept = default;
  explicit UniqueFd(int fd) noexcept : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    UniqueFd moved(std::move(other));  // leaves with the old one
    std::swap(fd_, moved.fd_);
    return *this;
  }
  ~UniqueFd() { reset(); }

  /// -1: none.
  int get() const noexcept { return fd_; }
  explicit operator bool() const noexcept { return fd_ >= 0; }
  /// Gives the descriptor away.
  int release() noexcept { return std::exchange(fd_, -1); }
  /// Closes it now.
  void reset() noexcept {
    if (fd_ >= 0) ::close(std::exchange(fd_, -1));
  }

 private:
  int fd_ = -1;
};

}  // namespace roost
