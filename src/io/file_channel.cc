// SPDX-License-Identifier: MIT
#include "roost/io/file_channel.h"

#include <fcntl.h>
#include <limits.h>

#include <algorithm>
#include <cerrno>

namespace roost {

namespace {

// One operation of the kernel's transfers no more.
constexpr std::size_t kMaxTransfer = 1u << 30;

}  // namespace

FileChannel::FileChannel(UniqueFd fd, std::string name, std::uint64_t offset)
    : Channel(std::move(name)), fd_(std::move(fd)), read_offset_(offset), write_offset_(offset) {}

FileChannel::~FileChannel() = default;

Result<std::unique_ptr<FileChannel>> FileChannel::open(const std::string& path, int flags,
                                                       unsigned mode) {
  UniqueFd fd(::open(path.c_str(), flags | O_CLOEXEC, mode));
  if (!fd) return fail(errno, "open " + path);
  return std::make_unique<FileChannel>(std::move(fd), path);
}

Task<Result<std::size_t>> FileChannel::do_readv(std::span<const iovec> to, bool,
                                                std::stop_token stop) {
  if (read_ended_) co_return 0;
  const auto piece = std::ranges::find_if(to, [](const iovec& one) { return one.iov_len > 0; });
  const std::span<std::byte> buffer(static_cast<std::byte*>(piece->iov_base),
                                    std::min(piece->iov_len, kMaxTransfer));
  for (;;) {
    if (in_transit(Direction::kRead)) co_await arrive();
    CancellableIoAwaiter wait(io_read(fd_.get(), buffer, read_offset_).request(), stop, &slots_[0]);
    const std::int64_t n = co_await std::move(wait);
    if (n >= 0) {
      read_offset_ += static_cast<std::uint64_t>(n);
      co_return static_cast<std::size_t>(n);
    }
    if (n == -ECANCELED && stop.stop_requested())
      co_return cancelled("read from", "nothing was taken");
    if (n == -ECANCELED || n == -EINTR || n == -EAGAIN) continue;
    co_return failure("read from", static_cast<int>(-n));
  }
}

Task<Result<std::size_t>> FileChannel::do_writev(std::span<const iovec> from, bool,
                                                 std::stop_token stop) {
  if (write_ended_) co_return failure("write to", EPIPE);
  const auto pieces = from.first(std::min<std::size_t>(from.size(), IOV_MAX));
  for (;;) {
    if (in_transit(Direction::kWrite)) co_await arrive();
    CancellableIoAwaiter wait(io_writev(fd_.get(), pieces, write_offset_).request(), stop,
                              &slots_[1]);
    const std::int64_t n = co_await std::move(wait);
    if (n > 0) {
      write_offset_ += static_cast<std::uint64_t>(n);
      co_return static_cast<std::size_t>(n);
    }
    if (n == -ECANCELED && stop.stop_requested())
      co_return cancelled("write to", "nothing was sent");
    if (n == -ECANCELED || n == -EINTR || n == -EAGAIN) continue;
    co_return failure("write to", n == 0 ? ENOSPC : static_cast<int>(-n));
  }
}

Task<Result<void>> FileChannel::do_shutdown(StreamEnd end, std::stop_token stop) {
  if (end == StreamEnd::kRead) {
    read_ended_ = true;
    co_return Result<void>();
  }
  write_ended_ = true;
  const std::int64_t result = co_await io_data_sync(fd_.get(), std::move(stop));
  // What cannot be synced, a pipe under /dev/fd for one, has nothing to sync.
  if (result < 0 && result != -EINVAL && result != -EROFS) {
    co_return failure("sync", static_cast<int>(-result));
  }
  co_return Result<void>();
}

void FileChannel::interrupt(AioContext&) {
  for (IoSlot& slot : slots_) slot.interrupt();
}

}  // namespace roost
