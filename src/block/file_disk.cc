// SPDX-License-Identifier: MIT
// A regular file or block device, through the page cache: the kernel caches and reads ahead, and
// only flush() and FUA writes wait for the device. Or, with O_DIRECT, past it: then requests that
// are not aligned as the file wants it go through memory that is, and a write of a part of a block
// reads the block first, while no other write may touch it.
#include "block/file_disk.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "block/direct_io.h"
#include "block/range_lock.h"
#include "roost/aio/io.h"
#include "roost/aio/unique_fd.h"
#include "roost/block/block_driver.h"

namespace roost {

namespace {

constexpr std::size_t kZeroChunk = 1 << 20;
constexpr std::size_t kBounceSize = 1 << 20;  // at least two blocks
constexpr std::size_t kExtentsAtOnce = 1024;  // a worker looks for them some microseconds each

// Whether the range lies in the page cache: cachestat(2) of Linux 6.5, which the C library does not
// know. A page that is being read counts: whoever uses it waits for it.
bool all_in_page_cache(int fd, std::uint64_t offset, std::uint64_t length) noexcept {
  struct Range {
    std::uint64_t offset;
    std::uint64_t length;
  };
  struct Counts {
    std::uint64_t cached;
    std::uint64_t dirty;
    std::uint64_t under_writeback;
    std::uint64_t evicted;
    std::uint64_t recently_evicted;
  };
  constexpr long kCachestat = 451;
  static const auto page_size = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  Range range{offset, length};
  Counts counts{};
  if (::syscall(kCachestat, fd, &range, &counts, 0U) < 0) return false;
  const std::uint64_t pages = (offset + length - 1) / page_size - offset / page_size + 1;
  if (counts.cached != pages) return false;
  // The page in which the file ends counts, too. (A device has no size there.)
  struct stat status {};
  if (::fstat(fd, &status) < 0) return false;
  return !S_ISREG(status.st_mode) || offset + length <= static_cast<std::uint64_t>(status.st_size);
}

// What a short write left to do.
class RemainingBuffers {
 public:
  explicit RemainingBuffers(std::span<const iovec> all) : all_(all) {
    for (const iovec& one : all) left_ += one.iov_len;
  }

  std::uint64_t left() const noexcept { return left_; }

  std::span<const iovec> get() const noexcept {
    return partial_.empty() ? all_ : std::span<const iovec>(partial_);
  }

  void advance(std::uint64_t count) {
    left_ -= count;
    if (left_ == 0) return;
    if (partial_.empty()) partial_.assign(all_.begin(), all_.end());
    auto first = partial_.begin();
    while (count >= first->iov_len) {
      count -= first->iov_len;
      ++first;
    }
    first->iov_base = static_cast<std::byte*>(first->iov_base) + count;
    first->iov_len -= count;
    partial_.erase(partial_.begin(), first);
  }

 private:
  const std::span<const iovec> all_;
  std::vector<iovec> partial_;  // only once a write was short
  std::uint64_t left_ = 0;
};

// The largest piece of data that was found last: who asks within it, for instance what of a read is
// zeroes, need not ask a worker. To take a hole for data is never wrong, so it may be out of date;
// only when the disk itself makes a hole is it forgotten.
//
// Threads: any.
class KnownData {
 public:
  bool covers(std::uint64_t offset, std::uint64_t length) {
    std::lock_guard lock(mutex_);
    return offset >= begin_ && offset + length <= end_;
  }

  /// `generation` is from before it was looked for: what was forgotten since is not learnt again.
  void learn(std::uint64_t offset, std::uint64_t length, std::uint64_t generation) {
    std::lock_guard lock(mutex_);
    if (generation != generation_) return;
    begin_ = offset;
    end_ = offset + length;
  }

  std::uint64_t generation() {
    std::lock_guard lock(mutex_);
    return generation_;
  }

  void forget() {
    std::lock_guard lock(mutex_);
    ++generation_;
    begin_ = end_ = 0;
  }

 private:
  std::mutex mutex_;  // guards all
  std::uint64_t begin_ = 0;
  std::uint64_t end_ = 0;
  std::uint64_t generation_ = 0;  // so often was it forgotten
};

class FileDisk final : public BlockDriver {
 public:
  FileDisk(std::string name, std::uint64_t size, bool read_only, UniqueFd fd,
           std::optional<DirectAlignment> direct, bool device)
      : BlockDriver(std::move(name), size, read_only),
        fd_(std::move(fd)),
        direct_(direct),
        device_(device) {}

  Task<Result<void>> read(std::uint64_t offset, std::span<std::byte> to) override {
    if (direct_) co_return co_await read_directly(offset, to);
    while (!to.empty()) {
      const std::int64_t n = co_await io_read(fd_.get(), to, offset);
      if (n > 0) [[likely]] {
        to = to.subspan(static_cast<std::size_t>(n));
        offset += static_cast<std::uint64_t>(n);
      } else if (n == 0) {
        co_return fail(EIO, describe("pread", offset, to.size()) + ": the file has been truncated");
      } else if (n != -EINTR && n != -EAGAIN) {
        co_return fail(static_cast<int>(-n), describe("pread", offset, to.size()));
      }
    }
    co_return Result<void>();
  }

  Task<Result<void>> write(std::uint64_t offset, std::span<const iovec> from, bool fua) override {
    Result<void> written;
    if (direct_) {
      written = co_await write_directly(offset, from);
    } else {
      written = co_await write_all(offset, from);
    }
    if (!written) co_return written;
    // Not RWF_DSYNC: the kernel tells of a write that could not be brought to the device once per
    // open file, whoever asks first. So there is one place that asks.
    if (fua) co_return co_await flush();
    co_return Result<void>();
  }

  // One fdatasync at a time; those that come meanwhile share the next. So whoever is told "success"
  // knows the outcome of every sync before his own, and many flushes cost little more than one.
  Task<Result<void>> flush() override {
    Waiter me;
    const auto join = [this, waiter = &me](Coroutine& co) noexcept {
      waiter->co = &co;
      bool first = false;
      {
        std::lock_guard lock(flush_mutex_);
        waiter->next = next_flush_;
        next_flush_ = waiter;
        first = !std::exchange(flushing_, true);
      }
      // The first is its own leader. From the unlock on, only a leader may touch the others.
      if (first) wake_waiter(co);
    };
    co_await suspend_waiting("a flush", join);
    if (!me.done) co_await lead_flush();
    if (me.error != 0) co_return fail(me.error, "fdatasync " + name());
    co_return Result<void>();
  }

  Task<Result<void>> discard(std::uint64_t offset, std::uint64_t length) override {
    if (length == 0) co_return Result<void>();
    const std::int64_t result = co_await allocate(FALLOC_FL_PUNCH_HOLE, offset, length);
    known_data_.forget();
    // Advice: where the file system cannot, nothing is wrong.
    if (result < 0 && result != -EOPNOTSUPP && result != -EINVAL) {
      co_return fail(static_cast<int>(-result), describe("punch a hole in", offset, length));
    }
    co_return Result<void>();
  }

  Task<Result<void>> write_zeroes(std::uint64_t offset, std::uint64_t length,
                                  ZeroFlags flags) override {
    if (length == 0) co_return Result<void>();
    if (flags.fast && device_ && !flags.may_unmap) {
      // The kernel would write them.
      co_return fail(ENOTSUP, describe("write zeroes quickly to", offset, length));
    }
    const int mode = flags.may_unmap ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;
    const std::int64_t result = co_await allocate(mode, offset, length);
    known_data_.forget();
    if (result == 0) {
      if (flags.fua) co_return co_await flush();
      co_return Result<void>();
    }
    if (result != -EOPNOTSUPP && result != -EINVAL) {
      co_return fail(static_cast<int>(-result), describe("write zeroes to", offset, length));
    }
    if (flags.fast) co_return fail(ENOTSUP, describe("write zeroes quickly to", offset, length));
    co_return co_await write_zero_bytes(offset, length, flags.fua);
  }

  // A file system takes the calls or not, and only a try tells. A device often writes zeroes in the
  // end, whatever it is asked.
  bool can_zero_fast() const noexcept override { return !device_ && !read_only(); }

  // Of a device nobody knows what was discarded, and what that reads as. A range of a file that has
  // been allocated and not written counts as a hole: nothing is read for it.
  Task<Result<std::vector<Extent>>> block_status(std::uint64_t offset, std::uint64_t length,
                                                 std::size_t max_extents) override {
    std::vector<Extent> extents;
    if (device_) {
      extents.push_back({.length = length, .hole = false, .zero = false});
      co_return extents;
    }
    if (known_data_.covers(offset, length)) {
      extents.push_back({.length = length, .hole = false, .zero = false});
      co_return extents;
    }
    const std::uint64_t generation = known_data_.generation();
    std::vector<FileExtent> found(std::min(max_extents, kExtentsAtOnce));
    const std::int64_t count = co_await io_find_extents(fd_.get(), found, offset, length);
    if (count == -EINVAL || count == -EOPNOTSUPP) {
      extents.push_back({.length = length, .hole = false, .zero = false});
      co_return extents;
    }
    if (count == -ENXIO) {
      co_return fail(EIO,
                     describe("find holes in", offset, length) + ": the file has been truncated");
    }
    if (count < 0) {
      co_return fail(static_cast<int>(-count), describe("find holes in", offset, length));
    }
    found.resize(static_cast<std::size_t>(count));
    extents.reserve(found.size());
    std::uint64_t largest = 0;
    std::uint64_t largest_at = 0;
    for (const FileExtent& one : found) {
      if (!one.hole && one.length > largest) {
        largest = one.length;
        largest_at = offset;
      }
      extents.push_back(
          {.length = std::min(one.length, length), .hole = one.hole, .zero = one.hole});
      offset += one.length;
      length -= extents.back().length;
    }
    if (largest > 0) known_data_.learn(largest_at, largest, generation);
    co_return extents;
  }

  std::optional<FileLocation> in_page_cache(std::uint64_t offset, std::uint64_t length) override {
    if (direct_ || !all_in_page_cache(fd_.get(), offset, length)) return std::nullopt;
    return FileLocation{fd_.get(), offset};
  }

  Task<Result<void>> cache(std::uint64_t offset, std::uint64_t length) override {
    if (direct_) co_return Result<void>();
    const std::int64_t result = co_await io_read_ahead(fd_.get(), offset, length);
    // Advice: where there is no cache, nothing is wrong.
    if (result < 0 && result != -EOPNOTSUPP && result != -EINVAL) {
      co_return fail(static_cast<int>(-result), describe("cache", offset, length));
    }
    co_return Result<void>();
  }

  bool can_resize() const noexcept override { return !device_ && !read_only(); }

  Task<Result<void>> resize(std::uint64_t new_size) override {
    const std::string what = "resize " + name() + " to " + std::to_string(new_size);
    if (device_) co_return fail(ENOTSUP, what + ": it is a device");
    if (read_only()) co_return fail(ENOTSUP, what + ": it is read-only");
    if (direct_ && !direct_->fits(new_size)) {
      co_return fail(EINVAL, what + ": no multiple of " + std::to_string(direct_->offset) +
                                 " bytes, as O_DIRECT wants it");
    }
    if (new_size > std::uint64_t{std::numeric_limits<std::int64_t>::max()}) {
      co_return fail(EFBIG, what);
    }
    const std::int64_t result = co_await io_truncate(fd_.get(), new_size);
    known_data_.forget();
    if (result < 0) co_return fail(static_cast<int>(-result), what);
    set_size(new_size);
    co_return Result<void>();
  }

 private:
  struct Waiter {
    Coroutine* co = nullptr;
    Waiter* next = nullptr;
    int error = 0;
    bool done = false;
  };

  // Syncs for everybody who waits now, and hands the lead to one of those who came meanwhile.
  Task<void> lead_flush() {
    Waiter* batch = nullptr;
    {
      std::lock_guard lock(flush_mutex_);
      batch = std::exchange(next_flush_, nullptr);
    }
    std::int64_t result = 0;
    do {
      IoAwaiter sync = io_data_sync(fd_.get());
      sync.request().direct = direct_.has_value();
      result = co_await sync;
    } while (result == -EINTR);
    // For ever: the kernel may have dropped what it could not write.
    if (result < 0) flush_error_ = static_cast<int>(-result);
    const int error = flush_error_;
    Waiter* leader = nullptr;
    {
      std::lock_guard lock(flush_mutex_);
      leader = next_flush_;
      if (!leader) flushing_ = false;
    }
    const Coroutine* const self = Coroutine::self();
    while (Waiter* waiter = batch) {
      batch = waiter->next;
      waiter->error = error;
      waiter->done = true;
      if (waiter->co != self) wake_waiter(*waiter->co);
    }
    if (leader) wake_waiter(*leader->co);
  }

  std::string describe(const char* what, std::uint64_t offset, std::uint64_t length) const {
    return std::string(what) + " " + name() + " at " + std::to_string(offset) + "+" +
           std::to_string(length);
  }

  Task<Result<void>> write_all(std::uint64_t offset, std::span<const iovec> from) {
    RemainingBuffers buffers(from);
    while (buffers.left() > 0) {
      IoAwaiter write = io_writev(fd_.get(), buffers.get(), offset);
      write.request().direct = direct_.has_value();
      const std::int64_t n = co_await write;
      if (n > 0) [[likely]] {
        buffers.advance(static_cast<std::uint64_t>(n));
        offset += static_cast<std::uint64_t>(n);
      } else if (n == 0 || (n != -EINTR && n != -EAGAIN)) {
        const int error = n == 0 ? ENOSPC : static_cast<int>(-n);
        co_return fail(error, describe("pwrite", offset, buffers.left()));
      }
    }
    co_return Result<void>();
  }

  // fallocate(2), which knows no alignment: at its edges the kernel changes parts of blocks.
  Task<std::int64_t> allocate(int mode, std::uint64_t offset, std::uint64_t length) {
    std::optional<RangeLock::Range> touched;
    if (direct_) {
      touched.emplace(direct_->down(offset), direct_->up(offset + length), false);
      co_await writes_.acquire(*touched);
    }
    co_return co_await io_allocate(fd_.get(), mode | FALLOC_FL_KEEP_SIZE, offset, length);
  }

  // ---- With O_DIRECT

  Task<Result<void>> read_directly(std::uint64_t offset, std::span<std::byte> to) {
    if (direct_->fits(offset, to)) co_return co_await read_blocks(offset, to, to.size());
    if (to.empty()) co_return Result<void>();
    const std::uint64_t all_begin = direct_->down(offset);
    const std::uint64_t all = direct_->up(offset + to.size()) - all_begin;
    const BounceBuffer bounce(std::min<std::uint64_t>(all, kBounceSize));
    if (!bounce) co_return fail(ENOMEM, describe("pread", offset, to.size()));
    while (!to.empty()) {
      const std::uint64_t begin = direct_->down(offset);
      const std::size_t skip = offset - begin;
      const std::size_t count = std::min(to.size(), bounce.get().size() - skip);
      const auto blocks = bounce.get().first(direct_->up(skip + count));
      const Result<void> done = co_await read_blocks(begin, blocks, skip + count);
      if (!done) co_return done;
      std::memcpy(to.data(), blocks.data() + skip, count);
      to = to.subspan(count);
      offset += count;
    }
    co_return Result<void>();
  }

  // Reads aligned blocks, of which the file has to have the first `needed` bytes.
  Task<Result<void>> read_blocks(std::uint64_t offset, std::span<std::byte> to,
                                 std::size_t needed) {
    std::size_t done = 0;
    while (done < needed) {
      IoAwaiter read = io_read(fd_.get(), to.subspan(done), offset + done);
      read.request().direct = true;
      const std::int64_t n = co_await read;
      if (n == -EINTR || n == -EAGAIN) continue;
      if (n < 0) co_return fail(static_cast<int>(-n), describe("pread", offset, needed));
      if (done + static_cast<std::size_t>(n) >= needed) break;
      // Only at the end of the file does it stop within a block.
      const std::uint64_t whole = direct_->down(static_cast<std::uint64_t>(n));
      if (whole == 0) {
        co_return fail(EIO, describe("pread", offset, needed) + ": the file has been truncated");
      }
      done += whole;
    }
    co_return Result<void>();
  }

  Task<Result<void>> write_directly(std::uint64_t offset, std::span<const iovec> from) {
    std::uint64_t length = 0;
    for (const iovec& piece : from) length += piece.iov_len;
    if (length == 0) co_return Result<void>();
    const bool whole_blocks = direct_->fits(offset) && direct_->fits(length);
    // A block that is read, changed and written back must not be written by others meanwhile: what
    // they wrote would be undone.
    RangeLock::Range touched(direct_->down(offset), direct_->up(offset + length), !whole_blocks);
    co_await writes_.acquire(touched);
    if (direct_->fits(offset, from)) co_return co_await write_all(offset, from);

    const std::uint64_t all_begin = direct_->down(offset);
    const std::uint64_t all = direct_->up(offset + length) - all_begin;
    const BounceBuffer bounce(std::min<std::uint64_t>(all, kBounceSize));
    if (!bounce) co_return fail(ENOMEM, describe("pwrite", offset, length));
    GatherCursor cursor(from);
    while (length > 0) {
      const std::uint64_t begin = direct_->down(offset);
      const std::size_t skip = offset - begin;
      const std::size_t count = std::min<std::uint64_t>(length, bounce.get().size() - skip);
      const auto blocks = bounce.get().first(direct_->up(skip + count));
      const std::size_t block = direct_->offset;
      const std::size_t last = blocks.size() - block;
      const bool cut_end = skip + count < blocks.size();
      if (skip > 0 || (cut_end && last == 0)) {
        const Result<void> head = co_await read_blocks(begin, blocks.first(block), block);
        if (!head) co_return head;
      }
      if (cut_end && last > 0) {
        const Result<void> tail = co_await read_blocks(begin + last, blocks.subspan(last), block);
        if (!tail) co_return tail;
      }
      cursor.copy_to(blocks.subspan(skip, count));
      const iovec piece{blocks.data(), blocks.size()};
      const Result<void> written = co_await write_all(begin, std::span(&piece, 1));
      if (!written) co_return written;
      offset += count;
      length -= count;
    }
    co_return Result<void>();
  }

  Task<Result<void>> write_zero_bytes(std::uint64_t offset, std::uint64_t length, bool fua) {
    alignas(4096) static constinit std::array<std::byte, kZeroChunk> zeroes{};
    while (length > 0) {
      const std::uint64_t count = std::min<std::uint64_t>(length, kZeroChunk);
      const iovec piece{zeroes.data(), count};
      const Result<void> written = co_await write(offset, std::span(&piece, 1), fua);
      if (!written) co_return written;
      offset += count;
      length -= count;
    }
    co_return Result<void>();
  }

  const UniqueFd fd_;
  const std::optional<DirectAlignment> direct_;  // none: through the page cache
  const bool device_;                            // no regular file
  RangeLock writes_;                             // with O_DIRECT: what writes under way touch

  KnownData known_data_;

  std::mutex flush_mutex_;
  Waiter* next_flush_ = nullptr;  // guarded: wait for the next sync
  bool flushing_ = false;         // guarded: somebody leads
  int flush_error_ = 0;           // the leader's: an errno once durability was lost, never cleared
};

struct Found {
  std::uint64_t size = 0;
  bool device = false;
};

Result<Found> look_at(int fd, const std::string& path) {
  struct stat info;
  if (::fstat(fd, &info) < 0) return fail(errno, path);
  if (S_ISREG(info.st_mode)) {
    return Found{.size = static_cast<std::uint64_t>(info.st_size), .device = false};
  }
  if (S_ISBLK(info.st_mode)) {
    std::uint64_t size = 0;
    if (::ioctl(fd, BLKGETSIZE64, &size) < 0) return fail(errno, path);
    return Found{.size = size, .device = true};
  }
  if (S_ISDIR(info.st_mode)) return fail(EISDIR, path);
  return fail(EINVAL, path + ": neither a regular file nor a block device");
}

}  // namespace

std::unique_ptr<BlockDriver> make_file_disk(std::string name, std::uint64_t size, bool read_only,
                                            UniqueFd fd, std::optional<DirectAlignment> direct,
                                            bool device) {
  return std::make_unique<FileDisk>(std::move(name), size, read_only, std::move(fd), direct,
                                    device);
}

Result<std::unique_ptr<BlockDriver>> open_file(const std::string& path, OpenOptions options) {
  const int access =
      (options.read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC | (options.direct ? O_DIRECT : 0);
  UniqueFd fd(::open(path.c_str(), access | O_NONBLOCK));
  const bool made = !fd && errno == ENOENT && options.create_size > 0 && !options.read_only;
  if (made) {
    fd = UniqueFd(::open(path.c_str(), access | O_CREAT | O_EXCL, 0666));
    if (fd && ::ftruncate(fd.get(), static_cast<off_t>(options.create_size)) < 0) {
      const int error = errno;
      ::unlink(path.c_str());
      return fail(error,
                  path + ": cannot be made " + std::to_string(options.create_size) + " bytes long");
    }
  }
  if (!fd && errno == EINVAL && options.direct) {
    if (made) ::unlink(path.c_str());
    return fail(EINVAL, path + ": its file system does not allow O_DIRECT");
  }
  if (!fd) return fail(errno, path);
  const auto found = look_at(fd.get(), path);
  if (!found) return std::unexpected(found.error());
  std::optional<DirectAlignment> direct;
  if (options.direct) {
    const auto alignment = direct_alignment(fd.get(), path);
    if (!alignment) return std::unexpected(alignment.error());
    direct = *alignment;
    if (!direct->fits(found->size) && !options.read_only) {
      return fail(EINVAL, path + ": a size of " + std::to_string(found->size) +
                              " bytes, which is no multiple of " + std::to_string(direct->offset) +
                              ", cannot be written with O_DIRECT");
    }
  }
  // Not wanted for I/O, only so that opening a pipe or a terminal by mistake does not hang.
  ::fcntl(fd.get(), F_SETFL, ::fcntl(fd.get(), F_GETFL) & ~O_NONBLOCK);
  return make_file_disk(path, found->size, options.read_only, std::move(fd), direct, found->device);
}

}  // namespace roost
