// SPDX-License-Identifier: MIT
// Operating errors as values: an errno code and the words that say what was being done to which
// object, such as "pread disk.img at 4096+512: Input/output error".
//
// Threads: values, no shared state.
#pragma once

#include <expected>
#include <string>
#include <utility>

namespace roost {

/// What failed, and how. A value.
class Error {
 public:
  /// `code` is a positive errno value; `doing` names the object and the attempt.
  Error(int code, std::string doing) : code_(code), doing_(std::move(doing)) {}

  /// The errno value.
  int code() const noexcept { return code_; }
  /// What was attempted with which object.
  const std::string& doing() const noexcept { return doing_; }

  /// "<doing>: <strerror(code)>".
  std::string message() const;

 private:
  int code_;
  std::string doing_;
};

/// A value, or the error that kept it from being had.
template <class T>
using Result = std::expected<T, Error>;

/// Whether a type is a Result.
template <class T>
inline constexpr bool kIsResult = false;
template <class T>
inline constexpr bool kIsResult<Result<T>> = true;

/// For `return fail(ENOSPC, "...")` in a function that returns a Result.
inline std::unexpected<Error> fail(int code, std::string doing) {
  return std::unexpected<Error>(Error(code, std::move(doing)));
}

}  // namespace roost
