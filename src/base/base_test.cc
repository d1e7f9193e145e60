// SPDX-License-Identifier: MIT
// Errors, checks, byte order and clocks.
#include <gtest/gtest.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "roost/base/bytes.h"
#include "roost/base/check.h"
#include "roost/base/clock.h"
#include "roost/base/result.h"

namespace roost {
namespace {

TEST(Error, ItsMessageNamesTheAttemptAndTheCause) {
  const Error error(EIO, "pread disk.img at 4096+512");
  EXPECT_EQ(error.code(), EIO);
  EXPECT_EQ(error.doing(), "pread disk.img at 4096+512");
  EXPECT_EQ(error.message(), "pread disk.img at 4096+512: Input/output error");
}

TEST(Error, AnUnknownCodeStillGivesAMessage) {
  EXPECT_TRUE(Error(123'456, "something").message().starts_with("something: "));
}

Result<int> halve(int value) {
  if (value % 2) return fail(EINVAL, "halve " + std::to_string(value));
  return value / 2;
}

TEST(Result, CarriesAValueOrAnError) {
  EXPECT_EQ(halve(8).value(), 4);
  const auto refused = halve(7);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), EINVAL);
  EXPECT_EQ(refused.error().message(), "halve 7: Invalid argument");
}

TEST(Result, HoldsMoveOnlyValues) {
  Result<std::unique_ptr<int>> result = std::make_unique<int>(3);
  EXPECT_EQ(*std::move(result).value(), 3);
}

TEST(Bytes, AreStoredWithTheHighestFirst) {
  std::array<std::byte, 8> bytes{};
  store_be(bytes.data(), std::uint32_t{0x01020304});
  EXPECT_EQ(bytes[0], std::byte{1});
  EXPECT_EQ(bytes[3], std::byte{4});
  EXPECT_EQ(bytes[4], std::byte{0});
  store_be(bytes.data(), std::uint64_t{0x8070605040302010});
  EXPECT_EQ(bytes[0], std::byte{0x80});
  EXPECT_EQ(bytes[7], std::byte{0x10});
}

TEST(Bytes, LoadGivesBackWhatStoreWroteAtAnyAlignment) {
  std::array<std::byte, 16> bytes{};
  for (int offset = 0; offset < 8; ++offset) {
    std::byte* at = bytes.data() + offset;
    store_be(at, std::uint64_t{0xfedcba9876543210});
    EXPECT_EQ(load_be<std::uint64_t>(at), 0xfedcba9876543210u);
    EXPECT_EQ(load_be<std::uint32_t>(at), 0xfedcba98u);
    EXPECT_EQ(load_be<std::uint16_t>(at), 0xfedcu);
    EXPECT_EQ(load_be<std::uint8_t>(at), 0xfeu);
  }
}

TEST(Clock, TheManualOneMovesOnlyWhenTold) {
  ManualClock clock;
  const auto start = clock.now_ns();
  EXPECT_EQ(clock.now_ns(), start);
  clock.advance_ns(7);
  EXPECT_EQ(clock.now_ns(), start + 7);
}

TEST(Clock, TheRealOneGoesOnAndNeverBack) {
  const std::int64_t start = real_clock().now_ns();
  std::int64_t before = start;
  while (before < start + 1'000'000) {
    const std::int64_t now = real_clock().now_ns();
    ASSERT_GE(now, before);
    before = now;
  }
}

TEST(CheckDeathTest, AFailedCheckPrintsConditionPlaceAndMessageAndAborts) {
  const int apples = 3;
  EXPECT_DEATH(ROOST_CHECK(apples == 4, "{} apples in {}", apples, "the bag"),
               "roost: .*base_test.cc:[0-9]+: check 'apples == 4' failed: 3 apples in the bag");
  ROOST_CHECK(apples == 3, "not evaluated");
}

TEST(CheckDeathTest, PanicPrintsItsMessage) {
  EXPECT_DEATH(panic("the sky fell"), "^roost: the sky fell");
  EXPECT_DEATH(panicf("{} of {}", 1, "two"), "^roost: 1 of two");
}

TEST(Check, APlaceIsDescribedByTheEndOfItsPath) {
  const std::string text = describe(std::source_location::current());
  EXPECT_TRUE(text.starts_with("base/base_test.cc:")) << text;
}

}  // namespace
}  // namespace roost
