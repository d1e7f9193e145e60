// SPDX-License-Identifier: MIT
// The client against a server that the test plays by hand, over channels in memory.
#include "roost/nbd/client.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <optional>
#include <utility>

#include "io/test_channel.h"
#include "nbd/test_bytes.h"
#include "roost/base/bytes.h"
#include "roost/io/memory_channel.h"
#include "roost/io/socket_channel.h"

namespace roost::nbd {
namespace {

using Done = Result<void>;
using Client = std::unique_ptr<NbdClient>;
using Extents = Result<std::vector<ContextExtents>>;

constexpr std::uint64_t kSize = 1 << 20;
constexpr std::uint16_t kAllFlags =
    kTransmissionHasFlags | kTransmissionSendFlush | kTransmissionSendFua | kTransmissionSendTrim |
    kTransmissionSendWriteZeroes | kTransmissionSendDf | kTransmissionSendCache |
    kTransmissionSendResize | kTransmissionSendFastZero;

ByteVector be16(std::uint16_t v) {
  return {static_cast<std::uint8_t>(v >> 8), static_cast<std::uint8_t>(v)};
}

ByteVector option_reply(std::uint32_t option, std::uint32_t type, const ByteVector& data = {}) {
  return join(be64(0x0003e889045565a9), be32(option), be32(type),
              be32(static_cast<std::uint32_t>(data.size())), data);
}

/// A request as the server got it.
struct Got {
  std::uint16_t flags = 0;
  std::uint16_t command = 0;
  std::uint64_t cookie = 0;
  std::uint64_t offset = 0;
  std::uint64_t length = 0;
};

ByteVector chunk(const Got& to, std::uint16_t flags, std::uint16_t type,
                 const ByteVector& payload = {}) {
  return join(be32(0x668e33ef), be16(flags), be16(type), be64(to.cookie),
              be32(static_cast<std::uint32_t>(payload.size())), payload);
}

ByteVector simple(const Got& to, std::uint32_t error = 0) {
  return join(be32(0x67446698), be32(error), be64(to.cookie));
}

ByteVector data_chunk(const Got& to, char fill) {
  return chunk(to, 1, 1, join(be64(to.offset), ByteVector(to.length, fill)));
}

class ClientTest : public ChannelTest {
 protected:
  struct Setup {
    std::uint16_t flags = kAllFlags;
    std::uint32_t max_payload = 1 << 20;
    std::uint32_t min_block = 1;
    bool extended = false;
    std::size_t capacity = 256 << 10;
    bool sockets = false;
  };

  void connect(const Setup& setup) {
    extended_ = setup.extended;
    auto ends = make_memory_channels(setup.capacity);
    if (setup.sockets) {
      auto sockets = SocketChannel::pair();
      ASSERT_TRUE(sockets) << sockets.error().message();
      ends = {std::move(sockets->first), std::move(sockets->second)};
    }
    far_ = std::move(ends.second);
    options_.wishes = {.export_name = "disk",
                       .extended_headers = setup.extended,
                       .meta_contexts = {"base:allocation", "qemu:x"}};
    start(NbdClient::connect(std::move(ends.first), options_), connected_);
    send(join(text("NBDMAGICIHAVEOPT"), ByteVector{0, 3}));
    receive(4 + 16);
    send(option_reply(setup.extended ? 11 : 8, 1));
    receive(16 + 4 + 4 + 4 + 4 + 15 + 4 + 6);
    send(join(option_reply(10, 4, join(be32(5), text("base:allocation"))),
              option_reply(10, 4, join(be32(6), text("qemu:x"))), option_reply(10, 1)));
    receive(16 + 4 + 4 + 8);
    send(join(option_reply(7, 3, join({0, 0}, be64(kSize), be16(setup.flags))),
              option_reply(
                  7, 3, join({0, 3}, be32(setup.min_block), be32(4096), be32(setup.max_payload))),
              option_reply(7, 1)));
    finish(connected_);
    ASSERT_TRUE(*connected_) << connected_->error().message();
    settle();
  }
  void connect() { connect(Setup()); }

  NbdClient& client() { return ***connected_; }

  void TearDown() override {
    if (!connected_ || !*connected_) return;
    std::stop_source stop;
    stop.request_stop();
    disconnect(stop.get_token());
  }

  void disconnect(std::stop_token stop = {}) {
    std::optional<Done> ended;
    run(ended_then(client(), std::move(stop)), ended);
  }
  static Task<Done> ended_then(NbdClient& client, std::stop_token stop) {
    co_await client.disconnect(std::move(stop));
    co_return Done();
  }

  // ---- the server, on context b

  void send(const ByteVector& bytes) {
    std::optional<Done> sent;
    start_on(b(), far_->write_full(view(bytes)), sent, "server");
    finish(sent);
    ASSERT_TRUE(*sent) << sent->error().message();
    settle();
  }

  ByteVector receive(std::size_t size) {
    std::string bytes(size, '\0');
    std::optional<Done> got;
    start_on(b(), far_->read_full(room_of(bytes)), got, "server");
    finish(got);
    EXPECT_TRUE(*got) << got->error().message();
    return text(bytes);
  }

  /// Nothing more has come than was received.
  void expect_silence() {
    settle();
    std::string byte(1, '\0');
    std::optional<Result<std::size_t>> got;
    std::stop_source stop;
    start_on(b(), far_->read(room_of(byte), stop.get_token()), got, "server");
    settle();
    EXPECT_FALSE(got) << "the client has sent something more";
    stop.request_stop();
    finish(got);
  }

  Got get() {
    const ByteVector bytes = receive(extended_ ? 32 : 28);
    const std::byte* const at = view(bytes).data();
    EXPECT_EQ(load_be<std::uint32_t>(at), extended_ ? kExtendedRequestMagic : kRequestMagic);
    return {
        .flags = load_be<std::uint16_t>(at + 4),
        .command = load_be<std::uint16_t>(at + 6),
        .cookie = load_be<std::uint64_t>(at + 8),
        .offset = load_be<std::uint64_t>(at + 16),
        .length = extended_ ? load_be<std::uint64_t>(at + 24) : load_be<std::uint32_t>(at + 24)};
  }

  void close_server() {
    far_.reset();
    settle();
  }

  static std::string words(const std::optional<Done>& done) {
    if (!done) return "it has not ended";
    return *done ? "success" : done->error().doing();
  }

  std::unique_ptr<Channel> far_;
  NbdClientOptions options_;
  std::optional<Result<Client>> connected_;
  bool extended_ = false;
};

TEST_F(ClientTest, ReadsIntoTheCallersBuffers) {
  connect();
  EXPECT_EQ(client().size(), kSize);
  EXPECT_EQ(client().outcome().headers, ReplyStyle::kStructured);
  std::string first(100, '?'), second(200, '?');
  const iovec pieces[] = {{first.data(), first.size()}, {second.data(), second.size()}};
  std::optional<Done> done;
  start(client().readv(4096, pieces), done);
  const Got request = get();
  EXPECT_EQ(request.command, 0);
  EXPECT_EQ(request.flags, 0);
  EXPECT_EQ(request.offset, 4096u);
  EXPECT_EQ(request.length, 300u);
  // In parts, the last of which is cut, so that its end is received straight into a buffer.
  send(chunk(request, 0, 2, join(be64(4096 + 250), be32(50))));
  const ByteVector data = chunk(request, 1, 1, join(be64(4096), ByteVector(250, 'x')));
  send({data.begin(), data.begin() + 60});
  EXPECT_FALSE(done);
  send({data.begin() + 60, data.end()});
  finish(done);
  EXPECT_EQ(words(done), "success");
  EXPECT_EQ(first, std::string(100, 'x'));
  EXPECT_EQ(second, std::string(150, 'x') + std::string(50, '\0'));
  EXPECT_EQ(client().in_flight(), 0u);
}

TEST_F(ClientTest, SpeaksExtendedHeaders) {
  connect({.extended = true});
  std::optional<Done> done;
  start(client().zero(0, kSize, kCommandNoHole), done);
  const Got request = get();
  EXPECT_EQ(request.command, 6);
  EXPECT_EQ(request.flags, kCommandNoHole);
  EXPECT_EQ(request.length, kSize);
  send(join(be32(0x6e8a278c), be16(1), be16(0), be64(request.cookie), be64(0), be64(0)));
  finish(done);
  EXPECT_EQ(words(done), "success");
}

TEST_F(ClientTest, HasManyRequestsInFlightAndTakesRepliesInAnyOrder) {
  connect();
  std::string buffers[3] = {std::string(512, '?'), std::string(512, '?'), std::string(512, '?')};
  std::optional<Done> done[3];
  for (std::size_t i = 0; i < 3; ++i) start(client().read(i * 512, room_of(buffers[i])), done[i]);
  std::vector<Got> requests;
  for (int i = 0; i < 3; ++i) requests.push_back(get());
  EXPECT_EQ(client().in_flight(), 3u);
  for (std::size_t i : {2u, 0u, 1u}) {
    send(data_chunk(requests[i], static_cast<char>('a' + requests[i].offset / 512)));
  }
  for (std::size_t i = 0; i < 3; ++i) {
    finish(done[i]);
    EXPECT_EQ(words(done[i]), "success");
    EXPECT_EQ(buffers[i], std::string(512, static_cast<char>('a' + i)));
  }
}

TEST_F(ClientTest, WritesAndFlushes) {
  connect();
  const std::string text_to_write = "hello, world";
  std::optional<Done> written, flushed;
  start(client().write(7, bytes_of(text_to_write), kCommandFua), written);
  start(client().flush(), flushed);
  const Got write = get();
  EXPECT_EQ(write.command, 1);
  EXPECT_EQ(write.flags, kCommandFua);
  EXPECT_EQ(write.length, text_to_write.size());
  EXPECT_EQ(receive(text_to_write.size()), text(text_to_write));
  const Got flush = get();
  EXPECT_EQ(flush.command, 3);
  send(simple(flush));
  send(simple(write, 28));
  finish(flushed);
  finish(written);
  EXPECT_EQ(words(flushed), "success");
  ASSERT_FALSE(*written);
  EXPECT_EQ(written->error().code(), ENOSPC);
  EXPECT_EQ(words(written), "one end in memory: WRITE 7+12");
}

TEST_F(ClientTest, TakesRequestsFromOtherContexts) {
  connect();
  std::string buffer(512, '?');
  std::optional<Done> done;
  start_on(b(), client().read(0, room_of(buffer)), done);
  send(data_chunk(get(), 'x'));
  finish(done);
  EXPECT_EQ(words(done), "success");
  EXPECT_EQ(buffer, std::string(512, 'x'));
}

TEST_F(ClientTest, MovesToAnotherContextWithRequestsInFlight) {
  connect();
  std::string buffer(512, '?');
  std::optional<Done> done, moved;
  start(client().read(0, room_of(buffer)), done);
  const Got request = get();
  run(client().move_to(b()), moved);
  EXPECT_EQ(words(moved), "success");
  send(data_chunk(request, 'x'));
  finish(done);
  EXPECT_EQ(words(done), "success");
  std::optional<Done> again;
  start(client().read(0, room_of(buffer)), again);
  send(data_chunk(get(), 'y'));
  finish(again);
  EXPECT_EQ(words(again), "success");
  EXPECT_EQ(buffer, std::string(512, 'y'));
}

TEST_F(ClientTest, SendsLongRequestsInParts) {
  connect({.max_payload = 4096, .min_block = 512});
  std::string buffer(10 * 1024, '?');
  std::optional<Done> done;
  start(client().read(512, room_of(buffer)), done);
  std::uint64_t at = 512;
  for (std::uint64_t length : {4096, 4096, 2048}) {
    const Got request = get();
    EXPECT_EQ(request.offset, at);
    EXPECT_EQ(request.length, length);
    send(data_chunk(request, static_cast<char>('a' + at / 4096)));
    at += length;
  }
  finish(done);
  EXPECT_EQ(words(done), "success");
  EXPECT_EQ(buffer, std::string(4096, 'a') + std::string(4096, 'b') + std::string(2048, 'c'));
}

TEST_F(ClientTest, TellsWhatTheServerSaysOfARange) {
  connect();
  std::optional<Extents> done;
  start(client().block_status(kSize - 4096, 4096), done);
  const Got request = get();
  EXPECT_EQ(request.command, 7);
  send(chunk(request, 0, 5, join(be32(6), be32(512), be32(9))));
  send(chunk(request, 1, 5, join(be32(5), be32(512), be32(3), be32(1 << 20), be32(0))));
  finish(done);
  ASSERT_TRUE(*done) << done->error().message();
  EXPECT_EQ(**done, (std::vector<ContextExtents>{{"base:allocation", {{512, 3}, {3584, 0}}},
                                                 {"qemu:x", {{512, 9}}}}));
}

TEST_F(ClientTest, ResizesTheExport) {
  connect();
  std::optional<Done> done;
  start(client().resize(2 * kSize), done);
  const Got request = get();
  EXPECT_EQ(request.command, 8);
  EXPECT_EQ(request.offset, 2 * kSize);
  EXPECT_EQ(client().size(), kSize);
  send(simple(request));
  finish(done);
  EXPECT_EQ(client().size(), 2 * kSize);
  std::optional<Done> trimmed;
  start(client().trim(kSize, kSize), trimmed);
  send(simple(get()));
  finish(trimmed);
  EXPECT_EQ(words(trimmed), "success");
}

TEST_F(ClientTest, DoesNotSendWhatTheServerWouldRefuse) {
  connect({.flags = kTransmissionHasFlags | kTransmissionReadOnly, .min_block = 512});
  std::string buffer(512, '?');
  const auto code = [&](Task<Done> task) {
    std::optional<Done> done;
    run(std::move(task), done);
    return *done ? 0 : done->error().code();
  };
  EXPECT_EQ(code(client().write(0, bytes_of(buffer))), EROFS);
  EXPECT_EQ(code(client().flush()), ENOTSUP);
  EXPECT_EQ(code(client().trim(0, 512)), ENOTSUP);
  EXPECT_EQ(code(client().zero(0, 512)), ENOTSUP);
  EXPECT_EQ(code(client().cache(0, 512)), ENOTSUP);
  EXPECT_EQ(code(client().resize(512)), ENOTSUP);
  EXPECT_EQ(code(client().write(0, bytes_of(buffer), kCommandFua)), ENOTSUP);
  EXPECT_EQ(code(client().write(0, bytes_of(buffer), kCommandDf)), EINVAL);
  EXPECT_EQ(code(client().read(1, room_of(buffer))), EINVAL);
  EXPECT_EQ(code(client().read(kSize, room_of(buffer))), EINVAL);
  EXPECT_EQ(code(client().read(~std::uint64_t{0} - 511, room_of(buffer))), EINVAL);
  EXPECT_EQ(code(client().read(kSize, {})), 0);
  expect_silence();
}

// ---- stopping

TEST_F(ClientTest, WithdrawsWhatWasNotSent) {
  connect({.capacity = 4096});
  const std::string long_text(16384, 'x');
  std::string buffer(512, '?');
  std::optional<Done> written, read;
  std::stop_source stop;
  start(client().write(0, bytes_of(long_text)), written);
  settle();
  start(client().read(0, room_of(buffer), stop.get_token()), read);
  settle();
  stop.request_stop();
  finish(read);
  ASSERT_FALSE(*read);
  EXPECT_EQ(read->error().code(), ECANCELED);
  EXPECT_EQ(words(read), "one end in memory: READ 0+512: not sent");
  const Got write = get();
  receive(long_text.size());
  send(simple(write));
  finish(written);
  EXPECT_EQ(words(written), "success");
  expect_silence();
}

TEST_F(ClientTest, AwaitsTheReplyToWhatWasSent) {
  connect();
  std::string buffer(512, '?');
  std::optional<Done> done;
  std::stop_source stop;
  start(client().read(0, room_of(buffer), stop.get_token()), done);
  const Got request = get();
  stop.request_stop();
  settle();
  EXPECT_FALSE(done);
  send(data_chunk(request, 'x'));
  finish(done);
  EXPECT_EQ(words(done), "success");
  EXPECT_EQ(buffer, std::string(512, 'x'));
}

TEST_F(ClientTest, LeavesWhatWasSentAndKeepsOffItsBuffer) {
  connect();
  std::string buffer(512, '?');
  std::optional<Done> done;
  std::stop_source stop;
  start(client().read(0, room_of(buffer), stop.get_token(), WhenStopped::kLeave), done);
  const Got request = get();
  stop.request_stop();
  finish(done);
  ASSERT_FALSE(*done);
  EXPECT_EQ(done->error().code(), EINPROGRESS);
  EXPECT_EQ(client().in_flight(), 1u);
  send(data_chunk(request, 'x'));
  EXPECT_EQ(buffer, std::string(512, '?'));
  EXPECT_EQ(client().in_flight(), 0u);
  std::optional<Done> next;
  start(client().read(0, room_of(buffer)), next);
  send(data_chunk(get(), 'y'));
  finish(next);
  EXPECT_EQ(words(next), "success");
}

TEST_F(ClientTest, LeavesOnlyOnceArrivingDataHasArrived) {
  connect();
  std::string buffer(512, '?');
  std::optional<Done> done;
  std::stop_source stop;
  start(client().read(0, room_of(buffer), stop.get_token(), WhenStopped::kLeave), done);
  const Got request = get();
  const ByteVector data = chunk(request, 0, 1, join(be64(0), ByteVector(256, 'x')));
  send({data.begin(), data.begin() + 100});
  stop.request_stop();
  settle();
  EXPECT_FALSE(done);
  send({data.begin() + 100, data.end()});
  finish(done);
  EXPECT_EQ(done->error().code(), EINPROGRESS);
  send(chunk(request, 1, 1, join(be64(256), ByteVector(256, 'x'))));
  EXPECT_EQ(buffer, std::string(256, 'x') + std::string(256, '?'));
  EXPECT_EQ(client().in_flight(), 0u);
}

TEST_F(ClientTest, SaysThatPartsOfAStoppedRequestWereDone) {
  connect({.max_payload = 4096});
  std::string buffer(8192, '?');
  std::optional<Done> done;
  std::stop_source stop;
  start(client().read(0, room_of(buffer), stop.get_token()), done);
  const Got request = get();
  stop.request_stop();
  send(data_chunk(request, 'x'));
  finish(done);
  ASSERT_FALSE(*done);
  EXPECT_EQ(done->error().code(), EINPROGRESS);
  expect_silence();
}

TEST_F(ClientTest, KeepsAWriteUntilItIsSentAlthoughItWasAnswered) {
  connect({.capacity = 4096});
  const std::string long_text(16384, 'x');
  std::optional<Done> done;
  start(client().write(0, bytes_of(long_text)), done);
  const Got write = get();
  send(simple(write, 28));
  EXPECT_FALSE(done) << "its buffer is still being sent";
  receive(long_text.size());
  finish(done);
  ASSERT_FALSE(*done);
  EXPECT_EQ(done->error().code(), ENOSPC);
}

// ---- servers that lie or go

TEST_F(ClientTest, FailsOnlyTheRequestWhoseReplyDoesNotAddUp) {
  connect();
  std::string buffer(512, '?');
  std::optional<Done> bad, good;
  start(client().read(4096, room_of(buffer)), bad);
  const Got request = get();
  send(chunk(request, 0, 1, join(be64(4096), ByteVector(400, 'x'))));
  send(chunk(request, 1, 1, join(be64(4096 + 300), ByteVector(212, 'y'))));
  finish(bad);
  ASSERT_FALSE(*bad);
  EXPECT_EQ(bad->error().code(), EPROTO);
  EXPECT_EQ(words(bad),
            "one end in memory: READ 4096+512: the server sent OFFSET_DATA 4396+212, which it has "
            "sent a part of before");
  start(client().read(4096, room_of(buffer)), good);
  send(data_chunk(get(), 'z'));
  finish(good);
  EXPECT_EQ(words(good), "success");
}

TEST_F(ClientTest, FailsTheConnectionWhereTheServerTalksOfSomethingElse) {
  connect();
  std::string buffer(512, '?');
  std::optional<Done> done, later;
  start(client().read(4096, room_of(buffer)), done);
  Got request = get();
  request.cookie += 1;
  send(data_chunk(request, 'x'));
  finish(done);
  ASSERT_FALSE(*done);
  EXPECT_EQ(done->error().code(), EPROTO);
  EXPECT_EQ(words(done),
            "one end in memory: READ 4096+512: the server replied to a request that was not made, "
            "cookie 2");
  EXPECT_EQ(buffer, std::string(512, '?'));
  run(client().read(0, room_of(buffer)), later);
  EXPECT_EQ(later->error().code(), EPROTO);
  EXPECT_FALSE(client().state());
}

TEST_F(ClientTest, KnowsAReplyToWhatItHasNotYetSent) {
  connect({.capacity = 4096});
  const std::string long_text(16384, 'x');
  std::string buffer(512, '?');
  std::optional<Done> written, read;
  start(client().write(0, bytes_of(long_text)), written);
  settle();
  start(client().read(0, room_of(buffer)), read);
  settle();
  send(data_chunk({.cookie = 2, .offset = 0, .length = 512}, 'x'));
  finish(read);
  finish(written);
  EXPECT_EQ(words(read),
            "one end in memory: READ 0+512: the server replied to a request that was not made, "
            "cookie 2");
  EXPECT_EQ(written->error().code(), EPROTO);
}

TEST_F(ClientTest, FailsTheConnectionOnTheWrongKindOfReply) {
  connect();
  std::string buffer(512, '?');
  std::optional<Done> done;
  start(client().read(4096, room_of(buffer)), done);
  send(simple(get()));
  finish(done);
  EXPECT_EQ(words(done),
            "one end in memory: READ 4096+512: the server sent a simple reply, where a structured "
            "one was negotiated, answering READ 4096+512");
}

TEST_F(ClientTest, FailsWhatIsInFlightWhenTheServerGoes) {
  connect();
  std::string buffer(512, '?');
  std::optional<Done> read, flushed;
  start(client().read(4096, room_of(buffer)), read);
  start(client().flush(), flushed);
  const Got request = get();
  get();
  const ByteVector data = data_chunk(request, 'x');
  send({data.begin(), data.begin() + 100});
  close_server();
  finish(read);
  finish(flushed);
  EXPECT_EQ(read->error().code(), ECONNRESET);
  EXPECT_EQ(flushed->error().code(), ECONNRESET);
  EXPECT_TRUE(words(flushed).starts_with("one end in memory: FLUSH: ")) << words(flushed);
}

TEST_F(ClientTest, TakesLeaveOfAServerThatShutsDown) {
  connect();
  std::string buffer(512, '?');
  std::optional<Done> read, flushed, later;
  start(client().read(4096, room_of(buffer)), read);
  start(client().flush(), flushed);
  const Got request = get();
  send(simple(get(), 108));
  finish(flushed);
  EXPECT_EQ(flushed->error().code(), ESHUTDOWN);
  run(client().read(0, room_of(buffer)), later);
  EXPECT_EQ(later->error().code(), ESHUTDOWN);
  expect_silence();
  send(data_chunk(request, 'x'));
  finish(read);
  EXPECT_EQ(words(read), "success");
  EXPECT_EQ(get().command, 2) << "not DISC";
}

// ---- the end

TEST_F(ClientTest, SaysGoodbyeOnceWhatIsInFlightHasEnded) {
  connect();
  std::string buffer(512, '?');
  std::optional<Done> read, ended;
  start(client().read(4096, room_of(buffer)), read);
  start(ended_then(client(), {}), ended);
  const Got request = get();
  expect_silence();
  EXPECT_FALSE(ended);
  send(data_chunk(request, 'x'));
  finish(read);
  EXPECT_EQ(words(read), "success");
  const Got goodbye = get();
  EXPECT_EQ(goodbye.command, 2);
  EXPECT_EQ(goodbye.offset, 0u);
  EXPECT_EQ(goodbye.length, 0u);
  finish(ended);
}

TEST_F(ClientTest, CutsTheConnectionWhenToldNotToWait) {
  connect();
  std::string buffer(512, '?');
  std::optional<Done> read;
  start(client().read(4096, room_of(buffer)), read);
  get();
  std::stop_source stop;
  stop.request_stop();
  disconnect(stop.get_token());
  finish(read);
  EXPECT_EQ(read->error().code(), ESHUTDOWN);
  EXPECT_EQ(words(read), "one end in memory: READ 4096+512: the connection was cut off");
}

TEST_F(ClientTest, CanBeCutFromAnotherContextThanTheChannels) {
  connect({.sockets = true});
  std::string buffer(512, '?');
  std::optional<Done> read, ended;
  start(client().read(4096, room_of(buffer)), read);
  get();
  std::stop_source stop;
  stop.request_stop();
  start_on(b(), ended_then(client(), stop.get_token()), ended);
  finish(ended);
  finish(read);
  EXPECT_EQ(read->error().code(), ESHUTDOWN);
}

using ClientDeathTest = ClientTest;

TEST_F(ClientDeathTest, DoesNotGoWhileItIsConnected) {
  connect();
  EXPECT_DEATH(connected_.reset(), "the NBD client of one end in memory goes without disconnect");
}

TEST_F(ClientTest, ReportsAHandshakeThatFails) {
  auto ends = make_memory_channels();
  far_ = std::move(ends.second);
  std::optional<Result<Client>> connected;
  start(NbdClient::connect(std::move(ends.first), options_), connected);
  send(text("220 mail.example ESMTP"));
  finish(connected);
  ASSERT_FALSE(*connected);
  EXPECT_EQ(connected->error().code(), EPROTO);
  EXPECT_EQ(connected->error().doing(),
            "one end in memory: the server greeted with \"220 mail\", which is not NBD");
}

TEST_F(ClientTest, AsksForTheListOfExports) {
  auto ends = make_memory_channels();
  far_ = std::move(ends.second);
  options_.wishes.mode = ClientWishes::Mode::kList;
  std::optional<Result<ClientNegotiation::Outcome>> listed;
  start(query_nbd_server(std::move(ends.first), options_), listed);
  send(join(text("NBDMAGICIHAVEOPT"), ByteVector{0, 3}));
  receive(4 + 16);
  send(join(option_reply(3, 2, join(be32(1), text("a disk"))), option_reply(3, 1)));
  finish(listed);
  ASSERT_TRUE(*listed) << listed->error().message();
  EXPECT_EQ((*listed)->entries, (std::vector<ClientNegotiation::ListEntry>{{"a", " disk"}}));
  const ByteVector abort = receive(16);
  EXPECT_EQ(abort[11], 2);
}

Task<Result<std::unique_ptr<Channel>>> pretend_tls(std::unique_ptr<Channel> channel,
                                                   std::stop_token) {
  co_return std::move(channel);
}

TEST_F(ClientTest, StartsTlsBeforeAnythingElse) {
  auto ends = make_memory_channels();
  far_ = std::move(ends.second);
  options_.wishes = {.mode = ClientWishes::Mode::kList, .tls = ClientWishes::Tls::kRequired};
  options_.start_tls = pretend_tls;
  std::optional<Result<ClientNegotiation::Outcome>> listed;
  start(query_nbd_server(std::move(ends.first), options_), listed);
  send(join(text("NBDMAGICIHAVEOPT"), ByteVector{0, 3}));
  EXPECT_EQ(receive(4 + 16)[4 + 11], 5);
  send(option_reply(5, 1));
  EXPECT_EQ(receive(16)[11], 3);
  send(option_reply(3, 1));
  finish(listed);
  ASSERT_TRUE(*listed) << listed->error().message();
  EXPECT_TRUE((*listed)->tls);
}

}  // namespace
}  // namespace roost::nbd
