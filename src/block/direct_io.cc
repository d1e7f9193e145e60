// SPDX-License-Identifier: MIT
#include "block/direct_io.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace roost {

namespace {
// Holds for every disk whose sectors are not larger; where the kernel tells more, it is asked.
constexpr std::uint32_t kUsualAlignment = 4096;
}  // namespace

Result<DirectAlignment> direct_alignment(int fd, const std::string& path) {
#ifdef STATX_DIOALIGN  // Linux 6.1
  struct statx info;
  if (::statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 &&
      (info.stx_mask & STATX_DIOALIGN)) {
    if (info.stx_dio_offset_align == 0) {
      return fail(EINVAL, path + ": cannot be read and written directly");
    }
    if (info.stx_dio_offset_align <= kUsualAlignment && info.stx_dio_mem_align <= kUsualAlignment) {
      return DirectAlignment{info.stx_dio_offset_align, std::max(info.stx_dio_mem_align, 1u)};
    }
    return fail(EINVAL, path + ": its blocks are larger than 4096 bytes");
  }
#endif
  int sector = 0;
  if (::ioctl(fd, BLKSSZGET, &sector) == 0 && sector > 0) {
    const auto size = static_cast<std::uint32_t>(sector);
    return DirectAlignment{size, size};
  }
  return DirectAlignment{kUsualAlignment, kUsualAlignment};
}

void GatherCursor::copy_to(std::span<std::byte> to) noexcept {
  while (!to.empty()) {
    const iovec& piece = from_.front();
    const std::size_t count = std::min(to.size(), piece.iov_len - done_);
    if (count > 0) {
      std::memcpy(to.data(), static_cast<const std::byte*>(piece.iov_base) + done_, count);
    }
    to = to.subspan(count);
    done_ += count;
    if (done_ == piece.iov_len) {
      from_ = from_.subspan(1);
      done_ = 0;
    }
  }
}

}  // namespace roost
