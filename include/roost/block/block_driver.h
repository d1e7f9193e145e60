// SPDX-License-Identifier: MIT
// BlockDriver: the code behind a disk: a file or block device, memory, or nothing at all.
//
// Threads: every operation may be called from a coroutine on any context, any number at a time; a
// request runs on the context it arrives on.
// Lifetime: outlives its requests. Buffers belong to the request until it returns.
// Errors: an errno code with the disk, the operation, the offset and the length in words.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "roost/base/result.h"
#include "roost/coro/task.h"

namespace roost {

/// How a range is to be zeroed.
struct ZeroFlags {
  bool may_unmap = true;  // a hole is as good; otherwise the space stays allocated
  bool fua = false;       // durable before it returns
  bool fast = false;      // ENOTSUP, and nothing done, where writing the zeroes would be as quick
};

/// What a piece of a disk holds. A value.
struct Extent {
  std::uint64_t length;  // in bytes, at least 1
  bool hole;             // takes no space
  bool zero;             // reads as zeroes

  bool operator==(const Extent&) const = default;
};

/// Where bytes of a disk lie. A value; the descriptor is the disk's.
struct FileLocation {
  int fd;
  std::uint64_t offset;
};

/// A disk. The file's head says who may call it, and how it fails.
class BlockDriver {
 public:
  virtual ~BlockDriver() = default;
  BlockDriver(const BlockDriver&) = delete;
  BlockDriver& operator=(const BlockDriver&) = delete;

  /// What the user called it; for messages.
  const std::string& name() const noexcept { return name_; }
  /// In bytes. Changed by resize() only.
  std::uint64_t size() const noexcept {
    // Acquire pairs with set_size(): who sees a larger size sees what made it so.
    return size_.load(std::memory_order_acquire);
  }
  /// Constant.
  bool read_only() const noexcept { return read_only_; }

  // REQUIRES, of all: offset + length <= size().

  /// Fills `to`.
  virtual Task<Result<void>> read(std::uint64_t offset, std::span<std::byte> to) = 0;

  /// Writes all of `from`, at most IOV_MAX pieces; with `fua`, durable before it returns.
  virtual Task<Result<void>> write(std::uint64_t offset, std::span<const iovec> from, bool fua) = 0;

  /// Makes every write that has returned, whichever context it was on, durable. A disk that failed
  /// to do so once fails for ever: the kernel may have dropped what it could not write.
  virtual Task<Result<void>> flush() = 0;

  /// Says that the range's contents are of no interest any more.
  virtual Task<Result<void>> discard(std::uint64_t offset, std::uint64_t length) = 0;

  /// Makes the range read as zeroes.
  virtual Task<Result<void>> write_zeroes(std::uint64_t offset, std::uint64_t length,
                                          ZeroFlags flags) = 0;

  /// Says what the range holds, from `offset` on: one to `max_extents` extents, neighbours of which
  /// differ, and which together are no longer than `length`, but may be shorter. Whoever cannot
  /// tell says data. What is written meanwhile may be seen or not.
  /// REQUIRES: length > 0, max_extents > 0.
  virtual Task<Result<std::vector<Extent>>> block_status(std::uint64_t offset, std::uint64_t length,
                                                         std::size_t max_extents);

  /// A file that holds what read() would give, all of it in memory now: who can send parts of files
  /// without copying need not read. None, if it is not so, or not worth asking. What is written to
  /// the range afterwards is seen by who looks later.
  virtual std::optional<FileLocation> in_page_cache(std::uint64_t offset, std::uint64_t length);

  /// The range is going to be read soon. Advice: a disk without a cache does nothing.
  virtual Task<Result<void>> cache(std::uint64_t offset, std::uint64_t length);

  /// Makes the disk larger, by zeroes, or smaller. ENOTSUP where it cannot.
  /// REQUIRES: no request is in flight beyond the smaller of both sizes.
  virtual Task<Result<void>> resize(std::uint64_t new_size);

  /// The last one of all, once no other is in flight and none is going to start. A disk may need it
  /// before it goes: one that another machine has, to say goodbye. The disk is closed even if this
  /// fails. EIO: writes that succeeded may be lost, though nothing but the other end has failed.
  virtual Task<Result<void>> close();

  /// Whether resize() and write_zeroes() with `fast` may succeed. Constant.
  virtual bool can_resize() const noexcept { return false; }
  virtual bool can_zero_fast() const noexcept { return false; }

 protected:
  BlockDriver(std::string name, std::uint64_t size, bool read_only)
      : name_(std::move(name)), size_(size), read_only_(read_only) {}

  /// For resize().
  void set_size(std::uint64_t size) noexcept { size_.store(size, std::memory_order_release); }

 private:
  const std::string name_;
  std::atomic<std::uint64_t> size_;  // any thread reads; resize() writes
  const bool read_only_;
};

/// How a disk is opened.
struct OpenOptions {
  bool read_only = false;
  /// For files: make it, sparse, of this many bytes, if there is none. 0: do not.
  std::uint64_t create_size = 0;
  /// For files: past the page cache, with O_DIRECT.
  bool direct = false;
};

/// A regular file or block device. Blocks while opening.
Result<std::unique_ptr<BlockDriver>> open_file(const std::string& path, OpenOptions options);

/// Memory that starts as zeroes and is taken as it is written.
Result<std::unique_ptr<BlockDriver>> make_memory_disk(std::uint64_t size, OpenOptions options);

/// Reads as zeroes, forgets writes.
Result<std::unique_ptr<BlockDriver>> make_null_disk(std::uint64_t size, OpenOptions options);

/// "mem:SIZE", "null:SIZE" or a path.
Result<std::unique_ptr<BlockDriver>> open_disk(const std::string& description, OpenOptions options);

/// Whether open_disk() understands `description`; opens nothing.
Result<void> check_description(const std::string& description);

/// "512", "4K", "1G"...: bytes, with the binary suffixes K, M, G and T. At most 2^63 - 1.
Result<std::uint64_t> parse_size(const std::string& text);

}  // namespace roost
