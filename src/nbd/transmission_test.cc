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

TEST(SimpleReply, IsWrittenBigEndian) {
  std::array<std::byte, kSimpleReplySize> reply;
  encode_simple_reply(reply, kErrorNoSpc, 0x0102030405060708);
  EXPECT_EQ(copy(reply), (ByteVector{
                             0x67, 0x44, 0x66, 0x98,                          // magic
                             0x00, 0x00, 0x00, 0x1c,                          // ENOSPC
                             0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08,  // cookie
                         }));
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

Request make(Command command, std::uint64_t offset, std::uint32_t length, std::uint16_t flags = 0) {
  return {.flags = flags, .command = command, .cookie = 1, .offset = offset, .length = length};
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

// ---- the parser ----

/// All requests of a stream that arrives in these parts; payloads are collected.
struct Parsed {
  std::vector<Request> requests;
  std::vector<ByteVector> payloads;
  Event end = Event::kNeedInput;
  bool at_boundary = false;

  bool operator==(const Parsed&) const = default;
};

Parsed parse(const std::vector<ByteVector>& parts) {
  RequestParser parser;
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
