// SPDX-License-Identifier: MIT
// Copying and comparing disks in memory: what is read and written, and what is not; odd sizes;
// failures of either side; stopping.
#include "roost/block/copy_disk.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <functional>
#include <memory>
#include <optional>
#include <utility>

#include "block/test_disk.h"

namespace roost {
namespace {

constexpr std::uint64_t kKiB = 1024;
constexpr std::uint64_t kMiB = 1024 * kKiB;

/// A disk in memory that counts what is done to it, and fails where it is told to.
class WatchedDisk final : public BlockDriver {
 public:
  explicit WatchedDisk(std::uint64_t size)
      : BlockDriver("watched", size, false), disk_(std::move(*make_memory_disk(size, {}))) {}

  Task<Result<void>> read(std::uint64_t offset, std::span<std::byte> to) override {
    ++reads;
    read_bytes += to.size();
    longest = std::max<std::size_t>(longest, to.size());
    if (before_read) before_read();
    if (offset <= fail_reads_at && fail_reads_at < offset + to.size()) {
      co_return fail(EIO, "read the bad block");
    }
    co_return co_await disk_->read(offset, to);
  }
  Task<Result<void>> write(std::uint64_t offset, std::span<const iovec> from, bool fua) override {
    std::size_t size = 0;
    for (const iovec& piece : from) size += piece.iov_len;
    ++writes;
    written_bytes += size;
    fua_seen |= fua;
    if (offset <= fail_writes_at && fail_writes_at < offset + size) {
      co_return fail(ENOSPC, "write the full block");
    }
    co_return co_await disk_->write(offset, from, fua);
  }
  Task<Result<void>> flush() override {
    ++flushes;
    co_return co_await disk_->flush();
  }
  Task<Result<void>> discard(std::uint64_t offset, std::uint64_t length) override {
    co_return co_await disk_->discard(offset, length);
  }
  Task<Result<void>> write_zeroes(std::uint64_t offset, std::uint64_t length,
                                  ZeroFlags flags) override {
    ++zeroes;
    zeroed_bytes += length;
    if (fail_zeroes) co_return fail(EIO, "zero");
    co_return co_await disk_->write_zeroes(offset, length, flags);
  }
  Task<Result<std::vector<Extent>>> block_status(std::uint64_t offset, std::uint64_t length,
                                                 std::size_t max_extents) override {
    if (fail_status) co_return fail(EIO, "ask for extents");
    if (!tells_extents) {
      std::vector<Extent> all(1, Extent{.length = length, .hole = false, .zero = false});
      co_return all;
    }
    co_return co_await disk_->block_status(offset, length, max_extents);
  }

  std::uint64_t fail_reads_at = ~std::uint64_t{0};
  std::uint64_t fail_writes_at = ~std::uint64_t{0};
  bool fail_zeroes = false;
  bool fail_status = false;
  bool tells_extents = true;
  std::function<void()> before_read;

  unsigned reads = 0, writes = 0, zeroes = 0, flushes = 0;
  std::uint64_t read_bytes = 0, written_bytes = 0, zeroed_bytes = 0;
  std::size_t longest = 0;
  bool fua_seen = false;

 private:
  const std::unique_ptr<BlockDriver> disk_;
};

class CopyDisk : public DiskTest {
 protected:
  CopyOptions options(std::size_t request_size = 64 * kKiB) {
    CopyOptions copying;
    copying.contexts = {&context()};
    copying.depth = 4;
    copying.request_size = request_size;
    copying.progress = &progress_;
    return copying;
  }

  CopyReport copy(WatchedDisk& from, WatchedDisk& to, CopyOptions how) {
    const auto done = wait(copy_disk(from, to, std::move(how)));
    EXPECT_TRUE(done) << done.error().message();
    return done ? *done : CopyReport{};
  }

  std::optional<std::uint64_t> difference(WatchedDisk& one, WatchedDisk& other, CopyOptions how) {
    const auto done = wait(compare_disks(one, other, std::move(how)));
    EXPECT_TRUE(done) << done.error().message();
    return done ? *done : std::nullopt;
  }

  void fill(BlockDriver& disk, std::uint64_t offset, const Bytes& bytes) {
    const Result<void> done = write(disk, offset, bytes);
    ASSERT_TRUE(done) << done.error().message();
  }

  static void forget_counts(WatchedDisk& disk) {
    disk.reads = disk.writes = disk.zeroes = 0;
    disk.read_bytes = disk.written_bytes = disk.zeroed_bytes = 0;
  }

  std::atomic<std::uint64_t> progress_{0};
};

TEST_P(CopyDisk, CopiesDataAndZeroesHolesWithoutReadingThem) {
  WatchedDisk from(8 * kMiB), to(8 * kMiB);
  const Bytes low = pattern(kMiB, 1), high = pattern(kMiB, 2);
  fill(from, 0, low);
  fill(from, 6 * kMiB, high);
  fill(to, 2 * kMiB, pattern(kMiB, 3));
  forget_counts(to);
  const CopyReport report = copy(from, to, options());
  EXPECT_EQ(report.written, 2 * kMiB);
  EXPECT_EQ(report.zeroed, 6 * kMiB);
  EXPECT_EQ(report.skipped, 0u);
  EXPECT_EQ(from.read_bytes, 2 * kMiB);
  EXPECT_EQ(to.written_bytes, 2 * kMiB);
  EXPECT_EQ(to.zeroed_bytes, 6 * kMiB);
  EXPECT_EQ(progress_, 8 * kMiB);
  EXPECT_EQ(to.flushes, 0u);
  EXPECT_FALSE(to.fua_seen);
  EXPECT_EQ(read(to, 0, kMiB), low);
  EXPECT_EQ(read(to, 6 * kMiB, kMiB), high);
  EXPECT_EQ(read(to, kMiB, 5 * kMiB), Bytes(5 * kMiB));
}

TEST_P(CopyDisk, MakesHolesOfZeroesInData) {
  WatchedDisk from(64 * kKiB), to(64 * kKiB);
  from.tells_extents = false;
  Bytes bytes = pattern(64 * kKiB);
  // Two whole units, and one that is zero but for its last byte.
  std::fill_n(bytes.begin() + 8 * kKiB, 8 * kKiB, std::byte{0});
  std::fill_n(bytes.begin() + 20 * kKiB, 4 * kKiB - 1, std::byte{0});
  bytes[24 * kKiB - 1] = std::byte{1};
  fill(from, 0, bytes);
  fill(to, 0, pattern(64 * kKiB, 9));
  forget_counts(to);
  const CopyReport report = copy(from, to, options());
  EXPECT_EQ(report.zeroed, 8 * kKiB);
  EXPECT_EQ(report.written, 56 * kKiB);
  EXPECT_EQ(to.zeroes, 1u);
  EXPECT_EQ(to.writes, 2u);
  EXPECT_EQ(read(to, 0, bytes.size()), bytes);
}

TEST_P(CopyDisk, CopiesZeroesAsDataWhenItIsNotToLookForThem) {
  WatchedDisk from(64 * kKiB), to(64 * kKiB);
  from.tells_extents = false;
  CopyOptions how = options();
  how.detect_zeroes = false;
  const CopyReport report = copy(from, to, how);
  EXPECT_EQ(report.written, 64 * kKiB);
  EXPECT_EQ(to.zeroes, 0u);
}

TEST_P(CopyDisk, LeavesZeroesAloneWhereTheTargetHasThem) {
  WatchedDisk from(2 * kMiB), to(2 * kMiB);
  Bytes bytes = pattern(64 * kKiB);
  std::fill_n(bytes.begin(), 4 * kKiB, std::byte{0});
  fill(from, kMiB, bytes);
  CopyOptions how = options();
  how.target_is_zero = true;
  const CopyReport report = copy(from, to, how);
  EXPECT_EQ(report.zeroed, 0u);
  EXPECT_EQ(report.written, 60 * kKiB);
  EXPECT_EQ(report.skipped, 2 * kMiB - 60 * kKiB);
  EXPECT_EQ(to.zeroes, 0u);
  EXPECT_EQ(progress_, 2 * kMiB);
  EXPECT_EQ(read(to, kMiB, bytes.size()), bytes);
}

TEST_P(CopyDisk, CopiesOddSizesWholeAndNothingBehindThem) {
  for (const std::uint64_t size : {std::uint64_t{1}, std::uint64_t{511}, 4 * kKiB - 1, 4 * kKiB + 1,
                                   64 * kKiB - 1, 64 * kKiB + 1, kMiB + 12345}) {
    SCOPED_TRACE(size);
    WatchedDisk from(size), to(size + 100);
    const Bytes bytes = pattern(size), before = pattern(size + 100, 2);
    fill(from, 0, bytes);
    fill(to, 0, before);
    progress_ = 0;
    const CopyReport report = copy(from, to, options());
    EXPECT_EQ(report.written + report.zeroed, size);
    EXPECT_EQ(progress_, size);
    EXPECT_LE(from.longest, 64 * kKiB);
    EXPECT_EQ(read(to, 0, size), bytes);
    EXPECT_EQ(read(to, size, 100), Bytes(before.end() - 100, before.end()));
    EXPECT_EQ(difference(from, to, options()), std::nullopt);
  }
}

TEST_P(CopyDisk, CopiesNothingFromAnEmptyDisk) {
  WatchedDisk from(0), to(4 * kKiB);
  const CopyReport report = copy(from, to, options());
  EXPECT_EQ(report.written + report.zeroed + report.skipped, 0u);
  EXPECT_EQ(to.writes + to.zeroes, 0u);
  EXPECT_EQ(difference(from, to, options()), std::nullopt);
}

TEST_P(CopyDisk, EndsWithTheFirstErrorOfEitherSide) {
  for (const int side : {0, 1, 2, 3}) {
    SCOPED_TRACE(side);
    WatchedDisk from(4 * kMiB), to(4 * kMiB);
    fill(from, 0, pattern(2 * kMiB));
    if (side == 0) from.fail_reads_at = 100 * kKiB;
    if (side == 1) to.fail_writes_at = 100 * kKiB;
    if (side == 2) to.fail_zeroes = true;
    if (side == 3) from.fail_status = true;
    const auto done = wait(copy_disk(from, to, options()));
    ASSERT_FALSE(done);
    EXPECT_EQ(done.error().code(), side == 1 ? ENOSPC : EIO);
    const char* const words[] = {"read the bad block", "write the full block", "zero",
                                 "ask for extents"};
    EXPECT_EQ(done.error().doing(), words[side]);
    if (side != 2) {
      // The other workers ended what they had begun, and began no more.
      EXPECT_LE(from.reads, 8u);
    }
  }
}

TEST_P(CopyDisk, EndsEarlyWhenItIsStopped) {
  WatchedDisk from(4 * kMiB), to(4 * kMiB);
  fill(from, 0, pattern(4 * kMiB));
  std::stop_source stop;
  from.before_read = [&] {
    if (from.reads == 10) stop.request_stop();
  };
  CopyOptions how = options();
  how.stop = stop.get_token();
  const auto done = wait(copy_disk(from, to, how));
  ASSERT_FALSE(done);
  EXPECT_EQ(done.error().code(), ECANCELED);
  EXPECT_GE(from.reads, 10u);
  EXPECT_LE(from.reads, 14u);
}

// ---- comparing

TEST_P(CopyDisk, FindsTheLowestBlockThatDiffers) {
  WatchedDisk one(2 * kMiB), other(2 * kMiB + 5);
  const Bytes bytes = pattern(2 * kMiB);
  fill(one, 0, bytes);
  fill(other, 0, bytes);
  EXPECT_EQ(difference(one, other, options()), std::nullopt);
  EXPECT_EQ(progress_, 2 * kMiB);
  for (const std::uint64_t at : {2 * kMiB - 1, kMiB + 4097, std::uint64_t{0}}) {
    const Bytes changed{bytes[at] ^ std::byte{1}};
    fill(other, at, changed);
    EXPECT_EQ(difference(one, other, options()), at / 4096 * 4096);
  }
}

TEST_P(CopyDisk, ComparesHolesWithWhatTheOtherReads) {
  WatchedDisk one(2 * kMiB), other(2 * kMiB);
  other.tells_extents = false;
  EXPECT_EQ(difference(one, other, options()), std::nullopt);
  EXPECT_EQ(one.reads, 0u);
  EXPECT_EQ(other.read_bytes, 2 * kMiB);
  fill(other, kMiB + 8 * kKiB, Bytes(1, std::byte{1}));
  EXPECT_EQ(difference(one, other, options()), kMiB + 8 * kKiB);
}

TEST_P(CopyDisk, ComparisonsEndWithTheErrorOfEitherSide) {
  for (const bool first : {true, false}) {
    WatchedDisk one(kMiB), other(kMiB);
    fill(one, 0, pattern(kMiB));
    fill(other, 0, pattern(kMiB));
    (first ? one : other).fail_reads_at = 300 * kKiB;
    const auto done = wait(compare_disks(one, other, options()));
    ASSERT_FALSE(done);
    EXPECT_EQ(done.error().code(), EIO);
  }
}

TEST_P(CopyDisk, ComparisonsStop) {
  WatchedDisk one(kMiB), other(kMiB);
  std::stop_source stop;
  stop.request_stop();
  CopyOptions how = options();
  how.stop = stop.get_token();
  const auto done = wait(compare_disks(one, other, how));
  ASSERT_FALSE(done);
  EXPECT_EQ(done.error().code(), ECANCELED);
  EXPECT_EQ(other.reads, 0u);
}

ROOST_ON_EACH_LOOP(CopyDisk);

}  // namespace
}  // namespace roost
