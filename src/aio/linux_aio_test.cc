// SPDX-License-Identifier: MIT
// Files opened with O_DIRECT, through whatever executes them: Linux AIO, the ring, the pool.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stop_token>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include "aio/test_loop.h"
#include "base/test_build.h"
#include "roost/aio/io.h"
#include "roost/aio/unique_fd.h"

namespace roost {
namespace {

constexpr std::size_t kBlock = 4096;

// Memory that O_DIRECT takes.
class Blocks {
 public:
  explicit Blocks(std::size_t count)
      : size_(count * kBlock), bytes_(static_cast<std::byte*>(std::aligned_alloc(kBlock, size_))) {
    std::memset(bytes_, 0, size_);
  }
  Blocks(const Blocks&) = delete;
  Blocks& operator=(const Blocks&) = delete;
  ~Blocks() { std::free(bytes_); }
  std::span<std::byte> all() { return {bytes_, size_}; }
  std::span<std::byte> block(std::size_t i) { return {bytes_ + i * kBlock, kBlock}; }

 private:
  std::size_t size_;
  std::byte* bytes_;
};

using Way = std::tuple<EventLoop, FileIo>;

class DirectFile : public testing::TestWithParam<Way> {
 protected:
  void SetUp() override {
    const auto [loop, file_io] = GetParam();
    if (loop == EventLoop::kIoUring && !io_uring_available()) {
      GTEST_SKIP() << "the kernel refuses io_uring";
    }
    if (file_io == FileIo::kLinuxAio && !linux_aio_available()) {
      GTEST_SKIP() << "there is no Linux AIO";
    }
    file_ = UniqueFd(::open("/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC | O_DIRECT, 0600));
    if (!file_) GTEST_SKIP() << "the file system of /tmp does not allow O_DIRECT";
    AioContextOptions options;
    options.event_loop = loop;
    options.file_io = file_io;
    context_ = AioContext::create(options);
    scope_.emplace(*context_);
  }
  void TearDown() override {
    scope_.reset();
    context_.reset();
  }

  Task<std::int64_t> write(std::span<std::byte> from, std::uint64_t offset, int flags = 0) {
    const iovec part{from.data(), from.size()};
    const std::span<const iovec> parts(&part, 1);
    IoAwaiter io = io_writev(file_.get(), parts, offset, flags);
    io.request().direct = true;
    co_return co_await io;
  }
  Task<std::int64_t> read(std::span<std::byte> to, std::uint64_t offset) {
    IoAwaiter io = io_read(file_.get(), to, offset);
    io.request().direct = true;
    co_return co_await io;
  }
  Task<std::int64_t> sync() {
    IoAwaiter io = io_data_sync(file_.get());
    io.request().direct = true;
    co_return co_await io;
  }

  template <class Predicate>
  void poll_until(Predicate done) {
    while (!done()) context_->poll(true);
  }
  template <class Body>
  void run(Body& body) {
    bool ended = false;
    const auto outer = [&]() -> Task<void> {
      co_await body();
      ended = true;
    };
    Coroutine::create(outer(), "test")->enter();
    poll_until([&] { return ended; });
  }

  UniqueFd file_;
  std::shared_ptr<AioContext> context_;
  std::optional<ContextScope> scope_;
};

std::string way_name(const testing::TestParamInfo<Way>& info) {
  const auto [loop, file_io] = info.param;
  const std::string by = file_io == FileIo::kAuto       ? "Auto"
                         : file_io == FileIo::kPool     ? "Pool"
                         : file_io == FileIo::kLinuxAio ? "LinuxAio"
                                                        : "IoUring";
  return by + (loop == EventLoop::kIoUring ? "UnderIoUring" : "UnderEpoll");
}

INSTANTIATE_TEST_SUITE_P(Ways, DirectFile,
                         testing::Values(Way{EventLoop::kEpoll, FileIo::kAuto},
                                         Way{EventLoop::kEpoll, FileIo::kPool},
                                         Way{EventLoop::kEpoll, FileIo::kLinuxAio},
                                         Way{EventLoop::kIoUring, FileIo::kAuto},
                                         Way{EventLoop::kIoUring, FileIo::kPool},
                                         Way{EventLoop::kIoUring, FileIo::kLinuxAio},
                                         Way{EventLoop::kIoUring, FileIo::kIoUring}),
                         way_name);

TEST_P(DirectFile, WhatWasWrittenIsReadBackAndSynced) {
  Blocks out(8);
  Blocks in(8);
  TestRandom random(1);
  for (std::byte& b : out.all()) b = static_cast<std::byte>(random.next());
  const auto body = [&]() -> Task<void> {
    EXPECT_EQ(co_await write(out.all(), 2 * kBlock), static_cast<std::int64_t>(8 * kBlock));
    EXPECT_EQ(co_await write(out.block(0), 0, RWF_DSYNC), static_cast<std::int64_t>(kBlock));
    EXPECT_EQ(co_await sync(), 0);
    EXPECT_EQ(co_await read(in.all(), 2 * kBlock), static_cast<std::int64_t>(8 * kBlock));
    // Beyond the end.
    EXPECT_EQ(co_await read(in.block(0), 100 * kBlock), 0);
    EXPECT_EQ(co_await read(in.block(0), 2 * kBlock), static_cast<std::int64_t>(kBlock));
  };
  run(body);
  EXPECT_TRUE(std::ranges::equal(in.all(), out.all()));
}

TEST_P(DirectFile, ErrorsAreNegativeErrnos) {
  Blocks block(1);
  const auto body = [&]() -> Task<void> {
    EXPECT_EQ(co_await write(block.all(), 1), -EINVAL) << "an offset that is not aligned";
    IoAwaiter io = io_read(-1, block.all(), 0);
    io.request().direct = true;
    EXPECT_EQ(co_await io, -EBADF);
    // What follows a refused submission is submitted all the same.
    EXPECT_EQ(co_await write(block.all(), 0), static_cast<std::int64_t>(kBlock));
  };
  run(body);
}

// More than the kernel is given at a time, good and bad ones mixed, in one iteration.
TEST_P(DirectFile, ThousandsAtOnce) {
  constexpr int kWrites = 1000;
  Blocks out(kWrites);
  for (int i = 0; i < kWrites; ++i) std::ranges::fill(out.block(i), static_cast<std::byte>(i));
  int done = 0;
  int refused = 0;
  const auto body = [&](int i) -> Task<void> {
    const bool bad = i % 10 == 9;
    const std::int64_t n = co_await write(out.block(i), i * kBlock + (bad ? 1 : 0));
    EXPECT_EQ(n, bad ? -EINVAL : static_cast<std::int64_t>(kBlock));
    refused += n < 0;
    ++done;
  };
  for (int i = 0; i < kWrites; ++i) Coroutine::create(body(i))->enter();
  poll_until([&] { return done == kWrites; });
  EXPECT_EQ(refused, kWrites / 10);
  Blocks in(kWrites);
  const auto check = [&](int i) -> Task<void> {
    EXPECT_EQ(co_await read(in.block(i), i * kBlock), static_cast<std::int64_t>(kBlock));
    ++done;
  };
  done = 0;
  for (int i = 0; i < kWrites - 1; ++i) Coroutine::create(check(i))->enter();
  poll_until([&] { return done == kWrites - 1; });
  for (int i = 0; i < kWrites - 1; ++i) {
    EXPECT_EQ(in.block(i)[17], i % 10 == 9 ? std::byte{} : static_cast<std::byte>(i)) << i;
  }
}

// Cancelled right away, each either did not happen or is told as done.
TEST_P(DirectFile, ACancelledWriteHasNotHappenedOrIsDone) {
  constexpr int kWrites = 300;
  Blocks out(kWrites);
  for (int i = 0; i < kWrites; ++i) std::ranges::fill(out.block(i), std::byte{0x5a});
  ASSERT_EQ(::ftruncate(file_.get(), kWrites * kBlock), 0);
  std::vector<std::int64_t> results(kWrites);
  int done = 0;
  std::stop_source source;
  const auto body = [&](std::size_t i) -> Task<void> {
    const iovec part{out.block(i).data(), kBlock};
    const std::span<const iovec> parts(&part, 1);
    IoAwaiter io = io_writev(file_.get(), parts, i * kBlock);
    io.request().direct = true;
    CancellableIoAwaiter cancellable(io.request(), source.get_token());
    results[i] = co_await std::move(cancellable);
    ++done;
  };
  for (std::size_t i = 0; i < kWrites; ++i) Coroutine::create(body(i))->enter();
  context_->poll(false);
  source.request_stop();
  poll_until([&] { return done == kWrites; });
  Blocks in(kWrites);
  const auto check = [&]() -> Task<void> {
    std::size_t offset = 0;
    while (offset < in.all().size()) {
      const std::int64_t n = co_await read(in.all().subspan(offset), offset);
      if (n <= 0) co_return;
      offset += static_cast<std::size_t>(n);
    }
  };
  run(check);
  int cancelled = 0;
  for (std::size_t i = 0; i < kWrites; ++i) {
    ASSERT_TRUE(results[i] == kBlock || results[i] == -ECANCELED) << results[i];
    cancelled += results[i] == -ECANCELED;
    EXPECT_EQ(in.block(i)[0], results[i] == -ECANCELED ? std::byte{} : std::byte{0x5a}) << i;
  }
  const auto [loop, file_io] = GetParam();
  if (file_io == FileIo::kLinuxAio) {
    // The first ones were submitted, and are told as done; those that waited were withdrawn.
    constexpr int kSubmitted = 128;  // at most so many at a time
    EXPECT_GE(cancelled, kWrites - kSubmitted);
    EXPECT_LT(cancelled, kWrites);
    EXPECT_TRUE(std::ranges::is_sorted(results, std::greater()));
  }
}

TEST(FileIo, TheRingIsNotToBeHadUnderEpoll) {
  AioContextOptions options;
  options.event_loop = EventLoop::kEpoll;
  options.file_io = FileIo::kIoUring;
  EXPECT_THROW(AioContext::create(options), std::system_error);
}

TEST(FileIo, LinuxAioIsAnErrorWhereThereIsNone) {
  AioContextOptions options;
  options.file_io = FileIo::kLinuxAio;
  if (linux_aio_available()) {
    EXPECT_NO_THROW(AioContext::create(options));
  } else {
    EXPECT_THROW(AioContext::create(options), std::system_error);
  }
}

}  // namespace
}  // namespace roost
