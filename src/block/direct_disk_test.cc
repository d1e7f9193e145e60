// SPDX-License-Identifier: MIT
// Files past the page cache, where the file system has them so: requests of any alignment, and
// writes of parts of blocks that must not undo what others write.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "aio/test_loop.h"
#include "base/test_build.h"
#include "block/direct_io.h"
#include "block/range_lock.h"
#include "roost/aio/iothread.h"
#include "roost/block/block_driver.h"

namespace roost {
namespace {

namespace fs = std::filesystem;
using Bytes = std::vector<std::byte>;

constexpr std::size_t kDiskSize = 3 << 20;

// ---- Ranges

class Ranges : public LoopTest {
 protected:
  // Holds a range until it is told to go on.
  struct Holder {
    Holder(std::uint64_t begin, std::uint64_t end, bool exclusive) : range(begin, end, exclusive) {}
    RangeLock::Range range;
    bool held = false;
    Coroutine* co = nullptr;
  };
  static Task<void> hold(RangeLock& lock, Holder& holder) {
    co_await lock.acquire(holder.range);
    holder.held = true;
    const auto park = [&holder](Coroutine& co) noexcept { holder.co = &co; };
    co_await suspend(park);
    lock.release(holder.range);
    holder.held = false;
  }
  void start(Holder& holder) { Coroutine::create(hold(lock_, holder), "holder")->enter(); }
  static void let_go(Holder& holder) { co_wake(*holder.co); }

  RangeLock lock_;
};
ROOST_ON_EACH_LOOP(Ranges);

TEST_P(Ranges, SharedOnesOverlap) {
  Holder a(0, 10, false), b(5, 15, false);
  start(a);
  start(b);
  EXPECT_TRUE(a.held && b.held);
  let_go(a);
  let_go(b);
}

TEST_P(Ranges, AnExclusiveOneWaitsForThoseItOverlapsAndHoldsUpThoseBehindIt) {
  Holder shared(0, 10, false), exclusive(5, 15, true), behind(14, 20, false), apart(15, 20, false);
  start(shared);
  start(exclusive);
  start(behind);
  start(apart);
  EXPECT_TRUE(shared.held);
  EXPECT_FALSE(exclusive.held);
  EXPECT_FALSE(behind.held) << "came later, and must not starve the exclusive one";
  EXPECT_TRUE(apart.held);
  let_go(shared);
  EXPECT_TRUE(exclusive.held);
  EXPECT_FALSE(behind.held);
  let_go(exclusive);
  EXPECT_TRUE(behind.held);
  let_go(behind);
  let_go(apart);
}

TEST_P(Ranges, OneReleaseLetsEveryoneInWhoMay) {
  Holder exclusive(0, 100, true), a(0, 10, false), b(0, 10, false), c(50, 60, true),
      d(55, 70, true);
  for (Holder* one : {&exclusive, &a, &b, &c, &d}) start(*one);
  let_go(exclusive);
  EXPECT_TRUE(a.held && b.held && c.held);
  EXPECT_FALSE(d.held);
  let_go(c);
  EXPECT_TRUE(d.held);
  for (Holder* one : {&a, &b, &d}) let_go(*one);
}

// ---- Disks

struct Way {
  EventLoop loop;
  FileIo file_io;
};

class DirectDisk : public testing::TestWithParam<Way> {
 protected:
  void SetUp() override {
    if (GetParam().loop == EventLoop::kIoUring && !io_uring_available()) {
      GTEST_SKIP() << "the kernel refuses io_uring";
    }
    if (GetParam().file_io == FileIo::kLinuxAio && !linux_aio_available()) {
      GTEST_SKIP() << "there is no Linux AIO";
    }
    std::string folder = (fs::temp_directory_path() / "roost-direct-XXXXXX").string();
    ASSERT_NE(::mkdtemp(folder.data()), nullptr);
    folder_ = folder;
    auto disk = open_file(path("disk"), {.create_size = kDiskSize, .direct = true});
    if (!disk && disk.error().code() == EINVAL) GTEST_SKIP() << disk.error().message();
    ASSERT_TRUE(disk) << disk.error().message();
    disk_ = std::move(*disk);
    context_ = AioContext::create(options());
    scope_.emplace(*context_);
  }
  void TearDown() override {
    scope_.reset();
    context_.reset();
    disk_.reset();
    if (!folder_.empty()) fs::remove_all(folder_);
  }

  static AioContextOptions options() {
    AioContextOptions o;
    o.event_loop = GetParam().loop;
    o.file_io = GetParam().file_io;
    return o;
  }
  std::string path(const char* name) const { return (folder_ / name).string(); }

  Result<void> wait(Task<Result<void>> operation) {
    std::optional<Result<void>> result;
    const auto store = [&]() -> Task<void> { result = co_await std::move(operation); };
    Coroutine::create(store())->enter();
    while (!result) context_->poll(true);
    return *result;
  }

  static Bytes pattern(TestRandom& random, std::size_t size) {
    Bytes bytes(size);
    for (std::byte& b : bytes) b = static_cast<std::byte>(random.next());
    return bytes;
  }

  fs::path folder_;
  std::unique_ptr<BlockDriver> disk_;
  std::shared_ptr<AioContext> context_;
  std::optional<ContextScope> scope_;
};

std::string way_name(const testing::TestParamInfo<Way>& info) {
  const auto [loop, file_io] = info.param;
  const std::string by = file_io == FileIo::kLinuxAio ? "LinuxAio"
                         : file_io == FileIo::kPool   ? "Pool"
                                                      : "Ring";
  return by + (loop == EventLoop::kEpoll ? "UnderEpoll" : "UnderIoUring");
}

INSTANTIATE_TEST_SUITE_P(Ways, DirectDisk,
                         testing::Values(Way{EventLoop::kEpoll, FileIo::kLinuxAio},
                                         Way{EventLoop::kEpoll, FileIo::kPool},
                                         Way{EventLoop::kIoUring, FileIo::kIoUring},
                                         Way{EventLoop::kIoUring, FileIo::kLinuxAio}),
                         way_name);

TEST_P(DirectDisk, AnyOffsetAndLengthAndMemory) {
  TestRandom random(3);
  Bytes model(kDiskSize);
  for (int i = 0; i < 200; ++i) {
    const std::uint64_t most = random.below(4) == 0 ? 2'500'000 : 9'000;
    std::uint64_t length = 1 + random.below(static_cast<std::uint32_t>(most));
    std::uint64_t offset = random.below(kDiskSize - static_cast<std::uint32_t>(length));
    if (i % 4 == 0) offset = offset / 4096 * 4096;
    if (i % 8 == 0)
      length = std::min<std::uint64_t>((length + 4095) / 4096 * 4096, kDiskSize - offset);
    switch (random.below(4)) {
      case 0:
      case 1: {
        // In pieces, one of them empty, at odd addresses.
        const Bytes out = pattern(random, length + 1);
        const std::size_t cut = random.below(static_cast<std::uint32_t>(length));
        auto* const data = const_cast<std::byte*>(out.data()) + i % 2;
        const iovec pieces[] = {{data, cut}, {data, 0}, {data + cut, length - cut}};
        const Result<void> written = wait(disk_->write(offset, pieces, i % 16 == 0));
        ASSERT_TRUE(written) << written.error().message();
        std::copy_n(data, length, model.begin() + static_cast<std::ptrdiff_t>(offset));
        break;
      }
      case 2: {
        const Result<void> zeroed =
            wait(disk_->write_zeroes(offset, length, {.may_unmap = i % 3 != 0, .fua = false}));
        ASSERT_TRUE(zeroed) << zeroed.error().message();
        std::fill_n(model.begin() + static_cast<std::ptrdiff_t>(offset), length, std::byte{});
        break;
      }
      default: {
        Bytes in(length + 1, std::byte{0xee});
        const auto to = std::span(in).subspan(i % 2, length);
        const Result<void> read = wait(disk_->read(offset, to));
        ASSERT_TRUE(read) << read.error().message();
        ASSERT_TRUE(
            std::equal(to.begin(), to.end(), model.begin() + static_cast<std::ptrdiff_t>(offset)))
            << offset << "+" << length;
        EXPECT_EQ(in[i % 2 ? 0 : length], std::byte{0xee}) << "beyond the buffer";
      }
    }
  }
  ASSERT_TRUE(wait(disk_->flush()));
  Bytes in(kDiskSize);
  ASSERT_TRUE(wait(disk_->read(0, in)));
  EXPECT_TRUE(in == model);
}

// Each coroutine owns every n-th piece of the same few blocks, on two contexts.
TEST_P(DirectDisk, WritesOfPartsOfABlockDoNotUndoEachOther) {
  constexpr std::size_t kPiece = 100;
  constexpr int kWriters = 16;
  const int kRounds = rounds(100);
  std::atomic<int> left{kWriters};
  {
    IOThread a(options());
    IOThread b(options());
    const auto writer = [&](int index) -> Task<void> {
      for (int round = 1; round <= kRounds; ++round) {
        Bytes out(kPiece, static_cast<std::byte>(round * kWriters + index));
        const iovec piece{out.data(), out.size()};
        const std::span<const iovec> pieces(&piece, 1);
        const std::uint64_t offset =
            (static_cast<std::uint64_t>(round) * kWriters + static_cast<std::uint64_t>(index)) *
            kPiece % (64 * kPiece);
        const Result<void> written = co_await disk_->write(offset, pieces, false);
        EXPECT_TRUE(written) << written.error().message();
        Bytes in(kPiece);
        EXPECT_TRUE(co_await disk_->read(offset, in));
        EXPECT_TRUE(in == out) << "writer " << index << ", round " << round;
      }
      --left;
    };
    for (int i = 0; i < kWriters; ++i) spawn(i % 2 ? a.context() : b.context(), writer(i));
    while (left > 0) std::this_thread::yield();
  }
}

// A whole block is written, zeroed or written in part at the same time: what only one of them
// touches has to be what that one made of it.
TEST_P(DirectDisk, AWriteOfAPartOfABlockDoesNotUndoAWriteOfTheWhole) {
  const int kRounds = rounds(200);
  for (int round = 1; round <= kRounds; ++round) {
    const auto value = static_cast<std::byte>(round);
    BounceBuffer whole(4096);
    std::ranges::fill(whole.get(), value);
    Bytes part(100, std::byte{0xff});
    int done = 0;
    const auto write_whole = [&]() -> Task<void> {
      if (round % 4 == 0) {
        EXPECT_TRUE(co_await disk_->write_zeroes(0, 4096, {}));
      } else {
        const iovec piece{whole.get().data(), 4096};
        const std::span<const iovec> pieces(&piece, 1);
        EXPECT_TRUE(co_await disk_->write(0, pieces, false));
      }
      ++done;
    };
    const auto write_part = [&]() -> Task<void> {
      const iovec piece{part.data(), part.size()};
      const std::span<const iovec> pieces(&piece, 1);
      EXPECT_TRUE(co_await disk_->write(50, pieces, false));
      ++done;
    };
    if (round % 2) Coroutine::create(write_whole())->enter();
    Coroutine::create(write_part())->enter();
    if (round % 3 == 0) context_->poll(false);
    if (round % 2 == 0) Coroutine::create(write_whole())->enter();
    while (done < 2) context_->poll(true);
    Bytes in(4096);
    ASSERT_TRUE(wait(disk_->read(0, in)));
    const std::byte rest = round % 4 == 0 ? std::byte{} : value;
    ASSERT_EQ(in[0], rest) << round;
    ASSERT_EQ(in[200], rest) << round;
    ASSERT_TRUE(in[60] == std::byte{0xff} || in[60] == rest) << round;
  }
}

TEST_P(DirectDisk, ASizeThatIsNotAMultipleOfTheAlignmentCanOnlyBeRead) {
  const int fd = ::open(path("odd").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  TestRandom random(9);
  const Bytes contents = pattern(random, 10'001);
  ASSERT_EQ(::write(fd, contents.data(), contents.size()), 10'001);
  ::close(fd);
  const auto refused = open_file(path("odd"), {.direct = true});
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().message().find("10001"), std::string::npos)
      << refused.error().message();
  const auto disk = open_file(path("odd"), {.read_only = true, .direct = true});
  ASSERT_TRUE(disk) << disk.error().message();
  Bytes in(10'001);
  ASSERT_TRUE(wait((*disk)->read(0, in)));
  EXPECT_TRUE(in == contents);
  Bytes tail(1);
  ASSERT_TRUE(wait((*disk)->read(10'000, tail)));
  EXPECT_EQ(tail[0], contents[10'000]);
  ASSERT_EQ(::truncate(path("odd").c_str(), 5'000), 0);
  const Result<void> beyond = wait((*disk)->read(4'000, std::span(in).first(2'000)));
  ASSERT_FALSE(beyond);
  EXPECT_EQ(beyond.error().code(), EIO);
}

}  // namespace
}  // namespace roost
