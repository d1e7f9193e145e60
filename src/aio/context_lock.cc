// SPDX-License-Identifier: MIT
#include "roost/aio/context_lock.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>

#include "aio/simulated_context.h"

namespace roost {

namespace {

using Word = RealPlatform::Atomic<std::uint64_t>;

// The kernel compares 32 bits: those that hold the small values of a word.
const std::uint32_t* low_half(const Word* word) noexcept {
  static_assert(sizeof(Word) == sizeof(std::uint64_t));
  return reinterpret_cast<const std::uint32_t*>(word) +
         (std::endian::native == std::endian::big ? 1 : 0);
}

}  // namespace

void FutexPark::wait(const RealPlatform::Atomic<std::uint64_t>& word,
                     std::uint64_t value) noexcept {
  if (SimulatedThread* const me = this_thread().simulated) [[unlikely]] {
    me->simulation.block("a context lock", [&] { return word.load() != value; });
    return;
  }
  ::syscall(SYS_futex, low_half(&word), FUTEX_WAIT_PRIVATE, static_cast<std::uint32_t>(value),
            nullptr, nullptr, 0);
}

void FutexPark::wake(const RealPlatform::Atomic<std::uint64_t>* word) noexcept {
  if (this_thread().simulated) return;  // the waiter looks at the word
  ::syscall(SYS_futex, low_half(word), FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

}  // namespace roost
