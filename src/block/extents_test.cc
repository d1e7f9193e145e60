// SPDX-License-Identifier: MIT
// What disks say of their ranges, and how they get room, give it back and change their size.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <fstream>
#include <memory>
#include <optional>
#include <ostream>
#include <thread>
#include <vector>

#include "base/test_build.h"
#include "block/file_disk.h"
#include "block/test_disk.h"
#include "roost/aio/iothread.h"
#include "roost/aio/simulation.h"

namespace roost {

void PrintTo(const Extent& extent, std::ostream* out) {
  *out << (extent.hole ? "hole " : "") << (extent.zero ? "zero " : "") << extent.length;
}

namespace {

using Extents = std::vector<Extent>;

constexpr std::uint64_t kBlock = 64 << 10;  // a multiple of what any file system tells apart

Extent data(std::uint64_t length) { return {.length = length, .hole = false, .zero = false}; }
Extent hole(std::uint64_t length) { return {.length = length, .hole = true, .zero = true}; }

class DiskExtents : public DiskTest {
 protected:
  Extents status(BlockDriver& disk, std::uint64_t offset, std::uint64_t length,
                 std::size_t max_extents = 1000) {
    const auto result = wait(disk.block_status(offset, length, max_extents));
    EXPECT_TRUE(result) << result.error().message();
    return result ? *result : Extents{};
  }

  // Does the file system tell holes from data?
  bool has_holes(BlockDriver& fresh) { return status(fresh, 0, 1).front().hole; }

  // A file of which every extent is known.
  std::unique_ptr<BlockDriver> make_sparse_file() {
    auto disk = make_file(16 * kBlock);
    EXPECT_TRUE(write(*disk, 2 * kBlock, pattern(kBlock)));
    EXPECT_TRUE(write(*disk, 3 * kBlock, pattern(kBlock)));
    EXPECT_TRUE(write(*disk, 8 * kBlock, pattern(kBlock)));
    return disk;
  }
};
ROOST_ON_EACH_LOOP(DiskExtents);

// ---- Files

TEST_P(DiskExtents, AFileTellsItsHolesFromItsData) {
  auto disk = make_file(16 * kBlock);
  if (!has_holes(*disk)) GTEST_SKIP() << "a file system without holes";
  EXPECT_EQ(status(*disk, 0, 16 * kBlock), (Extents{hole(16 * kBlock)}));
  disk = make_sparse_file();
  EXPECT_EQ(status(*disk, 0, 16 * kBlock),
            (Extents{hole(2 * kBlock), data(2 * kBlock), hole(4 * kBlock), data(kBlock),
                     hole(7 * kBlock)}));
  // A part is told as a part, wherever it begins and ends.
  EXPECT_EQ(status(*disk, 100, 200), (Extents{hole(200)}));
  EXPECT_EQ(status(*disk, 3 * kBlock + 1, 6 * kBlock - 2),
            (Extents{data(kBlock - 1), hole(4 * kBlock), data(kBlock - 1)}));
  EXPECT_EQ(status(*disk, 16 * kBlock - 1, 1), (Extents{hole(1)}));
  // No more than one asks for.
  EXPECT_EQ(status(*disk, 0, 16 * kBlock, 1), (Extents{hole(2 * kBlock)}));
  EXPECT_EQ(status(*disk, kBlock, 16 * kBlock - kBlock, 2),
            (Extents{hole(kBlock), data(2 * kBlock)}));
}

TEST_P(DiskExtents, WhatAFileGivesBackBecomesAHole) {
  auto disk = make_sparse_file();
  if (!has_holes(*disk)) GTEST_SKIP() << "a file system without holes";
  ASSERT_TRUE(wait(disk->discard(2 * kBlock, kBlock)));
  ASSERT_TRUE(wait(disk->write_zeroes(8 * kBlock, kBlock, {})));
  EXPECT_EQ(status(*disk, 0, 16 * kBlock),
            (Extents{hole(3 * kBlock), data(kBlock), hole(12 * kBlock)}));
}

TEST_P(DiskExtents, AFileOfManyPiecesIsToldInParts) {
  constexpr unsigned kPieces = 600;
  auto disk = make_file(kPieces * kBlock);
  if (!has_holes(*disk)) GTEST_SKIP() << "a file system without holes";
  const Bytes one = pattern(1);
  for (unsigned i = 0; i < kPieces; ++i) ASSERT_TRUE(write(*disk, i * kBlock, one));
  std::uint64_t offset = 0;
  std::size_t told = 0;
  bool was_hole = true;
  int parts = 0;
  for (; offset < disk->size(); ++parts) {
    const Extents part = status(*disk, offset, disk->size() - offset, 1'000'000);
    ASSERT_FALSE(part.empty());
    for (const Extent& extent : part) {
      EXPECT_NE(extent.hole, was_hole) << "at " << offset;
      was_hole = extent.hole;
      offset += extent.length;
    }
    told += part.size();
  }
  EXPECT_EQ(offset, disk->size());
  EXPECT_EQ(told, 2 * kPieces);
  EXPECT_GT(parts, 1) << "one call keeps a worker for so long";
}

TEST_P(DiskExtents, BeyondTheEndOfATruncatedFileIsAnErrorThatSaysSo) {
  auto disk = make_sparse_file();
  ASSERT_EQ(::truncate(path("disk").c_str(), 9 * kBlock - 100), 0);
  const auto beyond = wait(disk->block_status(10 * kBlock, 5, 10));
  ASSERT_FALSE(beyond);
  EXPECT_EQ(beyond.error().code(), EIO);
  EXPECT_EQ(beyond.error().message(),
            "find holes in " + path("disk") +
                " at 655360+5: the file has been truncated: Input/output error");
  // What is still there is told.
  EXPECT_EQ(status(*disk, 8 * kBlock, 2 * kBlock), (Extents{data(kBlock - 100)}));
}

TEST_P(DiskExtents, ADeviceIsDataAndKeepsItsSizeAndWritesItsZeroes) {
  make_sparse_file();
  UniqueFd fd(::open(path("disk").c_str(), O_RDWR | O_CLOEXEC));
  const auto disk = make_file_disk("device", 16 * kBlock, false, std::move(fd), std::nullopt, true);
  EXPECT_EQ(status(*disk, 0, 16 * kBlock), (Extents{data(16 * kBlock)}));
  EXPECT_FALSE(disk->can_resize());
  const auto resized = wait(disk->resize(kBlock));
  ASSERT_FALSE(resized);
  EXPECT_EQ(resized.error().code(), ENOTSUP);
  EXPECT_FALSE(disk->can_zero_fast());
  const auto zeroed = wait(disk->write_zeroes(0, kBlock, {.may_unmap = false, .fast = true}));
  ASSERT_FALSE(zeroed);
  EXPECT_EQ(zeroed.error().code(), ENOTSUP);
}

// ---- Memory and nothing

TEST_P(DiskExtents, MemoryThatWasNotWrittenIsAHole) {
  const auto disk = std::move(*make_memory_disk((8 << 20) + 1000, {}));
  const std::uint64_t size = disk->size();
  EXPECT_EQ(status(*disk, 0, size), (Extents{hole(size)}));
  ASSERT_TRUE(write(*disk, 5'000, pattern(1)));
  ASSERT_TRUE(write(*disk, (4 << 20) - 4096, pattern(8192)));  // two pieces
  ASSERT_TRUE(write(*disk, size - 1, pattern(1)));
  EXPECT_EQ(status(*disk, 0, size), (Extents{hole(4096), data(4096), hole((4 << 20) - 3 * 4096),
                                             data(8192), hole((4 << 20) - 4096), data(1000)}));
  EXPECT_EQ(status(*disk, 5'000, 5'000), (Extents{data(3192), hole(1808)}));
  EXPECT_EQ(status(*disk, 0, size, 2), (Extents{hole(4096), data(4096)}));
  // Of a page that is zeroed in part, something is left.
  ASSERT_TRUE(wait(disk->write_zeroes((4 << 20) + 1, 4095, {})));
  EXPECT_EQ(status(*disk, 4 << 20, 8192), (Extents{data(4096), hole(4096)}));
  ASSERT_TRUE(wait(disk->discard(4 << 20, 4096)));
  EXPECT_EQ(status(*disk, 4 << 20, 8192), (Extents{hole(8192)}));
  // The last page need not be whole.
  ASSERT_TRUE(wait(disk->discard(size - 1000, 1000)));
  EXPECT_EQ(status(*disk, size - 1000, 1000), (Extents{hole(1000)}));
  // Zeroes that are to take room are no hole.
  ASSERT_TRUE(wait(disk->write_zeroes(0, 4096, {.may_unmap = false})));
  EXPECT_EQ(status(*disk, 0, 4096), (Extents{data(4096)}));
}

long resident_bytes() {
  std::ifstream file("/proc/self/statm");
  long total = 0;
  long resident = 0;
  file >> total >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

TEST_P(DiskExtents, MemoryIsTakenByWritesOnlyAndGivenBack) {
  constexpr std::uint64_t kSize = 16 << 20;
  constexpr long kMost = static_cast<long>(kSize) / 4 * 3;
  const auto disk = std::move(*make_memory_disk(kSize, {}));
  const Bytes chunk = pattern(1 << 20);
  const auto fill = [&] {
    for (std::uint64_t at = 0; at < kSize; at += chunk.size()) {
      ASSERT_TRUE(write(*disk, at, chunk));
    }
  };
  // Into the same memory each time: AddressSanitizer keeps what is freed for a while.
  const Bytes zeroes(chunk.size());
  Bytes buffer(chunk.size());
  const auto read_all = [&] {
    for (std::uint64_t at = 0; at < kSize; at += chunk.size()) {
      ASSERT_TRUE(wait(disk->read(at, buffer)));
      ASSERT_TRUE(buffer == zeroes) << at;
    }
  };
  const auto give_back = [&](auto how) {
    fill();
    const long full = resident_bytes();
    how();
    EXPECT_LT(resident_bytes(), full - kMost);
    EXPECT_EQ(status(*disk, 0, kSize), (Extents{hole(kSize)}));
    const long empty = resident_bytes();
    read_all();
    EXPECT_LT(resident_bytes(), empty + kMost);
  };
  give_back([&] { ASSERT_TRUE(wait(disk->discard(0, kSize))); });
  give_back([&] { ASSERT_TRUE(wait(disk->write_zeroes(0, kSize, {.fast = true}))); });
  give_back([&] {
    ASSERT_TRUE(wait(disk->resize(4096)));
    ASSERT_TRUE(wait(disk->resize(kSize)));
    ASSERT_TRUE(wait(disk->discard(0, 4096)));
  });
}

TEST_P(DiskExtents, NothingIsOneHoleOfAnySize) {
  const auto disk = std::move(*make_null_disk(1ull << 40, {}));
  EXPECT_EQ(status(*disk, 5, (1ull << 40) - 5, 1), (Extents{hole((1ull << 40) - 5)}));
  EXPECT_TRUE(disk->can_zero_fast());
  EXPECT_TRUE(wait(disk->write_zeroes(0, 1 << 20, {.fast = true})));
  EXPECT_TRUE(disk->can_resize());
  ASSERT_TRUE(wait(disk->resize(512)));
  EXPECT_EQ(disk->size(), 512u);
}

// ---- Size

TEST_P(DiskExtents, GrowsByZeroesAndForgetsWhatItShrinksBy) {
  std::vector<std::unique_ptr<BlockDriver>> disks;
  disks.push_back(make_file(10 * kBlock));
  disks.push_back(std::move(*make_memory_disk(10 * kBlock, {})));
  disks.push_back(std::move(*make_memory_disk(0, {})));
  for (auto& disk : disks) {
    SCOPED_TRACE(disk->name());
    ASSERT_TRUE(disk->can_resize());
    ASSERT_TRUE(wait(disk->resize(3 * kBlock + 77)));
    EXPECT_EQ(disk->size(), 3 * kBlock + 77);
    const Bytes full = pattern(3 * kBlock + 77);
    ASSERT_TRUE(write(*disk, 0, full));
    // Neither of them where a page ends.
    ASSERT_TRUE(wait(disk->resize(2 * kBlock - 5)));
    EXPECT_EQ(disk->size(), 2 * kBlock - 5);
    ASSERT_TRUE(wait(disk->resize(40 * kBlock + 1)));
    EXPECT_EQ(disk->size(), 40 * kBlock + 1);
    Bytes expected = full;
    expected.resize(2 * kBlock - 5);
    expected.resize(40 * kBlock + 1);
    EXPECT_TRUE(read(*disk, 0, expected.size()) == expected);
    ASSERT_TRUE(write(*disk, 40 * kBlock, pattern(1)));
    EXPECT_EQ(read(*disk, 40 * kBlock, 1), pattern(1));
    ASSERT_TRUE(wait(disk->resize(0)));
    ASSERT_TRUE(wait(disk->resize(kBlock)));
    EXPECT_TRUE(read(*disk, 0, kBlock) == Bytes(kBlock));
  }
  struct stat info;
  ASSERT_EQ(::stat(path("disk").c_str(), &info), 0);
  EXPECT_EQ(info.st_size, static_cast<off_t>(kBlock));
}

TEST_P(DiskExtents, ASizeThatCannotBeIsAnErrorAndChangesNothing) {
  const auto disk = make_file(kBlock);
  const auto huge = wait(disk->resize(1ull << 63));
  ASSERT_FALSE(huge);
  EXPECT_EQ(huge.error().code(), EFBIG);
  EXPECT_EQ(huge.error().message(),
            "resize " + path("disk") + " to 9223372036854775808: File too large");
  const auto memory = std::move(*make_memory_disk(kBlock, {}));
  ASSERT_TRUE(write(*memory, 0, pattern(kBlock)));
  EXPECT_FALSE(wait(memory->resize(1ull << 62)));
  EXPECT_EQ(memory->size(), kBlock);
  EXPECT_TRUE(read(*memory, 0, kBlock) == pattern(kBlock));

  std::vector<std::unique_ptr<BlockDriver>> disks;
  disks.push_back(std::move(*open_file(path("disk"), {.read_only = true})));
  disks.push_back(std::move(*make_memory_disk(kBlock, {.read_only = true})));
  disks.push_back(std::move(*make_null_disk(kBlock, {.read_only = true})));
  for (auto& one : disks) {
    SCOPED_TRACE(one->name());
    EXPECT_FALSE(one->can_resize());
    EXPECT_FALSE(one->can_zero_fast());
    const auto resized = wait(one->resize(4096));
    ASSERT_FALSE(resized);
    EXPECT_EQ(resized.error().code(), ENOTSUP);
    EXPECT_EQ(one->size(), kBlock);
  }
}

TEST_P(DiskExtents, WithODirectASizeHasToBeAligned) {
  auto opened = open_file(path("direct"), {.create_size = 16 * kBlock, .direct = true});
  if (!opened && opened.error().code() == EINVAL) GTEST_SKIP() << opened.error().message();
  ASSERT_TRUE(opened) << opened.error().message();
  BlockDriver& disk = **opened;
  const auto odd = wait(disk.resize(kBlock + 1));
  ASSERT_FALSE(odd);
  EXPECT_EQ(odd.error().code(), EINVAL);
  EXPECT_EQ(disk.size(), 16 * kBlock);
  ASSERT_TRUE(wait(disk.resize(32 * kBlock)));
  ASSERT_TRUE(write(disk, 20 * kBlock, pattern(kBlock)));
  EXPECT_TRUE(read(disk, 20 * kBlock, kBlock) == pattern(kBlock));
  EXPECT_EQ(status(disk, 0, 32 * kBlock),
            (Extents{hole(20 * kBlock), data(kBlock), hole(11 * kBlock)}));
  EXPECT_TRUE(wait(disk.cache(0, 32 * kBlock)));
}

// The memory moves while others read and write what stays.
TEST(MemoryDisk, IsUsedWhileItChangesItsSize) {
  constexpr std::uint64_t kStays = 1 << 20;
  constexpr int kUsers = 4;
  const int kRounds = rounds(200);
  const auto disk = std::move(*make_memory_disk(kStays, {}));
  std::atomic<int> left{kUsers};
  std::atomic<bool> resized{false};
  {
    IOThread a;
    IOThread b;
    const auto user = [&](std::uint64_t index) -> Task<void> {
      Bytes bytes(3'000);
      for (unsigned round = 1; !resized; ++round) {
        const std::uint64_t offset = index * kStays / kUsers + round % 100 * 1'000;
        const Bytes out = pattern(bytes.size(), round);
        const iovec piece{const_cast<std::byte*>(out.data()), out.size()};
        const std::span<const iovec> pieces(&piece, 1);
        EXPECT_TRUE(co_await disk->write(offset, pieces, false));
        EXPECT_TRUE(co_await disk->read(offset, bytes));
        EXPECT_TRUE(bytes == out);
        AioContext& next = round % 2 ? a.context() : b.context();
        co_await move_to(next);
      }
      --left;
    };
    const auto resizer = [&]() -> Task<void> {
      for (int round = 0; round < kRounds; ++round) {
        EXPECT_TRUE(co_await disk->resize(kStays + (round + 1) * kStays));
        EXPECT_TRUE(co_await disk->resize(kStays));
        co_await move_to(b.context());
      }
      resized = true;
    };
    for (int i = 0; i < kUsers; ++i) spawn(a.context(), user(static_cast<std::uint64_t>(i)));
    spawn(b.context(), resizer());
    while (left > 0) std::this_thread::yield();
  }
}

// ---- Zeroes, quickly or not at all

TEST_P(DiskExtents, FastZeroesAreAllocatedNotWritten) {
  std::vector<std::unique_ptr<BlockDriver>> disks;
  disks.push_back(make_file(4 * kBlock));
  disks.push_back(std::move(*make_memory_disk(4 * kBlock, {})));
  for (auto& disk : disks) {
    SCOPED_TRACE(disk->name());
    ASSERT_TRUE(disk->can_zero_fast());
    Bytes expected = pattern(4 * kBlock);
    ASSERT_TRUE(write(*disk, 0, expected));
    const auto zeroed = wait(disk->write_zeroes(5'000, kBlock, {.fua = true, .fast = true}));
    if (!zeroed && zeroed.error().code() == ENOTSUP) GTEST_SKIP() << zeroed.error().message();
    ASSERT_TRUE(zeroed) << zeroed.error().message();
    std::fill_n(expected.begin() + 5'000, kBlock, std::byte{});
    EXPECT_TRUE(read(*disk, 0, 4 * kBlock) == expected);
  }
  // To keep the room and be quick is more than memory can.
  const auto kept = wait(disks.back()->write_zeroes(0, 4096, {.may_unmap = false, .fast = true}));
  ASSERT_FALSE(kept);
  EXPECT_EQ(kept.error().code(), ENOTSUP);
  EXPECT_EQ(kept.error().message(),
            "write zeroes quickly to mem:262144 at 0+4096: Operation not supported");
}

// ---- Caching

TEST_P(DiskExtents, CachingBringsARangeIntoThePageCache) {
  constexpr std::uint64_t kSize = 32 << 20;  // more than a device reads ahead by itself
  auto disk = make_file(kSize);
  ASSERT_TRUE(write(*disk, 0, pattern(kSize), true));
  const UniqueFd fd(::open(path("disk").c_str(), O_RDWR | O_CLOEXEC));
  ASSERT_EQ(::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_DONTNEED), 0);
  void* const mapped = ::mmap(nullptr, kSize, PROT_READ, MAP_SHARED, fd.get(), 0);
  ASSERT_NE(mapped, MAP_FAILED);
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const auto cached = [&](std::uint64_t offset, std::uint64_t length) {
    std::vector<unsigned char> pages(length / page);
    EXPECT_EQ(::mincore(static_cast<std::byte*>(mapped) + offset, length, pages.data()), 0);
    return std::ranges::count_if(pages, [](unsigned char one) { return one & 1; });
  };
  if (cached(0, kSize) == 0) {
    ASSERT_TRUE(wait(disk->cache(kSize / 4, kSize / 2)));
    // The device is being read.
    const auto wanted = static_cast<std::ptrdiff_t>(kSize / 2 / page);
    while (cached(kSize / 4, kSize / 2) < wanted) std::this_thread::yield();
    EXPECT_EQ(cached(0, kSize / 4), 0);
    ASSERT_TRUE(wait(disk->cache(0, 0)));
    EXPECT_EQ(cached(0, kSize / 4), 0) << "nothing is not everything";
  }
  EXPECT_EQ(::munmap(mapped, kSize), 0);
}

// ---- Simulated disks

class SimulatedFile {
 public:
  explicit SimulatedFile(std::uint64_t seed, SimulatedDiskOptions options = {.short_one_in = 0})
      : simulation_({.seed = seed}),
        fd_(simulation_.make_disk(kSize, options)),
        context_(simulation_.make_context("disk")),
        disk_(make_file_disk("disk", kSize, false, UniqueFd(fd_), std::nullopt)) {}

  static constexpr std::uint64_t kSize = 64 << 10;

  template <class T>
  Result<T> wait(Task<Result<T>> operation) {
    std::optional<Result<T>> result;
    const auto store = [&]() -> Task<void> { result = co_await std::move(operation); };
    simulation_.spawn(*context_, store(), "operation");
    simulation_.run_until([&] { return result.has_value(); });
    return *result;
  }
  Result<void> write(std::uint64_t offset, const Bytes& bytes) {
    const iovec piece{const_cast<std::byte*>(bytes.data()), bytes.size()};
    return wait(disk_->write(offset, std::span(&piece, 1), false));
  }

  Simulation& simulation() { return simulation_; }
  BlockDriver& disk() { return *disk_; }
  int fd() const { return fd_; }

 private:
  Simulation simulation_;
  const int fd_;
  std::shared_ptr<AioContext> context_;
  std::unique_ptr<BlockDriver> disk_;
};

TEST(SimulatedDisks, WhereThereAreNoHolesAllIsData) {
  SimulatedFile file(1);
  EXPECT_EQ(*file.wait(file.disk().block_status(0, 4096, 9)), (Extents{hole(4096)}));
  file.simulation().fail_next(file.fd(), IoRequest::Op::kFindExtents, EINVAL);
  EXPECT_EQ(*file.wait(file.disk().block_status(0, 4096, 9)), (Extents{data(4096)}));
}

// The next question that reaches the disk fails.
TEST(SimulatedDisks, WhoAsksWithinDataThatIsKnownNeedsNoWorker) {
  SimulatedFile file(1);
  ASSERT_TRUE(file.write(0, pattern(32'768)));
  const auto ask = [&](std::uint64_t offset, std::uint64_t length) {
    return file.wait(file.disk().block_status(offset, length, 9));
  };
  const auto fail_next = [&] {
    file.simulation().fail_next(file.fd(), IoRequest::Op::kFindExtents, EIO);
  };
  EXPECT_EQ(*ask(0, 65'536), (Extents{data(32'768), hole(32'768)}));
  fail_next();
  EXPECT_EQ(*ask(0, 32'768), (Extents{data(32'768)}));
  EXPECT_EQ(*ask(512, 100), (Extents{data(100)}));
  EXPECT_FALSE(ask(512, 32'768)) << "a part of it is not known";
  fail_next();
  EXPECT_FALSE(ask(40'000, 100)) << "that a hole is one is not known";
  // What may have made a hole ends it.
  ASSERT_TRUE(file.wait(file.disk().discard(0, 512)));
  EXPECT_EQ(*ask(0, 32'768), (Extents{hole(512), data(32'256)}));
  ASSERT_TRUE(file.wait(file.disk().write_zeroes(512, 512, {})));
  EXPECT_EQ(*ask(512, 32'256), (Extents{hole(512), data(31'744)}));
  ASSERT_TRUE(file.wait(file.disk().resize(1'024)));
  ASSERT_TRUE(file.wait(file.disk().resize(8'192)));
  EXPECT_EQ(*ask(1'024, 7'168), (Extents{hole(7'168)}));
}

TEST_P(DiskExtents, APartOfAPieceOfDataTellsOfAllOfIt) {
  auto disk = make_sparse_file();
  if (!has_holes(*disk)) GTEST_SKIP() << "a file system without holes";
  EXPECT_EQ(status(*disk, 2 * kBlock, 10), (Extents{data(10)}));
  // Whoever asked the file again would notice.
  ASSERT_EQ(::truncate(path("disk").c_str(), 0), 0);
  EXPECT_EQ(status(*disk, 3 * kBlock, kBlock), (Extents{data(kBlock)}));
  EXPECT_FALSE(wait(disk->block_status(4 * kBlock, 1, 10)));
}

TEST(SimulatedDisks, ErrorsNameTheDiskTheOffsetAndTheCause) {
  SimulatedFile file(1);
  file.simulation().fail_next(file.fd(), IoRequest::Op::kFindExtents, EIO);
  const auto status = file.wait(file.disk().block_status(512, 4096, 9));
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().message(), "find holes in disk at 512+4096: Input/output error");
  file.simulation().fail_next(file.fd(), IoRequest::Op::kTruncate, ENOSPC);
  const auto resized = file.wait(file.disk().resize(1 << 20));
  ASSERT_FALSE(resized);
  EXPECT_EQ(resized.error().message(), "resize disk to 1048576: No space left on device");
  EXPECT_EQ(file.disk().size(), SimulatedFile::kSize);
  file.simulation().fail_next(file.fd(), IoRequest::Op::kReadAhead, EIO);
  const auto cached = file.wait(file.disk().cache(512, 4096));
  ASSERT_FALSE(cached);
  EXPECT_EQ(cached.error().message(), "cache disk at 512+4096: Input/output error");
  file.simulation().fail_next(file.fd(), IoRequest::Op::kReadAhead, EINVAL);
  EXPECT_TRUE(file.wait(file.disk().cache(512, 4096))) << "it is advice";
}

TEST(SimulatedDisks, FastZeroesThatCannotBeAreNotWrittenInstead) {
  for (const bool may_unmap : {true, false}) {
    SimulatedFile file(1);
    const Bytes before = pattern(SimulatedFile::kSize);
    ASSERT_TRUE(file.write(0, before));
    file.simulation().fail_next(file.fd(), IoRequest::Op::kAllocate, EOPNOTSUPP);
    const auto fast =
        file.wait(file.disk().write_zeroes(512, 4096, {.may_unmap = may_unmap, .fast = true}));
    ASSERT_FALSE(fast);
    EXPECT_EQ(fast.error().code(), ENOTSUP);
    EXPECT_EQ(fast.error().message(),
              "write zeroes quickly to disk at 512+4096: Operation not supported");
    EXPECT_TRUE(std::ranges::equal(file.simulation().disk_contents(file.fd()), before));
    file.simulation().fail_next(file.fd(), IoRequest::Op::kAllocate, EOPNOTSUPP);
    ASSERT_TRUE(file.wait(file.disk().write_zeroes(512, 4096, {.may_unmap = may_unmap})));
    EXPECT_EQ(file.simulation().disk_contents(file.fd())[512], std::byte{});
  }
}

// ---- Any sequence

// What is said to be zero is zero, neighbours differ, and everything can be told in the end.
void check_status(const Extents& extents, std::span<const std::byte> contents) {
  ASSERT_FALSE(extents.empty());
  std::size_t at = 0;
  for (std::size_t i = 0; i < extents.size(); ++i) {
    ASSERT_GT(extents[i].length, 0u);
    ASSERT_LE(extents[i].length, contents.size() - at);
    const auto part = contents.subspan(at, extents[i].length);
    if (extents[i].zero) {
      ASSERT_TRUE(std::ranges::all_of(part, [](std::byte b) { return b == std::byte{}; })) << at;
    }
    if (i > 0) {
      ASSERT_NE(extents[i].hole, extents[i - 1].hole) << at;
    }
    at += extents[i].length;
  }
}

TEST_P(DiskExtents, WhatIsSaidOfARangeIsTrueOfItsBytes) {
  std::vector<std::unique_ptr<BlockDriver>> disks;
  disks.push_back(make_file(3 << 20));
  disks.push_back(std::move(*make_memory_disk(3 << 20, {})));
  for (auto& disk : disks) {
    SCOPED_TRACE(disk->name());
    TestRandom random(7);
    Bytes model(3 << 20);
    int holes = 0;
    int blocks = 0;
    for (int i = 0; i < 300; ++i) {
      const auto size = static_cast<std::uint32_t>(model.size());
      std::uint64_t offset = random.below(size);
      std::uint64_t length = 1 + random.below(static_cast<std::uint32_t>(size - offset));
      if (random.below(2) == 0) length = std::min<std::uint64_t>(length, 20'000);
      const auto begin = model.begin() + static_cast<std::ptrdiff_t>(offset);
      const auto end = begin + static_cast<std::ptrdiff_t>(length);
      switch (random.below(5)) {
        case 0: {
          const Bytes bytes = pattern(length, random.below(1'000) + 1);
          ASSERT_TRUE(write(*disk, offset, bytes));
          std::ranges::copy(bytes, begin);
          break;
        }
        case 1:
          ASSERT_TRUE(
              wait(disk->write_zeroes(offset, length, {.may_unmap = random.below(3) != 0})));
          std::fill(begin, end, std::byte{});
          break;
        case 2:
          ASSERT_TRUE(wait(disk->discard(offset, length)));
          std::copy_n(read(*disk, offset, length).begin(), length, begin);
          break;
        case 3: {
          const std::uint64_t new_size = (1 << 20) + random.below(3 << 20);
          ASSERT_TRUE(wait(disk->resize(new_size)));
          model.resize(new_size);
          break;
        }
        default: {
          const Extents extents = status(*disk, offset, length, 1 + random.below(20));
          check_status(extents, std::span(model).subspan(offset, length));
          holes += extents.front().hole;
          blocks += !extents.front().hole;
        }
      }
      ASSERT_FALSE(HasFatalFailure()) << "step " << i;
    }
    EXPECT_TRUE(read(*disk, 0, model.size()) == model);
    EXPECT_GT(holes, 5);
    EXPECT_GT(blocks, 5);
  }
}

TEST(SimulatedDisks, WhatIsSaidOfARangeIsTrueOfItsBytesAfterALossOfPower) {
  int holes = 0;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    SimulatedFile file(seed, {.short_one_in = 3});
    TestRandom random(seed);
    for (int i = 0; i < 100; ++i) {
      const auto size = static_cast<std::uint32_t>(file.disk().size());
      const std::uint64_t offset = random.below(size);
      const std::uint64_t length = 1 + random.below(static_cast<std::uint32_t>(size - offset));
      switch (random.below(6)) {
        case 0:
          ASSERT_TRUE(file.write(offset, pattern(std::min<std::uint64_t>(length, 3'000), i + 1)));
          break;
        case 1:
          ASSERT_TRUE(file.wait(file.disk().write_zeroes(offset, length, {})));
          break;
        case 2:
          ASSERT_TRUE(file.wait(file.disk().resize(1 + random.below(100'000))));
          break;
        case 3:
          if (random.below(10) == 0) {
            file.simulation().crash_disk(file.fd());
          } else if (random.below(2) == 0) {
            ASSERT_TRUE(file.wait(file.disk().flush()));
          }
          break;
        default: {
          const auto told = file.wait(file.disk().block_status(offset, length, 9));
          ASSERT_TRUE(told) << told.error().message();
          holes += told->front().hole;
          check_status(*told, file.simulation().disk_contents(file.fd()).subspan(offset, length));
        }
      }
      ASSERT_FALSE(testing::Test::HasFatalFailure()) << "seed " << seed << ", step " << i;
    }
  }
  EXPECT_GT(holes, 100);
}

class DiskCache : public DiskTest {};
ROOST_ON_EACH_LOOP(DiskCache);

TEST_P(DiskCache, SaysWhereAFileHoldsWhatIsInMemory) {
  const auto disk = make_file(16 * kBlock);
  ASSERT_TRUE(write(*disk, 2 * kBlock, pattern(2 * kBlock)));
  const auto place = disk->in_page_cache(2 * kBlock + 100, kBlock);
  if (!place) GTEST_SKIP() << "this kernel does not say what is in the page cache";
  Bytes there(kBlock);
  ASSERT_EQ(::pread(place->fd, there.data(), there.size(), static_cast<off_t>(place->offset)),
            static_cast<ssize_t>(there.size()));
  Bytes read(kBlock);
  ASSERT_TRUE(wait(disk->read(2 * kBlock + 100, read)));
  EXPECT_EQ(there, read);

  // A hole, the edge of one, and what nobody has read.
  EXPECT_FALSE(disk->in_page_cache(8 * kBlock, kBlock));
  EXPECT_FALSE(disk->in_page_cache(3 * kBlock, 2 * kBlock));
  ASSERT_TRUE(wait(disk->flush()));
  ASSERT_EQ(::posix_fadvise(place->fd, 0, 0, POSIX_FADV_DONTNEED), 0);
  EXPECT_FALSE(disk->in_page_cache(2 * kBlock, kBlock));
}

// The page in which a file ends is in memory, but not all of it is the file's.
TEST_P(DiskCache, HoldsNothingBehindTheEndOfAFileThatWasCutShort) {
  const auto disk = make_file(4 * kBlock);
  ASSERT_TRUE(write(*disk, 0, pattern(4 * kBlock)));
  if (!disk->in_page_cache(0, 4 * kBlock)) {
    GTEST_SKIP() << "this kernel does not say what is in the page cache";
  }
  std::filesystem::resize_file(path("disk"), kBlock + 100);
  EXPECT_TRUE(disk->in_page_cache(0, kBlock + 100));
  EXPECT_FALSE(disk->in_page_cache(0, kBlock + 101));
}

TEST_P(DiskCache, IsNotAskedOfADiskThatGoesPastIt) {
  {
    const auto disk = make_file(16 * kBlock);
    ASSERT_TRUE(write(*disk, 0, pattern(16 * kBlock)));
  }
  const auto disk = open_file(path("disk"), {.direct = true});
  if (!disk) GTEST_SKIP() << disk.error().message();
  EXPECT_FALSE((*disk)->in_page_cache(0, kBlock));
}

}  // namespace
}  // namespace roost
