// SPDX-License-Identifier: MIT
#include "roost/aio/context_lock.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>

namespace roost {

namespace {

// The kernel compares 32 bits: those that hold the small values of a word.
const std::uint32_t* low_half(const std::atomic<std::uint64_t>* word) noexcept {
  static_assert(sizeof(std::atomic<std::uint64_t>) == sizeof(std::uint64_t));
  return reinterpret_cast<const std::uint32_t*>(word) +
         (std::endian::native == std::endian::big ? 1 : 0);
}

}  // namespace

void FutexPark::wait(const std::atomic<std::uint64_t>& word, std::uint64_t value) noexcept {
  ::syscall(SYS_futex, low_half(&word), FUTEX_WAIT_PRIVATE, static_cast<std::uint32_t>(value),
            nullptr, nullptr, 0);
}

void FutexPark::wake(const std::atomic<std::uint64_t>* word) noexcept {
  ::syscall(SYS_futex, low_half(word), FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

}  // namespace roost
