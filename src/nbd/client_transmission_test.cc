// SPDX-License-Identifier: MIT
#include "roost/nbd/client_transmission.h"

#include <gtest/gtest.h>

#include <array>
#include <cerrno>
#include <utility>
#include <vector>

#include "nbd/test_bytes.h"

namespace roost::nbd {
namespace {

using Event = ReplyParser::Event;
using Kind = ReplyMessage::Kind;
using Action = ReplyChecker::Action;

constexpr std::uint64_t kCookie = 0x0102030405060708;
constexpr std::uint64_t kOffset = 0x1234567000;

ByteVector be16(std::uint16_t v) {
  return {static_cast<std::uint8_t>(v >> 8), static_cast<std::uint8_t>(v)};
}

ByteVector simple(std::uint32_t error = 0) {
  return join({0x67, 0x44, 0x66, 0x98}, be32(error), be64(kCookie));
}

constexpr std::uint16_t kMore = 0;
constexpr std::uint16_t kLast = 1;

ByteVector chunk(std::uint16_t flags, std::uint16_t type, const ByteVector& payload = {}) {
  return join({0x66, 0x8e, 0x33, 0xef}, be16(flags), be16(type), be64(kCookie),
              be32(static_cast<std::uint32_t>(payload.size())), payload);
}

ByteVector extended(std::uint16_t flags, std::uint16_t type, const ByteVector& payload = {},
                    std::uint64_t offset = kOffset) {
  return join({0x6e, 0x8a, 0x27, 0x8c}, be16(flags), be16(type), be64(kCookie), be64(offset),
              be64(payload.size()), payload);
}

ByteVector data(std::uint64_t at, std::size_t size) {
  return join(be64(kOffset + at), ByteVector(size, 'x'));
}

ByteVector hole(std::uint64_t at, std::uint32_t size) {
  return join(be64(kOffset + at), be32(size));
}

ByteVector error(std::uint32_t code, const std::string& message = {}) {
  return join(be32(code), be16(static_cast<std::uint16_t>(message.size())), text(message));
}

constexpr std::uint16_t kData = 1, kHole = 2, kStatus = 5, kStatusExt = 6;
constexpr std::uint16_t kErr = 0x8001, kErrAt = 0x8002;

// ---- requests ----

TEST(ClientRequest, IsWrittenWithACompactHeader) {
  std::array<std::byte, kMaxRequestHeader> to{};
  const ClientRequest request = {.command = Command::kWrite,
                                 .flags = kCommandFua,
                                 .cookie = kCookie,
                                 .offset = kOffset,
                                 .length = 4096};
  for (ReplyStyle style : {ReplyStyle::kSimple, ReplyStyle::kStructured}) {
    ASSERT_EQ(encode_request(to, style, request), 28u);
    EXPECT_EQ(copy(std::span(to).first(28)),
              (ByteVector{
                  0x25, 0x60, 0x95, 0x13,                          // magic
                  0x00, 0x01,                                      // FUA
                  0x00, 0x01,                                      // WRITE
                  0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08,  // cookie
                  0x00, 0x00, 0x00, 0x12, 0x34, 0x56, 0x70, 0x00,  // offset
                  0x00, 0x00, 0x10, 0x00,                          // length
              }));
  }
}

TEST(ClientRequest, IsWrittenWithAnExtendedHeader) {
  std::array<std::byte, kMaxRequestHeader> to{};
  const ClientRequest write = {.command = Command::kWrite,
                               .flags = kCommandFua,
                               .cookie = kCookie,
                               .offset = kOffset,
                               .length = 4096};
  ASSERT_EQ(encode_request(to, ReplyStyle::kExtended, write), 32u);
  EXPECT_EQ(copy(to), (ByteVector{
                          0x21, 0xe4, 0x1c, 0x71,                          // magic
                          0x00, 0x21,                                      // FUA, PAYLOAD_LEN
                          0x00, 0x01,                                      // WRITE
                          0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08,  // cookie
                          0x00, 0x00, 0x00, 0x12, 0x34, 0x56, 0x70, 0x00,  // offset
                          0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x00,  // length
                      }));
  const ClientRequest trim = {.command = Command::kTrim, .length = 1ull << 40};
  encode_request(to, ReplyStyle::kExtended, trim);
  EXPECT_EQ(copy(std::span(to).subspan(4, 4)), (ByteVector{0, 0, 0, 4}));
  EXPECT_EQ(copy(std::span(to).subspan(24)), be64(1ull << 40));
}

TEST(ClientRequestDeathTest, MustFitItsHeader) {
  std::array<std::byte, kMaxRequestHeader> to{};
  const ClientRequest trim = {.command = Command::kTrim, .length = 1ull << 32};
  EXPECT_DEATH(encode_request(to, ReplyStyle::kStructured, trim), "TRIM 0.4294967296 is too long");
}

TEST(ClientRequest, HasWords) {
  EXPECT_EQ(to_string(ClientRequest{.command = Command::kRead, .offset = 4096, .length = 512}),
            "READ 4096+512");
  EXPECT_EQ(to_string(ClientRequest{.command = Command::kFlush}), "FLUSH");
  EXPECT_EQ(to_string(ClientRequest{.command = Command::kResize, .offset = 7}), "RESIZE to 7");
}

TEST(NbdError, HasAnErrnoValue) {
  const std::pair<std::uint32_t, int> errors[] = {
      {0, 0},          {1, EPERM},          {5, EIO},
      {12, ENOMEM},    {22, EINVAL},        {28, ENOSPC},
      {75, EOVERFLOW}, {95, ENOTSUP},       {108, ESHUTDOWN},
      {2, EINVAL},     {0xffffffff, EINVAL}};
  for (auto [wire, value] : errors) EXPECT_EQ(from_nbd_error(wire), value) << wire;
}

// ---- the parser ----

struct Parsed {
  std::vector<ReplyMessage> messages;
  std::vector<ByteVector> payloads;
  Event end = Event::kNeedInput;
  std::string failure;
  bool at_boundary = false;
};

bool same(const ReplyMessage& a, const ReplyMessage& b) {
  return a.kind == b.kind && a.flags == b.flags && a.type == b.type && a.cookie == b.cookie &&
         a.request_offset == b.request_offset && a.error == b.error && a.message == b.message &&
         a.offset == b.offset && a.hole_size == b.hole_size && a.context_id == b.context_id &&
         a.payload_size == b.payload_size;
}

/// `simple_payload`: what a simple reply without an error brings.
Parsed parse(ReplyStyle style, const std::vector<ByteVector>& parts,
             std::uint32_t simple_payload = 0) {
  ReplyParser parser(style);
  Parsed parsed;
  for (const ByteVector& part : parts) {
    std::span<const std::byte> input = view(part);
    for (;;) {
      if (parser.payload_left() > 0) {
        parsed.payloads.back() = join(parsed.payloads.back(), copy(parser.take_payload(input)));
        if (parser.payload_left() > 0) break;
      }
      ReplyMessage message;
      parsed.end = parser.next(input, message);
      if (parsed.end != Event::kMessage) break;
      if (message.kind == Kind::kSimple && message.error == 0) {
        parser.expect_payload(simple_payload);
      }
      parsed.messages.push_back(message);
      parsed.payloads.emplace_back();
    }
    if (parsed.end == Event::kFailed) break;
  }
  parsed.at_boundary = parser.at_boundary();
  if (parser.failed()) parsed.failure = parser.failure();
  return parsed;
}

Parsed parse_wherever_cut(ReplyStyle style, const ByteVector& stream,
                          std::uint32_t simple_payload = 0) {
  const Parsed whole = parse(style, {stream}, simple_payload);
  std::vector<ByteVector> bytes;
  for (std::uint8_t b : stream) bytes.push_back({b});
  std::vector<Parsed> others = {parse(style, bytes, simple_payload)};
  for (std::size_t cut = 0; cut <= stream.size(); ++cut) {
    const auto at = stream.begin() + static_cast<std::ptrdiff_t>(cut);
    others.push_back(parse(style, {{stream.begin(), at}, {at, stream.end()}}, simple_payload));
  }
  for (const Parsed& other : others) {
    EXPECT_TRUE(std::ranges::equal(whole.messages, other.messages, same));
    EXPECT_EQ(whole.payloads, other.payloads);
    EXPECT_EQ(whole.at_boundary, other.at_boundary);
    EXPECT_EQ(whole.failure, other.failure);
  }
  return whole;
}

TEST(ReplyParser, FindsSimpleReplies) {
  const Parsed parsed =
      parse_wherever_cut(ReplyStyle::kSimple, join(simple(), text("hello"), simple(28)), 5);
  ASSERT_EQ(parsed.messages.size(), 2u);
  EXPECT_TRUE(parsed.at_boundary);
  EXPECT_EQ(parsed.messages[0].kind, Kind::kSimple);
  EXPECT_EQ(parsed.messages[0].cookie, kCookie);
  EXPECT_TRUE(parsed.messages[0].done());
  EXPECT_FALSE(parsed.messages[0].is_error());
  EXPECT_EQ(parsed.payloads[0], text("hello"));
  EXPECT_EQ(parsed.messages[1].error, 28u);
  EXPECT_TRUE(parsed.messages[1].is_error());
}

TEST(ReplyParser, FindsStructuredReplies) {
  const Parsed parsed = parse_wherever_cut(
      ReplyStyle::kStructured,
      join(chunk(kMore, kData, data(1, 3)), chunk(kMore, kHole, hole(4, 0x01020304)), simple(22),
           chunk(kLast, kStatus, join(be32(7), be32(512), be32(3))), chunk(kLast, 0),
           chunk(kMore, kErrAt, join(error(5, "oh"), be64(kOffset + 9))),
           chunk(kLast, kErr, join(error(108, ""), ByteVector{1, 2})),
           chunk(kLast, 0x9999, error(1))));
  ASSERT_EQ(parsed.messages.size(), 8u) << parsed.failure;
  EXPECT_TRUE(parsed.at_boundary);
  const auto& m = parsed.messages;
  EXPECT_EQ(m[0].type, ChunkType::kOffsetData);
  EXPECT_FALSE(m[0].done());
  EXPECT_EQ(m[0].cookie, kCookie);
  EXPECT_FALSE(m[0].request_offset);
  EXPECT_EQ(m[0].offset, kOffset + 1);
  EXPECT_EQ(m[0].payload_size, 3u);
  EXPECT_EQ(parsed.payloads[0], text("xxx"));
  EXPECT_EQ(m[1].type, ChunkType::kOffsetHole);
  EXPECT_EQ(m[1].offset, kOffset + 4);
  EXPECT_EQ(m[1].hole_size, 0x01020304u);
  EXPECT_EQ(m[2].kind, Kind::kSimple);
  EXPECT_EQ(m[3].type, ChunkType::kBlockStatus);
  EXPECT_EQ(m[3].context_id, 7u);
  EXPECT_EQ(parsed.payloads[3], join(be32(512), be32(3)));
  EXPECT_EQ(m[4].type, ChunkType::kNone);
  EXPECT_TRUE(m[4].done());
  EXPECT_TRUE(m[5].is_error());
  EXPECT_EQ(m[5].error, 5u);
  EXPECT_EQ(m[5].message, "oh");
  EXPECT_EQ(m[5].offset, kOffset + 9);
  EXPECT_EQ(m[6].error, 108u);
  EXPECT_EQ(m[7].error, 1u);
  EXPECT_TRUE(m[7].is_error());
}

TEST(ReplyParser, FindsExtendedReplies) {
  const Parsed parsed = parse_wherever_cut(
      ReplyStyle::kExtended,
      join(extended(kMore, kData, data(1, 3)),
           extended(kLast, kStatusExt, join(be32(7), be32(1), be64(1ull << 40), be64(2))),
           extended(kLast, kErr, error(5, "no"))));
  ASSERT_EQ(parsed.messages.size(), 3u) << parsed.failure;
  const auto& m = parsed.messages;
  EXPECT_EQ(m[0].request_offset, kOffset);
  EXPECT_EQ(m[0].offset, kOffset + 1);
  EXPECT_EQ(parsed.payloads[0], text("xxx"));
  EXPECT_EQ(m[1].context_id, 7u);
  EXPECT_EQ(m[1].payload_size, 16u);
  EXPECT_EQ(m[2].message, "no");
}

TEST(ReplyParser, HandsOutPayloadsInPlaceAndLetsThemBeReceivedPastIt) {
  ReplyParser parser(ReplyStyle::kStructured);
  const ByteVector stream = chunk(kLast, kData, data(0, 5));
  std::span<const std::byte> input = view(stream).first(stream.size() - 3);
  ReplyMessage message;
  ASSERT_EQ(parser.next(input, message), Event::kMessage);
  const auto part = parser.take_payload(input);
  EXPECT_EQ(part.data(), view(stream).data() + 28);
  EXPECT_EQ(part.size(), 2u);
  EXPECT_FALSE(parser.at_boundary());
  parser.payload_received(3);
  EXPECT_TRUE(parser.at_boundary());
  const ByteVector more = simple();
  input = view(more);
  EXPECT_EQ(parser.next(input, message), Event::kMessage);
}

TEST(ReplyParser, SkipsAPayloadWhereverItIsCut) {
  const ByteVector stream = join(chunk(kMore, kData, data(0, 5)), chunk(kLast, 0));
  for (std::size_t cut = 28; cut <= stream.size(); ++cut) {
    ReplyParser parser(ReplyStyle::kStructured);
    std::vector<ChunkType> types;
    for (auto part : {view(stream).first(cut), view(stream).subspan(cut)}) {
      ReplyMessage message;
      while (parser.next(part, message) == Event::kMessage) {
        types.push_back(message.type);
        parser.skip_payload();
      }
      EXPECT_TRUE(part.empty());
    }
    EXPECT_EQ(types, (std::vector{ChunkType::kOffsetData, ChunkType::kNone})) << cut;
  }
}

TEST(ReplyParserDeathTest, MustNotBeAskedForAMessageAmidAPayload) {
  ReplyParser parser(ReplyStyle::kStructured);
  const ByteVector stream = chunk(kLast, kData, data(0, 5));
  std::span<const std::byte> input = view(stream);
  ReplyMessage message;
  ASSERT_EQ(parser.next(input, message), Event::kMessage);
  EXPECT_DEATH(parser.next(input, message), "5 bytes of payload are still to be taken");
  EXPECT_DEATH(parser.payload_received(6), "received 6 bytes");
  EXPECT_DEATH(parser.expect_payload(6), "a payload of 5 bytes, not 6");
}

std::string failure_of(ReplyStyle style, const ByteVector& stream) {
  const Parsed parsed = parse_wherever_cut(style, join(stream, zeroes(64)));
  EXPECT_TRUE(parsed.messages.empty());
  return parsed.failure;
}

TEST(ReplyParser, SaysWhatALyingServerDid) {
  const ReplyStyle plain = ReplyStyle::kSimple;
  const ReplyStyle structured = ReplyStyle::kStructured;
  const ReplyStyle ext = ReplyStyle::kExtended;
  EXPECT_EQ(failure_of(plain, text("HTTP")),
            "the server sent the wrong magic 0x48545450 before a reply");
  EXPECT_EQ(failure_of(plain, chunk(kLast, 0)),
            "the server sent a structured reply, where simple ones were negotiated");
  EXPECT_EQ(failure_of(ext, chunk(kLast, 0)),
            "the server sent a structured reply, where extended headers were negotiated");
  EXPECT_EQ(failure_of(ext, simple()),
            "the server sent a simple reply, where extended headers were negotiated");
  EXPECT_EQ(failure_of(structured, extended(kLast, 0)),
            "the server sent an extended reply, which was not negotiated");
  EXPECT_EQ(failure_of(structured, chunk(kLast, 0, {0})),
            "the server sent 1 bytes in a chunk of type NONE");
  EXPECT_EQ(failure_of(structured, chunk(kMore, 0)),
            "the server sent a chunk of type NONE that is not the last one");
  EXPECT_EQ(failure_of(structured, chunk(kLast, kData, data(0, 0))),
            "the server sent 8 bytes in a chunk of type OFFSET_DATA");
  ByteVector long_data = chunk(kLast, kData, data(0, 1));
  long_data[16] = 0x02, long_data[19] = 0x09;  // 32 MiB + 9
  EXPECT_EQ(failure_of(structured, long_data),
            "the server sent 33554441 bytes in a chunk of type OFFSET_DATA");
  EXPECT_EQ(failure_of(structured, chunk(kLast, kHole, join(hole(0, 1), ByteVector{0}))),
            "the server sent 13 bytes in a chunk of type OFFSET_HOLE");
  EXPECT_EQ(failure_of(structured, chunk(kLast, kHole, hole(0, 0))),
            "the server sent a hole of 0 bytes");
  EXPECT_EQ(failure_of(structured, chunk(kLast, kStatus, be32(7))),
            "the server sent 4 bytes in a chunk of type BLOCK_STATUS");
  EXPECT_EQ(failure_of(structured, chunk(kLast, kStatus, zeroes(16))),
            "the server sent 16 bytes in a chunk of type BLOCK_STATUS");
  EXPECT_EQ(failure_of(structured, chunk(kLast, kStatusExt, zeroes(24))),
            "the server sent BLOCK_STATUS_EXT without extended headers");
  EXPECT_EQ(failure_of(ext, extended(kLast, kStatus, zeroes(12))),
            "the server sent BLOCK_STATUS, where extended headers ask for BLOCK_STATUS_EXT");
  EXPECT_EQ(failure_of(ext, extended(kLast, kStatusExt, zeroes(8))),
            "the server sent 8 bytes in a chunk of type BLOCK_STATUS_EXT");
  EXPECT_EQ(failure_of(ext, extended(kLast, kStatusExt, join(be32(7), be32(2), zeroes(16)))),
            "the server announced 2 descriptors in 24 bytes of BLOCK_STATUS_EXT");
  ByteVector endless = extended(kLast, kData, data(0, 1));
  endless[24] = 0x80;
  EXPECT_EQ(failure_of(ext, endless),
            "the server sent 9223372036854775817 bytes in a chunk of type OFFSET_DATA");
  EXPECT_EQ(failure_of(structured, chunk(kLast, 3)),
            "the server sent a chunk of the unknown type 0x3");
  EXPECT_EQ(failure_of(structured, chunk(kLast, kErr, zeroes(5))),
            "the server sent 5 bytes in a chunk of type ERROR");
  EXPECT_EQ(failure_of(structured, chunk(kLast, kErrAt, zeroes(13))),
            "the server sent 13 bytes in a chunk of type ERROR_OFFSET");
  EXPECT_EQ(failure_of(structured, chunk(kLast, kErr, zeroes(8193))),
            "the server sent 8193 bytes in a chunk of type ERROR");
  EXPECT_EQ(failure_of(structured, chunk(kLast, kErr, join(be32(5), be16(1)))),
            "the server announced a message of 1 bytes in 6 bytes of ERROR");
  EXPECT_EQ(failure_of(structured, chunk(kLast, kErrAt, join(be32(5), be16(1), zeroes(8)))),
            "the server announced a message of 1 bytes in 14 bytes of ERROR_OFFSET");
  EXPECT_EQ(failure_of(structured, chunk(kLast, kErr, error(5, std::string(4097, 'x')))),
            "the server announced a message of 4097 bytes in 4103 bytes of ERROR");
  EXPECT_EQ(failure_of(structured, chunk(kLast, kErr, error(0))),
            "the server sent ERROR with the error 0");
}

TEST(ReplyParser, FailsForGood) {
  ReplyParser parser(ReplyStyle::kSimple);
  const ByteVector wrong = text("nonsense");
  const ByteVector right = simple();
  ReplyMessage message;
  std::span<const std::byte> input = view(wrong);
  EXPECT_EQ(parser.next(input, message), Event::kFailed);
  input = view(right);
  EXPECT_EQ(parser.next(input, message), Event::kFailed);
}

// ---- coverage ----

TEST(Coverage, KnowsWhatWasSeenBefore) {
  using enum Coverage::Added;
  Coverage coverage;
  EXPECT_EQ(coverage.add(100, 10), kNew);
  EXPECT_EQ(coverage.add(100, 10), kOverlaps);
  EXPECT_EQ(coverage.add(109, 1), kOverlaps);
  EXPECT_EQ(coverage.add(99, 2), kOverlaps);
  EXPECT_EQ(coverage.add(110, 10), kNew);  // behind
  EXPECT_EQ(coverage.add(90, 10), kNew);   // before
  EXPECT_EQ(coverage.total(), 30u);
  EXPECT_EQ(coverage.add(200, 10), kNew);  // apart
  EXPECT_EQ(coverage.add(0, 10), kNew);
  EXPECT_EQ(coverage.add(150, 10), kNew);
  EXPECT_EQ(coverage.add(155, 10), kOverlaps);
  EXPECT_EQ(coverage.add(145, 10), kOverlaps);
  EXPECT_EQ(coverage.add(0, 1000), kOverlaps);
  EXPECT_EQ(coverage.add(209, 1), kOverlaps);
  EXPECT_EQ(coverage.add(120, 30), kNew);  // closes a gap
  EXPECT_EQ(coverage.add(120, 1), kOverlaps);
  EXPECT_EQ(coverage.add(149, 1), kOverlaps);
  EXPECT_EQ(coverage.add(160, 1), kNew);
  EXPECT_EQ(coverage.add(199, 1), kNew);
  EXPECT_EQ(coverage.add(199, 1), kOverlaps);
  EXPECT_EQ(coverage.total(), 30u + 30 + 30 + 2);
}

TEST(Coverage, AgreesWithCountingBytes) {
  std::uint32_t seed = 1;
  const auto random = [&](std::uint32_t below) {
    seed = seed * 1664525 + 1013904223;
    return (seed >> 8) % below;
  };
  for (int round = 0; round < 200; ++round) {
    Coverage coverage;
    std::array<bool, 256> bytes{};
    for (int i = 0; i < 100; ++i) {
      const std::uint32_t size = 1 + random(8);
      const std::uint32_t at = random(256 - size);
      const auto part = std::span(bytes).subspan(at, size);
      const bool free = std::ranges::count(part, true) == 0;
      ASSERT_EQ(coverage.add(at, size) == Coverage::Added::kNew, free);
      if (free) std::ranges::fill(part, true);
      ASSERT_EQ(coverage.total(), static_cast<std::uint64_t>(std::ranges::count(bytes, true)));
    }
  }
}

TEST(Coverage, IsBounded) {
  Coverage coverage;
  std::uint64_t at = 0;
  while (coverage.add(at, 1) == Coverage::Added::kNew) at += 2;
  EXPECT_EQ(at, 2 * Coverage::kMaxPieces);
  EXPECT_EQ(coverage.add(1, 1), Coverage::Added::kNew);
  EXPECT_EQ(coverage.total(), Coverage::kMaxPieces + 1);
}

// ---- the checker ----

constexpr ClientRequest kRead = {
    .command = Command::kRead, .cookie = kCookie, .offset = kOffset, .length = 4096};

/// The outcome of a reply to one request: the buffer it filled, and what was said.
struct Answered {
  bool fatal = false;
  bool done = false;
  std::string fault;
  Result<void> result{};
  ByteVector buffer;
  std::vector<ContextStatus> status;
  std::optional<std::uint64_t> error_offset;
};

const std::vector<MetaContext> kContexts = {{7, "base:allocation"}, {9, "qemu:x"}};

Answered answer(const ClientRequest& request, ReplyStyle style, const ByteVector& stream,
                std::span<const MetaContext> contexts = kContexts) {
  ReplyParser parser(style);
  ReplyChecker checker(request, style, contexts);
  Answered answered;
  if (request.command == Command::kRead) answered.buffer = ByteVector(request.length, '?');
  std::span<const std::byte> input = view(stream);
  ReplyMessage message;
  while (parser.next(input, message) == Event::kMessage) {
    const ReplyChecker::Verdict verdict = checker.check(message);
    answered.fatal |= verdict.fatal;
    if (verdict.payload_size > 0) parser.expect_payload(verdict.payload_size);
    const auto at = answered.buffer.begin() + static_cast<std::ptrdiff_t>(verdict.at);
    switch (verdict.action) {
      case Action::kData:
        EXPECT_LE(verdict.at + verdict.payload_size, answered.buffer.size());
        std::ranges::copy(copy(parser.take_payload(input)), at);
        break;
      case Action::kZeroes:
        EXPECT_LE(verdict.at + verdict.size, answered.buffer.size());
        std::fill_n(at, verdict.size, 0);
        break;
      case Action::kStatus:
        while (parser.payload_left() > 0) {
          // Three bytes at a time, so that descriptors are cut.
          auto part = input.first(std::min<std::size_t>(3, input.size()));
          input = input.subspan(part.size());
          checker.take_status(parser.take_payload(part));
          input = {input.data() - part.size(), input.size() + part.size()};
        }
        break;
      case Action::kSkip:
        parser.skip_payload();
        break;
      case Action::kNothing:
        EXPECT_EQ(verdict.payload_size, 0u);
        break;
    }
  }
  EXPECT_FALSE(parser.failed()) << parser.failure();
  answered.done = checker.done();
  if (checker.done()) answered.result = checker.finish();
  answered.fault = checker.fault();
  answered.status = checker.status();
  answered.error_offset = checker.error_offset();
  return answered;
}

TEST(ReplyChecker, TakesTheDataOfASimpleReply) {
  const Answered answered =
      answer(kRead, ReplyStyle::kSimple, join(simple(), ByteVector(4096, 'y')));
  EXPECT_TRUE(answered.result);
  EXPECT_EQ(answered.buffer, ByteVector(4096, 'y'));
  EXPECT_EQ(answered.fault, "");
  const Answered failed = answer(kRead, ReplyStyle::kSimple, simple(28));
  ASSERT_FALSE(failed.result);
  EXPECT_EQ(failed.result.error().code(), ENOSPC);
  EXPECT_EQ(failed.result.error().doing(), "READ 78187491328+4096");
}

TEST(ReplyChecker, PutsChunksTogetherInAnyOrder) {
  for (ReplyStyle style : {ReplyStyle::kStructured, ReplyStyle::kExtended}) {
    const auto make = style == ReplyStyle::kStructured
                          ? chunk
                          : +[](std::uint16_t flags, std::uint16_t type, const ByteVector& p) {
                              return extended(flags, type, p);
                            };
    const Answered answered =
        answer(kRead, style,
               join(make(kMore, kData, data(3072, 1024)), make(kMore, kHole, hole(0, 1024)),
                    make(kMore, kHole, hole(2048, 1024)), make(kLast, kData, data(1024, 1024))));
    EXPECT_TRUE(answered.result) << answered.fault;
    EXPECT_EQ(answered.buffer,
              join(zeroes(1024), ByteVector(1024, 'x'), zeroes(1024), ByteVector(1024, 'x')));
  }
}

TEST(ReplyChecker, ReportsTheServersErrors) {
  const Answered generic = answer(
      kRead, ReplyStyle::kStructured,
      join(chunk(kMore, kData, data(0, 1024)), chunk(kLast, kErr, error(5, "the disk\nis gone"))));
  ASSERT_FALSE(generic.result);
  EXPECT_EQ(generic.result.error().code(), EIO);
  EXPECT_EQ(generic.result.error().doing(),
            "READ 78187491328+4096: the server says \"the disk\\x0ais gone\"");
  EXPECT_EQ(generic.fault, "");

  const Answered at =
      answer(kRead, ReplyStyle::kStructured,
             join(chunk(kMore, kData, data(0, 1024)),
                  chunk(kMore, kErrAt, join(error(5), be64(kOffset + 100))),
                  chunk(kMore, kErrAt, join(error(28), be64(kOffset + 2000))), chunk(kLast, 0)));
  ASSERT_FALSE(at.result);
  EXPECT_EQ(at.result.error().code(), EIO);
  EXPECT_EQ(at.result.error().doing(), "READ 78187491328+4096, at 78187491428");
  EXPECT_EQ(at.error_offset, kOffset + 100);
}

TEST(ReplyChecker, TakesSimpleAndStructuredRepliesToOtherRequests) {
  const ClientRequest flush = {.command = Command::kFlush, .cookie = kCookie};
  for (const ByteVector& reply : {simple(), chunk(kLast, 0)}) {
    const Answered answered = answer(flush, ReplyStyle::kStructured, reply);
    EXPECT_TRUE(answered.result);
    EXPECT_EQ(answered.fault, "");
  }
  const Answered failed = answer(flush, ReplyStyle::kStructured, simple(5));
  ASSERT_FALSE(failed.result);
  EXPECT_EQ(failed.result.error().doing(), "FLUSH");
}

/// What is wrong with a reply after which the connection goes on.
std::string spoiled(const ClientRequest& request, ReplyStyle style, const ByteVector& stream) {
  const Answered answered = answer(request, style, stream);
  EXPECT_FALSE(answered.fatal);
  EXPECT_TRUE(answered.done);
  EXPECT_FALSE(answered.result);
  if (answered.result) return {};
  EXPECT_EQ(answered.result.error().code(), EPROTO);
  EXPECT_EQ(answered.result.error().doing(), to_string(request) + ": " + answered.fault);
  return answered.fault;
}

TEST(ReplyChecker, FailsAReadWhosePartsDoNotFit) {
  const auto fault = [](const auto&... chunks) {
    return spoiled(kRead, ReplyStyle::kStructured, join(chunks..., chunk(kLast, 0)));
  };
  EXPECT_EQ(fault(), "the server sent only 0 bytes and claims success");
  EXPECT_EQ(fault(chunk(kMore, kData, data(0, 4095))),
            "the server sent only 4095 bytes and claims success");
  EXPECT_EQ(fault(chunk(kMore, kData, data(0, 4096)), chunk(kMore, kHole, hole(4095, 1))),
            "the server sent OFFSET_HOLE 78187495423+1, which it has sent a part of before");
  EXPECT_EQ(fault(chunk(kMore, kHole, hole(0, 8)), chunk(kMore, kData, data(7, 8))),
            "the server sent OFFSET_DATA 78187491335+8, which it has sent a part of before");
  EXPECT_EQ(fault(chunk(kMore, kData, data(0, 4097))),
            "the server sent OFFSET_DATA 78187491328+4097, which is not within");
  EXPECT_EQ(fault(chunk(kMore, kHole, hole(4096, 1))),
            "the server sent OFFSET_HOLE 78187495424+1, which is not within");
  EXPECT_EQ(fault(chunk(kMore, kHole, hole(~std::uint64_t{0}, 4096))),  // before the request
            "the server sent OFFSET_HOLE 78187491327+4096, which is not within");
  EXPECT_EQ(fault(chunk(kMore, kErrAt, join(error(5), be64(kOffset + 10))),
                  chunk(kMore, kData, data(0, 11))),
            "the server sent OFFSET_DATA 78187491328+11 behind an error at 78187491338");
  EXPECT_EQ(fault(chunk(kMore, kErrAt, join(error(5), be64(kOffset + 4096)))),
            "the server told of an error at 78187495424, which is not within");

  ByteVector scattered;
  for (std::uint64_t at = 0; at < 2 * 4097; at += 2) {
    scattered = join(scattered, chunk(kMore, kHole, hole(at, 1)));
  }
  ClientRequest large = kRead;
  large.length = 1 << 20;
  EXPECT_EQ(spoiled(large, ReplyStyle::kStructured, join(scattered, chunk(kLast, 0))),
            "the server sent more than 4096 parts that do not touch");

  ClientRequest whole = kRead;
  whole.flags = kCommandDf;
  EXPECT_EQ(
      spoiled(whole, ReplyStyle::kStructured,
              join(chunk(kMore, kData, data(0, 1024)), chunk(kLast, kData, data(1024, 3072)))),
      "the server sent OFFSET_DATA 78187492352+3072 as a second part of what must not be "
      "cut");
}

TEST(ReplyChecker, GivesUpAServerThatTalksOfSomethingElse) {
  const auto fatal = [](const ClientRequest& request, ReplyStyle style, const ByteVector& stream) {
    const Answered answered = answer(request, style, stream);
    EXPECT_TRUE(answered.fatal) << answered.fault;
    return answered.fault;
  };
  const ReplyStyle structured = ReplyStyle::kStructured;
  EXPECT_EQ(fatal(kRead, structured, simple()),
            "the server sent a simple reply, where a structured one was negotiated");
  EXPECT_EQ(fatal(kRead, structured, simple(22)),
            "the server sent a simple reply, where a structured one was negotiated");
  EXPECT_EQ(fatal(kRead, ReplyStyle::kExtended, extended(kLast, kHole, hole(0, 4096), kOffset + 1)),
            "the server replied with the offset 78187491329");
  EXPECT_EQ(fatal(kRead, structured, join(chunk(kLast, kHole, hole(0, 4096)), chunk(kLast, 0))),
            "the server went on with a reply that was complete");
  EXPECT_EQ(fatal(kRead, structured, chunk(kLast, kStatus, join(be32(7), be32(1), be32(0)))),
            "the server replied with BLOCK_STATUS");
  const ClientRequest trim = {
      .command = Command::kTrim, .cookie = kCookie, .offset = kOffset, .length = 4096};
  EXPECT_EQ(fatal(trim, structured, chunk(kLast, kHole, hole(0, 4096))),
            "the server replied with OFFSET_HOLE 78187491328+4096");
  EXPECT_EQ(
      fatal(trim, structured, join(chunk(kMore, kErrAt, join(error(5), be64(kOffset))), simple())),
      "the server sent a simple reply behind chunks of another one");
}

// ---- block status ----

constexpr ClientRequest kAsk = {
    .command = Command::kBlockStatus, .cookie = kCookie, .offset = kOffset, .length = 4096};

ByteVector status(std::uint32_t context, std::initializer_list<StatusExtent> extents) {
  ByteVector bytes = be32(context);
  for (const StatusExtent& e : extents) {
    bytes = join(bytes, be32(static_cast<std::uint32_t>(e.length)),
                 be32(static_cast<std::uint32_t>(e.flags)));
  }
  return bytes;
}

ByteVector status_ext(std::uint32_t context, std::initializer_list<StatusExtent> extents) {
  ByteVector bytes = join(be32(context), be32(static_cast<std::uint32_t>(extents.size())));
  for (const StatusExtent& e : extents) bytes = join(bytes, be64(e.length), be64(e.flags));
  return bytes;
}

TEST(ReplyChecker, CollectsTheStatusOfEachContext) {
  const Answered answered =
      answer(kAsk, ReplyStyle::kStructured,
             join(chunk(kMore, kStatus, status(9, {{512, 0x80000000}})),
                  chunk(kLast, kStatus, status(7, {{512, 3}, {1024, 0}, {1024, 0}, {9999, 3}}))));
  EXPECT_TRUE(answered.result) << answered.fault;
  EXPECT_EQ(answered.status, (std::vector<ContextStatus>{{9, {{512, 0x80000000}}},
                                                         {7, {{512, 3}, {2048, 0}, {9999, 3}}}}));
  ClientRequest large = kAsk;
  large.length = 1ull << 50;
  const Answered wide =
      answer(large, ReplyStyle::kExtended,
             join(extended(kMore, kStatusExt, status_ext(9, {{1ull << 40, 1ull << 63}, {1, 0}})),
                  extended(kLast, kStatusExt, status_ext(7, {{1ull << 51, 3}}))));
  EXPECT_TRUE(wide.result) << wide.fault;
  EXPECT_EQ(wide.status, (std::vector<ContextStatus>{{9, {{1ull << 40, 1ull << 63}, {1, 0}}},
                                                     {7, {{1ull << 51, 3}}}}));
}

TEST(ReplyChecker, FailsAStatusThatDoesNotAddUp) {
  const auto fault = [](const ClientRequest& request, const auto&... chunks) {
    return spoiled(request, ReplyStyle::kStructured, join(chunks..., chunk(kLast, 0)));
  };
  const ByteVector other = chunk(kMore, kStatus, status(9, {{512, 0}}));
  const auto base = [](std::initializer_list<StatusExtent> extents) {
    return chunk(kMore, kStatus, status(7, extents));
  };
  EXPECT_EQ(fault(kAsk, base({{4096, 0}})),
            "the server sent the status of 1 contexts, not of 2, and claims success");
  EXPECT_EQ(spoiled(kAsk, ReplyStyle::kStructured, simple()),
            "the server sent the status of 0 contexts, not of 2, and claims success");
  EXPECT_EQ(fault(kAsk, other, other), "the server sent the status of \"qemu:x\" twice");
  EXPECT_EQ(fault(kAsk, chunk(kMore, kStatus, status(8, {{512, 0}}))),
            "the server sent the status of the unknown context 8");
  EXPECT_EQ(fault(kAsk, base({{512, 0}, {0, 1}})), "the server sent a descriptor of 0 bytes");
  EXPECT_EQ(fault(kAsk, base({{4096, 0}, {512, 1}})),
            "the server sent more descriptors behind 4096 bytes of status");
  ClientRequest one = kAsk;
  one.flags = kCommandReqOne;
  EXPECT_EQ(fault(one, base({{512, 0}, {512, 1}})),
            "the server sent 2 descriptors, where one was asked for");
  EXPECT_EQ(fault(one, base({{4097, 0}})),
            "the server sent a descriptor of 4097 bytes, longer than asked for");
  EXPECT_TRUE(
      answer(one, ReplyStyle::kStructured, join(other, base({{4096, 0}}), chunk(kLast, 0))).result);

  const auto ext = [](std::initializer_list<StatusExtent> extents) {
    return spoiled(kAsk, ReplyStyle::kExtended,
                   join(extended(kMore, kStatusExt, status_ext(7, extents)), extended(kLast, 0)));
  };
  EXPECT_EQ(ext({{~std::uint64_t{0}, 0}}),
            "the server sent a descriptor of 18446744073709551615 bytes, which nothing is");
  EXPECT_EQ(ext({{512, 1ull << 32}}),
            "the server sent the flags 0x100000000, where 32 bits are right");
}

}  // namespace
}  // namespace roost::nbd
