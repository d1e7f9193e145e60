// SPDX-License-Identifier: MIT
// The disks, on both event loops: what is written is read, errors say what failed, and what a disk
// cannot do quickly it does slowly.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <optional>
#include <vector>

#include "block/file_disk.h"
#include "block/test_disk.h"
#include "roost/aio/aio_context.h"
#include "roost/aio/simulation.h"
#include "roost/block/block_driver.h"

namespace roost {
namespace {

ROOST_ON_EACH_LOOP(DiskTest);

TEST_P(DiskTest, WhatIsWrittenIsRead) {
  std::vector<std::unique_ptr<BlockDriver>> disks;
  disks.push_back(make_file(1 << 20));
  disks.push_back(std::move(*make_memory_disk(1 << 20, {})));
  for (auto& disk : disks) {
    SCOPED_TRACE(disk->name());
    EXPECT_EQ(disk->size(), 1u << 20);
    const Bytes data = pattern(100'000);
    ASSERT_TRUE(write(*disk, 12'345, data));
    EXPECT_EQ(read(*disk, 12'345, data.size()), data);
    EXPECT_EQ(read(*disk, 0, 12'345), Bytes(12'345));
    ASSERT_TRUE(write(*disk, disk->size() - data.size(), data, true));
    EXPECT_EQ(read(*disk, disk->size() - data.size(), data.size()), data);
    EXPECT_TRUE(wait(disk->flush()));
  }
}

TEST_P(DiskTest, WritesEveryPieceOfAGatheredWrite) {
  auto disk = make_file(1 << 20);
  const Bytes data = pattern(50'000);
  std::vector<iovec> pieces;
  for (std::size_t at = 0, size = 1; at < data.size(); at += size, size = size * 2 + 1) {
    size = std::min(size, data.size() - at);
    pieces.push_back({const_cast<std::byte*>(data.data() + at), size});
  }
  ASSERT_TRUE(wait(disk->write(777, pieces, false)));
  EXPECT_EQ(read(*disk, 777, data.size()), data);
}

TEST_P(DiskTest, ZeroesAndDiscardsRangesOfAnyAlignment) {
  std::vector<std::unique_ptr<BlockDriver>> disks;
  disks.push_back(make_file(4 << 20));
  disks.push_back(std::move(*make_memory_disk(4 << 20, {})));
  for (auto& disk : disks) {
    SCOPED_TRACE(disk->name());
    for (const bool may_unmap : {true, false}) {
      for (const auto& [offset, length] : {std::pair<std::uint64_t, std::uint64_t>{1, 10},
                                           {4096, 8192},
                                           {5000, 3'000'000},
                                           {(4 << 20) - 1, 1},
                                           {100, 0}}) {
        Bytes expected = pattern(4 << 20);
        ASSERT_TRUE(write(*disk, 0, expected));
        const Result<void> zeroed =
            wait(disk->write_zeroes(offset, length, {.may_unmap = may_unmap, .fua = !may_unmap}));
        ASSERT_TRUE(zeroed) << zeroed.error().message();
        std::fill_n(expected.begin() + static_cast<std::ptrdiff_t>(offset), length, std::byte{0});
        EXPECT_TRUE(read(*disk, 0, 4 << 20) == expected) << offset << "+" << length;
      }
    }
    const Bytes data = pattern(4 << 20);
    ASSERT_TRUE(write(*disk, 0, data));
    ASSERT_TRUE(wait(disk->discard(8192, 1 << 20)));
    const Bytes after = read(*disk, 0, 4 << 20);
    EXPECT_TRUE(std::equal(after.begin(), after.begin() + 8192, data.begin()));
    EXPECT_TRUE(
        std::equal(after.begin() + 8192 + (1 << 20), after.end(), data.begin() + 8192 + (1 << 20)));
  }
}

TEST_P(DiskTest, UnmappingZeroesFreesSpaceAndNoHoleKeepsIt) {
  auto disk = make_file(4 << 20);
  const auto allocated = [this] {
    struct stat info;
    return ::stat(path("disk").c_str(), &info) == 0 ? info.st_blocks * 512 : -1;
  };
  ASSERT_TRUE(write(*disk, 0, pattern(4 << 20), true));
  EXPECT_GE(allocated(), 4 << 20);
  ASSERT_TRUE(wait(disk->write_zeroes(0, 1 << 20, {.may_unmap = false, .fua = true})));
  EXPECT_GE(allocated(), 4 << 20);
  ASSERT_TRUE(wait(disk->write_zeroes(0, 1 << 20, {.may_unmap = true, .fua = true})));
  EXPECT_LE(allocated(), 3 << 20);
  ASSERT_TRUE(wait(disk->discard(1 << 20, 1 << 20)));
  EXPECT_LE(allocated(), 2 << 20);
}

TEST_P(DiskTest, ReadingATruncatedFileIsAnErrorThatSaysSo) {
  auto disk = make_file(1 << 20);
  ASSERT_EQ(::truncate(path("disk").c_str(), 1000), 0);
  Bytes buffer(4096);
  const Result<void> result = wait(disk->read(512, buffer));
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code(), EIO);
  EXPECT_NE(result.error().message().find("truncated"), std::string::npos);
  EXPECT_NE(result.error().message().find("pread " + path("disk") + " at 1000+3608"),
            std::string::npos)
      << result.error().message();
  // What is still there can be read.
  EXPECT_TRUE(wait(disk->read(0, std::span(buffer).first(1000))));
}

TEST_P(DiskTest, AWriteThatTheSystemRefusesIsAnErrorAndTheDiskLivesOn) {
  // A file limit makes every write beyond it fail, without root.
  auto disk = make_file(1 << 20);
  rlimit old{};
  ::getrlimit(RLIMIT_FSIZE, &old);
  ::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{.rlim_cur = 1 << 19, .rlim_max = old.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &small);
  const Result<void> result = write(*disk, 1 << 19, pattern(4096));
  ::setrlimit(RLIMIT_FSIZE, &old);
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code(), EFBIG);
  EXPECT_EQ(result.error().message(), "pwrite " + path("disk") + " at 524288+4096: File too large");
  EXPECT_TRUE(write(*disk, 1 << 19, pattern(4096)));
}

TEST_P(DiskTest, ManyRequestsAtOnceFromOneContext) {
  auto disk = make_file(8 << 20);
  constexpr int kRequests = 500;
  int done = 0;
  const auto body = [&](int i) -> Task<void> {
    const Bytes data = pattern(4096, static_cast<unsigned>(i + 1));
    const iovec piece{const_cast<std::byte*>(data.data()), data.size()};
    const std::uint64_t offset = static_cast<std::uint64_t>(i) * 4096;
    const Result<void> written = co_await disk->write(offset, std::span(&piece, 1), i % 50 == 0);
    EXPECT_TRUE(written);
    Bytes back(4096);
    const Result<void> was_read = co_await disk->read(offset, back);
    EXPECT_TRUE(was_read);
    EXPECT_EQ(back, data);
    ++done;
  };
  for (int i = 0; i < kRequests; ++i) Coroutine::create(body(i))->enter();
  poll_until([&] { return done == kRequests; });
}

// io_uring may do a part of what it was asked for, at any time. A simulated disk does so in half of
// its operations.
TEST(FileDisks, ShortReadsAndWritesFromIoUringAreGoneOnWith) {
  constexpr std::size_t kSize = 64 << 10;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    Simulation simulation({.seed = seed});
    const int fd = simulation.make_disk(kSize, {.short_one_in = 2});
    const auto context = simulation.make_context("disk");
    // A simulation's descriptor is no number that close() knows.
    const auto disk = make_file_disk("disk", kSize, false, UniqueFd(fd), std::nullopt);
    const Bytes written = pattern(50'000, static_cast<unsigned>(seed));
    Bytes copy(written.size());
    bool done = false;
    const auto body = [&]() -> Task<void> {
      const std::span<std::byte> all(const_cast<std::byte*>(written.data()), written.size());
      const std::array<iovec, 3> pieces{iovec{all.data(), 1'000}, iovec{all.data() + 1'000, 1},
                                        iovec{all.data() + 1'001, all.size() - 1'001}};
      const Result<void> write = co_await disk->write(77, pieces, false);
      EXPECT_TRUE(write) << write.error().message();
      const Result<void> read = co_await disk->read(77, copy);
      EXPECT_TRUE(read) << read.error().message();
      done = true;
    };
    simulation.spawn(*context, body(), "short");
    simulation.run_until([&] { return done; });
    EXPECT_EQ(copy, written) << "seed " << seed;
    const auto contents = simulation.disk_contents(fd);
    EXPECT_TRUE(std::ranges::equal(contents.subspan(77, written.size()), written));
  }
}

TEST(OpenFile, NamesTheFileAndTheCause) {
  const auto missing = open_file("/nonexistent/disk.img", {});
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().message(), "/nonexistent/disk.img: No such file or directory");
  const auto folder = open_file("/tmp", {.read_only = true});
  ASSERT_FALSE(folder);
  EXPECT_EQ(folder.error().message(), "/tmp: Is a directory");
  const auto device = open_file("/dev/null", {});
  ASSERT_FALSE(device);
  EXPECT_EQ(device.error().code(), EINVAL);
}

TEST(NullDisk, ReadsZeroesAndForgetsWrites) {
  const auto disk = make_null_disk(1 << 20, {});
  ASSERT_TRUE(disk);
  EXPECT_EQ((*disk)->size(), 1u << 20);
  auto context = AioContext::create();
  ContextScope scope(*context);
  bool done = false;
  const auto body = [&]() -> Task<void> {
    Bytes data = pattern(512);
    const iovec piece{data.data(), data.size()};
    const Result<void> written = co_await (*disk)->write(0, std::span(&piece, 1), true);
    EXPECT_TRUE(written);
    const Result<void> was_read = co_await (*disk)->read(0, data);
    EXPECT_TRUE(was_read);
    EXPECT_EQ(data, Bytes(512));
    done = true;
  };
  Coroutine::create(body())->enter();
  EXPECT_TRUE(done);
}

TEST(ParseSize, TakesBytesAndBinarySuffixes) {
  EXPECT_EQ(parse_size("0"), 0u);
  EXPECT_EQ(parse_size("512"), 512u);
  EXPECT_EQ(parse_size("4K"), 4096u);
  EXPECT_EQ(parse_size("3M"), 3u << 20);
  EXPECT_EQ(parse_size("1G"), 1u << 30);
  EXPECT_EQ(parse_size("2T"), 2ull << 40);
  EXPECT_EQ(parse_size("9223372036854775807"), 9223372036854775807ull);
  for (const char* bad : {"", "K", "-1", "1X", "1KB", "1.5G", " 1", "1 ", "9223372036854775808",
                          "18446744073709551616", "8388608T"}) {
    EXPECT_FALSE(parse_size(bad)) << bad;
  }
}

TEST(OpenDisk, UnderstandsItsKinds) {
  EXPECT_EQ((*open_disk("mem:1M", {}))->size(), 1u << 20);
  EXPECT_EQ((*open_disk("null:1T", {.read_only = true}))->size(), 1ull << 40);
  EXPECT_TRUE((*open_disk("null:1T", {.read_only = true}))->read_only());
  EXPECT_FALSE(open_disk("mem:lots", {}));
  EXPECT_FALSE(open_disk("/nonexistent", {}));
}

}  // namespace
}  // namespace roost
