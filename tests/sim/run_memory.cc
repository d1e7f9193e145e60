// SPDX-License-Identifier: MIT
// The heap of roost_sim_test: runs in one process do not see each other in it.
//
// What an allocation gets matters to a run: where a node has the address of an earlier one, a
// compare-and-swap succeeds that would else be tried again, which is an event more. Here it gets
// the block of its size that was freed last, else one that nobody had yet. Blocks that earlier runs
// left behind are the last to be taken, and the run cannot tell them from new ones. So it goes as
// it would in a process of its own. (A general allocator splits and merges blocks; what it gives
// depends on all that was done before.) Stacks and coroutine frames are handed out the same way
// already.
//
// Threads: one. Under a sanitizer the heap is the sanitizer's.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

namespace {

constexpr std::size_t kGranule = 16;
constexpr std::size_t kSmall = 1024;  // up to here a class a granule, above one a power of two
constexpr std::size_t kPieceBytes = 1 << 20;
constexpr int kFill = 0xA5;  // memory that is read before it is written reads the same in each run

// In front of what the user gets.
struct Header {
  std::uint32_t size_class;
  std::uint32_t offset;  // of the user's bytes in the block
  std::uint64_t unused;
};
static_assert(sizeof(Header) == kGranule);

struct FreeBlock {
  FreeBlock* next;
};

struct Heap {
  std::array<FreeBlock*, kSmall / kGranule + 64> free{};  // by class
  std::byte* rest = nullptr;                              // of the newest piece of memory
  std::byte* end = nullptr;
};
constinit Heap heap;

constexpr std::size_t size_class(std::size_t bytes) {
  if (bytes <= kSmall) return (bytes - 1) / kGranule;
  return kSmall / kGranule + static_cast<std::size_t>(std::bit_width(bytes - 1));
}

constexpr std::size_t block_bytes(std::size_t index) {
  if (index < kSmall / kGranule) return (index + 1) * kGranule;
  return std::size_t{1} << (index - kSmall / kGranule);
}

std::byte* new_block(std::size_t bytes) {
  if (bytes > static_cast<std::size_t>(heap.end - heap.rest)) {
    const std::size_t piece = std::max(bytes, kPieceBytes);
    void* const memory =
        ::mmap(nullptr, piece, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    heap.rest = static_cast<std::byte*>(memory);
    heap.end = heap.rest + piece;
  }
  std::byte* const block = heap.rest;
  heap.rest += bytes;
  return block;
}

void* take(std::size_t size, std::size_t alignment) {
  // Where the alignment is met by chance, the class is still the same.
  const std::size_t slack = alignment > kGranule ? alignment - kGranule : 0;
  if (size > PTRDIFF_MAX - sizeof(Header) - slack) throw std::bad_alloc();
  const std::size_t index = size_class(sizeof(Header) + size + slack);
  auto* block = reinterpret_cast<std::byte*>(heap.free[index]);
  if (block) {
    heap.free[index] = heap.free[index]->next;
  } else {
    block = new_block(block_bytes(index));
  }
  auto address = reinterpret_cast<std::uintptr_t>(block) + sizeof(Header);
  address = (address + alignment - 1) & ~(alignment - 1);
  auto* const user = reinterpret_cast<std::byte*>(address);
  std::memset(user, kFill, size);
  ::new (user - sizeof(Header)) Header{.size_class = static_cast<std::uint32_t>(index),
                                       .offset = static_cast<std::uint32_t>(user - block),
                                       .unused = 0};
  return user;
}

void give_back(void* user) noexcept {
  if (!user) return;
  auto* const bytes = static_cast<std::byte*>(user);
  const Header header = *reinterpret_cast<const Header*>(bytes - sizeof(Header));
  FreeBlock*& list = heap.free[header.size_class];
  list = ::new (bytes - header.offset) FreeBlock{list};
}

}  // namespace

// The other forms call these.
void* operator new(std::size_t size) { return take(size, kGranule); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return take(size, std::max(static_cast<std::size_t>(alignment), kGranule));
}
void operator delete(void* block) noexcept { give_back(block); }
void operator delete(void* block, std::size_t) noexcept { give_back(block); }
void operator delete(void* block, std::align_val_t) noexcept { give_back(block); }
void operator delete(void* block, std::size_t, std::align_val_t) noexcept { give_back(block); }

#endif
