// SPDX-License-Identifier: MIT
#include "roost/nbd/negotiation.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "nbd/test_bytes.h"

namespace roost::nbd {
namespace {

using State = ServerNegotiation::State;

// ---- what goes over the wire, written out ----

const ByteVector kGreeting = {
    'N',  'B',  'D', 'M', 'A', 'G', 'I', 'C',  // first magic
    'I',  'H',  'A', 'V', 'E', 'O', 'P', 'T',  // newstyle magic
    0x00, 0x03,                                // fixed newstyle, no zeroes
};

const ByteVector kFixedNoZeroes = {0x00, 0x00, 0x00, 0x03};
const ByteVector kFixedOnly = {0x00, 0x00, 0x00, 0x01};

const ByteVector kAbort = {
    'I',  'H',  'A',  'V',  'E', 'O', 'P', 'T',  //
    0x00, 0x00, 0x00, 0x02,                      // ABORT
    0x00, 0x00, 0x00, 0x00,                      // no data
};

const ByteVector kAbortAck = {
    0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9,  // magic of option replies
    0x00, 0x00, 0x00, 0x02,                          // to ABORT
    0x00, 0x00, 0x00, 0x01,                          // ACK
    0x00, 0x00, 0x00, 0x00,                          // no data
};

const ByteVector kList = {
    'I',  'H',  'A',  'V',  'E', 'O', 'P', 'T',  //
    0x00, 0x00, 0x00, 0x03,                      // LIST
    0x00, 0x00, 0x00, 0x00,                      // no data
};

/// GO for the export "disk", asking for its block sizes.
const ByteVector kGoDisk = {
    'I',  'H',  'A',  'V',  'E', 'O', 'P', 'T',  //
    0x00, 0x00, 0x00, 0x07,                      // GO
    0x00, 0x00, 0x00, 0x0c,                      // 12 bytes of data
    0x00, 0x00, 0x00, 0x04,                      // length of the name
    'd',  'i',  's',  'k',                       //
    0x00, 0x01,                                  // one information request
    0x00, 0x03,                                  // BLOCK_SIZE
};

/// The answer: "disk" below.
const ByteVector kGoDiskReply = {
    0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9,  // magic of option replies
    0x00, 0x00, 0x00, 0x07,                          // to GO
    0x00, 0x00, 0x00, 0x03,                          // INFO
    0x00, 0x00, 0x00, 0x0c,                          // 12 bytes
    0x00, 0x00,                                      // EXPORT
    0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x02, 0x00,  // 4 GiB + 512 bytes
    0x01, 0x6d,                                      // flags: all but READ_ONLY
    0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9,  //
    0x00, 0x00, 0x00, 0x07,                          // to GO
    0x00, 0x00, 0x00, 0x03,                          // INFO
    0x00, 0x00, 0x00, 0x0e,                          // 14 bytes
    0x00, 0x03,                                      // BLOCK_SIZE
    0x00, 0x00, 0x00, 0x01,                          // minimum
    0x00, 0x00, 0x10, 0x00,                          // preferred
    0x02, 0x00, 0x00, 0x00,                          // maximum payload
    0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9,  //
    0x00, 0x00, 0x00, 0x07,                          // to GO
    0x00, 0x00, 0x00, 0x01,                          // ACK
    0x00, 0x00, 0x00, 0x00,                          //
};

// ---- exports ----

constexpr std::uint16_t kAllFlags = kTransmissionHasFlags | kTransmissionSendFlush |
                                    kTransmissionSendFua | kTransmissionSendTrim |
                                    kTransmissionSendWriteZeroes | kTransmissionCanMultiConn;

const std::vector<ExportInfo> kExports = {
    {.name = "disk", .size = (1ull << 32) + 512, .transmission_flags = kAllFlags},
    {.name = "",
     .size = 0x1122334455667788,
     .transmission_flags = kTransmissionHasFlags | kTransmissionReadOnly,
     .description = "the default"},
    {.name = "odd",
     .size = 8192,
     .transmission_flags = kTransmissionHasFlags,
     .min_block = 4096,
     .preferred_block = 8192,
     .max_payload = 1 << 20,
     .description = "big blocks"},
};

// ---- helpers for what varies ----

ByteVector option(std::uint32_t number, const ByteVector& data, std::uint32_t length) {
  return join(text("IHAVEOPT"), be32(number), be32(length), data);
}

ByteVector option(std::uint32_t number, const ByteVector& data = {}) {
  return option(number, data, static_cast<std::uint32_t>(data.size()));
}

ByteVector reply(std::uint32_t to, ReplyType type, const ByteVector& data = {}) {
  return join(be64(0x0003e889045565a9), be32(to), be32(static_cast<std::uint32_t>(type)),
              be32(static_cast<std::uint32_t>(data.size())), data);
}

ByteVector go_data(const std::string& name, const ByteVector& requests = {}) {
  const auto count = static_cast<std::uint8_t>(requests.size() / 2);
  return join(be32(static_cast<std::uint32_t>(name.size())), text(name), ByteVector{0, count},
              requests);
}

struct Outcome {
  ByteVector output;
  std::size_t consumed = 0;
  State state = State::kNegotiating;
  std::string failure;

  bool operator==(const Outcome&) const = default;
};

/// Feeds parts one after the other, as a server would, and drains all output each time.
Outcome feed_parts(ServerNegotiation& negotiation, const std::vector<ByteVector>& parts) {
  Outcome outcome;
  const auto drain = [&] {
    const ByteVector part = copy(negotiation.output());
    outcome.output.insert(outcome.output.end(), part.begin(), part.end());
    negotiation.drain_output(part.size());
    return !part.empty();
  };
  for (const ByteVector& part : parts) {
    std::span<const std::byte> input = view(part);
    do {
      const std::size_t taken = negotiation.feed(input);
      outcome.consumed += taken;
      input = input.subspan(taken);
    } while (drain() && negotiation.state() == State::kNegotiating);
    EXPECT_TRUE(input.empty() || negotiation.state() != State::kNegotiating);
    if (negotiation.state() != State::kNegotiating) break;
  }
  outcome.state = negotiation.state();
  if (outcome.state == State::kFailed) outcome.failure = negotiation.failure();
  return outcome;
}

/// The outcome for a client's stream; also checks that it is the same for the stream fed byte by
/// byte and cut in two at every place.
Outcome negotiate(const ByteVector& stream, std::span<const ExportInfo> exports = kExports) {
  ServerNegotiation whole(exports);
  const Outcome outcome = feed_parts(whole, {stream});
  std::vector<ByteVector> bytes;
  for (std::uint8_t b : stream) bytes.push_back({b});
  ServerNegotiation bytewise(exports);
  EXPECT_EQ(feed_parts(bytewise, bytes), outcome);
  for (std::size_t cut = 0; cut <= stream.size(); ++cut) {
    const auto at = stream.begin() + static_cast<std::ptrdiff_t>(cut);
    ServerNegotiation halves(exports);
    EXPECT_EQ(feed_parts(halves, {{stream.begin(), at}, {at, stream.end()}}), outcome)
        << "cut at " << cut;
  }
  return outcome;
}

/// The replies behind the greeting.
ByteVector replies(const Outcome& outcome) {
  EXPECT_EQ(ByteVector(outcome.output.begin(), outcome.output.begin() + 18), kGreeting);
  return {outcome.output.begin() + 18, outcome.output.end()};
}

/// Type and message of a single error reply.
std::pair<ReplyType, std::string> only_error(const Outcome& outcome, std::uint32_t to) {
  const ByteVector all = replies(outcome);
  if (all.size() < 20) return {};
  const auto number = [&](std::size_t at) {
    return std::uint32_t{all[at]} << 24 | all[at + 1] << 16 | all[at + 2] << 8 | all[at + 3];
  };
  EXPECT_EQ(number(8), to);
  EXPECT_EQ(number(16), all.size() - 20) << "more than one reply";
  return {ReplyType{number(12)}, {all.begin() + 20, all.end()}};
}

TEST(Negotiation, GreetsBeforeTheClientHasSaidAnything) {
  ServerNegotiation negotiation(kExports);
  EXPECT_EQ(copy(negotiation.output()), kGreeting);
  EXPECT_EQ(negotiation.state(), State::kNegotiating);
}

TEST(Negotiation, StartsTransmissionWithGoAndLeavesTheRequestsBehindIt) {
  const ByteVector request = {0x25, 0x60, 0x95, 0x13, 0x00};
  const Outcome outcome = negotiate(join(kFixedNoZeroes, kGoDisk, request));
  EXPECT_EQ(outcome.output, join(kGreeting, kGoDiskReply));
  EXPECT_EQ(outcome.state, State::kTransmission);
  EXPECT_EQ(outcome.consumed, kFixedNoZeroes.size() + kGoDisk.size());
}

TEST(Negotiation, SaysWhatGoSelected) {
  ServerNegotiation negotiation(kExports);
  negotiation.feed(view(join(kFixedNoZeroes, kGoDisk)));
  ASSERT_EQ(negotiation.state(), State::kTransmission);
  EXPECT_EQ(negotiation.selection().export_index, 0u);
  EXPECT_EQ(negotiation.selection().transmission_flags, kAllFlags);
  EXPECT_TRUE(negotiation.selection().no_zeroes);
  EXPECT_TRUE(negotiation.selection().block_size_requested);
}

TEST(Negotiation, KnowsThatAClientDidNotAskForBlockSizes) {
  ServerNegotiation negotiation(kExports);
  // Asking with INFO does not bind the client; only GO does.
  negotiation.feed(view(join(kFixedOnly, option(6, go_data("disk", {0, 3})),  //
                             option(7, go_data("odd", {0, 0, 0, 1})))));
  ASSERT_EQ(negotiation.state(), State::kTransmission);
  EXPECT_EQ(negotiation.selection().export_index, 2u);
  EXPECT_FALSE(negotiation.selection().block_size_requested);
  EXPECT_FALSE(negotiation.selection().no_zeroes);
}

TEST(Negotiation, AnswersExportNameWithoutZeroesWhereThatWasAgreed) {
  const ByteVector export_name_disk = {
      'I',  'H',  'A',  'V',  'E', 'O', 'P', 'T',  //
      0x00, 0x00, 0x00, 0x01,                      // EXPORT_NAME
      0x00, 0x00, 0x00, 0x04,                      //
      'd',  'i',  's',  'k',
  };
  const ByteVector answer = {
      0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x02, 0x00,  // size
      0x01, 0x6d,                                      // flags
  };
  const Outcome terse = negotiate(join(kFixedNoZeroes, export_name_disk));
  EXPECT_EQ(terse.output, join(kGreeting, answer));
  EXPECT_EQ(terse.state, State::kTransmission);
  const Outcome padded = negotiate(join(kFixedOnly, export_name_disk));
  EXPECT_EQ(padded.output, join(kGreeting, answer, zeroes(124)));
  EXPECT_EQ(padded.state, State::kTransmission);
}

TEST(Negotiation, TakesTheEmptyNameForTheDefaultExport) {
  const Outcome outcome = negotiate(join(kFixedNoZeroes, option(1)));
  EXPECT_EQ(replies(outcome), (ByteVector{0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88,  //
                                          0x00, 0x03}));  // HAS_FLAGS, READ_ONLY
  EXPECT_EQ(outcome.state, State::kTransmission);
}

TEST(Negotiation, HasNoDefaultExportWhereAllHaveNames) {
  const auto named = std::span(kExports).first(1);
  EXPECT_EQ(negotiate(join(kFixedNoZeroes, option(1)), named).state, State::kFailed);
  const Outcome outcome = negotiate(join(kFixedNoZeroes, option(7, go_data(""))), named);
  EXPECT_EQ(only_error(outcome, 7).first, ReplyType::kErrUnknown);
  EXPECT_EQ(outcome.state, State::kNegotiating);
}

TEST(Negotiation, ClosesOnAnUnknownExportNameAndQuotesItForTheLog) {
  const Outcome outcome = negotiate(join(kFixedNoZeroes, option(1, text("no\nsuch\"\x80"))));
  EXPECT_EQ(outcome.output, kGreeting);
  EXPECT_EQ(outcome.state, State::kFailed);
  EXPECT_EQ(outcome.failure, "unknown export \"no\\x0asuch\\x22\\x80\"");
}

TEST(Negotiation, AnswersInfoAndGoesOn) {
  const Outcome outcome = negotiate(
      join(kFixedNoZeroes, option(6, go_data("", {0, 1, 0, 2})), option(7, go_data("disk"))));
  const ByteVector export_default = {0x00, 0x00,                                      // EXPORT
                                     0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88,  // size
                                     0x00, 0x03};                                     // flags
  const ByteVector export_disk = {0x00, 0x00, 0x00, 0x00, 0x00, 0x01,
                                  0x00, 0x00, 0x02, 0x00, 0x01, 0x6d};
  EXPECT_EQ(replies(outcome),
            join(reply(6, ReplyType::kInfo, export_default),
                 reply(6, ReplyType::kInfo, {0x00, 0x01}),  // NAME: empty
                 reply(6, ReplyType::kInfo, join({0x00, 0x02}, text("the default"))),
                 reply(6, ReplyType::kAck), reply(7, ReplyType::kInfo, export_disk),
                 reply(7, ReplyType::kAck)));
  EXPECT_EQ(outcome.state, State::kTransmission);
}

TEST(Negotiation, SendsUnusualBlockSizesUnasked) {
  const Outcome outcome = negotiate(join(kFixedNoZeroes, option(6, go_data("odd"))));
  EXPECT_EQ(replies(outcome),
            join(reply(6, ReplyType::kInfo, {0, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 1}),
                 reply(6, ReplyType::kInfo,
                       {0, 3, 0, 0, 0x10, 0, 0, 0, 0x20, 0, 0, 0x10, 0, 0}),  // 4 KiB, 8 KiB, 1 MiB
                 reply(6, ReplyType::kAck)));
}

TEST(Negotiation, IgnoresUnknownAndRepeatedInformationRequests) {
  const Outcome outcome =
      negotiate(join(kFixedNoZeroes, option(6, go_data("disk", {0x12, 0x34, 0, 1, 0, 1, 0, 2}))));
  EXPECT_EQ(replies(outcome),
            join(reply(6, ReplyType::kInfo, {0, 0, 0, 0, 0, 1, 0, 0, 2, 0, 0x01, 0x6d}),
                 reply(6, ReplyType::kInfo, join({0, 1}, text("disk"))),  //
                 reply(6, ReplyType::kAck)));
}

TEST(Negotiation, RefusesGoForAnUnknownExportAndTakesTheNextOption) {
  const Outcome refused = negotiate(join(kFixedNoZeroes, option(7, go_data("nope"))));
  const auto [type, message] = only_error(refused, 7);
  EXPECT_EQ(type, ReplyType::kErrUnknown);
  EXPECT_EQ(message, "there is no export \"nope\"");
  EXPECT_EQ(refused.state, State::kNegotiating);

  const Outcome retried = negotiate(join(kFixedNoZeroes, option(7, go_data("nope")), kGoDisk));
  EXPECT_EQ(retried.output, join(refused.output, kGoDiskReply));
  EXPECT_EQ(retried.state, State::kTransmission);
}

TEST(Negotiation, RefusesMalformedInfoAndGo) {
  const std::vector<ByteVector> malformed = {
      {},                              // nothing
      {0, 0, 0, 0, 0},                 // too short by a byte
      {0, 0, 0, 1, 0, 0},              // the name ends behind the data
      {0, 0, 0, 2, 'a', 0, 0},         // the name ate the count
      {0xff, 0xff, 0xff, 0xff, 0, 0},  // a name of 4 GiB
      {0xff, 0xff, 0xff, 0xfc, 0, 0},  // plus 4 it would be 0
      {0, 0, 0, 0, 0, 1},              // a request is missing
      {0, 0, 0, 0, 0, 1, 0},           // half a request
      {0, 0, 0, 0, 0, 0, 0, 3},        // a request too many
      {0, 0, 0, 0, 0xff, 0xff, 0, 3},  // 65535 requests
  };
  for (std::uint32_t number : {6u, 7u}) {
    for (const ByteVector& data : malformed) {
      const Outcome outcome = negotiate(join(kFixedNoZeroes, option(number, data)));
      EXPECT_EQ(only_error(outcome, number).first, ReplyType::kErrInvalid)
          << testing::PrintToString(data);
      EXPECT_EQ(outcome.state, State::kNegotiating);
    }
  }
}

TEST(Negotiation, ListsTheExports) {
  const ByteVector expected = {
      0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9,                 // magic of option replies
      0x00, 0x00, 0x00, 0x03,                                         // to LIST
      0x00, 0x00, 0x00, 0x02,                                         // SERVER
      0x00, 0x00, 0x00, 0x08,                                         // 8 bytes
      0x00, 0x00, 0x00, 0x04,                                         // length of the name
      'd',  'i',  's',  'k',                                          // no description
      0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9,                 //
      0x00, 0x00, 0x00, 0x03,                                         //
      0x00, 0x00, 0x00, 0x02,                                         //
      0x00, 0x00, 0x00, 0x0f,                                         // 15 bytes
      0x00, 0x00, 0x00, 0x00,                                         // no name
      't',  'h',  'e',  ' ',  'd',  'e',  'f',  'a',  'u', 'l', 't',  //
      0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9,                 //
      0x00, 0x00, 0x00, 0x03,                                         //
      0x00, 0x00, 0x00, 0x02,                                         //
      0x00, 0x00, 0x00, 0x11,                                         // 17 bytes
      0x00, 0x00, 0x00, 0x03,                                         //
      'o',  'd',  'd',                                                //
      'b',  'i',  'g',  ' ',  'b',  'l',  'o',  'c',  'k', 's',       //
      0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9,                 //
      0x00, 0x00, 0x00, 0x03,                                         //
      0x00, 0x00, 0x00, 0x01,                                         // ACK
      0x00, 0x00, 0x00, 0x00,                                         //
  };
  const Outcome outcome = negotiate(join(kFixedNoZeroes, kList, kAbort));
  EXPECT_EQ(outcome.output, join(kGreeting, expected, kAbortAck));
  EXPECT_EQ(outcome.state, State::kFinished);
}

TEST(Negotiation, ListsNothingWithAnAckAlone) {
  EXPECT_EQ(replies(negotiate(join(kFixedNoZeroes, kList), {})), reply(3, ReplyType::kAck));
}

TEST(Negotiation, RefusesToListWithData) {
  const Outcome outcome = negotiate(join(kFixedNoZeroes, option(3, text("x"))));
  EXPECT_EQ(only_error(outcome, 3).first, ReplyType::kErrInvalid);
  EXPECT_EQ(outcome.state, State::kNegotiating);
}

TEST(Negotiation, AcknowledgesAbortAndTakesNothingAfterIt) {
  const Outcome plain = negotiate(join(kFixedNoZeroes, kAbort, kList));
  EXPECT_EQ(plain.output, join(kGreeting, kAbortAck));
  EXPECT_EQ(plain.state, State::kFinished);
  EXPECT_EQ(plain.consumed, 20u);
  const Outcome with_data = negotiate(join(kFixedNoZeroes, option(2, text("bye"))));
  EXPECT_EQ(with_data.output, plain.output);
  EXPECT_EQ(with_data.state, State::kFinished);
}

TEST(Negotiation, AnswersWhatItDoesNotSupportAndSkipsItsData) {
  for (std::uint32_t number : {0u, 4u, 5u, 8u, 9u, 10u, 11u, 12u, 0xffffffffu}) {
    for (const ByteVector& data : {ByteVector{}, text("IHAVEOPT and more")}) {
      const Outcome refused = negotiate(join(kFixedNoZeroes, option(number, data)));
      const auto [type, message] = only_error(refused, number);
      EXPECT_EQ(type, ReplyType::kErrUnsup);
      EXPECT_TRUE(message.ends_with(" is not supported")) << message;
      const Outcome then_go = negotiate(join(kFixedNoZeroes, option(number, data), kGoDisk));
      EXPECT_EQ(then_go.output, join(refused.output, kGoDiskReply));
    }
  }
}

TEST(Negotiation, FailsOnUnknownClientFlags) {
  for (std::uint32_t flags : {4u, 7u, 0x80000000u, 0xffffffffu}) {
    const Outcome outcome = negotiate(join(be32(flags), kGoDisk));
    EXPECT_EQ(outcome.state, State::kFailed);
    EXPECT_EQ(outcome.output, kGreeting);
    EXPECT_TRUE(outcome.failure.starts_with("unknown client flags 0x")) << outcome.failure;
  }
}

TEST(Negotiation, TakesOnlyExportNameFromAClientWithoutFixedNewstyle) {
  const ByteVector no_flags = {0, 0, 0, 0};
  EXPECT_EQ(negotiate(join(no_flags, option(1, text("disk")))).state, State::kTransmission);
  for (std::uint32_t number : {2u, 3u, 6u, 7u, 8u}) {
    const Outcome outcome = negotiate(join(no_flags, option(number)));
    EXPECT_EQ(outcome.state, State::kFailed) << number;
    EXPECT_EQ(outcome.output, kGreeting);
  }
}

TEST(Negotiation, FailsOnAWrongMagic) {
  const Outcome http = negotiate(join(kFixedNoZeroes, text("GET / HTTP/1.1\r\n\r\n")));
  EXPECT_EQ(http.state, State::kFailed);
  EXPECT_EQ(http.output, kGreeting);
  EXPECT_EQ(http.failure, "wrong magic 0x474554202f204854 before an option");
  for (std::size_t at = 0; at < 8; ++at) {
    ByteVector almost = kGoDisk;
    almost[at] ^= 1;
    EXPECT_EQ(negotiate(join(kFixedNoZeroes, almost)).state, State::kFailed) << at;
  }
}

TEST(Negotiation, TakesAnExportNameOf4096BytesAndNotOneMore) {
  const std::vector<ExportInfo> exports = {{.name = std::string(4096, 'n'), .size = 1}};
  ServerNegotiation longest(exports);
  longest.feed(view(join(kFixedNoZeroes, option(1, text(exports[0].name)))));
  EXPECT_EQ(longest.state(), State::kTransmission);

  // Fails at the header already: nobody has to send the name.
  const Outcome longer = negotiate(join(kFixedNoZeroes, option(1, {}, 4097)), exports);
  EXPECT_EQ(longer.state, State::kFailed);
  EXPECT_EQ(longer.failure, "an export name of 4097 bytes");
}

TEST(Negotiation, TakesANameOf4096BytesWithGoAndNotOneMore) {
  const std::vector<ExportInfo> exports = {{.name = std::string(4096, 'n'), .size = 1}};
  ServerNegotiation longest(exports);
  longest.feed(view(join(kFixedNoZeroes, option(7, go_data(exports[0].name)))));
  EXPECT_EQ(longest.state(), State::kTransmission);

  ServerNegotiation longer(exports);
  const Outcome outcome =
      feed_parts(longer, {join(kFixedNoZeroes, option(7, go_data(exports[0].name + 'n')))});
  EXPECT_EQ(only_error(outcome, 7).first, ReplyType::kErrTooBig);
  EXPECT_EQ(outcome.state, State::kNegotiating);
}

TEST(Negotiation, SkipsTooMuchDataOfGoAndGoesOn) {
  for (std::uint32_t length : {8193u, 100'000u}) {
    ServerNegotiation negotiation(kExports);
    const Outcome outcome =
        feed_parts(negotiation, {join(kFixedNoZeroes, option(7, zeroes(length))), kAbort});
    const ByteVector all = outcome.output;
    const ByteVector too_big = {0, 0, 0, 7, 0x80, 0, 0, 9};  // to GO: TOO_BIG
    ASSERT_GT(all.size(), 18u + 20u);
    EXPECT_EQ(ByteVector(all.begin() + 26, all.begin() + 34), too_big);
    EXPECT_EQ(outcome.state, State::kFinished);
  }
  // The longest that is looked at: it has 4093 requests, of which none is known.
  ServerNegotiation negotiation(kExports);
  const ByteVector data = join(ByteVector{0, 0, 0, 0, 0x0f, 0xfd}, ByteVector(8186, 0xee));
  ASSERT_EQ(data.size(), ServerNegotiation::kMaxOptionData);
  feed_parts(negotiation, {join(kFixedNoZeroes, option(7, data))});
  EXPECT_EQ(negotiation.state(), State::kTransmission);
}

TEST(Negotiation, SkipsThirtyTwoMebibytesInAllAndNotOneMore) {
  const ByteVector mebibyte = zeroes(1 << 20);
  ServerNegotiation negotiation(kExports);
  negotiation.feed(view(join(kFixedNoZeroes, option(8, {}, (32u << 20) - 5))));
  for (int i = 0; i < 31; ++i) EXPECT_EQ(negotiation.feed(view(mebibyte)), mebibyte.size());
  negotiation.feed(view(mebibyte).subspan(5));
  EXPECT_EQ(negotiation.state(), State::kNegotiating);
  negotiation.feed(view(option(5, text("12345"))));
  EXPECT_EQ(negotiation.state(), State::kNegotiating);
  negotiation.drain_output(negotiation.output().size());
  negotiation.feed(view(option(5, text("1"))));
  ASSERT_EQ(negotiation.state(), State::kFailed);
  EXPECT_EQ(negotiation.failure(), "option STARTTLS with 1 bytes of unwanted data");
  EXPECT_TRUE(negotiation.output().empty());
}

TEST(Negotiation, RefusesAnOptionOfFourGigabytesAtItsHeader) {
  for (std::uint32_t number : {1u, 2u, 3u, 6u, 7u, 8u, 77u}) {
    for (std::uint32_t length : {0xffffffffu, (32u << 20) + 1}) {
      const Outcome outcome = negotiate(join(kFixedNoZeroes, option(number, {}, length)));
      EXPECT_EQ(outcome.state, State::kFailed) << number;
      EXPECT_NE(outcome.failure.find(std::to_string(length)), std::string::npos);
      EXPECT_EQ(outcome.consumed, 20u);
    }
  }
}

TEST(Negotiation, EndsAfter1024Options) {
  ServerNegotiation negotiation(kExports);
  negotiation.feed(view(kFixedNoZeroes));
  for (int i = 0; i < 1024; ++i) {
    EXPECT_EQ(negotiation.feed(view(option(8))), 16u);
    negotiation.drain_output(negotiation.output().size());
    ASSERT_EQ(negotiation.state(), State::kNegotiating) << i;
  }
  negotiation.feed(view(option(8)));
  ASSERT_EQ(negotiation.state(), State::kFailed);
  EXPECT_EQ(negotiation.failure(), "more than 1024 options");
}

TEST(Negotiation, HoldsBackAClientThatDoesNotReadItsReplies) {
  ServerNegotiation negotiation(kExports);
  negotiation.feed(view(kFixedNoZeroes));
  ByteVector spam;
  for (int i = 0; i < 1000; ++i) spam = join(std::move(spam), kList);
  const std::size_t taken = negotiation.feed(view(spam));
  EXPECT_LT(taken, spam.size());
  EXPECT_GE(negotiation.output().size(), ServerNegotiation::kOutputLimit);
  EXPECT_LE(negotiation.output().size(), ServerNegotiation::kMaxOutput);
  EXPECT_EQ(negotiation.feed(view(spam).subspan(taken)), 0u);

  // Reading a little lets it go on a little.
  negotiation.drain_output(4096);
  const std::size_t more = negotiation.feed(view(spam).subspan(taken));
  EXPECT_GT(more, 0u);
  EXPECT_LT(more, 4096u);
  EXPECT_LE(negotiation.output().size(), ServerNegotiation::kMaxOutput);
}

TEST(Negotiation, ListsMoreExportsThanTheOutputMayHold) {
  std::vector<ExportInfo> exports;
  ByteVector expected = kGreeting;
  for (int i = 0; i < 100; ++i) {
    exports.push_back({.name = std::to_string(i) + std::string(2000, 'n'),
                       .description = std::string(2000, 'd')});
    expected = join(std::move(expected),
                    reply(3, ReplyType::kServer,
                          join(be32(static_cast<std::uint32_t>(exports.back().name.size())),
                               text(exports.back().name), text(exports.back().description))));
  }
  expected = join(std::move(expected), reply(3, ReplyType::kAck), kAbortAck);

  // 1000 bytes at a time, so that the output is rarely empty.
  ServerNegotiation negotiation(exports);
  const ByteVector stream = join(kFixedNoZeroes, kList, kAbort);
  std::span<const std::byte> input = view(stream);
  ByteVector output;
  while (negotiation.state() == State::kNegotiating || !negotiation.output().empty()) {
    input = input.subspan(negotiation.feed(input));
    ASSERT_LE(negotiation.output().size(), ServerNegotiation::kMaxOutput);
    const std::size_t count = std::min<std::size_t>(1000, negotiation.output().size());
    ASSERT_GT(count, 0u);
    output = join(std::move(output), copy(negotiation.output().first(count)));
    negotiation.drain_output(count);
  }
  EXPECT_TRUE(output == expected);
  EXPECT_EQ(negotiation.state(), State::kFinished);
}

TEST(CheckExport, RefusesWhatTheProtocolDoesNotAllow) {
  EXPECT_TRUE(check_export({}));
  for (const ExportInfo& info : kExports) EXPECT_TRUE(check_export(info));
  const std::vector<ExportInfo> bad = {
      {.name = std::string(4097, 'x')},
      {.name = std::string("a\0b", 3)},
      {.description = std::string(4097, 'x')},
      {.min_block = 0},
      {.min_block = 3},
      {.min_block = 1 << 17, .preferred_block = 1 << 17},
      {.preferred_block = 256},
      {.preferred_block = 5000},
      {.min_block = 8192, .preferred_block = 4096},
      {.max_payload = 2048},
      {.max_payload = kMaxPayload + 1},
      {.transmission_flags = kTransmissionReadOnly},
      {.transmission_flags = kTransmissionHasFlags | kTransmissionSendDf},
      {.transmission_flags = kTransmissionHasFlags | kTransmissionSendFastZero},
  };
  for (std::size_t i = 0; i < bad.size(); ++i) {
    const Result<void> result = check_export(bad[i]);
    ASSERT_FALSE(result) << i;
    EXPECT_TRUE(result.error().doing().starts_with("export \"")) << result.error().doing();
  }
}

TEST(NegotiationDeathTest, RequiresProperExports) {
  const std::vector<ExportInfo> exports = {{.min_block = 3}};
  EXPECT_DEATH(ServerNegotiation{exports}, "minimum block size");
}

}  // namespace
}  // namespace roost::nbd
