// SPDX-License-Identifier: MIT
// What the server answers where replies come in chunks: data and zeroes, errors with their words,
// the state of blocks.
#include <gtest/gtest.h>

#include "export/test_nbd_server.h"

namespace roost {
namespace {

class NbdRepliesTest : public NbdServerTest {};
ROOST_ON_EACH_LOOP(NbdRepliesTest);

constexpr nbd::ReplyStyle kChunked[] = {nbd::ReplyStyle::kStructured, nbd::ReplyStyle::kExtended};

Extent data(std::uint64_t length) { return {length, false, false}; }
Extent hole(std::uint64_t length) { return {length, true, true}; }

TEST_P(NbdRepliesTest, AReadIsOneChunkWithItsDataWhole) {
  start();
  for (ReplyStyle style : kChunked) {
    Client client = connect();
    client.negotiate(style);
    EXPECT_TRUE(client.told_flags & nbd::kTransmissionSendDf);
    for (std::uint64_t i = 1; i <= 3; ++i) client.ask(Command::kRead, i, 8192 * i, 4096);
    for (std::uint64_t i = 1; i <= 3; ++i) {
      const auto got = client.chunk(i, 8192 * i);
      EXPECT_EQ(got.type, nbd::ChunkType::kOffsetData);
      EXPECT_TRUE(got.done);
      ASSERT_EQ(got.payload.size(), 8u + 4096);
      EXPECT_EQ(got.offset(), 8192 * i);
      EXPECT_EQ(got.payload.back(), std::byte{0x5a});
    }
    // Of no bytes: a chunk without data.
    client.ask(Command::kRead, 4, 0, 0);
    const auto none = client.chunk(4, 0);
    EXPECT_EQ(none.type, nbd::ChunkType::kNone);
    EXPECT_TRUE(none.done);
  }
  EXPECT_EQ(disk_.count("status"), 0);
}

TEST_P(NbdRepliesTest, ALongReadLeavesOutZeroes) {
  disk_.extents = {data(8192), hole(65536), data(1 << 20)};
  start();
  for (ReplyStyle style : kChunked) {
    Client client = connect();
    client.negotiate(style);
    client.ask(Command::kRead, 1, 4096, 128 << 10);
    const auto first = client.chunk(1, 4096);
    EXPECT_EQ(first.type, nbd::ChunkType::kOffsetData);
    EXPECT_FALSE(first.done);
    EXPECT_EQ(first.offset(), 4096u);
    EXPECT_EQ(first.payload.size(), 8u + 8192);
    const auto second = client.chunk(1, 4096);
    EXPECT_EQ(second.type, nbd::ChunkType::kOffsetHole);
    EXPECT_FALSE(second.done);
    EXPECT_EQ(second.offset(), 4096u + 8192);
    ASSERT_EQ(second.payload.size(), 12u);
    EXPECT_EQ(load_be<std::uint32_t>(second.payload.data() + 8), 65536u);
    const auto third = client.chunk(1, 4096);
    EXPECT_EQ(third.type, nbd::ChunkType::kOffsetData);
    EXPECT_TRUE(third.done);
    EXPECT_EQ(third.offset(), 4096u + 8192 + 65536);
    EXPECT_EQ(third.payload.size(), 8u + (128 << 10) - 8192 - 65536);

    // Not to be fragmented: all of it is data.
    client.ask(Command::kRead, 2, 4096, 128 << 10, nbd::kCommandDf);
    const auto whole = client.chunk(2, 4096);
    EXPECT_EQ(whole.type, nbd::ChunkType::kOffsetData);
    EXPECT_TRUE(whole.done);
    EXPECT_EQ(whole.payload.size(), 8u + (128 << 10));
  }
  EXPECT_EQ(disk_.count("status"), 2);
}

TEST_P(NbdRepliesTest, PiecesOfAReadCountAsOneRequest) {
  disk_.extents = {hole(8192), data(8192), hole(8192), data(1 << 20)};
  start({.requests_in_flight = 2});
  Client client = connect();
  client.negotiate(ReplyStyle::kStructured);
  for (std::uint64_t i = 0; i < 20; ++i) client.ask(Command::kRead, i, 0, 64 << 10);
  std::map<std::uint64_t, int> chunks;
  for (int i = 0; i < 20 * 4; ++i) {
    const auto header = client.receive(nbd::kStructuredReplySize);
    ASSERT_EQ(header.size(), nbd::kStructuredReplySize);
    client.receive(load_be<std::uint32_t>(header.data() + 16));
    ++chunks[load_be<std::uint64_t>(header.data() + 8)];
  }
  EXPECT_EQ(chunks.size(), 20u);
  for (auto [cookie, count] : chunks) EXPECT_EQ(count, 4) << cookie;
}

TEST_P(NbdRepliesTest, ErrorsComeWithTheirMessageAndTheirPlace) {
  disk_.extents = {data(8192), hole(65536), data(1 << 20)};
  start();
  for (ReplyStyle style : kChunked) {
    Client client = connect();
    client.negotiate(style);
    disk_.error = ENOSPC;
    client.ask(Command::kWrite, 1, 0, 512);
    const auto full = client.chunk(1, 0);
    EXPECT_EQ(full.type, nbd::ChunkType::kError);
    EXPECT_TRUE(full.done);
    EXPECT_EQ(full.error(), nbd::kErrorNoSpc);
    EXPECT_EQ(full.message(), "write hand at 0+512: No space left on device");
    disk_.error = 0;

    client.ask(Command::kRead, 2, kSize, 512);
    const auto beyond = client.chunk(2, kSize);
    EXPECT_EQ(beyond.error(), nbd::kErrorInval);
    EXPECT_EQ(beyond.message(), "beyond the end of the export");

    // The first two pieces are sent before the third fails.
    disk_.bad_from = 50'000;
    client.ask(Command::kRead, 3, 0, 128 << 10);
    EXPECT_EQ(client.chunk(3, 0).type, nbd::ChunkType::kOffsetData);
    EXPECT_EQ(client.chunk(3, 0).type, nbd::ChunkType::kOffsetHole);
    const auto broken = client.chunk(3, 0);
    EXPECT_EQ(broken.type, nbd::ChunkType::kErrorOffset);
    EXPECT_TRUE(broken.done);
    EXPECT_EQ(broken.error(), nbd::kErrorIo);
    EXPECT_EQ(broken.message(), "read bad sector: Input/output error");
    EXPECT_EQ(load_be<std::uint64_t>(broken.payload.data() + broken.payload.size() - 8),
              8192u + 65536);
    disk_.bad_from = ~0ull;
    client.ask(Command::kFlush, 4, 0, 0);
    EXPECT_EQ(client.outcome(4), 0u);
  }
}

TEST_P(NbdRepliesTest, StatusTellsWhatTheDiskSays) {
  disk_.extents = {data(8192), hole(65536), {4096, false, true}, data(1 << 20)};
  start();
  for (ReplyStyle style : kChunked) {
    const bool extended = style == ReplyStyle::kExtended;
    const auto extents = [&](const Client::ReplyChunk& got) {
      EXPECT_TRUE(got.done);
      EXPECT_EQ(got.type,
                extended ? nbd::ChunkType::kBlockStatusExt : nbd::ChunkType::kBlockStatus);
      std::vector<std::pair<std::uint64_t, std::uint64_t>> result;
      const std::byte* at = got.payload.data();
      const std::byte* const end = at + got.payload.size();
      EXPECT_EQ(load_be<std::uint32_t>(at), nbd::kBaseAllocationId);
      at += extended ? 8 : 4;
      for (; at < end; at += extended ? 16 : 8) {
        if (extended) {
          result.emplace_back(load_be<std::uint64_t>(at), load_be<std::uint64_t>(at + 8));
        } else {
          result.emplace_back(load_be<std::uint32_t>(at), load_be<std::uint32_t>(at + 4));
        }
      }
      if (extended) {
        EXPECT_EQ(load_be<std::uint32_t>(got.payload.data() + 4), result.size());
      }
      return result;
    };
    using List = std::vector<std::pair<std::uint64_t, std::uint64_t>>;
    Client client = connect();
    client.negotiate(style);
    client.ask(Command::kBlockStatus, 1, 0, 100'000);
    EXPECT_EQ(extents(client.chunk(1, 0)),
              (List{{8192, 0}, {65536, 3}, {4096, 2}, {100'000 - 8192 - 65536 - 4096, 0}}));
    client.ask(Command::kBlockStatus, 2, 512, 100'000, nbd::kCommandReqOne);
    EXPECT_EQ(extents(client.chunk(2, 512)), (List{{8192, 0}}));
    client.ask(Command::kBlockStatus, 3, 0, 0);
    EXPECT_EQ(client.outcome(3), nbd::kErrorInval);
    EXPECT_EQ((client.told_flags & nbd::kTransmissionBlockStatusPayload) != 0, extended);
    if (!extended) continue;

    std::vector<std::byte> query(12);
    store_be<std::uint64_t>(query.data(), 10'000);
    store_be<std::uint32_t>(query.data() + 8, nbd::kBaseAllocationId);
    client.ask(Command::kBlockStatus, 4, 0, 12, nbd::kCommandPayloadLen, query);
    EXPECT_EQ(extents(client.chunk(4, 0)), (List{{8192, 0}, {10'000 - 8192, 3}}));
    store_be<std::uint32_t>(query.data() + 8, 77u);
    client.ask(Command::kBlockStatus, 5, 0, 12, nbd::kCommandPayloadLen, query);
    EXPECT_EQ(client.outcome(5), nbd::kErrorInval);
    query.resize(16);
    client.ask(Command::kBlockStatus, 6, 0, 16, nbd::kCommandPayloadLen, query);
    EXPECT_EQ(client.outcome(6), nbd::kErrorInval);
    client.ask(Command::kRead, 7, 0, 512);
    EXPECT_EQ(client.chunk(7, 0).payload.size(), 8u + 512);
  }
}

TEST_P(NbdRepliesTest, StatusNeedsItsContext) {
  start();
  Client client = connect();
  client.greet();
  ASSERT_EQ(client.option(nbd::Option::kStructuredReply), Client::kAck);
  ASSERT_EQ(client.go(""), Client::kAck);
  client.send(Client::request(Command::kBlockStatus, 1, 512));
  const auto header = client.receive(nbd::kStructuredReplySize);
  ASSERT_EQ(header.size(), nbd::kStructuredReplySize);
  EXPECT_EQ(load_be<std::uint16_t>(header.data() + 6),
            static_cast<std::uint16_t>(nbd::ChunkType::kError));
  EXPECT_EQ(disk_.count("status"), 0);
}

TEST_P(NbdRepliesTest, CachingAndQuickZeroesReachTheDisk) {
  start();
  Client client = connect();
  client.negotiate(ReplyStyle::kExtended);
  client.ask(Command::kCache, 1, 0, kSize);
  EXPECT_EQ(client.outcome(1), 0u);
  EXPECT_EQ(disk_.count("cache"), 1);
  client.ask(Command::kWriteZeroes, 2, 0, kSize, nbd::kCommandFastZero);
  EXPECT_EQ(client.outcome(2), 0u);
  EXPECT_EQ(disk_.count("zeroes fast"), 1);
  // That it would not be quick is an answer, not a failure.
  disk_.error = ENOTSUP;
  client.ask(Command::kWriteZeroes, 3, 0, kSize, nbd::kCommandFastZero);
  EXPECT_EQ(client.outcome(3), nbd::kErrorNotSup);
  EXPECT_TRUE(log().empty());
  // Otherwise the protocol does not know that word.
  client.ask(Command::kWriteZeroes, 4, 0, kSize);
  EXPECT_EQ(client.outcome(4), nbd::kErrorInval);
  EXPECT_EQ(log().size(), 1u);
}

TEST_P(NbdRepliesTest, RequestsKeepToTheExportsBlockSize) {
  disk_.extents = {data(1000), hole(1 << 20)};
  start();
  ASSERT_TRUE(server_->add_export({.name = "blocks", .disk = &disk_, .min_block = 4096}));
  Client client = connect();
  client.negotiate(ReplyStyle::kExtended, "blocks");
  client.ask(Command::kRead, 1, 4096, 512);
  EXPECT_EQ(client.outcome(1, 4096), nbd::kErrorInval);
  client.ask(Command::kRead, 2, 4096, 4096);
  EXPECT_EQ(client.chunk(2, 4096).payload.size(), 8u + 4096);
  // Nor does a status say anything about a part of a block.
  client.ask(Command::kBlockStatus, 3, 0, 16384, nbd::kCommandReqOne);
  const auto got = client.chunk(3, 0);
  ASSERT_EQ(got.payload.size(), 8u + 16);
  EXPECT_EQ(load_be<std::uint64_t>(got.payload.data() + 8), 4096u);
  EXPECT_EQ(load_be<std::uint64_t>(got.payload.data() + 16), 0u);
}

}  // namespace
}  // namespace roost
