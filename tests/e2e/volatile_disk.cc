// SPDX-License-Identifier: MIT
//
// A disk with a volatile write cache, for testing that a flush is one.
//
//   volatile_disk [--fail-reads-from=N] [--fail-writes-from=N] [--fail-sync] BACKING MOUNTPOINT
//
// Mounts a FUSE file system whose one file, disk.img, has the size and the contents of BACKING.
// A write stays in the memory of this process; fsync, fdatasync and a write with O_DSYNC (or
// RWF_DSYNC) move what is there to BACKING. SIGUSR1 forgets what has not been synced, as a power
// failure would, and so does the end of the process. The --fail options make reads and writes at or
// above an offset, or every sync, fail with EIO.
//
// The page cache of the host cannot play this part: it outlives any process, so a server that never
// flushes would still pass.
//
// Threads: libfuse calls the operations from the main thread, SIGUSR1 is taken by another; the disk
// is guarded by one mutex.

#define FUSE_USE_VERSION 312

#include <fcntl.h>
#include <fuse3/fuse.h>
#include <linux/falloc.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <thread>

namespace {

constexpr uint64_t kBlockBytes = 4096;
constexpr const char* kDiskPath = "/disk.img";

struct Options {
  uint64_t fail_reads_from = std::numeric_limits<uint64_t>::max();
  uint64_t fail_writes_from = std::numeric_limits<uint64_t>::max();
  int fail_sync = 0;
};

class VolatileDisk {
 public:
  VolatileDisk(int fd, uint64_t size, const Options& options)
      : fd_(fd), size_(size), options_(options) {}

  uint64_t size() const { return size_; }

  // Each returns a count or a negative errno, as libfuse wants it.

  int read(char* to, size_t length, uint64_t offset) {
    std::lock_guard lock(mutex_);
    if (offset >= size_) return 0;
    length = std::min<uint64_t>(length, size_ - offset);
    if (offset + length > options_.fail_reads_from) return -EIO;
    for (size_t done = 0; done < length;) {
      const Span span = span_at(offset + done, length - done);
      const auto cached = cache_.find(span.block);
      if (cached != cache_.end()) {
        std::memcpy(to + done, cached->second.data() + span.start, span.length);
      } else if (int error = read_backing(to + done, span.length, offset + done)) {
        return error;
      }
      done += span.length;
    }
    return static_cast<int>(length);
  }

  // Writes zeroes where `from` is null.
  int write(const char* from, size_t length, uint64_t offset) {
    std::lock_guard lock(mutex_);
    if (offset > size_ || length > size_ - offset) return -ENOSPC;
    if (offset + length > options_.fail_writes_from) return -EIO;
    for (size_t done = 0; done < length;) {
      const Span span = span_at(offset + done, length - done);
      auto [cached, is_new] = cache_.try_emplace(span.block);
      if (is_new && span.length != kBlockBytes) {
        if (int error = read_backing(cached->second.data(), kBlockBytes, span.block)) {
          cache_.erase(cached);
          return error;
        }
      }
      if (from != nullptr) {
        std::memcpy(cached->second.data() + span.start, from + done, span.length);
      } else {
        std::memset(cached->second.data() + span.start, 0, span.length);
      }
      done += span.length;
    }
    return static_cast<int>(length);
  }

  int sync() {
    std::lock_guard lock(mutex_);
    if (options_.fail_sync) return -EIO;
    while (!cache_.empty()) {
      const auto& [offset, block] = *cache_.begin();
      const size_t length = std::min(kBlockBytes, size_ - offset);
      const ssize_t count = pwrite(fd_, block.data(), length, static_cast<off_t>(offset));
      if (count != static_cast<ssize_t>(length)) return count < 0 ? -errno : -EIO;
      cache_.erase(cache_.begin());
    }
    return 0;
  }

  void forget() {
    std::lock_guard lock(mutex_);
    cache_.clear();
  }

 private:
  struct Span {
    uint64_t block;  // offset of the cache block on the disk
    size_t start;    // within the block
    size_t length;
  };

  static Span span_at(uint64_t offset, size_t length) {
    const size_t start = offset % kBlockBytes;
    return {offset - start, start, std::min<size_t>(length, kBlockBytes - start)};
  }

  // Beyond the end of the backing file there are zeroes.
  int read_backing(char* to, size_t length, uint64_t offset) {
    const ssize_t count = pread(fd_, to, length, static_cast<off_t>(offset));
    if (count < 0) return -errno;
    std::memset(to + count, 0, length - static_cast<size_t>(count));
    return 0;
  }

  const int fd_;
  const uint64_t size_;
  const Options options_;

  std::mutex mutex_;
  std::map<uint64_t, std::array<char, kBlockBytes>> cache_;  // guarded by mutex_, by offset
};

struct Mount {
  VolatileDisk* disk;
  // Set once by init, before any request; read by the thread that takes SIGUSR1.
  std::atomic<struct fuse*> fuse{nullptr};
};

Mount& mount() { return *static_cast<Mount*>(fuse_get_context()->private_data); }

bool is_disk(const char* path) { return std::strcmp(path, kDiskPath) == 0; }

void* on_init(fuse_conn_info* connection, fuse_config* config) {
  // The kernel must hand over every write at once, not when it sees fit.
  connection->want &= ~static_cast<unsigned>(FUSE_CAP_WRITEBACK_CACHE);
  config->use_ino = 0;
  Mount& self = mount();
  self.fuse.store(fuse_get_context()->fuse);
  return &self;
}

int on_getattr(const char* path, struct stat* stat, fuse_file_info*) {
  std::memset(stat, 0, sizeof *stat);
  if (std::strcmp(path, "/") == 0) {
    stat->st_mode = S_IFDIR | 0755;
    stat->st_nlink = 2;
    return 0;
  }
  if (!is_disk(path)) return -ENOENT;
  stat->st_mode = S_IFREG | 0644;
  stat->st_nlink = 1;
  stat->st_size = static_cast<off_t>(mount().disk->size());
  stat->st_blocks = stat->st_size / 512;
  return 0;
}

int on_readdir(const char*, void* buffer, fuse_fill_dir_t fill, off_t, fuse_file_info*,
               fuse_readdir_flags) {
  fill(buffer, kDiskPath + 1, nullptr, 0, fuse_fill_dir_flags{});
  return 0;
}

int on_open(const char* path, fuse_file_info*) { return is_disk(path) ? 0 : -ENOENT; }

int on_read(const char*, char* to, size_t length, off_t offset, fuse_file_info*) {
  return mount().disk->read(to, length, static_cast<uint64_t>(offset));
}

int on_write(const char*, const char* from, size_t length, off_t offset, fuse_file_info* info) {
  VolatileDisk& disk = *mount().disk;
  const int written = disk.write(from, length, static_cast<uint64_t>(offset));
  // RWF_DSYNC arrives here as O_DSYNC in the flags of the single write.
  if (written >= 0 && (info->flags & O_DSYNC) != 0) {
    if (int error = disk.sync()) return error;
  }
  return written;
}

int on_fsync(const char*, int, fuse_file_info*) { return mount().disk->sync(); }

int on_fallocate(const char*, int mode, off_t offset, off_t length, fuse_file_info*) {
  VolatileDisk& disk = *mount().disk;
  const uint64_t from = static_cast<uint64_t>(offset);
  if ((mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)) == 0) return -EOPNOTSUPP;
  if (from >= disk.size()) return 0;
  const uint64_t count = std::min(static_cast<uint64_t>(length), disk.size() - from);
  const int written = disk.write(nullptr, count, from);
  return written < 0 ? written : 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  const fuse_opt specification[] = {
      {"--fail-reads-from=%lu", offsetof(Options, fail_reads_from), 0},
      {"--fail-writes-from=%lu", offsetof(Options, fail_writes_from), 0},
      {"--fail-sync", offsetof(Options, fail_sync), 1},
      FUSE_OPT_END,
  };
  if (argc < 3) {
    std::fprintf(stderr, "usage: volatile_disk [--fail-...] BACKING MOUNTPOINT\n");
    return 2;
  }
  const char* backing = argv[argc - 2];
  argv[argc - 2] = argv[argc - 1];
  fuse_args args = FUSE_ARGS_INIT(argc - 1, argv);
  if (fuse_opt_parse(&args, &options, specification, nullptr) != 0) return 2;
  // In the foreground, so that whoever started this process can end it by its pid.
  fuse_opt_add_arg(&args, "-f");
  fuse_opt_add_arg(&args, "-s");

  const int fd = open(backing, O_RDWR | O_CLOEXEC);
  struct stat stat;
  if (fd < 0 || fstat(fd, &stat) != 0) {
    std::perror(backing);
    return 1;
  }
  VolatileDisk disk(fd, static_cast<uint64_t>(stat.st_size), options);
  Mount mount{&disk};

  // Blocked before libfuse starts its threads, so that only the one below takes it.
  sigset_t power_failure;
  sigemptyset(&power_failure);
  sigaddset(&power_failure, SIGUSR1);
  pthread_sigmask(SIG_BLOCK, &power_failure, nullptr);
  std::thread([&mount, power_failure] {
    for (;;) {
      int number = 0;
      if (sigwait(&power_failure, &number) != 0) continue;
      mount.disk->forget();
      // What the kernel has cached of the file is lost as well.
      if (struct fuse* fuse = mount.fuse.load()) fuse_invalidate_path(fuse, kDiskPath);
    }
  }).detach();

  fuse_operations operations{};
  operations.init = on_init;
  operations.getattr = on_getattr;
  operations.readdir = on_readdir;
  operations.open = on_open;
  operations.read = on_read;
  operations.write = on_write;
  operations.fsync = on_fsync;
  operations.fallocate = on_fallocate;
  const int result = fuse_main(args.argc, args.argv, &operations, &mount);
  fuse_opt_free_args(&args);
  // The thread that takes signals still refers to what is on this stack.
  std::_Exit(result);
}
