// SPDX-License-Identifier: MIT
#include "roost/nbd/negotiation.h"

#include <gtest/gtest.h>

#include <memory>
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
    {.id = 70, .name = "disk", .size = (1ull << 32) + 512, .transmission_flags = kAllFlags},
    {.id = 80,
     .name = "",
     .size = 0x1122334455667788,
     .transmission_flags = kTransmissionHasFlags | kTransmissionReadOnly,
     .description = "the default"},
    {.id = 90,
     .name = "odd",
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

ServerNegotiation::Exports always(std::span<const ExportInfo> exports) {
  return [set = std::make_shared<const ExportSet>(
              std::vector<ExportInfo>(exports.begin(), exports.end()))] { return set; };
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
Outcome negotiate(const ByteVector& stream, std::span<const ExportInfo> exports = kExports,
                  TlsPolicy tls = TlsPolicy::kUnsupported) {
  ServerNegotiation whole(always(exports), tls);
  const Outcome outcome = feed_parts(whole, {stream});
  std::vector<ByteVector> bytes;
  for (std::uint8_t b : stream) bytes.push_back({b});
  ServerNegotiation bytewise(always(exports), tls);
  EXPECT_EQ(feed_parts(bytewise, bytes), outcome);
  for (std::size_t cut = 0; cut <= stream.size(); ++cut) {
    const auto at = stream.begin() + static_cast<std::ptrdiff_t>(cut);
    ServerNegotiation halves(always(exports), tls);
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
  ServerNegotiation negotiation(always(kExports));
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
  ServerNegotiation negotiation(always(kExports));
  negotiation.feed(view(join(kFixedNoZeroes, kGoDisk)));
  ASSERT_EQ(negotiation.state(), State::kTransmission);
  EXPECT_EQ(negotiation.selection().export_id, 70u);
  EXPECT_EQ(negotiation.selection().transmission_flags, kAllFlags);
  EXPECT_TRUE(negotiation.selection().no_zeroes);
  EXPECT_TRUE(negotiation.selection().block_size_requested);
}

TEST(Negotiation, KnowsThatAClientDidNotAskForBlockSizes) {
  ServerNegotiation negotiation(always(kExports));
  // Asking with INFO does not bind the client; only GO does.
  negotiation.feed(view(join(kFixedOnly, option(6, go_data("disk", {0, 3})),  //
                             option(7, go_data("odd", {0, 0, 0, 1})))));
  ASSERT_EQ(negotiation.state(), State::kTransmission);
  EXPECT_EQ(negotiation.selection().export_id, 90u);
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
  for (std::uint32_t number : {0u, 4u, 5u, 12u, 0xffffffffu}) {
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
  ServerNegotiation longest(always(exports));
  longest.feed(view(join(kFixedNoZeroes, option(1, text(exports[0].name)))));
  EXPECT_EQ(longest.state(), State::kTransmission);

  // Fails at the header already: nobody has to send the name.
  const Outcome longer = negotiate(join(kFixedNoZeroes, option(1, {}, 4097)), exports);
  EXPECT_EQ(longer.state, State::kFailed);
  EXPECT_EQ(longer.failure, "an export name of 4097 bytes");
}

TEST(Negotiation, TakesANameOf4096BytesWithGoAndNotOneMore) {
  const std::vector<ExportInfo> exports = {{.name = std::string(4096, 'n'), .size = 1}};
  ServerNegotiation longest(always(exports));
  longest.feed(view(join(kFixedNoZeroes, option(7, go_data(exports[0].name)))));
  EXPECT_EQ(longest.state(), State::kTransmission);

  ServerNegotiation longer(always(exports));
  const Outcome outcome =
      feed_parts(longer, {join(kFixedNoZeroes, option(7, go_data(exports[0].name + 'n')))});
  EXPECT_EQ(only_error(outcome, 7).first, ReplyType::kErrTooBig);
  EXPECT_EQ(outcome.state, State::kNegotiating);
}

TEST(Negotiation, SkipsTooMuchDataOfGoAndGoesOn) {
  for (std::uint32_t length : {8193u, 100'000u}) {
    ServerNegotiation negotiation(always(kExports));
    const Outcome outcome =
        feed_parts(negotiation, {join(kFixedNoZeroes, option(7, zeroes(length))), kAbort});
    const ByteVector all = outcome.output;
    const ByteVector too_big = {0, 0, 0, 7, 0x80, 0, 0, 9};  // to GO: TOO_BIG
    ASSERT_GT(all.size(), 18u + 20u);
    EXPECT_EQ(ByteVector(all.begin() + 26, all.begin() + 34), too_big);
    EXPECT_EQ(outcome.state, State::kFinished);
  }
  // The longest that is looked at: it has 4093 requests, of which none is known.
  ServerNegotiation negotiation(always(kExports));
  const ByteVector data = join(ByteVector{0, 0, 0, 0, 0x0f, 0xfd}, ByteVector(8186, 0xee));
  ASSERT_EQ(data.size(), ServerNegotiation::kMaxOptionData);
  feed_parts(negotiation, {join(kFixedNoZeroes, option(7, data))});
  EXPECT_EQ(negotiation.state(), State::kTransmission);
}

TEST(Negotiation, SkipsThirtyTwoMebibytesInAllAndNotOneMore) {
  const ByteVector mebibyte = zeroes(1 << 20);
  ServerNegotiation negotiation(always(kExports));
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
  ServerNegotiation negotiation(always(kExports));
  negotiation.feed(view(kFixedNoZeroes));
  for (int i = 0; i < 1024; ++i) {
    EXPECT_EQ(negotiation.feed(view(option(77))), 16u);
    negotiation.drain_output(negotiation.output().size());
    ASSERT_EQ(negotiation.state(), State::kNegotiating) << i;
  }
  negotiation.feed(view(option(77)));
  ASSERT_EQ(negotiation.state(), State::kFailed);
  EXPECT_EQ(negotiation.failure(), "more than 1024 options");
}

TEST(Negotiation, HoldsBackAClientThatDoesNotReadItsReplies) {
  ServerNegotiation negotiation(always(kExports));
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
  ServerNegotiation negotiation(always(exports));
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

// ---- structured replies, extended headers ----

const ByteVector kStructured = {
    'I',  'H',  'A',  'V',  'E', 'O', 'P', 'T',  //
    0x00, 0x00, 0x00, 0x08,                      // STRUCTURED_REPLY
    0x00, 0x00, 0x00, 0x00,                      // no data
};
const ByteVector kExtended = {
    'I',  'H',  'A',  'V',  'E', 'O', 'P', 'T',  //
    0x00, 0x00, 0x00, 0x0b,                      // EXTENDED_HEADERS
    0x00, 0x00, 0x00, 0x00,                      // no data
};
const ByteVector kExtendedAck = {
    0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9,  // magic of option replies
    0x00, 0x00, 0x00, 0x0b,                          // to EXTENDED_HEADERS
    0x00, 0x00, 0x00, 0x01,                          // ACK
    0x00, 0x00, 0x00, 0x00,                          //
};

/// SET_META_CONTEXT for the export "disk", asking for base:allocation.
const ByteVector kSetAllocation = {
    'I',  'H',  'A',  'V',  'E', 'O', 'P', 'T',  //
    0x00, 0x00, 0x00, 0x0a,                      // SET_META_CONTEXT
    0x00, 0x00, 0x00, 0x1f,                      // 31 bytes of data
    0x00, 0x00, 0x00, 0x04,                      // length of the name
    'd',  'i',  's',  'k',                       //
    0x00, 0x00, 0x00, 0x01,                      // one query
    0x00, 0x00, 0x00, 0x0f,                      // of 15 bytes
    'b',  'a',  's',  'e',  ':', 'a', 'l', 'l', 'o', 'c', 'a', 't', 'i', 'o', 'n',
};
const ByteVector kSetAllocationReply = {
    0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9,  // magic of option replies
    0x00, 0x00, 0x00, 0x0a,                          // to SET_META_CONTEXT
    0x00, 0x00, 0x00, 0x04,                          // META_CONTEXT
    0x00, 0x00, 0x00, 0x13,                          // 19 bytes
    0x00, 0x00, 0x00, 0x01,                          // the context's number
    'b',  'a',  's',  'e',  ':',  'a',  'l',  'l',  'o',  'c',  'a',  't',
    'i',  'o',  'n',  0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9,  //
    0x00, 0x00, 0x00, 0x0a,                                            // to SET_META_CONTEXT
    0x00, 0x00, 0x00, 0x01,                                            // ACK
    0x00, 0x00, 0x00, 0x00,                                            //
};

ByteVector meta_data(const std::string& name, const std::vector<std::string>& queries) {
  ByteVector data = join(be32(static_cast<std::uint32_t>(name.size())), text(name),
                         be32(static_cast<std::uint32_t>(queries.size())));
  for (const std::string& query : queries) {
    data = join(std::move(data), be32(static_cast<std::uint32_t>(query.size())), text(query));
  }
  return data;
}

/// What the stream selects. It has to get as far as transmission.
ServerNegotiation::Selection selected(const ByteVector& stream,
                                      std::span<const ExportInfo> exports = kExports) {
  ServerNegotiation negotiation(always(exports));
  feed_parts(negotiation, {stream});
  EXPECT_EQ(negotiation.state(), State::kTransmission);
  return negotiation.state() == State::kTransmission ? negotiation.selection()
                                                     : ServerNegotiation::Selection();
}

TEST(Negotiation, AgreesOnHowToReply) {
  EXPECT_EQ(selected(join(kFixedNoZeroes, kGoDisk)).reply_style, ReplyStyle::kSimple);
  EXPECT_EQ(selected(join(kFixedNoZeroes, kStructured, kGoDisk)).reply_style,
            ReplyStyle::kStructured);
  EXPECT_EQ(selected(join(kFixedNoZeroes, kExtended, kGoDisk)).reply_style, ReplyStyle::kExtended);
  const ByteVector both = join(kFixedNoZeroes, kStructured, kExtended, kGoDisk);
  EXPECT_EQ(selected(both).reply_style, ReplyStyle::kExtended);
  EXPECT_EQ(replies(negotiate(both)), join(reply(8, ReplyType::kAck), kExtendedAck, kGoDiskReply));
}

TEST(Negotiation, DoesNotGoBackFromExtendedHeadersToStructuredReplies) {
  const ByteVector stream = join(kFixedNoZeroes, kExtended, kStructured, kGoDisk);
  const ByteVector all = replies(negotiate(stream));
  EXPECT_EQ(ByteVector(all.begin(), all.begin() + 20), kExtendedAck);
  EXPECT_EQ(ByteVector(all.begin() + 28, all.begin() + 36),
            (ByteVector{0, 0, 0, 8, 0x80, 0, 0, 0x0a}));  // to STRUCTURED_REPLY: EXT_HEADER_REQD
  EXPECT_EQ(selected(stream).reply_style, ReplyStyle::kExtended);
}

TEST(Negotiation, RefusesReplyStylesWithData) {
  for (std::uint32_t number : {8u, 11u}) {
    const ByteVector stream = join(kFixedNoZeroes, option(number, text("x")));
    EXPECT_EQ(only_error(negotiate(stream), number).first, ReplyType::kErrInvalid);
    EXPECT_EQ(selected(join(stream, kGoDisk)).reply_style, ReplyStyle::kSimple);
  }
}

TEST(Negotiation, ClosesOnExportNameAfterExtendedHeaders) {
  const Outcome outcome = negotiate(join(kFixedNoZeroes, kExtended, option(1, text("disk"))));
  EXPECT_EQ(replies(outcome), kExtendedAck);
  EXPECT_EQ(outcome.state, State::kFailed);
  EXPECT_EQ(outcome.failure, "EXPORT_NAME after EXTENDED_HEADERS");
  EXPECT_EQ(selected(join(kFixedNoZeroes, kStructured, option(1, text("disk")))).reply_style,
            ReplyStyle::kStructured);
}

TEST(Negotiation, ShowsFlagsOnlyToClientsThatCanUseThem) {
  std::vector<ExportInfo> exports = kExports;
  exports[0].transmission_flags |= kTransmissionSendDf | kTransmissionBlockStatusPayload;
  const auto flags = [&](const ByteVector& options) {
    const auto stream = join(kFixedNoZeroes, options, kGoDisk);
    const ByteVector output = negotiate(stream, exports).output;
    const std::uint16_t got = selected(stream, exports).transmission_flags;
    // The EXPORT reply is the first of the last three: 32, 34 and 20 bytes.
    const std::size_t at = output.size() - 20 - 34 - 2;
    EXPECT_EQ(output[at] << 8 | output[at + 1], got);
    return got & (kTransmissionSendDf | kTransmissionBlockStatusPayload);
  };
  constexpr int kBoth = kTransmissionSendDf | kTransmissionBlockStatusPayload;
  EXPECT_EQ(flags({}), 0);
  EXPECT_EQ(flags(kStructured), kTransmissionSendDf);
  EXPECT_EQ(flags(join(kStructured, kSetAllocation)), kTransmissionSendDf);
  EXPECT_EQ(flags(kExtended), kTransmissionSendDf);
  EXPECT_EQ(flags(join(kExtended, kSetAllocation)), kBoth);
  EXPECT_EQ(flags(join(kStructured, kSetAllocation, kExtended)), kBoth);
}

// ---- metadata contexts ----

TEST(Negotiation, SetsTheContextOfAnExport) {
  for (const ByteVector& style : {kStructured, kExtended}) {
    const ByteVector stream = join(kFixedNoZeroes, style, kSetAllocation, kGoDisk);
    const ByteVector all = replies(negotiate(stream));
    EXPECT_EQ(ByteVector(all.begin() + 20, all.end()), join(kSetAllocationReply, kGoDiskReply));
    EXPECT_TRUE(selected(stream).base_allocation);
  }
  EXPECT_FALSE(selected(join(kFixedNoZeroes, kStructured, kGoDisk)).base_allocation);
  EXPECT_TRUE(selected(join(kFixedNoZeroes, kStructured, kSetAllocation, option(1, text("disk"))))
                  .base_allocation);
}

TEST(Negotiation, ForgetsTheContextWithAnotherExportOrALaterSet) {
  const ByteVector set = join(kFixedNoZeroes, kStructured, kSetAllocation);
  EXPECT_FALSE(selected(join(set, option(7, go_data("odd")))).base_allocation);
  // What is only looked at, or listed, changes nothing.
  EXPECT_TRUE(selected(join(set, option(6, go_data("odd")), option(9, meta_data("odd", {})),
                            option(7, go_data("nope")), kGoDisk))
                  .base_allocation);
  const std::vector<ByteVector> later = {
      option(10, meta_data("disk", {})),                               // selects nothing
      option(10, meta_data("disk", {"base:"})),                        // no wildcard here
      option(10, meta_data("disk", {"base:other", "qemu:x"})),         // unknown ones
      option(10, meta_data("odd", {"base:allocation"})),               // for another export
      option(10, meta_data("nope", {"base:allocation"})),              // fails: no such export
      option(10, meta_data("disk", {"base"})),                         // fails: no colon
      option(10, text("xyz")),                                         // fails: malformed
      option(10, zeroes(8193)),                                        // fails: too long
      option(10, meta_data("disk", {"a:" + std::string(4095, 'x')})),  // fails: likewise
  };
  for (const ByteVector& options : later) {
    EXPECT_FALSE(selected(join(set, options, kGoDisk)).base_allocation);
    EXPECT_TRUE(selected(join(set, options, kSetAllocation, kGoDisk)).base_allocation);
  }
}

TEST(Negotiation, KnowsAnExportByItsIdNotItsName) {
  // Between two options "disk" goes, and another one of the same name comes.
  std::vector<ExportInfo> exports = kExports;
  auto set = std::make_shared<const ExportSet>(exports);
  ServerNegotiation negotiation([&] { return set; });
  negotiation.feed(view(join(kFixedNoZeroes, kStructured, kSetAllocation)));
  exports[0].id = 71;
  set = std::make_shared<const ExportSet>(exports);
  negotiation.feed(view(kGoDisk));
  ASSERT_EQ(negotiation.state(), State::kTransmission);
  EXPECT_EQ(negotiation.selection().export_id, 71u);
  EXPECT_FALSE(negotiation.selection().base_allocation);
}

TEST(Negotiation, ListsTheExportsThereWereWhenItWasAsked) {
  std::vector<ExportInfo> exports;
  for (int i = 0; i < 100; ++i) {
    exports.push_back({.name = std::to_string(i), .description = std::string(4000, 'd')});
  }
  auto set = std::make_shared<const ExportSet>(exports);
  ServerNegotiation negotiation([&] { return set; });
  negotiation.feed(view(join(kFixedNoZeroes, kList)));
  set = std::make_shared<const ExportSet>();
  std::size_t size = 0;
  while (!negotiation.output().empty()) {
    size += negotiation.output().size();
    negotiation.drain_output(negotiation.output().size());
    negotiation.feed({});
  }
  EXPECT_GT(size, 100u * 4000);
  negotiation.feed(view(kList));
  EXPECT_EQ(copy(negotiation.output()), reply(3, ReplyType::kAck));
}

TEST(Negotiation, ListsContexts) {
  const ByteVector allocation = join(be32(0), text("base:allocation"));
  const auto listed = [](const std::string& name, const std::vector<std::string>& queries) {
    const ByteVector all =
        replies(negotiate(join(kFixedNoZeroes, kStructured, option(9, meta_data(name, queries)))));
    return ByteVector(all.begin() + 20, all.end());
  };
  const ByteVector found =
      join(reply(9, ReplyType::kMetaContext, allocation), reply(9, ReplyType::kAck));
  EXPECT_EQ(listed("disk", {}), found);
  EXPECT_EQ(listed("", {"base:"}), found);
  EXPECT_EQ(listed("disk", {"x-mine:y", "base:allocation", "base:"}), found);
  EXPECT_EQ(listed("disk", {"base:alloc", "base:allocation2", "qemu:"}), reply(9, ReplyType::kAck));
}

TEST(Negotiation, RefusesMetadataOptionsWithoutChunksToAnswerThemIn) {
  for (std::uint32_t number : {9u, 10u}) {
    const Outcome outcome =
        negotiate(join(kFixedNoZeroes, option(number, meta_data("disk", {"base:allocation"}))));
    EXPECT_EQ(only_error(outcome, number).first, ReplyType::kErrInvalid);
  }
}

TEST(Negotiation, RefusesMalformedMetadataOptions) {
  const std::vector<std::pair<ByteVector, ReplyType>> bad = {
      {{}, ReplyType::kErrInvalid},
      {{0, 0, 0}, ReplyType::kErrInvalid},
      {{0, 0, 0, 0}, ReplyType::kErrInvalid},              // no number of queries
      {{0, 0, 0, 1, 0, 0, 0, 0}, ReplyType::kErrInvalid},  // the name ate a part of it
      {{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0}, ReplyType::kErrInvalid},
      {{0, 0, 0, 0, 0, 0, 0, 1}, ReplyType::kErrInvalid},  // the query is missing
      {{0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff}, ReplyType::kErrInvalid},
      {{0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, ':'}, ReplyType::kErrInvalid},
      {{0, 0, 0, 0, 0, 0, 0, 0, 0}, ReplyType::kErrInvalid},  // a byte too many
      {meta_data("disk", {"base:allocation", "allocation"}), ReplyType::kErrInvalid},
      {meta_data("disk", {""}), ReplyType::kErrInvalid},
      {meta_data("nope", {"base:allocation"}), ReplyType::kErrUnknown},
      {meta_data(std::string(4097, 'n'), {}), ReplyType::kErrTooBig},
      {meta_data("disk", {"a:" + std::string(4095, 'x')}), ReplyType::kErrTooBig},
      {zeroes(8193), ReplyType::kErrTooBig},
  };
  for (std::uint32_t number : {9u, 10u}) {
    for (std::size_t i = 0; i < bad.size(); ++i) {
      ServerNegotiation negotiation(always(kExports));
      const Outcome outcome = feed_parts(
          negotiation, {join(kFixedNoZeroes, kStructured), option(number, bad[i].first)});
      const ByteVector all = replies(outcome);
      ASSERT_GT(all.size(), 40u);
      EXPECT_EQ(ByteVector(all.begin() + 28, all.begin() + 36),
                join(be32(number), be32(static_cast<std::uint32_t>(bad[i].second))))
          << i;
      EXPECT_EQ(outcome.state, State::kNegotiating);
    }
  }
}

// ---- TLS ----

const ByteVector kStartTls = {
    'I',  'H',  'A',  'V',  'E', 'O', 'P', 'T',  //
    0x00, 0x00, 0x00, 0x05,                      // STARTTLS
    0x00, 0x00, 0x00, 0x00,                      // no data
};
const ByteVector kStartTlsAck = {
    0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9,  // magic of option replies
    0x00, 0x00, 0x00, 0x05,                          // to STARTTLS
    0x00, 0x00, 0x00, 0x01,                          // ACK
    0x00, 0x00, 0x00, 0x00,                          //
};

TEST(Tls, IsRefusedAsThePolicySays) {
  const ByteVector stream = join(kFixedNoZeroes, kStartTls);
  EXPECT_EQ(only_error(negotiate(stream), 5).first, ReplyType::kErrUnsup);
  EXPECT_EQ(only_error(negotiate(stream, kExports, TlsPolicy::kForbidden), 5).first,
            ReplyType::kErrPolicy);
}

TEST(Tls, StartsBehindTheAcknowledgement) {
  for (TlsPolicy policy : {TlsPolicy::kAllowed, TlsPolicy::kRequired}) {
    const Outcome outcome = negotiate(join(kFixedNoZeroes, kStartTls), kExports, policy);
    EXPECT_EQ(replies(outcome), kStartTlsAck);
    EXPECT_EQ(outcome.state, State::kStartTls);
    const ByteVector with_data = join(kFixedNoZeroes, option(5, text("x")));
    EXPECT_EQ(only_error(negotiate(with_data, kExports, policy), 5).first, ReplyType::kErrInvalid);
  }
}

TEST(Tls, TakesNoPlainTextBehindItsStart) {
  for (const ByteVector& behind : {ByteVector{0x16}, kGoDisk}) {
    ServerNegotiation negotiation(always(kExports), TlsPolicy::kAllowed);
    const ByteVector stream = join(kFixedNoZeroes, kStartTls, behind);
    EXPECT_EQ(negotiation.feed(view(stream)), 20u);
    ASSERT_EQ(negotiation.state(), State::kFailed);
    EXPECT_EQ(negotiation.failure(), "plain text behind STARTTLS");
  }
  // Nor with a later call.
  ServerNegotiation negotiation(always(kExports), TlsPolicy::kAllowed);
  negotiation.feed(view(join(kFixedNoZeroes, kStartTls)));
  EXPECT_EQ(negotiation.feed(view(kGoDisk)), 0u);
  EXPECT_EQ(negotiation.state(), State::kFailed);
}

TEST(Tls, ForgetsWhatWasSaidBeforeIt) {
  ServerNegotiation negotiation(always(kExports), TlsPolicy::kAllowed);
  feed_parts(negotiation, {join(kFixedNoZeroes, kExtended, kSetAllocation, kStartTls)});
  ASSERT_EQ(negotiation.state(), State::kStartTls);
  EXPECT_FALSE(negotiation.encrypted());
  negotiation.tls_started();
  EXPECT_TRUE(negotiation.encrypted());
  // A second STARTTLS is invalid; structured replies may be asked for, as if for the first time.
  const Outcome outcome = feed_parts(negotiation, {join(kStructured, kStartTls, kGoDisk)});
  EXPECT_EQ(ByteVector(outcome.output.begin(), outcome.output.begin() + 20),
            reply(8, ReplyType::kAck));
  EXPECT_EQ(ByteVector(outcome.output.begin() + 28, outcome.output.begin() + 36),
            (ByteVector{0, 0, 0, 5, 0x80, 0, 0, 3}));  // to STARTTLS: INVALID
  ASSERT_EQ(negotiation.state(), State::kTransmission);
  EXPECT_EQ(negotiation.selection().reply_style, ReplyStyle::kStructured);
  EXPECT_FALSE(negotiation.selection().base_allocation);
  EXPECT_TRUE(negotiation.selection().no_zeroes);  // the client flags are not sent again
}

TEST(Tls, IsRequiredForEverythingButItsStartAndAbort) {
  for (std::uint32_t number : {3u, 4u, 6u, 7u, 8u, 9u, 10u, 11u, 77u}) {
    for (const ByteVector& data : {ByteVector{}, go_data("disk")}) {
      const Outcome outcome =
          negotiate(join(kFixedNoZeroes, option(number, data)), kExports, TlsPolicy::kRequired);
      EXPECT_EQ(only_error(outcome, number).first, ReplyType::kErrTlsReqd);
      EXPECT_EQ(outcome.state, State::kNegotiating);
    }
  }
  EXPECT_EQ(replies(negotiate(join(kFixedNoZeroes, kAbort), kExports, TlsPolicy::kRequired)),
            kAbortAck);
  for (const char* name : {"disk", "nope"}) {
    const Outcome outcome =
        negotiate(join(kFixedNoZeroes, option(1, text(name))), kExports, TlsPolicy::kRequired);
    EXPECT_EQ(outcome.output, kGreeting);
    EXPECT_EQ(outcome.state, State::kFailed);
    EXPECT_EQ(outcome.failure, "EXPORT_NAME without TLS");
  }
  ServerNegotiation negotiation(always(kExports), TlsPolicy::kRequired);
  feed_parts(negotiation, {join(kFixedNoZeroes, kStartTls)});
  negotiation.tls_started();
  EXPECT_EQ(feed_parts(negotiation, {kGoDisk}).output, kGoDiskReply);
}

TEST(TlsDeathTest, StartsOnlyWhenAskedForAndAnswered) {
  ServerNegotiation negotiation(always(kExports), TlsPolicy::kAllowed);
  EXPECT_DEATH(negotiation.tls_started(), "TLS was not asked for");
  negotiation.feed(view(join(kFixedNoZeroes, kStartTls)));
  EXPECT_DEATH(negotiation.tls_started(), "38 bytes were to be sent before TLS");
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
      {.transmission_flags =
           kTransmissionHasFlags | kTransmissionReadOnly | kTransmissionSendResize},
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
  EXPECT_DEATH(ExportSet{exports}, "minimum block size");
}

}  // namespace
}  // namespace roost::nbd
