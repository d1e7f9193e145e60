// SPDX-License-Identifier: MIT
// Memory for coroutine frames, control blocks and queue entries: recently freed blocks by size, in
// front of chunks from operator new.
//
// Threads: any. Each thread has a cache of its own; a block may be freed on another thread than
// the one that allocated it, and then joins the cache there.
// Lifetime: a cache holds at most kFrameCacheBytes of each block size and is emptied when its
// thread ends; memory all of whose blocks are free goes back to the system: at once where it was
// freed outside of any event loop, otherwise when a loop is idle, or beyond 256 MiB. Under
// AddressSanitizer nothing is cached, so that a use after free is seen.
#pragma once

#include <cstddef>

namespace roost {

/// Bytes that one thread's cache keeps at most of one block size.
inline constexpr std::size_t kFrameCacheBytes = 128 << 10;

/// Blocks above this size are never cached.
inline constexpr std::size_t kLargestCachedFrame = 2048;

/// Throws std::bad_alloc. Aligned for any fundamental type; a size that is a multiple of 64, to 64.
void* allocate_frame(std::size_t size);

/// `size` is what was asked for.
void free_frame(void* block, std::size_t size) noexcept;

/// Bytes of a coroutine's control block.
inline constexpr std::size_t kControlBlockBytes = 128;

/// Memory for control blocks, which all can be found at any time. So they are constructed once,
/// when the memory is new; a block that was free before is as it was left but for its first word,
/// which linked free blocks. Throws std::bad_alloc.
void* allocate_control_block(void (*construct)(void* block) noexcept);
/// Gives one back. Any thread.
void free_control_block(void* block) noexcept;

/// Calls `visit` with every control block, in use or free. Meanwhile blocks may be allocated and
/// freed, but no memory of theirs goes back to the system. (Under AddressSanitizer it visits those
/// in use, and nobody can allocate or free one.)
void for_each_control_block(void (*visit)(void* block, void* argument), void* argument);

/// Gives a piece of unused memory back to the system. True: it did, and there may be more. For
/// contexts, before they sleep.
bool release_frame_memory() noexcept;

/// Base for classes that live in frame memory.
struct FrameAllocated {
  static void* operator new(std::size_t size) { return allocate_frame(size); }
  static void operator delete(void* block, std::size_t size) noexcept { free_frame(block, size); }
};

}  // namespace roost
