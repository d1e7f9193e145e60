// SPDX-License-Identifier: MIT
// What tests of disks share: a fixture that waits for one operation after the other.
//
// Threads: the test's.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "aio/test_loop.h"
#include "roost/aio/aio_context.h"
#include "roost/block/block_driver.h"

namespace roost {

using Bytes = std::vector<std::byte>;

inline Bytes pattern(std::size_t size, unsigned seed = 1) {
  Bytes bytes(size);
  for (std::byte& b : bytes) b = static_cast<std::byte>((seed = seed * 1664525 + 1013904223) >> 24);
  return bytes;
}

/// With a folder of its own.
class DiskTest : public LoopTest {
 protected:
  void SetUp() override {
    LoopTest::SetUp();
    if (IsSkipped()) return;
    std::string folder = (std::filesystem::temp_directory_path() / "roost-block-XXXXXX").string();
    ASSERT_NE(::mkdtemp(folder.data()), nullptr);
    folder_ = folder;
  }
  void TearDown() override {
    LoopTest::TearDown();
    if (!folder_.empty()) std::filesystem::remove_all(folder_);
  }

  std::string path(const char* name) const { return (folder_ / name).string(); }

  std::unique_ptr<BlockDriver> make_file(std::uint64_t size) {
    auto disk = open_file(path("disk"), {.read_only = false, .create_size = size});
    EXPECT_TRUE(disk) << disk.error().message();
    return disk ? std::move(*disk) : nullptr;
  }

  /// Runs one operation to its end.
  template <class T>
  Result<T> wait(Task<Result<T>> operation) {
    std::optional<Result<T>> result;
    Coroutine::create(store(std::move(operation), result))->enter();
    poll_until([&] { return result.has_value(); });
    return *result;
  }

  Result<void> write(BlockDriver& disk, std::uint64_t offset, const Bytes& bytes,
                     bool fua = false) {
    const iovec piece{const_cast<std::byte*>(bytes.data()), bytes.size()};
    return wait(disk.write(offset, std::span(&piece, 1), fua));
  }

  Bytes read(BlockDriver& disk, std::uint64_t offset, std::size_t size) {
    Bytes bytes(size, std::byte{0xee});
    const Result<void> result = wait(disk.read(offset, bytes));
    EXPECT_TRUE(result) << result.error().message();
    return bytes;
  }

  template <class T>
  static Task<void> store(Task<Result<T>> operation, std::optional<Result<T>>& to) {
    to = co_await std::move(operation);
  }

  std::filesystem::path folder_;
};

}  // namespace roost
