// SPDX-License-Identifier: MIT
// prefetch_for_write: fetches a cache line that is about to be written, and takes it from other
// CPUs at once. Reading first costs two transfers between CPUs: one for the line, and one to own
// it.
//
// Threads: any; it never faults, whatever the address.
#pragma once

namespace roost {

inline void prefetch_for_write(const void* address) noexcept {
#if defined(__x86_64__)
  // By hand: compilers use it only for CPUs that they are told of. Older ones take it for a nop.
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(address)));
#else
  __builtin_prefetch(address, 1);
#endif
}

}  // namespace roost
