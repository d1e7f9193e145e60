// SPDX-License-Identifier: MIT
#include "roost/nbd/transmission.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <vector>

#include "nbd/test_bytes.h"

namespace roost::nbd {
namespace {

using Event = RequestParser::Event;

const ByteVector kReadRequest = {
    0x25, 0x60, 0x95, 0x13,                          // magic
    0x00, 0x00,                                      // flags
    0x00, 0x00,                                      // READ
    0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08,  // cookie
    0x00, 0x00, 0x00, 0x12, 0x34, 0x56, 0x70, 0x00,  // offset
    0x00, 0x00, 0x10, 0x00,                          // length
};
const Request kRead = {.command = Command::kRead,
                       .cookie = 0x0102030405060708,
                       .offset = 0x1234567000,
                       .length = 4096};

const ByteVector kWriteRequest = {
    0x25, 0x60, 0x95, 0x13,                          // magic
    0x00, 0x01,                                      // FUA
    0x00, 0x01,                                      // WRITE
    0xff, 0xfe, 0xfd, 0xfc, 0xfb, 0xfa, 0xf9, 0xf8,  // cookie
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x02, 0x00,  // offset
    0x00, 0x00, 0x00, 0x05,                          // length
    'h',  'e',  'l',  'l',  'o',                     // data
};
const Request kWrite = {.flags = kCommandFua,
                        .command = Command::kWrite,
                        .cookie = 0xfffefdfcfbfaf9f8,
                        .offset = 512,
                        .length = 5};

const ByteVector kZeroesRequest = {
    0x25, 0x60, 0x95, 0x13,                          // magic
    0x00, 0x02,                                      // NO_HOLE
    0x00, 0x06,                                      // WRITE_ZEROES
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,  // cookie
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,  // offset
    0xff, 0xff, 0xff, 0xff,                          // length
};
const Request kZeroes = {.flags = kCommandNoHole,
                         .command = Command::kWriteZeroes,
                         .cookie = 0,
                         .offset = 0xffffffffffffffff,
                         .length = 0xffffffff};

const ByteVector kDiscRequest = {
    0x25, 0x60, 0x95, 0x13,                          // magic
    0x00, 0x00,                                      // flags
    0x00, 0x02,                                      // DISC
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x09,  // cookie
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,  //
    0x00, 0x00, 0x00, 0x00,                          //
};
const Request kDisc = {.command = Command::kDisc, .cookie = 9};

std::span<const std::byte, kRequestSize> header(const ByteVector& bytes) {
  return view(bytes).first<kRequestSize>();
}

const ByteVector kExtendedWriteRequest = {
    0x21, 0xe4, 0x1c, 0x71,                          // magic
    0x00, 0x21,                                      // FUA, PAYLOAD_LEN
    0x00, 0x01,                                      // WRITE
    0xff, 0xfe, 0xfd, 0xfc, 0xfb, 0xfa, 0xf9, 0xf8,  // cookie
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x02, 0x00,  // offset
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x05,  // payload length
    'h',  'e',  'l',  'l',  'o',                     // data
};
const Request kExtendedWrite = {.flags = kCommandFua | kCommandPayloadLen,
                                .command = Command::kWrite,
                                .extended = true,
                                .cookie = 0xfffefdfcfbfaf9f8,
                                .offset = 512,
                                .length = 5};

const ByteVector kExtendedTrimRequest = {
    0x21, 0xe4, 0x1c, 0x71,                          // magic
    0x00, 0x00,                                      // flags
    0x00, 0x04,                                      // TRIM
    0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08,  // cookie
    0x00, 0x00, 0x00, 0x12, 0x34, 0x56, 0x70, 0x00,  // offset
    0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x02, 0x00,  // 1 TiB + 512 bytes
};
const Request kExtendedTrim = {.command = Command::kTrim,
                               .extended = true,
                               .cookie = 0x0102030405060708,
                               .offset = 0x1234567000,
                               .length = (1ull << 40) + 512};

/// BLOCK_STATUS of 8 GiB, and of context 1 alone.
const ByteVector kStatusRequest = {
    0x21, 0xe4, 0x1c, 0x71,                          // magic
    0x00, 0x28,                                      // REQ_ONE, PAYLOAD_LEN
    0x00, 0x07,                                      // BLOCK_STATUS
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x07,  // cookie
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x00,  // offset
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x0c,  // payload length
    0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, 0x00,  // effect length
    0x00, 0x00, 0x00, 0x01,                          // context
};
const Request kStatus = {.flags = kCommandReqOne | kCommandPayloadLen,
                         .command = Command::kBlockStatus,
                         .extended = true,
                         .cookie = 7,
                         .offset = 4096,
                         .length = 12};

std::span<const std::byte, kExtendedRequestSize> extended_header(const ByteVector& bytes) {
  return view(bytes).first<kExtendedRequestSize>();
}

ByteVector with_length(ByteVector request, std::uint32_t length) {
  const ByteVector field = be32(length);
  std::ranges::copy(field, request.begin() + 24);
  request.resize(28);
  return request;
}

TEST(Request, IsParsedFieldByField) {
  EXPECT_EQ(parse_request(header(kReadRequest)), kRead);
  EXPECT_EQ(parse_request(header(kWriteRequest)), kWrite);
  EXPECT_EQ(parse_request(header(kZeroesRequest)), kZeroes);
  EXPECT_EQ(parse_request(header(kDiscRequest)), kDisc);
  EXPECT_TRUE(kWrite.fua());
  EXPECT_FALSE(kWrite.no_hole());
  EXPECT_TRUE(kZeroes.no_hole());
  EXPECT_EQ(kWrite.payload_size(), 5u);
  EXPECT_EQ(kZeroes.payload_size(), 0u);
  EXPECT_EQ(kRead.payload_size(), 0u);
}

TEST(Request, IsNotParsedBehindAWrongMagic) {
  for (std::size_t at = 0; at < 4; ++at) {
    ByteVector wrong = kReadRequest;
    wrong[at] ^= 0x80;
    EXPECT_FALSE(parse_request(header(wrong))) << at;
  }
}

TEST(ExtendedRequest, IsParsedFieldByField) {
  EXPECT_EQ(parse_extended_request(extended_header(kExtendedWriteRequest)), kExtendedWrite);
  EXPECT_EQ(parse_extended_request(extended_header(kExtendedTrimRequest)), kExtendedTrim);
  EXPECT_EQ(parse_extended_request(extended_header(kStatusRequest)), kStatus);
  EXPECT_EQ(kExtendedWrite.payload_size(), 5u);
  EXPECT_EQ(kExtendedTrim.payload_size(), 0u);
  EXPECT_EQ(kStatus.payload_size(), 12u);
  for (std::size_t at = 0; at < 4; ++at) {
    ByteVector wrong = kExtendedTrimRequest;
    wrong[at] ^= 0x80;
    EXPECT_FALSE(parse_extended_request(extended_header(wrong))) << at;
  }
}

TEST(ExtendedRequest, StatusPayloadHasTheRangesLength) {
  const auto payload = view(kStatusRequest).last<kStatusQuerySize>();
  const Request wanted = {.flags = kCommandReqOne,
                          .command = Command::kBlockStatus,
                          .extended = true,
                          .cookie = 7,
                          .offset = 4096,
                          .length = 8ull << 30};
  EXPECT_EQ(parse_status_query(kStatus, payload, 1), wanted);
  EXPECT_FALSE(parse_status_query(kStatus, payload, 2));
}

TEST(SimpleReply, IsWrittenBigEndian) {
  std::array<std::byte, kSimpleReplySize> reply;
  encode_simple_reply(reply, kErrorNoSpc, 0x0102030405060708);
  EXPECT_EQ(copy(reply), (ByteVector{
                             0x67, 0x44, 0x66, 0x98,                          // magic
                             0x00, 0x00, 0x00, 0x1c,                          // ENOSPC
                             0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08,  // cookie
                         }));
}

// ---- chunks ----

TEST(Chunk, HasAStructuredHeader) {
  ASSERT_EQ(chunk_header_size(ReplyStyle::kStructured), 20u);
  std::array<std::byte, 20> header;
  encode_chunk_header(header.data(), ReplyStyle::kStructured, kRead, kReplyDone,
                      ChunkType::kOffsetData, 4104);
  EXPECT_EQ(copy(header), (ByteVector{
                              0x66, 0x8e, 0x33, 0xef,                          // magic
                              0x00, 0x01,                                      // DONE
                              0x00, 0x01,                                      // OFFSET_DATA
                              0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08,  // cookie
                              0x00, 0x00, 0x10, 0x08,                          // length
                          }));
}

TEST(Chunk, HasAnExtendedHeaderWithTheRequestsOffset) {
  ASSERT_EQ(chunk_header_size(ReplyStyle::kExtended), 32u);
  std::array<std::byte, 32> header;
  encode_chunk_header(header.data(), ReplyStyle::kExtended, kRead, 0, ChunkType::kOffsetHole, 12);
  EXPECT_EQ(copy(header), (ByteVector{
                              0x6e, 0x8a, 0x27, 0x8c,                          // magic
                              0x00, 0x00,                                      // not done
                              0x00, 0x02,                                      // OFFSET_HOLE
                              0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08,  // cookie
                              0x00, 0x00, 0x00, 0x12, 0x34, 0x56, 0x70, 0x00,  // offset
                              0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x0c,  // length
                          }));
}

TEST(Chunk, TellsOfAHole) {
  std::array<std::byte, kOffsetHoleSize> hole;
  encode_offset_hole(hole, 0x1234567000, 0x10000);
  EXPECT_EQ(copy(hole), (ByteVector{0x00, 0x00, 0x00, 0x12, 0x34, 0x56, 0x70, 0x00,  // offset
                                    0x00, 0x01, 0x00, 0x00}));                       // size
}

TEST(Chunk, TellsTheStatusOfExtents) {
  ASSERT_EQ(StatusEncoder::status_size(ReplyStyle::kStructured, 2), 20u);
  std::array<std::byte, 20> compact;
  StatusEncoder narrow(compact.data(), ReplyStyle::kStructured, 1, 2);
  narrow.put(65536, 0);
  narrow.put(0xffffffff, kStateHole | kStateZero);
  EXPECT_EQ(copy(compact), (ByteVector{
                               0x00, 0x00, 0x00, 0x01,  // context
                               0x00, 0x01, 0x00, 0x00,  // length
                               0x00, 0x00, 0x00, 0x00,  // data
                               0xff, 0xff, 0xff, 0xff,  // length
                               0x00, 0x00, 0x00, 0x03,  // a hole, zeroes
                           }));
  EXPECT_EQ(StatusEncoder::type(ReplyStyle::kStructured), ChunkType::kBlockStatus);

  ASSERT_EQ(StatusEncoder::status_size(ReplyStyle::kExtended, 2), 40u);
  std::array<std::byte, 40> extended;
  StatusEncoder wide(extended.data(), ReplyStyle::kExtended, 1, 2);
  wide.put(65536, 0);
  wide.put(1ull << 40, kStateZero);
  EXPECT_EQ(copy(extended), (ByteVector{
                                0x00, 0x00, 0x00, 0x01,                          // context
                                0x00, 0x00, 0x00, 0x02,                          // descriptors
                                0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00,  // length
                                0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,  // data
                                0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00,  // length
                                0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x02,  // zeroes
                            }));
  EXPECT_EQ(StatusEncoder::type(ReplyStyle::kExtended), ChunkType::kBlockStatusExt);
}

TEST(Chunk, TellsWhatWentWrongAndWhere) {
  ASSERT_EQ(error_size("full", false), 10u);
  std::array<std::byte, 10> error;
  encode_error(error.data(), kErrorNoSpc, "full");
  EXPECT_EQ(copy(error), (ByteVector{0, 0, 0, 0x1c, 0, 4, 'f', 'u', 'l', 'l'}));

  ASSERT_EQ(error_size("bad", true), 17u);
  std::array<std::byte, 17> placed;
  encode_error(placed.data(), kErrorIo, "bad", 0x1234567000);
  EXPECT_EQ(copy(placed), (ByteVector{0, 0, 0, 5, 0, 3, 'b', 'a', 'd',  //
                                      0, 0, 0, 0x12, 0x34, 0x56, 0x70, 0}));

  std::array<std::byte, 6> silent;
  encode_error(silent.data(), kErrorInval, "");
  EXPECT_EQ(copy(silent), (ByteVector{0, 0, 0, 0x16, 0, 0}));
}

TEST(Chunk, CutsLongMessagesBetweenCharacters) {
  EXPECT_EQ(fit_message(std::string(4096, 'x')).size(), 4096u);
  EXPECT_EQ(fit_message(std::string(5000, 'x')).size(), 4096u);
  EXPECT_EQ(fit_message(std::string(4095, 'x') + "\u20ac").size(), 4095u);
  EXPECT_EQ(fit_message(std::string(4093, 'x') + "\u20ac").size(), 4096u);
}

// ---- verdicts ----

constexpr std::uint16_t kWritable = kTransmissionHasFlags | kTransmissionSendFlush |
                                    kTransmissionSendFua | kTransmissionSendTrim |
                                    kTransmissionSendWriteZeroes;
constexpr std::uint64_t kSize = 1 << 20;
constexpr ExportLimits kDisk = {.size = kSize, .transmission_flags = kWritable};
constexpr ExportLimits kReadOnlyDisk = {
    .size = kSize, .transmission_flags = kTransmissionHasFlags | kTransmissionReadOnly};
constexpr ExportLimits kHugeDisk = {.size = ~std::uint64_t{0}, .transmission_flags = kWritable};

Request make(Command command, std::uint64_t offset, std::uint64_t length, std::uint16_t flags = 0) {
  return {.flags = flags, .command = command, .cookie = 1, .offset = offset, .length = length};
}

Request make_extended(Command command, std::uint64_t offset, std::uint64_t length,
                      std::uint16_t flags = 0) {
  Request request = make(command, offset, length, flags);
  request.extended = true;
  return request;
}

TEST(Validate, AcceptsWhatLiesWithinTheExport) {
  for (Command command : {Command::kRead, Command::kWrite, Command::kTrim, Command::kWriteZeroes}) {
    EXPECT_EQ(validate(make(command, 0, kSize), kDisk), 0);
    EXPECT_EQ(validate(make(command, kSize - 1, 1), kDisk), 0);
    EXPECT_EQ(validate(make(command, 0, 0), kDisk), 0);
    EXPECT_EQ(validate(make(command, kSize, 0), kDisk), 0);
    EXPECT_EQ(validate(make(command, 1, 3), kDisk), 0);
  }
  EXPECT_EQ(validate(make(Command::kFlush, 0, 0), kDisk), 0);
  EXPECT_EQ(validate(make(Command::kDisc, 0, 0), kDisk), 0);
}

TEST(Validate, RefusesWhatReachesBeyondTheEnd) {
  const std::pair<Command, int> verdicts[] = {{Command::kRead, EINVAL},
                                              {Command::kTrim, EINVAL},
                                              {Command::kWrite, ENOSPC},
                                              {Command::kWriteZeroes, ENOSPC}};
  for (auto [command, error] : verdicts) {
    EXPECT_EQ(validate(make(command, 0, kSize + 1), kDisk), error);
    EXPECT_EQ(validate(make(command, kSize, 1), kDisk), error);
    EXPECT_EQ(validate(make(command, kSize - 1, 2), kDisk), error);
    EXPECT_EQ(validate(make(command, kSize + 1, 0), kDisk), error);
    // Sums that would wrap around to a place within.
    EXPECT_EQ(validate(make(command, ~std::uint64_t{0}, 1), kDisk), error);
    EXPECT_EQ(validate(make(command, ~std::uint64_t{0} - 511, 1024), kDisk), error);
    EXPECT_EQ(validate(make(command, ~std::uint64_t{0}, 2), kHugeDisk), error);
    EXPECT_EQ(validate(make(command, ~std::uint64_t{0} - 1, 1), kHugeDisk), 0);
  }
}

TEST(Validate, RefusesWritesToAReadOnlyExport) {
  for (Command command : {Command::kWrite, Command::kTrim, Command::kWriteZeroes}) {
    EXPECT_EQ(validate(make(command, 0, 512), kReadOnlyDisk), EPERM);
    EXPECT_EQ(validate(make(command, kSize, 512), kReadOnlyDisk), EPERM);
  }
  EXPECT_EQ(validate(make(Command::kRead, 0, 512), kReadOnlyDisk), 0);
}

TEST(Validate, RefusesUnknownCommands) {
  for (int command : {5, 7, 8, 9, 99, 0xffff}) {  // CACHE, BLOCK_STATUS and RESIZE among them
    EXPECT_EQ(validate(make(Command(command), 0, 512), kDisk), EINVAL) << command;
  }
}

TEST(Validate, RefusesCommandsThatWereNotOffered) {
  const ExportLimits bare = {.size = kSize};
  EXPECT_EQ(validate(make(Command::kRead, 0, 512), bare), 0);
  EXPECT_EQ(validate(make(Command::kWrite, 0, 512), bare), 0);
  EXPECT_EQ(validate(make(Command::kFlush, 0, 0), bare), EINVAL);
  EXPECT_EQ(validate(make(Command::kTrim, 0, 512), bare), EINVAL);
  EXPECT_EQ(validate(make(Command::kWriteZeroes, 0, 512), bare), EINVAL);
  const ExportLimits caching = {
      .size = kSize, .transmission_flags = kTransmissionHasFlags | kTransmissionSendCache};
  EXPECT_EQ(validate(make(Command::kCache, 0, 512), caching), 0);
  EXPECT_EQ(validate(make(Command::kCache, kSize, 1), caching), EINVAL);
}

TEST(Validate, ToleratesFuaOnAnyCommandWhereItIsOffered) {
  for (Command command : {Command::kRead, Command::kWrite, Command::kTrim, Command::kWriteZeroes}) {
    EXPECT_EQ(validate(make(command, 0, 512, kCommandFua), kDisk), 0);
  }
  EXPECT_EQ(validate(make(Command::kFlush, 0, 0, kCommandFua), kDisk), 0);
  EXPECT_EQ(validate(make(Command::kWrite, 0, 512, kCommandFua), {.size = kSize}), EINVAL);
}

TEST(Validate, TakesOtherFlagsOnlyWhereTheyBelong) {
  EXPECT_EQ(validate(make(Command::kWriteZeroes, 0, 1, kCommandNoHole | kCommandFua), kDisk), 0);
  EXPECT_EQ(validate(make(Command::kWriteZeroes, 0, 1, kCommandFastZero), kDisk), EINVAL);
  ExportLimits fast = kDisk;
  fast.transmission_flags |= kTransmissionSendFastZero;
  EXPECT_EQ(validate(make(Command::kWriteZeroes, 0, 1, kCommandFastZero), fast), 0);
  EXPECT_EQ(validate(make(Command::kTrim, 0, 1, kCommandFastZero), fast), EINVAL);
  for (Command command : {Command::kRead, Command::kWrite, Command::kTrim}) {
    for (std::uint16_t flag = 2; flag != 0; flag = static_cast<std::uint16_t>(flag << 1)) {
      EXPECT_EQ(validate(make(command, 0, 512, flag), kDisk), EINVAL) << flag;
    }
  }
  for (std::uint16_t flag = 4; flag != 0; flag = static_cast<std::uint16_t>(flag << 1)) {
    EXPECT_EQ(validate(make(Command::kWriteZeroes, 0, 512, flag), kDisk), EINVAL) << flag;
  }
  ExportLimits with_df = kDisk;
  with_df.transmission_flags |= kTransmissionSendDf;
  EXPECT_EQ(validate(make(Command::kRead, 0, 1, kCommandDf), with_df), 0);
  EXPECT_EQ(validate(make(Command::kWrite, 0, 1, kCommandDf), with_df), EINVAL);
}

TEST(Validate, WantsFlushWithoutOffsetAndLength) {
  EXPECT_EQ(validate(make(Command::kFlush, 1, 0), kDisk), EINVAL);
  EXPECT_EQ(validate(make(Command::kFlush, 0, 1), kDisk), EINVAL);
}

TEST(Validate, LimitsPayloadsButNotTheLengthOfOtherRequests) {
  for (Command command : {Command::kRead, Command::kWrite}) {
    EXPECT_EQ(validate(make(command, 0, 32 << 20), kHugeDisk), 0);
    EXPECT_EQ(validate(make(command, 0, (32 << 20) + 1), kHugeDisk), EINVAL);
    EXPECT_EQ(validate(make(command, 0, 0xffffffff), kHugeDisk), EINVAL);
  }
  EXPECT_EQ(validate(make(Command::kTrim, 0, 0xffffffff), kHugeDisk), 0);
  EXPECT_EQ(validate(make(Command::kWriteZeroes, 0, 0xffffffff), kHugeDisk), 0);
  ExportLimits small = kDisk;
  small.max_payload = 4096;
  EXPECT_EQ(validate(make(Command::kRead, 0, 4096), small), 0);
  EXPECT_EQ(validate(make(Command::kRead, 0, 4097), small), EINVAL);
}

TEST(Validate, WantsMultiplesOfTheMinimumBlockSize) {
  ExportLimits aligned = kDisk;
  aligned.min_block = 512;
  for (Command command : {Command::kRead, Command::kWrite, Command::kTrim, Command::kWriteZeroes}) {
    EXPECT_EQ(validate(make(command, 512, 1024), aligned), 0);
    EXPECT_EQ(validate(make(command, 511, 512), aligned), EINVAL);
    EXPECT_EQ(validate(make(command, 512, 513), aligned), EINVAL);
  }
  EXPECT_EQ(validate(make(Command::kFlush, 0, 0), aligned), 0);
}

TEST(Validate, TakesBlockStatusWhereTheContextWasSet) {
  ExportLimits limits = kDisk;
  limits.reply_style = ReplyStyle::kStructured;
  EXPECT_EQ(validate(make(Command::kBlockStatus, 0, 512), limits), EINVAL);
  limits.base_allocation = true;
  for (std::uint16_t flags : {0, int{kCommandReqOne}, kCommandReqOne | kCommandFua}) {
    EXPECT_EQ(validate(make(Command::kBlockStatus, 0, kSize, flags), limits), 0);
  }
  EXPECT_EQ(validate(make(Command::kBlockStatus, 0, 0), limits), EINVAL);
  EXPECT_EQ(validate(make(Command::kBlockStatus, 1, kSize), limits), EINVAL);
  EXPECT_EQ(validate(make(Command::kBlockStatus, 0, 1, kCommandDf), limits), EINVAL);
  EXPECT_EQ(validate(make(Command::kRead, 0, 1, kCommandReqOne), limits), EINVAL);
  EXPECT_EQ(validate(make(Command::kBlockStatus, 0, 12, kCommandPayloadLen), limits), EINVAL);
}

TEST(Validate, TakesPayloadsWithExtendedHeadersWhereTheyBelong) {
  ExportLimits limits = kDisk;
  limits.reply_style = ReplyStyle::kExtended;
  limits.base_allocation = true;
  EXPECT_EQ(validate(make_extended(Command::kWrite, 0, 512, kCommandPayloadLen), limits), 0);
  EXPECT_EQ(validate(make_extended(Command::kWrite, 0, 512), limits), EINVAL);
  EXPECT_EQ(validate(make(Command::kWrite, 0, 512, kCommandPayloadLen), limits), EINVAL);
  for (Command command : {Command::kRead, Command::kFlush, Command::kTrim, Command::kWriteZeroes,
                          Command::kBlockStatus}) {
    EXPECT_EQ(validate(make_extended(command, 0, 12, kCommandPayloadLen), limits), EINVAL);
  }
  limits.transmission_flags |= kTransmissionBlockStatusPayload;
  const auto status = [&](std::uint64_t length) {
    return validate(make_extended(Command::kBlockStatus, 0, length, kCommandPayloadLen), limits);
  };
  EXPECT_EQ(status(12), 0);
  // No context, two of them, half a one.
  for (std::uint64_t length : {0, 8, 16, 10, 4}) EXPECT_EQ(status(length), EINVAL) << length;
}

TEST(Validate, TakesLongRangesWithExtendedHeaders) {
  ExportLimits limits = kHugeDisk;
  limits.reply_style = ReplyStyle::kExtended;
  limits.base_allocation = true;
  limits.transmission_flags |= kTransmissionSendCache;
  for (Command command :
       {Command::kTrim, Command::kWriteZeroes, Command::kCache, Command::kBlockStatus}) {
    EXPECT_EQ(validate(make_extended(command, 1ull << 40, 1ull << 41), limits), 0);
    EXPECT_NE(validate(make_extended(command, 1, ~std::uint64_t{0}), limits), 0);
  }
  EXPECT_EQ(validate(make_extended(Command::kRead, 0, 1ull << 32), limits), EOVERFLOW);
  EXPECT_EQ(validate(make_extended(Command::kRead, 0, 32 << 20), limits), 0);
}

TEST(Validate, TakesResizeWhereItIsOffered) {
  EXPECT_EQ(validate(make(Command::kResize, 4096, 0), kDisk), EINVAL);
  EXPECT_EQ(validate(make(Command::kResize, 4096, 0), kReadOnlyDisk), EPERM);
  ExportLimits limits = kDisk;
  limits.transmission_flags |= kTransmissionSendResize;
  for (std::uint64_t size : {0ull, 1ull, 2ull * kSize, ~0ull >> 1}) {
    EXPECT_EQ(validate(make(Command::kResize, size, 0), limits), 0);
  }
  EXPECT_EQ(validate(make(Command::kResize, 1ull << 63, 0), limits), ENOSPC);
  EXPECT_EQ(validate(make(Command::kResize, 0, 0, kCommandNoHole), limits), EINVAL);
  limits.min_block = 512;
  EXPECT_EQ(validate(make(Command::kResize, 1024, 0), limits), 0);
  EXPECT_EQ(validate(make(Command::kResize, 1000, 0), limits), EINVAL);
}

TEST(Validate, SaysNoSpaceWhereAResizeMovedTheEnd) {
  ExportLimits limits = kDisk;
  limits.former_size = 2 * kSize;
  for (Command command : {Command::kRead, Command::kTrim, Command::kWrite}) {
    EXPECT_EQ(validate(make(command, kSize, 512), limits), ENOSPC);
    EXPECT_EQ(validate(make(command, kSize - 512, 512), limits), 0);
  }
  EXPECT_EQ(validate(make(Command::kRead, 2 * kSize, 512), limits), EINVAL);
}

TEST(Validate, SaysWhy) {
  std::string_view why;
  validate(make(Command::kRead, kSize, 1), kDisk, &why);
  EXPECT_EQ(why, "beyond the end of the export");
  validate(make(Command{99}, 0, 1), kDisk, &why);
  EXPECT_EQ(why, "unknown command");
}

// ---- the parser ----

/// All requests of a stream that arrives in these parts; payloads are collected.
struct Parsed {
  std::vector<Request> requests;
  std::vector<ByteVector> payloads;
  Event end = Event::kNeedInput;
  bool at_boundary = false;

  bool operator==(const Parsed&) const = default;
};

Parsed parse(const std::vector<ByteVector>& parts, ReplyStyle style = ReplyStyle::kSimple) {
  RequestParser parser(style);
  Parsed parsed;
  for (const ByteVector& part : parts) {
    std::span<const std::byte> input = view(part);
    for (;;) {
      if (parser.payload_left() > 0) {
        const ByteVector more = copy(parser.take_payload(input));
        parsed.payloads.back() = join(parsed.payloads.back(), more);
        if (parser.payload_left() > 0) break;
      }
      Request request;
      parsed.end = parser.next(input, request);
      if (parsed.end != Event::kRequest) break;
      parsed.requests.push_back(request);
      parsed.payloads.emplace_back();
    }
  }
  parsed.at_boundary = parser.at_boundary();
  return parsed;
}

TEST(RequestParser, FindsTheSameRequestsWhereverTheStreamIsCut) {
  const ByteVector stream =
      join(kReadRequest, kWriteRequest, kWriteRequest, kZeroesRequest, kDiscRequest);
  const Parsed whole = parse({stream});
  EXPECT_EQ(whole.requests, (std::vector{kRead, kWrite, kWrite, kZeroes, kDisc}));
  EXPECT_EQ(whole.payloads, (std::vector<ByteVector>{{}, text("hello"), text("hello"), {}, {}}));
  EXPECT_EQ(whole.end, Event::kNeedInput);
  EXPECT_TRUE(whole.at_boundary);

  std::vector<ByteVector> bytes;
  for (std::uint8_t b : stream) bytes.push_back({b});
  EXPECT_EQ(parse(bytes), whole);
  for (std::size_t cut = 0; cut <= stream.size(); ++cut) {
    const auto at = stream.begin() + static_cast<std::ptrdiff_t>(cut);
    EXPECT_EQ(parse({{stream.begin(), at}, {at, stream.end()}}), whole) << cut;
  }
}

TEST(RequestParser, FindsExtendedRequestsWhereverTheStreamIsCut) {
  const ByteVector stream = join(kExtendedTrimRequest, kExtendedWriteRequest, kStatusRequest,
                                 kExtendedWriteRequest, kExtendedTrimRequest);
  const Parsed whole = parse({stream}, ReplyStyle::kExtended);
  EXPECT_EQ(whole.requests,
            (std::vector{kExtendedTrim, kExtendedWrite, kStatus, kExtendedWrite, kExtendedTrim}));
  const ByteVector query(kStatusRequest.begin() + 32, kStatusRequest.end());
  EXPECT_EQ(whole.payloads, (std::vector<ByteVector>{{}, text("hello"), query, text("hello"), {}}));
  EXPECT_TRUE(whole.at_boundary);
  std::vector<ByteVector> bytes;
  for (std::uint8_t b : stream) bytes.push_back({b});
  EXPECT_EQ(parse(bytes, ReplyStyle::kExtended), whole);
  for (std::size_t cut = 0; cut <= stream.size(); ++cut) {
    const auto at = stream.begin() + static_cast<std::ptrdiff_t>(cut);
    EXPECT_EQ(parse({{stream.begin(), at}, {at, stream.end()}}, ReplyStyle::kExtended), whole)
        << cut;
  }
}

TEST(RequestParser, FailsOnTheOtherKindOfHeader) {
  EXPECT_EQ(parse({kExtendedTrimRequest}).end, Event::kFailed);
  EXPECT_EQ(parse({join(kReadRequest, zeroes(4))}, ReplyStyle::kExtended).end, Event::kFailed);
  EXPECT_EQ(parse({join(kReadRequest, zeroes(4))}, ReplyStyle::kStructured).requests.front(),
            kRead);
}

TEST(RequestParser, FailsOnExtendedPayloadsBeyondTheExportsMaximum) {
  Request request;
  for (std::uint64_t length : {4096ull, 4097ull, 1ull << 32, ~0ull}) {
    for (std::uint16_t command : {0, 1, 7, 99}) {
      RequestParser parser(ReplyStyle::kExtended, 4096);
      ByteVector bytes = kExtendedWriteRequest;
      bytes.resize(32);
      bytes[7] = static_cast<std::uint8_t>(command);
      std::ranges::copy(be64(length), bytes.begin() + 24);
      std::span<const std::byte> input = view(bytes);
      EXPECT_EQ(parser.next(input, request), length > 4096 ? Event::kFailed : Event::kRequest);
      if (length <= 4096) {
        EXPECT_EQ(parser.payload_left(), 4096u);  // whatever the command, to be skipped
      } else {
        EXPECT_EQ(parser.failure(),
                  "a payload of " + std::to_string(length) + " bytes, the most is 4096");
      }
    }
  }
}

TEST(RequestParser, HandsOutPayloadsInPlace) {
  RequestParser parser;
  std::span<const std::byte> input = view(kWriteRequest);
  Request request;
  ASSERT_EQ(parser.next(input, request), Event::kRequest);
  const std::span<const std::byte> payload = parser.take_payload(input);
  EXPECT_EQ(payload.data(), view(kWriteRequest).data() + 28);
  EXPECT_EQ(payload.size(), 5u);
  EXPECT_TRUE(input.empty());
  EXPECT_EQ(parser.next(input, request), Event::kNeedInput);
}

TEST(RequestParser, LetsTheRestOfAPayloadBeReceivedPastIt) {
  RequestParser parser;
  const ByteVector first(kWriteRequest.begin(), kWriteRequest.begin() + 30);
  std::span<const std::byte> input = view(first);
  Request request;
  ASSERT_EQ(parser.next(input, request), Event::kRequest);
  EXPECT_EQ(copy(parser.take_payload(input)), text("he"));
  EXPECT_EQ(parser.payload_left(), 3u);
  EXPECT_FALSE(parser.at_boundary());
  parser.payload_received(1);
  EXPECT_EQ(parser.payload_left(), 2u);
  parser.payload_received(2);
  EXPECT_TRUE(parser.at_boundary());
  input = view(kReadRequest);
  ASSERT_EQ(parser.next(input, request), Event::kRequest);
  EXPECT_EQ(request, kRead);
}

TEST(RequestParser, SkipsThePayloadOfARefusedWriteWhereverTheStreamIsCut) {
  const ByteVector stream = join(kWriteRequest, kReadRequest);
  for (std::size_t cut = 28; cut <= stream.size(); ++cut) {
    const auto at = stream.begin() + static_cast<std::ptrdiff_t>(cut);
    const ByteVector parts[] = {{stream.begin(), at}, {at, stream.end()}};
    RequestParser parser;
    std::vector<Request> requests;
    for (const ByteVector& part : parts) {
      std::span<const std::byte> input = view(part);
      Request request;
      while (parser.next(input, request) == Event::kRequest) {
        requests.push_back(request);
        parser.skip_payload();
      }
      EXPECT_TRUE(input.empty());
    }
    EXPECT_EQ(requests, (std::vector{kWrite, kRead})) << cut;
    EXPECT_TRUE(parser.at_boundary());
  }
}

TEST(RequestParser, SkipsWhatIsLeftOfAPayloadThatWasTakenInPart) {
  RequestParser parser;
  const ByteVector stream = join(kWriteRequest, kWriteRequest);
  std::span<const std::byte> input = view(stream).first(30);
  Request request;
  ASSERT_EQ(parser.next(input, request), Event::kRequest);
  EXPECT_EQ(parser.take_payload(input).size(), 2u);
  parser.skip_payload();
  input = view(stream).subspan(30);
  ASSERT_EQ(parser.next(input, request), Event::kRequest);
  EXPECT_EQ(copy(parser.take_payload(input)), text("hello"));
}

TEST(RequestParser, KnowsAStreamThatEndsWithinARequest) {
  for (std::size_t size = 0; size <= kWriteRequest.size(); ++size) {
    const ByteVector cut(kWriteRequest.begin(),
                         kWriteRequest.begin() + static_cast<std::ptrdiff_t>(size));
    EXPECT_EQ(parse({cut}).at_boundary, size == 0 || size == kWriteRequest.size()) << size;
  }
}

TEST(RequestParser, FailsForGoodOnAWrongMagic) {
  ByteVector wrong = kReadRequest;
  wrong[3] = 0x14;
  for (std::size_t cut : {0u, 1u, 27u, 28u}) {
    RequestParser parser;
    Request request;
    std::span<const std::byte> input = view(wrong).first(cut);
    if (cut < 28) {
      EXPECT_EQ(parser.next(input, request), Event::kNeedInput);
      input = view(wrong).subspan(cut);
    }
    EXPECT_EQ(parser.next(input, request), Event::kFailed);
    EXPECT_TRUE(parser.failed());
    EXPECT_EQ(parser.failure(), "wrong magic 0x25609514 before a request");
    input = view(kReadRequest);
    EXPECT_EQ(parser.next(input, request), Event::kFailed);
  }
}

TEST(RequestParser, TakesAWriteOf32MebibytesAndFailsOnMore) {
  RequestParser parser;
  Request request;
  const ByteVector largest = with_length(kWriteRequest, 32 << 20);
  std::span<const std::byte> input = view(largest);
  EXPECT_EQ(parser.next(input, request), Event::kRequest);
  EXPECT_EQ(parser.payload_left(), 32u << 20);
  for (std::uint32_t length : {(32u << 20) + 1, 0xffffffffu}) {
    RequestParser strict;
    const ByteVector larger = with_length(kWriteRequest, length);
    input = view(larger);
    EXPECT_EQ(strict.next(input, request), Event::kFailed);
    EXPECT_EQ(strict.failure(),
              "a write of " + std::to_string(length) + " bytes, the most is 33554432");
  }
  // Without a payload the length does not matter here.
  EXPECT_EQ(parse({with_length(kReadRequest, 0xffffffff)}).end, Event::kNeedInput);
}

TEST(RequestParserDeathTest, SkipsOnlyThePayloadItWasToldToSkip) {
  RequestParser parser;
  const ByteVector stream = join(kWriteRequest, kWriteRequest);
  std::span<const std::byte> input = view(stream);
  Request request;
  ASSERT_EQ(parser.next(input, request), Event::kRequest);
  parser.skip_payload();
  ASSERT_EQ(parser.next(input, request), Event::kRequest);
  EXPECT_DEATH(parser.next(input, request), "5 bytes of payload are still to be taken");
}

TEST(RequestParserDeathTest, MustNotBeAskedForARequestAmidAPayload) {
  RequestParser parser;
  Request request;
  std::span<const std::byte> input = view(kWriteRequest);
  ASSERT_EQ(parser.next(input, request), Event::kRequest);
  EXPECT_DEATH(parser.next(input, request), "5 bytes of payload are still to be taken");
  EXPECT_DEATH(parser.payload_received(6), "received 6 bytes");
}

}  // namespace
}  // namespace roost::nbd
