// SPDX-License-Identifier: MIT
#include "export/extents.h"

#include <gtest/gtest.h>

#include <random>

namespace roost {
namespace {

constexpr Extent data(std::uint64_t length) { return {length, false, false}; }
constexpr Extent hole(std::uint64_t length) { return {length, true, true}; }
constexpr Extent zeroes(std::uint64_t length) { return {length, false, true}; }

using Extents = std::vector<Extent>;
using Pieces = std::vector<ReadPiece>;

TEST(AlignExtents, LeavesWhatIsAligned) {
  const Extents extents = {data(512), hole(1024), data(4096)};
  EXPECT_EQ(align_extents(extents, 512), extents);
  EXPECT_EQ(align_extents(extents, 1), extents);
}

TEST(AlignExtents, CallsABlockWhatAllItsPartsAre) {
  EXPECT_EQ(align_extents(Extents{data(100), hole(924)}, 512), (Extents{data(512), hole(512)}));
  EXPECT_EQ(align_extents(Extents{hole(600), data(424)}, 512), (Extents{hole(512), data(512)}));
  EXPECT_EQ(align_extents(Extents{hole(100), zeroes(412)}, 512), Extents{zeroes(512)});
  // Four parts of one block.
  EXPECT_EQ(align_extents(Extents{hole(1), zeroes(1), hole(1), zeroes(1021)}, 1024),
            Extents{zeroes(1024)});
}

TEST(AlignExtents, MergesWhatBecomesAlike) {
  EXPECT_EQ(align_extents(Extents{data(512), hole(100), data(412), data(512)}, 512),
            Extents{data(1536)});
}

TEST(AlignExtents, DropsAPartAtTheEndUnlessThereIsNothingElse) {
  EXPECT_EQ(align_extents(Extents{hole(700)}, 512), Extents{hole(512)});
  EXPECT_EQ(align_extents(Extents{hole(700), data(100)}, 512), Extents{hole(512)});
  EXPECT_EQ(align_extents(Extents{hole(100)}, 512), Extents{data(512)});
}

TEST(AlignExtents, NeverClaimsMoreThanTheExtentsDo) {
  std::minstd_rand random(7);
  for (int round = 0; round < 2000; ++round) {
    Extents extents;
    std::vector<const Extent*> bytes;
    for (unsigned i = 0; i < 1 + random() % 8; ++i) {
      extents.push_back({1 + random() % 20, random() % 2 == 0, random() % 2 == 0});
    }
    for (const Extent& extent : extents) bytes.insert(bytes.end(), extent.length, &extent);
    const std::uint64_t block = 1u << random() % 4;
    std::uint64_t at = 0;
    for (const Extent& extent : align_extents(extents, block)) {
      ASSERT_GT(extent.length, 0u);
      ASSERT_EQ(extent.length % block, 0u);
      for (std::uint64_t i = 0; i < extent.length; ++i, ++at) {
        if (at >= bytes.size()) {
          ASSERT_FALSE(extent.hole || extent.zero);
        } else {
          ASSERT_TRUE(!extent.hole || bytes[at]->hole);
          ASSERT_TRUE(!extent.zero || bytes[at]->zero);
        }
      }
    }
    ASSERT_GT(at, 0u);
    ASSERT_LT(bytes.size(), at + block);
  }
}

TEST(SplitRead, TakesZeroesOutOfTheData) {
  EXPECT_EQ(split_read(4096, 65536, Extents{data(8192), hole(16384), data(40960)}),
            (Pieces{{4096, 8192, false}, {12288, 16384, true}, {28672, 40960, false}}));
  EXPECT_EQ(split_read(0, 65536, Extents{hole(65536)}), (Pieces{{0, 65536, true}}));
  // Whether it takes space does not matter.
  EXPECT_EQ(split_read(0, 8192, Extents{hole(2048), zeroes(6144)}), (Pieces{{0, 8192, true}}));
  // A hole that does not read as zeroes is data.
  EXPECT_EQ(split_read(0, 8192, Extents{{8192, true, false}}), (Pieces{{0, 8192, false}}));
}

TEST(SplitRead, KeepsFewZeroesWithTheData) {
  EXPECT_EQ(split_read(0, 16384, Extents{data(8192), hole(512), data(7680)}),
            (Pieces{{0, 16384, false}}));
  EXPECT_EQ(split_read(0, 4096, Extents{hole(8192)}), (Pieces{{0, 4096, true}}));
  EXPECT_EQ(split_read(0, 4095, Extents{hole(8192)}), (Pieces{{0, 4095, false}}));
}

TEST(SplitRead, TakesWhatTheExtentsDoNotCoverForData) {
  EXPECT_EQ(split_read(0, 65536, Extents{hole(8192)}),
            (Pieces{{0, 8192, true}, {8192, 57344, false}}));
  EXPECT_EQ(split_read(512, 4096, {}), (Pieces{{512, 4096, false}}));
}

}  // namespace
}  // namespace roost
