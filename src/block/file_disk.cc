// SPDX-License-Identifier: MIT
// A regular file or block device, through the page cache: the kernel caches and reads ahead, and
// only flush() and FUA writes wait for the device.

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <mutex>
#include <utility>
#include <vector>

#include "roost/aio/io.h"
#include "roost/aio/unique_fd.h"
#include "roost/block/block_driver.h"

namespace roost {

namespace {

constexpr std::size_t kZeroChunk = 1 << 20;

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

class FileDisk final : public BlockDriver {
 public:
  FileDisk(std::string name, std::uint64_t size, bool read_only, UniqueFd fd)
      : BlockDriver(std::move(name), size, read_only), fd_(std::move(fd)) {}

  Task<Result<void>> read(std::uint64_t offset, std::span<std::byte> to) override {
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
    RemainingBuffers buffers(from);
    while (buffers.left() > 0) {
      const std::int64_t n = co_await io_writev(fd_.get(), buffers.get(), offset);
      if (n > 0) [[likely]] {
        buffers.advance(static_cast<std::uint64_t>(n));
        offset += static_cast<std::uint64_t>(n);
      } else if (n == 0 || (n != -EINTR && n != -EAGAIN)) {
        const int error = n == 0 ? ENOSPC : static_cast<int>(-n);
        co_return fail(error, describe("pwrite", offset, buffers.left()));
      }
    }
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
    const std::int64_t result =
        co_await io_allocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
    // Advice: where the file system cannot, nothing is wrong.
    if (result < 0 && result != -EOPNOTSUPP && result != -EINVAL) {
      co_return fail(static_cast<int>(-result), describe("punch a hole in", offset, length));
    }
    co_return Result<void>();
  }

  Task<Result<void>> write_zeroes(std::uint64_t offset, std::uint64_t length,
                                  ZeroFlags flags) override {
    if (length == 0) co_return Result<void>();
    const int mode = flags.may_unmap ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;
    const std::int64_t result =
        co_await io_allocate(fd_.get(), mode | FALLOC_FL_KEEP_SIZE, offset, length);
    if (result == 0) {
      if (flags.fua) co_return co_await flush();
      co_return Result<void>();
    }
    if (result != -EOPNOTSUPP && result != -EINVAL) {
      co_return fail(static_cast<int>(-result), describe("write zeroes to", offset, length));
    }
    co_return co_await write_zero_bytes(offset, length, flags.fua);
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
      result = co_await io_data_sync(fd_.get());
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

  Task<Result<void>> write_zero_bytes(std::uint64_t offset, std::uint64_t length, bool fua) {
    static const std::vector<std::byte> zeroes(kZeroChunk);
    while (length > 0) {
      const std::uint64_t count = std::min<std::uint64_t>(length, kZeroChunk);
      const iovec piece{const_cast<std::byte*>(zeroes.data()), count};
      const Result<void> written = co_await write(offset, std::span(&piece, 1), fua);
      if (!written) co_return written;
      offset += count;
      length -= count;
    }
    co_return Result<void>();
  }

  const UniqueFd fd_;

  std::mutex flush_mutex_;
  Waiter* next_flush_ = nullptr;  // guarded: wait for the next sync
  bool flushing_ = false;         // guarded: somebody leads
  int flush_error_ = 0;           // the leader's: an errno once durability was lost, never cleared
};

Result<std::uint64_t> size_of(int fd, const std::string& path) {
  struct stat info;
  if (::fstat(fd, &info) < 0) return fail(errno, path);
  if (S_ISREG(info.st_mode)) return static_cast<std::uint64_t>(info.st_size);
  if (S_ISBLK(info.st_mode)) {
    std::uint64_t size = 0;
    if (::ioctl(fd, BLKGETSIZE64, &size) < 0) return fail(errno, path);
    return size;
  }
  if (S_ISDIR(info.st_mode)) return fail(EISDIR, path);
  return fail(EINVAL, path + ": neither a regular file nor a block device");
}

}  // namespace

Result<std::unique_ptr<BlockDriver>> open_file(const std::string& path, OpenOptions options) {
  const int access = (options.read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC;
  UniqueFd fd(::open(path.c_str(), access | O_NONBLOCK));
  if (!fd && errno == ENOENT && options.create_size > 0 && !options.read_only) {
    fd = UniqueFd(::open(path.c_str(), access | O_CREAT | O_EXCL, 0666));
    if (fd && ::ftruncate(fd.get(), static_cast<off_t>(options.create_size)) < 0) {
      const int error = errno;
      ::unlink(path.c_str());
      return fail(error,
                  path + ": cannot be made " + std::to_string(options.create_size) + " bytes long");
    }
  }
  if (!fd) return fail(errno, path);
  const auto size = size_of(fd.get(), path);
  if (!size) return std::unexpected(size.error());
  // Not wanted for I/O, only so that opening a pipe or a terminal by mistake does not hang.
  ::fcntl(fd.get(), F_SETFL, ::fcntl(fd.get(), F_GETFL) & ~O_NONBLOCK);
  return std::make_unique<FileDisk>(path, *size, options.read_only, std::move(fd));
}

}  // namespace roost
