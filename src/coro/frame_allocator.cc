// SPDX-License-Identifier: MIT
// Four steps, each much rarer than the one before: a free list of the calling thread; a depot
// behind a mutex, which gives and takes blocks by the batch; chunks, each for one size; regions of
// memory from the system, which go back once all their chunks have come home. (The structure is
// that of Bonwick's magazine allocator and of tcmalloc's central lists.) The general allocator
// would do, but for the moment in which a burst of coroutines ends: it looks at the neighbours of
// every block it frees, and those are cold.
#include "roost/coro/frame_allocator.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>

#include "roost/coro/context.h"

#if defined(__SANITIZE_ADDRESS__)
#define ROOST_CACHE_FRAMES 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ROOST_CACHE_FRAMES 0
#endif
#endif
#ifndef ROOST_CACHE_FRAMES
#define ROOST_CACHE_FRAMES 1
#endif

namespace roost {

namespace {

constexpr std::size_t kChunkHeader = 64;

struct FreeBlock {
  FreeBlock* next;
};

// A chunk of blocks of one size, which follow it; its address is a multiple of its size, so a block
// finds it. Guarded by the depot's mutex. (Under AddressSanitizer each control block has a chunk of
// its own, smaller, and only the list of all is used.)
struct alignas(kChunkHeader) Chunk {
  Chunk* previous = nullptr;  // in the list of chunks with free blocks
  Chunk* next = nullptr;
  Chunk* all_previous = nullptr;  // in control_block_chunks, where it is one of those
  Chunk* all_next = nullptr;
  FreeBlock* free = nullptr;
  std::uint32_t free_count = 0;
  std::uint32_t carved = 0;  // blocks handed out for the first time so far
  std::uint32_t capacity = 0;
  bool listed = false;
};
static_assert(sizeof(Chunk) == kChunkHeader);

// All chunks of control blocks. A variable, so that a debugger finds them without running code
// (scripts/gdb/roost-gdb.py). Guarded by the mutex under which control blocks are carved.
constinit Chunk* control_block_chunks = nullptr;

void remember_control_blocks(Chunk& chunk) noexcept {
  chunk.all_previous = nullptr;
  chunk.all_next = control_block_chunks;
  if (control_block_chunks) control_block_chunks->all_previous = &chunk;
  control_block_chunks = &chunk;
}

void forget_control_blocks(Chunk& chunk) noexcept {
  (chunk.all_previous ? chunk.all_previous->all_next : control_block_chunks) = chunk.all_next;
  if (chunk.all_next) chunk.all_next->all_previous = chunk.all_previous;
}

}  // namespace

#if ROOST_CACHE_FRAMES

namespace {

constexpr std::size_t kGranule = 16;
// By size; and after those, one for control blocks, so that its chunks hold nothing else.
constexpr std::size_t kSizeClasses = kLargestCachedFrame / kGranule;
constexpr std::size_t kControlBlocks = kSizeClasses;
constexpr std::size_t kClasses = kSizeClasses + 1;
constexpr std::size_t kChunkBytes = 64 << 10;
constexpr std::size_t kRegionBytes = 2 << 20;
constexpr std::size_t kSpareRegions = 4;
constexpr std::size_t kSpareRegionsWhileBusy = 128;

// Size 0 lands beyond every class.
constexpr std::size_t size_class(std::size_t size) { return (size - 1) / kGranule; }
constexpr std::size_t block_size(std::size_t index) {
  return index == kControlBlocks ? kControlBlockBytes : (index + 1) * kGranule;
}

// Blocks of one class that move between a thread and the depot at a time; a thread keeps two such
// batches at most.
constexpr std::uint32_t batch_size(std::size_t index) {
  return static_cast<std::uint32_t>(kFrameCacheBytes / 2 / block_size(index));
}

// What to do with a block before its first use; null: nothing.
using Construct = void (*)(void* block) noexcept;

// Chunks for every class. Giving memory back to the system interrupts the other CPUs and takes as
// long as hundreds of turns, so it is done by the region, a few stay, and where an event loop is
// under way the rest waits until that has nothing else to do.
class ChunkSource {
 public:
  /// Throws std::bad_alloc.
  void* take() {
    std::lock_guard lock(mutex_);
    // Those in use first, so that whole ones can go.
    if (!partial_) {
      if (!whole_) add_region();
      Region& region = *whole_;
      unlist(whole_, region);
      enlist(partial_, region);
      --spare_;
    }
    Region& region = *partial_;
    const int first = std::countr_zero(region.free);
    region.free &= ~(1u << first);
    if (region.free == 0) unlist(partial_, region);
    return reinterpret_cast<void*>(region.address +
                                   static_cast<std::uintptr_t>(first) * kChunkBytes);
  }

  void give_back(void* chunk) noexcept {
    const std::size_t may_stay = this_thread().context ? kSpareRegionsWhileBusy : kSpareRegions;
    {
      std::lock_guard lock(mutex_);
      const auto address = reinterpret_cast<std::uintptr_t>(chunk);
      const auto found = regions_.find(address & ~std::uintptr_t{kRegionBytes - 1});
      Region& region = found->second;
      if (region.free == 0) enlist(partial_, region);
      region.free |= 1u << ((address - region.address) / kChunkBytes);
      if (region.free != kAllFree) return;
      unlist(partial_, region);
      enlist(whole_, region);
      if (++spare_ > kSpareRegions) surplus_.store(true, std::memory_order_relaxed);
    }
    release_one(may_stay);
  }

  /// Whether more regions than are to stay may be unused; a hint.
  bool surplus() const noexcept { return surplus_.load(std::memory_order_relaxed); }

  /// Gives one region back to the system if more than `may_stay` are unused; true if so.
  bool release_one(std::size_t may_stay) noexcept {
    std::uintptr_t address = 0;
    {
      std::lock_guard lock(mutex_);
      if (spare_ > may_stay) {
        address = whole_->address;
        unlist(whole_, *whole_);
        regions_.erase(address);
        --spare_;
      }
      if (spare_ <= kSpareRegions) surplus_.store(false, std::memory_order_relaxed);
    }
    if (address == 0) return false;
    ::munmap(reinterpret_cast<void*>(address), kRegionBytes);
    return true;
  }

 private:
  struct Region {
    std::uintptr_t address;
    std::uint32_t free;  // a bit a chunk
    Region* previous;    // in partial_ or whole_; in neither if no chunk is free
    Region* next;
  };
  static constexpr std::uint32_t kAllFree = ~0u;
  static_assert(kRegionBytes / kChunkBytes == 32, "a bit a chunk");

  void add_region() {
    const std::uintptr_t address = map_region();
    // Coroutines are visited in an order that has nothing to do with their addresses, so many of
    // them want large pages. (A process with few stays small.)
    if (!regions_.empty()) {
      ::madvise(reinterpret_cast<void*>(address), kRegionBytes, MADV_HUGEPAGE);
    }
    try {
      const Region made{.address = address, .free = kAllFree, .previous = nullptr, .next = nullptr};
      enlist(whole_, regions_.emplace(address, made).first->second);
    } catch (...) {
      ::munmap(reinterpret_cast<void*>(address), kRegionBytes);
      throw;
    }
    ++spare_;
  }

  // At a multiple of its size.
  static std::uintptr_t map_region() {
    void* const twice = ::mmap(nullptr, 2 * kRegionBytes, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (twice == MAP_FAILED) throw std::bad_alloc();
    const auto start = reinterpret_cast<std::uintptr_t>(twice);
    const std::uintptr_t region = (start + kRegionBytes - 1) & ~(kRegionBytes - 1);
    if (region > start) ::munmap(twice, region - start);
    ::munmap(reinterpret_cast<void*>(region + kRegionBytes), start + kRegionBytes - region);
    return region;
  }

  static void enlist(Region*& list, Region& region) noexcept {
    region.previous = nullptr;
    region.next = list;
    if (list) list->previous = &region;
    list = &region;
  }

  static void unlist(Region*& list, Region& region) noexcept {
    (region.previous ? region.previous->next : list) = region.next;
    if (region.next) region.next->previous = region.previous;
  }

  std::mutex mutex_;
  std::unordered_map<std::uintptr_t, Region> regions_;  // by address
  Region* partial_ = nullptr;                           // some chunks are free
  Region* whole_ = nullptr;                             // all are
  std::size_t spare_ = 0;                               // how many those are
  std::atomic<bool> surplus_{false};  // spare_ > kSpareRegions; a hint outside of the mutex
};

// Never destroyed, like the depots: frames may be freed while static objects go.
ChunkSource& chunk_source() {
  static ChunkSource* const source = new ChunkSource;
  return *source;
}

// Where the threads' caches of one class get blocks from and bring them back to.
class Depot {
 public:
  /// A list of at most `wanted` blocks, at least one. Throws std::bad_alloc.
  FreeBlock* take(std::size_t index, std::uint32_t wanted, std::uint32_t& got,
                  Construct construct) {
    std::lock_guard lock(mutex_);
    FreeBlock* list = nullptr;
    got = 0;
    while (got < wanted) {
      if (!available_) {
        if (got > 0) break;
        add_chunk(index);
      }
      Chunk& chunk = *available_;
      FreeBlock* block = chunk.free;
      if (block) {
        chunk.free = block->next;
        --chunk.free_count;
      } else {
        block = reinterpret_cast<FreeBlock*>(reinterpret_cast<char*>(&chunk) + kChunkHeader +
                                             chunk.carved++ * block_size(index));
        if (construct) construct(block);
      }
      if (!chunk.free && chunk.carved == chunk.capacity) unlist(chunk);
      block->next = list;
      list = block;
      ++got;
    }
    return list;
  }

  void put(std::size_t index, FreeBlock* list) noexcept {
    std::lock_guard lock(mutex_);
    while (FreeBlock* block = list) {
      list = block->next;
      auto& chunk = *reinterpret_cast<Chunk*>(reinterpret_cast<std::uintptr_t>(block) &
                                              ~std::uintptr_t{kChunkBytes - 1});
      block->next = chunk.free;
      chunk.free = block;
      if (!chunk.listed) enlist(chunk);
      // All home: it goes, unless it is the only one that has something to give.
      if (++chunk.free_count == chunk.carved && (chunk.previous || chunk.next) && visitors_ == 0) {
        unlist(chunk);
        if (index == kControlBlocks) forget_control_blocks(chunk);
        chunk_source().give_back(&chunk);
      }
    }
  }

  /// For the depot of control blocks, which remembers its chunks.
  void visit_blocks(std::size_t index, void (*visit)(void*, void*), void* argument) {
    std::vector<std::pair<char*, std::size_t>> blocks;  // of each chunk: the first, and how many
    {
      std::lock_guard lock(mutex_);
      for (Chunk* chunk = control_block_chunks; chunk; chunk = chunk->all_next) {
        blocks.emplace_back(reinterpret_cast<char*>(chunk) + kChunkHeader, chunk->carved);
      }
      ++visitors_;
    }
    for (const auto& [first, count] : blocks) {
      for (std::size_t i = 0; i < count; ++i) visit(first + i * block_size(index), argument);
    }
    std::lock_guard lock(mutex_);
    --visitors_;
  }

 private:
  void add_chunk(std::size_t index) {
    void* memory = chunk_source().take();
    auto& chunk = *::new (memory) Chunk;
    chunk.capacity = static_cast<std::uint32_t>((kChunkBytes - kChunkHeader) / block_size(index));
    enlist(chunk);
    if (index == kControlBlocks) remember_control_blocks(chunk);
  }

  void enlist(Chunk& chunk) noexcept {
    chunk.listed = true;
    chunk.previous = nullptr;
    chunk.next = available_;
    if (available_) available_->previous = &chunk;
    available_ = &chunk;
  }

  void unlist(Chunk& chunk) noexcept {
    chunk.listed = false;
    (chunk.previous ? chunk.previous->next : available_) = chunk.next;
    if (chunk.next) chunk.next->previous = chunk.previous;
    chunk.previous = chunk.next = nullptr;
  }

  std::mutex mutex_;            // guards everything below
  Chunk* available_ = nullptr;  // chunks that have a block to give
  unsigned visitors_ = 0;       // while there are any, no chunk goes
};

Depot& depot(std::size_t index) {
  static Depot* const depots = new Depot[kClasses];
  return depots[index];
}

// Trivially destructible, so that it stays usable while the rest of its thread goes: what a
// destructor stores in its own object, compilers drop. The CacheKeeper empties it.
struct FrameCache {
  struct Class {
    FreeBlock* free = nullptr;   // used first, at most a batch
    FreeBlock* spare = nullptr;  // a whole batch, or none
    std::uint32_t count = 0;     // in `free`
    std::uint32_t spare_count = 0;
    std::uint32_t limit = 0;  // a batch; 0 until first used, and again when the thread ends
  };
  Class classes[kClasses] = {};

  // The thread is ending. What it frees from now on goes straight back.
  void give_back() noexcept {
    for (std::size_t index = 0; index < kClasses; ++index) {
      Class& mine = classes[index];
      if (mine.free) depot(index).put(index, mine.free);
      if (mine.spare) depot(index).put(index, mine.spare);
      mine = Class{};
    }
    ended = true;
    while (release_frame_memory()) {
    }
  }

  [[gnu::noinline]] void* refill(std::size_t index, Construct construct) {
    Class& mine = classes[index];
    if (mine.limit == 0) open(mine, index);
    if (mine.spare) {
      mine.free = std::exchange(mine.spare, nullptr);
      mine.count = mine.spare_count;
    } else {
      mine.free = depot(index).take(index, std::max(mine.limit, 1u), mine.count, construct);
    }
    FreeBlock* block = mine.free;
    mine.free = block->next;
    --mine.count;
    return block;
  }

  // A batch is full: it becomes the spare one. If there is one already, what goes is the batch that
  // was just freed, since its blocks are still warm.
  [[gnu::noinline]] void spill(std::size_t index) noexcept {
    Class& mine = classes[index];
    if (mine.limit == 0) open(mine, index);
    if (mine.count <= mine.limit) return;
    FreeBlock* const full = std::exchange(mine.free, nullptr);
    const std::uint32_t count = std::exchange(mine.count, 0);
    if (mine.spare || mine.limit == 0) {
      depot(index).put(index, full);
    } else {
      mine.spare = full;
      mine.spare_count = count;
    }
  }

  static void open(Class& mine, std::size_t index) noexcept;

  bool ended = false;
};

// Initial-exec: the cache is looked at for every frame, and a call to find it would cost as much.
[[gnu::tls_model("initial-exec")]] thread_local constinit FrameCache cache;

struct CacheKeeper {
  bool keeps = false;
  ~CacheKeeper() { cache.give_back(); }
};
thread_local constinit CacheKeeper keeper;

// The first use of a size on this thread.
void FrameCache::open(Class& mine, std::size_t index) noexcept {
  if (cache.ended) return;
  keeper.keeps = true;  // touching it makes the thread call its destructor
  mine.limit = batch_size(index);
}

}  // namespace

namespace {

inline void* allocate_from(std::size_t index, Construct construct) {
  FrameCache::Class& mine = cache.classes[index];
  FreeBlock* const block = mine.free;
  if (!block) [[unlikely]]
    return cache.refill(index, construct);
  mine.free = block->next;
  --mine.count;
  return block;
}

inline void free_to(std::size_t index, void* freed) noexcept {
  FrameCache::Class& mine = cache.classes[index];
  auto* const block = static_cast<FreeBlock*>(freed);
  block->next = mine.free;
  mine.free = block;
  if (++mine.count > mine.limit) [[unlikely]]
    cache.spill(index);
}

}  // namespace

void* allocate_frame(std::size_t size) {
  const std::size_t index = size_class(size);
  if (index >= kSizeClasses) [[unlikely]]
    return ::operator new(size);
  return allocate_from(index, nullptr);
}

void free_frame(void* block, std::size_t size) noexcept {
  const std::size_t index = size_class(size);
  if (index >= kSizeClasses) [[unlikely]] {
    ::operator delete(block);
    return;
  }
  free_to(index, block);
}

void* allocate_control_block(Construct construct) {
  return allocate_from(kControlBlocks, construct);
}
void free_control_block(void* block) noexcept { free_to(kControlBlocks, block); }

void for_each_control_block(void (*visit)(void* block, void* argument), void* argument) {
  depot(kControlBlocks).visit_blocks(kControlBlocks, visit, argument);
}

bool release_frame_memory() noexcept {
  return chunk_source().surplus() && chunk_source().release_one(kSpareRegions);
}

#else

bool release_frame_memory() noexcept { return false; }
void* allocate_frame(std::size_t size) { return ::operator new(size); }
void free_frame(void* block, std::size_t) noexcept { ::operator delete(block); }

namespace {

constinit std::mutex control_blocks_mutex;

}  // namespace

void* allocate_control_block(void (*construct)(void* block) noexcept) {
  auto* const chunk =
      ::new (::operator new (kChunkHeader + kControlBlockBytes, std::align_val_t{kChunkHeader}))
          Chunk;
  void* const block = chunk + 1;
  construct(block);
  std::lock_guard lock(control_blocks_mutex);
  chunk->carved = chunk->capacity = 1;
  remember_control_blocks(*chunk);
  return block;
}

void free_control_block(void* block) noexcept {
  Chunk* const chunk = static_cast<Chunk*>(block) - 1;
  {
    std::lock_guard lock(control_blocks_mutex);
    forget_control_blocks(*chunk);
  }
  ::operator delete (chunk, std::align_val_t{kChunkHeader});
}

void for_each_control_block(void (*visit)(void* block, void* argument), void* argument) {
  std::lock_guard lock(control_blocks_mutex);
  for (Chunk* chunk = control_block_chunks; chunk; chunk = chunk->all_next) {
    visit(chunk + 1, argument);
  }
}

#endif

}  // namespace roost
