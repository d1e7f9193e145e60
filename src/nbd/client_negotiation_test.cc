// SPDX-License-Identifier: MIT
#include "roost/nbd/client_negotiation.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <optional>
#include <utility>

#include "nbd/test_bytes.h"

namespace roost::nbd {
namespace {

using State = ClientNegotiation::State;
using Mode = ClientWishes::Mode;
using Tls = ClientWishes::Tls;

const ByteVector kGreeting = join(text("NBDMAGICIHAVEOPT"), ByteVector{0, 3});

ByteVector option(std::uint32_t number, const ByteVector& data = {}) {
  return join(text("IHAVEOPT"), be32(number), be32(static_cast<std::uint32_t>(data.size())), data);
}

ByteVector reply(std::uint32_t option_number, std::uint32_t type, const ByteVector& data = {}) {
  return join(ByteVector{0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9}, be32(option_number),
              be32(type), be32(static_cast<std::uint32_t>(data.size())), data);
}

constexpr std::uint32_t kUnsup = 0x80000001;
constexpr std::uint32_t kPolicy = 0x80000002;
constexpr std::uint32_t kTlsReqd = 0x80000005;
constexpr std::uint32_t kUnknown = 0x80000006;
constexpr std::uint32_t kShutdown = 0x80000007;

// "disk", and the information requests NAME, DESCRIPTION, BLOCK_SIZE.
const ByteVector kGoData = {0, 0, 0, 4, 'd', 'i', 's', 'k', 0, 3, 0, 1, 0, 2, 0, 3};
const ByteVector kExportInfo = {
    0x00, 0x00,                                      // NBD_INFO_EXPORT
    0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x00, 0x00,  // 1 MiB
    0x00, 0x8d,                                      // HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_DF
};
const ByteVector kBlockSizes = {0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 0, 64, 0, 0};
const ByteVector kContextsData =
    join(be32(4), text("disk"), be32(1), be32(15), text("base:allocation"));
const ByteVector kContext = join(be32(7), text("base:allocation"));

/// A step of a conversation: what the server sends, and what the client has to say to it.
struct Turn {
  ByteVector server;
  ByteVector client;
};

ByteVector drain(ClientNegotiation& negotiation) {
  const ByteVector sent = copy(negotiation.output());
  negotiation.drain_output(negotiation.output().size());
  return sent;
}

/// The client hears each turn at once, or byte by byte.
void converse(ClientNegotiation& negotiation, const std::vector<Turn>& turns,
              bool by_byte = false) {
  for (std::size_t i = 0; i < turns.size(); ++i) {
    SCOPED_TRACE(i);
    ASSERT_EQ(negotiation.state(), State::kNegotiating);
    std::span<const std::byte> input = view(turns[i].server);
    while (!input.empty()) {
      const std::size_t size = by_byte ? 1 : input.size();
      ASSERT_EQ(negotiation.feed(input.first(size)), size);
      input = input.subspan(size);
    }
    ASSERT_EQ(drain(negotiation), turns[i].client);
    if (negotiation.state() == State::kStartTls) negotiation.tls_started();
    if (negotiation.state() == State::kNegotiating && !negotiation.output().empty()) {
      ASSERT_LT(++i, turns.size());
      ASSERT_EQ(drain(negotiation), turns[i].client);
      ASSERT_TRUE(turns[i].server.empty());
    }
  }
}

/// What becomes of a server that says this to the wish for "disk", after the greeting.
std::pair<int, std::string> failure_after(const ByteVector& server,
                                          ClientWishes wishes = {.export_name = "disk",
                                                                 .structured_replies = false,
                                                                 .extended_headers = false}) {
  ClientNegotiation negotiation(std::move(wishes));
  const ByteVector all = join(kGreeting, server);
  negotiation.feed(view(all));
  if (negotiation.state() != State::kFailed) return {0, "has not failed"};
  return {negotiation.failure().code(), negotiation.failure().doing()};
}

using Failure = std::pair<int, std::string>;

TEST(ClientNegotiation, GetsAllItWishesFor) {
  const std::vector<Turn> turns = {
      {kGreeting, join(be32(3), option(5))},
      {reply(5, 1), {}},
      {{}, option(11)},
      {reply(11, 1), option(10, kContextsData)},
      {join(reply(10, 4, kContext), reply(10, 1)), option(7, kGoData)},
      {join(reply(7, 3, kExportInfo), reply(7, 3, kBlockSizes),
            reply(7, 3, join({0, 1}, text("the disk"))), reply(7, 3, join({0, 2}, text("of mine"))),
            reply(7, 3, {0, 99, 1}), reply(7, 1)),
       {}},
  };
  for (const bool by_byte : {false, true}) {
    ClientNegotiation negotiation(
        {.export_name = "disk", .tls = Tls::kRequired, .meta_contexts = {"base:allocation"}});
    converse(negotiation, turns, by_byte);
    ASSERT_EQ(negotiation.state(), State::kTransmission);
    const ClientNegotiation::Outcome& outcome = negotiation.outcome();
    EXPECT_EQ(outcome.size, 1u << 20);
    EXPECT_EQ(outcome.transmission_flags, 0x8d);
    EXPECT_TRUE(outcome.block_sizes_known);
    EXPECT_EQ(outcome.min_block, 512u);
    EXPECT_EQ(outcome.preferred_block, 4096u);
    EXPECT_EQ(outcome.max_payload, 4u << 20);
    EXPECT_EQ(outcome.canonical_name, "the disk");
    EXPECT_EQ(outcome.description, "of mine");
    EXPECT_EQ(outcome.headers, ReplyStyle::kExtended);
    EXPECT_TRUE(outcome.tls);
    EXPECT_EQ(outcome.contexts, (std::vector<MetaContext>{{7, "base:allocation"}}));
  }
}

TEST(ClientNegotiation, MakesDoWithoutTheOptionsTheServerDoesNotKnow) {
  ClientNegotiation negotiation(
      {.export_name = "disk", .tls = Tls::kAllowed, .meta_contexts = {"base:allocation"}});
  converse(negotiation, {
                            {kGreeting, join(be32(3), option(5))},
                            {reply(5, kUnsup, text("what?")), option(11)},
                            {reply(11, kUnsup), option(8)},
                            {reply(8, kUnsup), option(7, kGoData)},
                            {reply(7, kUnsup), option(1, text("disk"))},
                            {join(be64(1 << 20), ByteVector{0x00, 0x8d}), {}},
                        });
  ASSERT_EQ(negotiation.state(), State::kTransmission);
  EXPECT_EQ(negotiation.outcome().size, 1u << 20);
  // Not SEND_DF, which needs structured replies.
  EXPECT_EQ(negotiation.outcome().transmission_flags, 0x0d);
  EXPECT_FALSE(negotiation.outcome().block_sizes_known);
  EXPECT_EQ(negotiation.outcome().min_block, 1u);
  EXPECT_EQ(negotiation.outcome().canonical_name, "disk");
  EXPECT_EQ(negotiation.outcome().headers, ReplyStyle::kSimple);
  EXPECT_FALSE(negotiation.outcome().tls);
  EXPECT_TRUE(negotiation.outcome().contexts.empty());
}

TEST(ClientNegotiation, TakesStructuredRepliesWhereThereAreNoExtendedHeaders) {
  ClientNegotiation negotiation({.export_name = "disk", .meta_contexts = {"base:allocation"}});
  converse(negotiation, {
                            {kGreeting, join(be32(3), option(11))},
                            {reply(11, kPolicy), option(8)},
                            {reply(8, 1), option(10, kContextsData)},
                            // What comes before an error does not count.
                            {join(reply(10, 4, kContext), reply(10, kUnknown)), option(7, kGoData)},
                            {join(reply(7, 3, kExportInfo), reply(7, 1)), {}},
                        });
  ASSERT_EQ(negotiation.state(), State::kTransmission);
  EXPECT_EQ(negotiation.outcome().headers, ReplyStyle::kStructured);
  EXPECT_EQ(negotiation.outcome().transmission_flags, 0x8d);
  EXPECT_TRUE(negotiation.outcome().contexts.empty());
}

TEST(ClientNegotiation, LeavesOutWhatNobodyWants) {
  ClientNegotiation negotiation({.export_name = "disk",
                                 .structured_replies = false,
                                 .extended_headers = false,
                                 .meta_contexts = {"base:allocation"}});
  converse(negotiation, {
                            {kGreeting, join(be32(3), option(7, kGoData))},
                            {join(reply(7, 3, kExportInfo), reply(7, 1)), {}},
                        });
  EXPECT_EQ(negotiation.state(), State::kTransmission);

  ClientNegotiation without_fallback(
      {.export_name = "disk", .structured_replies = false, .extended_headers = true});
  converse(without_fallback, {
                                 {kGreeting, join(be32(3), option(11))},
                                 {reply(11, kUnsup), option(7, kGoData)},
                             });
}

TEST(ClientNegotiation, LeavesTheFirstReplyToTransmission) {
  ClientNegotiation negotiation(
      {.export_name = "disk", .structured_replies = false, .extended_headers = false});
  const ByteVector handshake = join(kGreeting, reply(7, 3, kExportInfo), reply(7, 1));
  const ByteVector all = join(handshake, text("gD"));
  EXPECT_EQ(negotiation.feed(view(all)), handshake.size());
  EXPECT_EQ(negotiation.state(), State::kTransmission);
  EXPECT_EQ(negotiation.feed(view(all)), 0u);
}

TEST(ClientNegotiation, SpeaksNewstyleThatIsNotFixed) {
  for (const bool no_zeroes : {false, true}) {
    ClientNegotiation negotiation({.export_name = "disk", .tls = Tls::kAllowed});
    const std::uint8_t flags = no_zeroes ? 2 : 0;
    ByteVector answer = join(be64(4096), ByteVector{0x00, 0x03});
    if (!no_zeroes) answer = join(answer, zeroes(124));
    converse(negotiation, {
                              {join(text("NBDMAGICIHAVEOPT"), ByteVector{0, flags}),
                               join(be32(flags), option(1, text("disk")))},
                              {answer, {}},
                          });
    ASSERT_EQ(negotiation.state(), State::kTransmission);
    EXPECT_EQ(negotiation.outcome().size, 4096u);
    EXPECT_EQ(negotiation.outcome().transmission_flags, 3);
  }
}

TEST(ClientNegotiation, IgnoresHandshakeFlagsItDoesNotKnow) {
  ClientNegotiation negotiation({.extended_headers = false});
  converse(negotiation,
           {{join(text("NBDMAGICIHAVEOPT"), ByteVector{0xff, 0xff}), join(be32(3), option(8))}});
}

const ByteVector kOldstyle =
    join(text("NBDMAGIC"), ByteVector{0x00, 0x00, 0x42, 0x02, 0x81, 0x86, 0x12, 0x53}, be64(512),
         be32(0x00030003), zeroes(124));

TEST(ClientNegotiation, SpeaksOldstyle) {
  ClientNegotiation negotiation({.tls = Tls::kAllowed});
  converse(negotiation, {{kOldstyle, {}}});
  ASSERT_EQ(negotiation.state(), State::kTransmission);
  EXPECT_EQ(negotiation.outcome().size, 512u);
  EXPECT_EQ(negotiation.outcome().transmission_flags, 3);
}

TEST(ClientNegotiation, KnowsWhatOldServersCannotDo) {
  const auto old = [](const ByteVector& greeting, ClientWishes wishes) {
    ClientNegotiation negotiation(std::move(wishes));
    negotiation.feed(view(greeting));
    EXPECT_TRUE(negotiation.output().empty());
    return negotiation.state() == State::kFailed ? negotiation.failure().doing() : "";
  };
  const ByteVector not_fixed = join(text("NBDMAGICIHAVEOPT"), ByteVector{0, 0});
  EXPECT_EQ(old(kOldstyle, {.tls = Tls::kRequired}),
            "TLS is required, and the server is of the old style, without TLS");
  EXPECT_EQ(old(not_fixed, {.tls = Tls::kRequired}),
            "TLS is required, and the server does not know options");
  EXPECT_EQ(old(kOldstyle, {.mode = Mode::kList}),
            "the server is of the old style: it cannot list");
  EXPECT_EQ(old(not_fixed, {.mode = Mode::kListMetaContexts}),
            "the server does not know options: it cannot list");
  EXPECT_EQ(old(kOldstyle, {.export_name = "disk"}),
            "the server is of the old style: it has no export \"disk\"");
}

TEST(ClientNegotiation, CountsFlagsWithoutHasFlagsAsNone) {
  ClientNegotiation negotiation({});
  converse(negotiation,
           {
               {join(text("NBDMAGICIHAVEOPT"), ByteVector{0, 2}), join(be32(2), option(1))},
               {join(be64(4096), ByteVector{0xff, 0xfe}), {}},
           });
  ASSERT_EQ(negotiation.state(), State::kTransmission);
  EXPECT_EQ(negotiation.outcome().transmission_flags, 1);
}

TEST(ClientNegotiation, DropsFlagsThatNeedWhatWasNotNegotiated) {
  ClientNegotiation negotiation({.structured_replies = false, .extended_headers = false});
  ByteVector info = kExportInfo;
  info[10] = 0x18;  // SEND_FAST_ZERO, BLOCK_STATUS_PAYLOAD
  negotiation.feed(view(join(kGreeting, reply(7, 3, info), reply(7, 1))));
  ASSERT_EQ(negotiation.state(), State::kTransmission);
  EXPECT_EQ(negotiation.outcome().transmission_flags, 0x0d);
}

TEST(ClientNegotiation, AsksForInformationOnly) {
  ClientNegotiation negotiation({.export_name = "disk", .mode = Mode::kInfo});
  converse(negotiation, {
                            {kGreeting, join(be32(3), option(11))},
                            {reply(11, 1), option(6, kGoData)},
                            {join(reply(6, 3, kExportInfo), reply(6, 1)), option(2)},
                        });
  ASSERT_EQ(negotiation.state(), State::kFinished);
  EXPECT_EQ(negotiation.outcome().size, 1u << 20);
}

TEST(ClientNegotiation, AsksOldServersForInformationByUsingTheExport) {
  ClientNegotiation negotiation({.export_name = "disk", .mode = Mode::kInfo});
  converse(negotiation, {
                            {kGreeting, join(be32(3), option(11))},
                            {reply(11, kUnsup), option(8)},
                            {reply(8, 1), option(6, kGoData)},
                            {reply(6, kUnsup), option(1, text("disk"))},
                            {join(be64(77), ByteVector{0x00, 0x81}), {}},
                        });
  ASSERT_EQ(negotiation.state(), State::kTransmission);
  EXPECT_EQ(negotiation.outcome().size, 77u);
  EXPECT_EQ(negotiation.outcome().headers, ReplyStyle::kStructured);
  EXPECT_EQ(negotiation.outcome().transmission_flags, 0x81);
}

TEST(ClientNegotiation, ListsExports) {
  ClientNegotiation negotiation({.mode = Mode::kList});
  converse(negotiation, {
                            {kGreeting, join(be32(3), option(3))},
                            {join(reply(3, 2, join(be32(4), text("disk"))),
                                  reply(3, 2, join(be32(0), text("the default"))), reply(3, 1)),
                             option(2)},
                        });
  ASSERT_EQ(negotiation.state(), State::kFinished);
  EXPECT_EQ(negotiation.outcome().entries,
            (std::vector<ClientNegotiation::ListEntry>{{"disk", ""}, {"", "the default"}}));
}

TEST(ClientNegotiation, ListsMetadataContexts) {
  ClientNegotiation negotiation({.export_name = "disk", .mode = Mode::kListMetaContexts});
  converse(
      negotiation,
      {
          {kGreeting, join(be32(3), option(11))},
          {reply(11, kUnsup), option(8)},
          {reply(8, 1), option(9, join(be32(4), text("disk"), be32(0)))},
          // Here ids mean nothing and may be the same.
          {join(reply(9, 4, kContext), reply(9, 4, join(be32(7), text("qemu:x"))), reply(9, 1)),
           option(2)},
      });
  ASSERT_EQ(negotiation.state(), State::kFinished);
  EXPECT_EQ(negotiation.outcome().contexts,
            (std::vector<MetaContext>{{0, "base:allocation"}, {0, "qemu:x"}}));
}

TEST(ClientNegotiation, ReportsWhyTheServerRefuses) {
  EXPECT_EQ(failure_after(reply(7, kUnknown, text("no such\nthing"))),
            Failure(ENOENT,
                    "the server answered GO for export \"disk\" with ERR_UNKNOWN: "
                    "\"no such\\x0athing\""));
  EXPECT_EQ(failure_after(reply(7, kShutdown)),
            Failure(ESHUTDOWN, "the server answered GO for export \"disk\" with ERR_SHUTDOWN"));
  EXPECT_EQ(failure_after(reply(7, kTlsReqd)),
            Failure(EACCES,
                    "the server answered GO for export \"disk\" with ERR_TLS_REQD (TLS is switched "
                    "off here)"));
  EXPECT_EQ(failure_after(reply(7, 0x80001234)),
            Failure(EINVAL, "the server answered GO for export \"disk\" with type 0x80001234"));
  EXPECT_EQ(failure_after(reply(11, kTlsReqd), {}),
            Failure(EACCES,
                    "the server answered EXTENDED_HEADERS with ERR_TLS_REQD (TLS is switched off "
                    "here)"));
  EXPECT_EQ(failure_after(join(reply(5, kUnsup), reply(11, kTlsReqd)), {.tls = Tls::kAllowed}),
            Failure(EACCES,
                    "the server answered EXTENDED_HEADERS with ERR_TLS_REQD (and refused "
                    "STARTTLS)"));
  EXPECT_EQ(failure_after(reply(5, kUnsup), {.tls = Tls::kRequired}),
            Failure(ENOTSUP, "the server answered STARTTLS with ERR_UNSUP"));
  EXPECT_EQ(failure_after(reply(5, kShutdown), {.tls = Tls::kAllowed}),
            Failure(ESHUTDOWN, "the server answered STARTTLS with ERR_SHUTDOWN"));
  EXPECT_EQ(failure_after(reply(3, kPolicy), {.mode = Mode::kList}),
            Failure(EACCES, "the server answered LIST with ERR_POLICY"));
}

TEST(ClientNegotiation, SaysGoodbyeToAServerThatRefuses) {
  ClientNegotiation negotiation({.mode = Mode::kList});
  converse(negotiation, {
                            {kGreeting, join(be32(3), option(3))},
                            {reply(3, kPolicy), option(2)},
                        });
  EXPECT_EQ(negotiation.state(), State::kFailed);
}

TEST(ClientNegotiation, FallsBackToExportNameOnlyWhereThatIsAllowed) {
  EXPECT_EQ(failure_after(join(reply(11, 1), reply(7, kUnsup)), {}),
            Failure(ENOTSUP, "the server answered GO for export \"\" with ERR_UNSUP"));
}

TEST(ClientNegotiation, TakesNothingUnencryptedBehindStartTls) {
  EXPECT_EQ(failure_after(join(reply(5, 1), ByteVector{0}), {.tls = Tls::kRequired}),
            Failure(EPROTO, "the server sent bytes without TLS behind its ACK of STARTTLS"));
  ClientNegotiation negotiation({.tls = Tls::kRequired});
  negotiation.feed(view(join(kGreeting, reply(5, 1))));
  EXPECT_EQ(negotiation.state(), State::kStartTls);
  EXPECT_EQ(negotiation.feed(view(reply(11, 1))), 0u);
}

TEST(ClientNegotiation, SaysWhatALyingServerDid) {
  const auto lies = [](const ByteVector& server) {
    const Failure failure = failure_after(server);
    EXPECT_EQ(failure.first, EPROTO) << failure.second;
    return failure.second;
  };
  ByteVector wrong_magic = reply(7, 1);
  wrong_magic[7] = 0xaa;
  EXPECT_EQ(lies(wrong_magic),
            "the server sent the wrong magic 0x0003e889045565aa before its "
            "reply to GO");
  EXPECT_EQ(lies(reply(6, 1)), "the server replied to option INFO when asked for GO");
  EXPECT_EQ(lies(reply(77, 1)), "the server replied to option 77 when asked for GO");
  EXPECT_EQ(lies(reply(7, 2, be32(0))), "the server answered GO with SERVER");
  EXPECT_EQ(lies(reply(7, 99)), "the server answered GO with type 0x63");
  EXPECT_EQ(lies(reply(7, 1, {0})),
            "the server sent 1 bytes with ACK in its reply to GO, where 0 to 0 are right");
  EXPECT_EQ(lies(reply(7, 1)), "the server acknowledged GO without telling the export's size");
  EXPECT_EQ(lies(join(reply(7, 3, kExportInfo), reply(7, 3, kExportInfo))),
            "the server told the export's size twice");
  EXPECT_EQ(lies(reply(7, 3, join(kExportInfo, ByteVector{0}))),
            "the server told the export's size in 11 bytes, not 10");
  EXPECT_EQ(lies(reply(7, 3, {0})),
            "the server sent 1 bytes with INFO in its reply to GO, where 2 to 8196 are right");
  EXPECT_EQ(lies(reply(7, 3, join({0, 1}, ByteVector(4097, 'x')))),
            "the server told a name of 4097 bytes");
  EXPECT_EQ(lies(reply(7, 3, {0, 3, 0})),
            "the server told the export's block sizes in 1 bytes, not 12");
  EXPECT_EQ(lies(reply(7, kUnknown, ByteVector(4097, 'x'))),
            "the server sent 4097 bytes with ERR_UNKNOWN in its reply to GO, where 0 to 4096 are "
            "right");
  ByteVector no_flags = kExportInfo;
  no_flags[11] = 0x0c;
  EXPECT_EQ(lies(join(reply(7, 3, no_flags), reply(7, 1))),
            "the server told the transmission flags 0x000c, without HAS_FLAGS");
  const auto sizes = [&](std::uint32_t least, std::uint32_t preferred, std::uint32_t most) {
    return join(reply(7, 3, kExportInfo),
                reply(7, 3, join({0, 3}, be32(least), be32(preferred), be32(most))), reply(7, 1));
  };
  EXPECT_EQ(lies(sizes(3, 512, 4096)),
            "the server told the block sizes 3, 512 and 4096, which make no sense");
  lies(sizes(0, 512, 4096));
  lies(sizes(131072, 131072, 131072));
  lies(sizes(1, 256, 4096));
  lies(sizes(1, 513, 4096));
  lies(sizes(4096, 512, 4096));
  lies(sizes(1, 512, 511));
  EXPECT_EQ(failure_after(sizes(1, 512, 0xffffffff)).second, "has not failed");
}

TEST(ClientNegotiation, SaysWhatAServerDidThatListsNonsense) {
  const auto lies = [](Mode mode, const ByteVector& server) {
    const ByteVector all = mode == Mode::kListMetaContexts ? join(reply(11, 1), server) : server;
    const Failure failure = failure_after(all, {.mode = mode});
    EXPECT_EQ(failure.first, EPROTO) << failure.second;
    return failure.second;
  };
  EXPECT_EQ(lies(Mode::kList, reply(3, 2, {0, 0, 0})),
            "the server sent 3 bytes with SERVER in its reply to LIST, where 4 to 8196 are right");
  EXPECT_EQ(lies(Mode::kList, reply(3, 2, be32(1))), "the server listed a name of 1 bytes in 0");
  EXPECT_EQ(lies(Mode::kList, reply(3, 2, be32(0xffffffff))),
            "the server listed a name of 4294967295 bytes in 0");
  EXPECT_EQ(lies(Mode::kList, reply(3, 2, join(be32(4097), ByteVector(4097, 'x')))),
            "the server listed a name or description of more than 4096 bytes");
  EXPECT_EQ(lies(Mode::kList, reply(3, 2, join(be32(1), zeroes(1)))),
            "the server listed a name with a NUL in it");
  EXPECT_EQ(lies(Mode::kListMetaContexts, reply(9, 4, join(be32(0), text("base")))),
            "the server sent the metadata context \"base\", which is not of the form "
            "namespace:leaf");
  const ByteVector again = join(be32(7), text("base:other"));
  EXPECT_EQ(failure_after(join(reply(11, 1), reply(10, 4, kContext), reply(10, 4, again)),
                          {.meta_contexts = {"base:allocation"}}),
            Failure(EPROTO,
                    "the server sent the metadata contexts 7 \"base:allocation\" and 7 "
                    "\"base:other\", which is one too many"));
}

TEST(ClientNegotiation, DoesNotTakeWhateverListsAServerMakesUp) {
  const ByteVector longest =
      reply(3, 2, join(be32(4096), ByteVector(4096, 'n'), ByteVector(4096, 'd')));
  ClientNegotiation negotiation({.mode = Mode::kList});
  negotiation.feed(view(kGreeting));
  std::size_t count = 0;
  while (negotiation.state() == State::kNegotiating && count < 10000) {
    negotiation.feed(view(longest));
    ++count;
  }
  ASSERT_EQ(negotiation.state(), State::kFailed);
  EXPECT_EQ(negotiation.failure().code(), EMSGSIZE);
  EXPECT_LT(count, (16u << 20) / 8192 + 2);
  EXPECT_GT(count, (16u << 20) / 8192 - 100);

  ClientNegotiation patient({});
  patient.feed(view(join(kGreeting, reply(11, 1))));
  count = 0;
  while (patient.state() == State::kNegotiating && count < 100000) {
    patient.feed(view(reply(7, 3, {0, 99})));
    ++count;
  }
  EXPECT_EQ(patient.failure().doing(), "the server sent more than 65536 replies to GO");
}

TEST(ClientNegotiation, KnowsAGreetingThatIsNoneOfNbd) {
  ClientNegotiation negotiation({});
  negotiation.feed(view(text("HTTP/1.1 400 Bad Request")));
  ASSERT_EQ(negotiation.state(), State::kFailed);
  EXPECT_EQ(negotiation.failure().doing(),
            "the server greeted with \"HTTP/1.1\", which is not NBD");
  ClientNegotiation other({});
  other.feed(view(text("NBDMAGICnonsense")));
  EXPECT_EQ(other.failure().doing(), "the server sent 0x6e6f6e73656e7365 behind NBDMAGIC");
}

TEST(ClientNegotiation, KnowsWhatTheEndOfTheStreamMeans) {
  const auto ends = [](const ByteVector& server, ClientWishes wishes) {
    ClientNegotiation negotiation(std::move(wishes));
    negotiation.feed(view(server));
    negotiation.end_of_input();
    return Failure(negotiation.failure().code(), negotiation.failure().doing());
  };
  EXPECT_EQ(ends({}, {}),
            Failure(ECONNRESET, "the server closed the connection without a greeting"));
  EXPECT_EQ(ends(text("NBD"), {}),
            Failure(ECONNRESET, "the server closed the connection within its greeting"));
  EXPECT_EQ(
      ends(kGreeting, {}),
      Failure(ECONNRESET, "the server closed the connection within its reply to EXTENDED_HEADERS"));
  EXPECT_EQ(ends(join(text("NBDMAGICIHAVEOPT"), ByteVector{0, 0}), {.export_name = "disk"}),
            Failure(ENOENT, "the server closed the connection when asked for export \"disk\""));
}

TEST(ClientNegotiation, RefusesWishesTheProtocolHasNoRoomFor) {
  EXPECT_TRUE(check_wishes({.export_name = std::string(4096, 'x')}));
  EXPECT_FALSE(check_wishes({.export_name = std::string(4097, 'x')}));
  EXPECT_FALSE(check_wishes({.export_name = std::string(1, '\0')}));
  EXPECT_FALSE(check_wishes({.meta_contexts = {"base"}}));
  EXPECT_FALSE(check_wishes({.meta_contexts = {":x"}}));
  EXPECT_FALSE(check_wishes({.meta_contexts = {std::string(4097, ':')}}));
  EXPECT_FALSE(check_wishes({.meta_contexts = std::vector<std::string>(1025, "a:b")}));
  EXPECT_TRUE(check_wishes({.meta_contexts = std::vector<std::string>(1024, "a:b")}));
}

TEST(ClientNegotiationDeathTest, HoldsItsCallerToTheOrderOfThings) {
  ClientNegotiation negotiation({.tls = Tls::kRequired});
  EXPECT_DEATH(negotiation.tls_started(), "nobody asked for TLS");
  EXPECT_DEATH(negotiation.outcome(), "there is no outcome yet");
  negotiation.feed(view(join(kGreeting, reply(5, 1))));
  EXPECT_DEATH(negotiation.tls_started(), "20 bytes should have been sent without TLS");
}

}  // namespace
}  // namespace roost::nbd
