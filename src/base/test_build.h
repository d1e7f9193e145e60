// SPDX-License-Identifier: MIT
// How this test program was compiled: sanitizers slow things down, and change what is measured.
//
// Threads: constants.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <fstream>

namespace roost {

#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kAddressSanitizer = true;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
inline constexpr bool kAddressSanitizer = true;
#else
inline constexpr bool kAddressSanitizer = false;
#endif
#else
inline constexpr bool kAddressSanitizer = false;
#endif

#if defined(__SANITIZE_THREAD__)
inline constexpr bool kThreadSanitizer = true;
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
inline constexpr bool kThreadSanitizer = true;
#else
inline constexpr bool kThreadSanitizer = false;
#endif
#else
inline constexpr bool kThreadSanitizer = false;
#endif

inline constexpr bool kSanitized = kAddressSanitizer || kThreadSanitizer;

/// `full` rounds of work, or a tenth of them where each is slow.
constexpr int rounds(int full) { return kSanitized ? full / 10 : full; }

/// What this process has in memory, in bytes, as the kernel counts it: whichever allocator it is
/// from.
inline std::size_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  std::size_t size = 0;
  std::size_t resident = 0;
  statm >> size >> resident;
  return resident * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

/// A small, fast generator with a fixed seed, so that a run can be repeated.
class TestRandom {
 public:
  explicit TestRandom(std::uint64_t seed) noexcept : state_(seed * 2 + 1) {}
  std::uint32_t next() noexcept {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::uint32_t>(state_ >> 33);
  }
  std::uint32_t below(std::uint32_t end) noexcept { return next() % end; }

 private:
  std::uint64_t state_;
};

}  // namespace roost
