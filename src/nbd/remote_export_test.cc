// SPDX-License-Identifier: MIT
// What a remote export does when connections are lost, against a server that the test plays: it
// has a cache that a crash empties, and answers, or does not, as the test wants.
#include "roost/nbd/remote_export.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "io/test_channel.h"
#include "nbd/test_bytes.h"
#include "roost/aio/timer.h"
#include "roost/base/bytes.h"
#include "roost/base/clock.h"
#include "roost/io/memory_channel.h"

namespace roost::nbd {
namespace {

using Done = Result<void>;
using Export = std::unique_ptr<RemoteExport>;

constexpr std::uint64_t kSize = 4096;
constexpr std::int64_t kMs = 1'000'000;
constexpr std::uint16_t kFlags = kTransmissionHasFlags | kTransmissionSendFlush |
                                 kTransmissionSendFua | kTransmissionSendTrim |
                                 kTransmissionSendWriteZeroes | kTransmissionSendCache |
                                 kTransmissionSendResize | kTransmissionCanMultiConn;

ByteVector be16(std::uint16_t v) {
  return {static_cast<std::uint8_t>(v >> 8), static_cast<std::uint8_t>(v)};
}
ByteVector option_reply(std::uint32_t option, std::uint32_t type, const ByteVector& data = {}) {
  return join(be64(0x0003e889045565a9), be32(option), be32(type),
              be32(static_cast<std::uint32_t>(data.size())), data);
}

struct Server {
  enum class Answer : std::uint8_t { kYes, kNo, kOnlyDo };

  struct Line {
    std::unique_ptr<Channel> channel;
    bool ended = false;
    int requests = 0;
  };

  std::uint64_t size = kSize;
  std::uint16_t flags = kFlags;
  std::string context = "base:allocation";
  std::string cache = std::string(kSize, '.');
  std::string disk = std::string(kSize, '.');
  std::vector<std::string> log{};  // "WRITE 0+4", in the order they came
  // What to do about a request; kOnlyDo: it is carried out, and not answered.
  std::function<Answer(const std::string&)> hook = [](const std::string&) { return Answer::kYes; };
  bool flushes_slowly = false;  // answers a millisecond later
  bool fails_flushes = false;
  bool refuses = false;
  bool greets = true;
  int tries = 0;
  std::vector<std::int64_t> tried_at{};
  std::vector<std::shared_ptr<Line>> lines{};

  void hang_up() {
    for (auto& line : lines) line->channel->abort();
  }
  void crash() {
    cache = disk;
    hang_up();
  }
};

Task<Done> read_bytes(Channel& channel, std::string& bytes) {
  return channel.read_full(room_of(bytes));
}

Task<Done> send_bytes(Channel& channel, ByteVector bytes) {
  co_return co_await channel.write_full(view(bytes));
}

// GCC 12 cannot have lists of initial values in coroutines.
ByteVector greeting() { return join(text("NBDMAGICIHAVEOPT"), ByteVector{0, 3}); }

ByteVector answer_to_option(const Server& server, std::uint32_t option) {
  ByteVector reply = option_reply(option, 1);
  if (option == 10) {
    return join(option_reply(10, 4, join(be32(5), text(server.context))), reply);
  }
  if (option == 7) {
    return join(option_reply(7, 3, join({0, 0}, be64(server.size), be16(server.flags))), reply);
  }
  return reply;
}

std::string name_of(int command) {
  constexpr const char* kNames[] = {"READ",  "WRITE", "DISC",   "FLUSH", "TRIM",
                                    "CACHE", "ZERO",  "STATUS", "RESIZE"};
  return kNames[command];
}

ByteVector structured(std::uint16_t type, std::uint64_t cookie, const ByteVector& payload) {
  return join(be32(0x668e33ef), be16(1), be16(type), be64(cookie),
              be32(static_cast<std::uint32_t>(payload.size())), payload);
}

Task<Done> serve_line(Server& server, Server::Line& line) {
  Channel& channel = *line.channel;
  Done good = co_await send_bytes(channel, greeting());
  std::string flags(4, '\0');
  if (good) good = co_await read_bytes(channel, flags);
  for (bool ready = false; !ready;) {
    std::string header(16, '\0');
    if (good) good = co_await read_bytes(channel, header);
    if (!good) co_return good;
    const auto option = load_be<std::uint32_t>(bytes_of(header).data() + 8);
    std::string data(load_be<std::uint32_t>(bytes_of(header).data() + 12), '\0');
    good = co_await read_bytes(channel, data);
    const ByteVector reply = answer_to_option(server, option);
    ready = option == 7;
    if (good) good = co_await send_bytes(channel, reply);
  }
  for (;;) {
    std::string header(28, '\0');
    good = co_await read_bytes(channel, header);
    if (!good) co_return good;
    const std::byte* const at = bytes_of(header).data();
    const auto fua = load_be<std::uint16_t>(at + 4) & 1;
    const int command = load_be<std::uint16_t>(at + 6);
    const auto cookie = load_be<std::uint64_t>(at + 8);
    const auto offset = load_be<std::uint64_t>(at + 16);
    const auto length = load_be<std::uint32_t>(at + 24);
    std::string data(command == 1 ? length : 0, '\0');
    if (command == 1) good = co_await read_bytes(channel, data);
    if (!good) co_return good;
    std::string words = name_of(command);
    if (command != 2 && command != 3) {
      words += " " + std::to_string(offset) + "+" + std::to_string(length);
    }
    if (command == 1) words += " " + data.substr(0, 1);
    if (fua) words += " FUA";
    server.log.push_back(words);
    ++line.requests;
    if (command == 2) co_return Done();
    const Server::Answer answer = server.hook(words);
    if (answer == Server::Answer::kNo) continue;
    if (command == 1) server.cache.replace(offset, length, data);
    if (command == 4 || command == 6) server.cache.replace(offset, length, length, '0');
    if (fua) server.disk.replace(offset, length, server.cache.substr(offset, length));
    const bool fails = command == 3 && server.fails_flushes;
    if (command == 3 && !fails) server.disk = server.cache;
    if (command == 3 && server.flushes_slowly) co_await sleep_for(kMs);
    if (answer == Server::Answer::kOnlyDo) continue;
    ByteVector reply = join(be32(0x67446698), be32(fails ? 5 : 0), be64(cookie));
    if (command == 0) {
      const ByteVector payload = join(be64(offset), text(server.cache.substr(offset, length)));
      reply = structured(1, cookie, payload);
    } else if (command == 7) {
      const ByteVector payload = join(be32(5), be32(length), be32(0));
      reply = structured(5, cookie, payload);
    }
    good = co_await send_bytes(channel, reply);
    if (!good) co_return good;
  }
}

Task<void> serve_and_hang_up(Server& server, std::shared_ptr<Server::Line> line) {
  (void)co_await serve_line(server, *line);
  line->channel->abort();
  line->ended = true;
}

class RemoteExportTest : public testing::Test {
 protected:
  using Answer = Server::Answer;

  std::shared_ptr<AioContext> make_context(const char* name) {
    AioContextOptions options;
    options.name = name;
    options.poll_max_ns = 0;
    options.clock = &clock_;
    return AioContext::create(options);
  }

  Task<Result<std::unique_ptr<NbdClient>>> dial(std::stop_token stop) {
    ++server_.tries;
    server_.tried_at.push_back(clock_.now_ns());
    if (server_.refuses) co_return fail(ECONNREFUSED, "connect");
    auto ends = make_memory_channels();
    auto line = std::make_shared<Server::Line>(Server::Line{std::move(ends.second)});
    server_.lines.push_back(line);
    if (server_.greets) spawn(*b_, serve_and_hang_up(server_, line), "server");
    NbdClientOptions options;
    options.wishes.export_name = "disk";
    options.wishes.meta_contexts = {"base:allocation"};
    options.wishes.extended_headers = false;
    co_return co_await NbdClient::connect(std::move(ends.first), options, std::move(stop));
  }

  void open(unsigned connections = 1) {
    if (options_.contexts.empty()) options_.contexts = {a_.get()};
    options_.connections = connections;
    std::optional<Result<Export>> opened;
    start(RemoteExport::open([this](std::stop_token stop) { return dial(std::move(stop)); },
                             options_),
          opened);
    finish(opened);
    ASSERT_TRUE(*opened) << opened->error().message();
    export_ = std::move(**opened);
    server_.log.clear();
  }

  void TearDown() override {
    if (export_) close();
    server_.hang_up();
    settle();
  }

  void close() {
    std::optional<Done> closed;
    start(closing(*export_), closed);
    settle();
    for (int i = 0; i < 20 && !closed; ++i) pass(kMs * 1000);
    ASSERT_TRUE(closed) << "close() takes for ever";
    export_.reset();
  }
  static Task<Done> closing(RemoteExport& remote) { co_return co_await remote.close(); }

  template <class T>
  static Task<void> keep(Task<T> task, std::optional<T>& result) {
    result.emplace(co_await std::move(task));
  }
  template <class T>
  void start(Task<T> task, std::optional<T>& result) {
    const ContextScope scope(*a_);
    Coroutine::create(keep(std::move(task), result), "test")->enter();
    settle();
  }
  void settle() {
    for (int quiet = 0; quiet < 3; ++quiet) {
      while (a_->poll(false) || b_->poll(false)) quiet = 0;
    }
  }
  template <class T>
  void finish(const std::optional<T>& result) {
    settle();
    ASSERT_TRUE(result) << "it has not ended";
  }
  void pass(std::int64_t ns) {
    clock_.advance_ns(ns);
    settle();
  }

  static Task<Done> write_task(RemoteExport& remote, std::uint64_t at, std::string data,
                               std::uint16_t flags, std::stop_token stop = {}) {
    const iovec piece{data.data(), data.size()};
    co_return co_await remote.writev(at, std::span(&piece, 1), flags, std::move(stop));
  }
  Task<Done> writing(std::uint64_t at, std::string data, std::uint16_t flags = 0,
                     std::stop_token stop = {}) {
    return write_task(*export_, at, std::move(data), flags, std::move(stop));
  }
  int code(Task<Done> task) {
    std::optional<Done> done;
    start(std::move(task), done);
    if (!done) return -1;
    words_ = *done ? "" : done->error().doing();
    return *done ? 0 : done->error().code();
  }
  int write(std::uint64_t at, std::string data, std::uint16_t flags = 0) {
    return code(writing(at, std::move(data), flags));
  }
  int flush() { return code(export_->flush()); }
  std::string read(std::uint64_t at, std::size_t size) {
    std::string buffer(size, '?');
    EXPECT_EQ(code(export_->read(at, room_of(buffer))), 0) << words_;
    return buffer;
  }

  std::ptrdiff_t writes_sent() const {
    return std::ranges::count_if(server_.log, [](auto& s) { return s.starts_with("WRITE"); });
  }

  /// And the client sees it.
  void hang_up() {
    server_.hang_up();
    settle();
  }

  /// The client has yet to find out. What it sends from then on is in the log.
  void crash_unseen() {
    server_.crash();
    server_.log.clear();
  }

  /// One connection goes, and the client sees it.
  void lose(std::size_t line) {
    server_.lines[line]->channel->abort();
    settle();
  }

  /// Until told otherwise, requests that begin with `prefix` get `answer`.
  void when(std::string prefix, Answer answer) {
    server_.hook = [prefix = std::move(prefix), answer](const std::string& words) {
      return words.starts_with(prefix) ? answer : Answer::kYes;
    };
  }
  void well() { when("nothing", Answer::kYes); }
  /// Each line from now on carries so many requests.
  void break_after(int requests) {
    server_.hook = [this, requests, left = 0, lines = std::size_t{0}](const std::string&) mutable {
      if (std::exchange(lines, server_.lines.size()) != server_.lines.size()) left = requests;
      if (--left < 0) server_.hang_up();
      return Answer::kYes;
    };
  }

  ManualClock clock_;
  std::shared_ptr<AioContext> a_ = make_context("a");
  std::shared_ptr<AioContext> b_ = make_context("b");
  Server server_;
  RemoteExportOptions options_;
  Export export_;
  std::string words_;
};

using Log = std::vector<std::string>;

TEST_F(RemoteExportTest, SendsReadsStatusCacheAndFlushAgain) {
  open();
  std::string buffer(4, '?');
  std::optional<Done> read, cached, flushed;
  std::optional<Result<std::vector<ContextExtents>>> status;
  when("", Answer::kNo);
  start(export_->read(8, room_of(buffer)), read);
  start(export_->cache(0, 512), cached);
  start(export_->flush(), flushed);
  start(export_->block_status(0, 512), status);
  EXPECT_EQ(server_.log.size(), 4u);
  well();
  hang_up();
  ASSERT_TRUE(read && cached && flushed && status);
  EXPECT_TRUE(*read && *cached && *flushed && *status);
  EXPECT_EQ(buffer, "....");
  EXPECT_EQ(server_.log.size(), 8u);
  EXPECT_EQ(export_->statistics().reconnected, 1u);
}

TEST_F(RemoteExportTest, SendsKeptWritesAgainBeforeAnythingElse) {
  open();
  EXPECT_EQ(write(0, "aaaa"), 0);
  EXPECT_EQ(write(2, "bbbb"), 0);
  EXPECT_EQ(code(export_->zero(4, 4)), 0);
  EXPECT_EQ(code(export_->trim(100, 4)), 0);
  crash_unseen();
  EXPECT_EQ(read(0, 8), "aabb0000");
  EXPECT_EQ(server_.log, (Log{"WRITE 0+2 a", "WRITE 2+2 b", "ZERO 4+4", "TRIM 100+4", "READ 0+8"}));
  EXPECT_EQ(flush(), 0);
  EXPECT_EQ(server_.disk.substr(0, 8), "aabb0000");
}

TEST_F(RemoteExportTest, ForgetsWritesThatAFlushCovered) {
  open();
  EXPECT_EQ(write(0, "aaaa"), 0);
  EXPECT_EQ(flush(), 0);
  EXPECT_EQ(export_->statistics().kept_bytes, 0u);
  EXPECT_EQ(write(4, "bbbb"), 0);
  crash_unseen();
  EXPECT_EQ(read(0, 8), "aaaabbbb");
  EXPECT_EQ(server_.log, (Log{"WRITE 4+4 b", "READ 0+8"}));
}

TEST_F(RemoteExportTest, AFlushDoesNotCoverWhatWasAcknowledgedAfterItBegan) {
  for (const bool kept : {true, false}) {
    SCOPED_TRACE(kept);
    server_ = Server();
    options_.keep_bytes = kept ? 1000 : 0;
    open(2);
    EXPECT_EQ(write(0, "aaaa"), 0);  // over the first
    server_.flushes_slowly = true;
    std::optional<Done> flushed;
    start(export_->flush(), flushed);  // over the second
    EXPECT_FALSE(flushed);
    EXPECT_EQ(write(4, "bbbb"), 0);
    pass(2 * kMs);
    finish(flushed);
    EXPECT_TRUE(*flushed);
    server_.flushes_slowly = false;
    server_.crash();
    settle();
    EXPECT_EQ(read(0, 8), kept ? "aaaabbbb" : "aaaa....");
    EXPECT_EQ(flush(), kept ? 0 : EIO);
    close();
  }
}

TEST_F(RemoteExportTest, AFailedFlushCoversNothing) {
  open();
  EXPECT_EQ(write(0, "aaaa"), 0);
  std::stop_source stop;
  stop.request_stop();
  EXPECT_EQ(code(export_->flush(stop.get_token())), ECANCELED);
  server_.crash();
  EXPECT_EQ(read(0, 4), "aaaa");
}

TEST_F(RemoteExportTest, SendsOnlyWhatNoLaterWriteHasWrittenOver) {
  open();
  EXPECT_EQ(write(0, "aaaaaaaaaaaa"), 0);
  EXPECT_EQ(write(2, "bb"), 0);
  EXPECT_EQ(write(6, "cc", kCommandFua), 0);
  EXPECT_EQ(write(3, "dddd"), 0);
  EXPECT_EQ(code(export_->zero(20, 4)), 0);
  EXPECT_EQ(write(20, "eeee"), 0);
  hang_up();
  server_.log.clear();
  EXPECT_EQ(read(0, 12), "aabddddcaaaa");
  EXPECT_EQ(server_.log, (Log{"WRITE 8+4 a", "WRITE 0+2 a", "WRITE 2+1 b", "WRITE 3+4 d",
                              "WRITE 20+4 e", "READ 0+12"}));
  EXPECT_EQ(export_->statistics().replayed, 4u);
}

TEST_F(RemoteExportTest, DurableWritesAreKeptOnlyWhereAnOlderOneWouldCoverThem) {
  open();
  EXPECT_EQ(write(100, "xxxx", kCommandFua), 0);
  EXPECT_EQ(export_->statistics().kept_bytes, 0u);
  EXPECT_EQ(write(0, "aaaa"), 0);
  EXPECT_EQ(write(2, "bb", kCommandFua), 0);
  crash_unseen();
  EXPECT_EQ(read(0, 4), "aabb");
  EXPECT_EQ(server_.log, (Log{"WRITE 0+2 a", "READ 0+4"}));
}

TEST_F(RemoteExportTest, TheNextFlushSaysOnceThatWritesWereNotKept) {
  options_.keep_bytes = 0;
  open();
  EXPECT_EQ(write(0, "aaaa"), 0);
  EXPECT_EQ(export_->statistics().unkept_bytes, 4u);
  server_.crash();
  EXPECT_EQ(read(0, 4), "....");
  EXPECT_EQ(flush(), EIO);
  EXPECT_EQ(words_,
            "FLUSH: writes that were acknowledged before the connection was lost may be lost");
  EXPECT_EQ(flush(), 0);
}

TEST_F(RemoteExportTest, CloseSaysThatWritesWereNotKeptIfNoFlushDid) {
  for (const bool flushed : {true, false}) {
    options_.keep_bytes = 0;
    open();
    EXPECT_EQ(write(0, "aaaa"), 0);
    server_.crash();
    EXPECT_EQ(read(0, 4), "....");
    if (flushed) {
      EXPECT_EQ(flush(), EIO);
    }
    EXPECT_EQ(code(closing(*export_)), flushed ? 0 : EIO) << words_;
    export_.reset();
  }
}

TEST_F(RemoteExportTest, AFlushThatSucceededBeforeSettlesWhatWasNotKept) {
  options_.keep_bytes = 0;
  open();
  EXPECT_EQ(write(0, "aaaa"), 0);
  EXPECT_EQ(flush(), 0);
  EXPECT_EQ(write(8, "bbbb", kCommandFua), 0);
  EXPECT_EQ(export_->statistics().unkept_bytes, 0u);
  server_.crash();
  EXPECT_EQ(read(0, 4), "aaaa");
  EXPECT_EQ(flush(), 0);
}

TEST_F(RemoteExportTest, KeepsNoMoreThanItMayAndNothingThatWouldCoverWhatItCannotKeep) {
  options_.keep_bytes = 3 * 64 + 12;
  open();
  EXPECT_EQ(write(0, "aaaa"), 0);
  EXPECT_EQ(write(100, "bbbb"), 0);
  EXPECT_EQ(write(200, "cccc"), 0);
  EXPECT_EQ(export_->statistics().kept_bytes, 3u * 64 + 12);
  EXPECT_EQ(write(102, "dddd"), 0);
  EXPECT_EQ(export_->statistics().kept_bytes, 2u * 64 + 8);
  EXPECT_EQ(export_->statistics().unkept_bytes, 8u);
  hang_up();  // nothing is lost this time
  server_.log.clear();
  EXPECT_EQ(read(100, 6), "bbdddd");
  EXPECT_EQ(server_.log, (Log{"WRITE 0+4 a", "WRITE 200+4 c", "READ 100+6"}));
  EXPECT_EQ(flush(), EIO);
}

TEST_F(RemoteExportTest, WhatCannotBeKeptTakesWithItWhatLiesUnderThat) {
  options_.keep_bytes = 3 * 64 + 12;
  open();
  EXPECT_EQ(write(0, "aaaa"), 0);
  EXPECT_EQ(write(2, "bbbb"), 0);
  EXPECT_EQ(write(100, "xxxx"), 0);
  EXPECT_EQ(write(4, "cccc"), 0);  // not over a, but over b, which is over a
  EXPECT_EQ(export_->statistics().kept_bytes, 64u + 4);
  EXPECT_EQ(export_->statistics().unkept_bytes, 12u);
  hang_up();
  server_.log.clear();
  EXPECT_EQ(read(0, 8), "aabbcccc");
  EXPECT_EQ(server_.log, (Log{"WRITE 100+4 x", "READ 0+8"}));
}

TEST_F(RemoteExportTest, WritesThatWereNotAcknowledgedFail) {
  open();
  when("WRITE", Answer::kOnlyDo);
  std::optional<Done> written;
  start(writing(0, "aaaa"), written);
  well();
  server_.log.clear();
  hang_up();
  finish(written);
  ASSERT_FALSE(*written);
  EXPECT_EQ(written->error().code(), ECONNRESET);
  EXPECT_TRUE(written->error().doing().ends_with("may have been carried out"))
      << written->error().doing();
  EXPECT_EQ(read(0, 4), "aaaa");
  EXPECT_EQ(server_.log, (Log{"READ 0+4"}));
}

TEST_F(RemoteExportTest, AWriteAfterAnUnseenLossWasNotSentAndIs) {
  open();
  hang_up();
  EXPECT_EQ(write(0, "aaaa"), 0);
}

TEST_F(RemoteExportTest, SendsUnacknowledgedWritesAgainIfItMayAndNothingThatOverlapsBefore) {
  options_.replay_writes = true;
  open();
  EXPECT_EQ(write(0, "kkkk"), 0);
  when("", Answer::kNo);
  std::optional<Done> first, second, third, read;
  std::string buffer(4, '?');
  start(writing(0, "aaaa"), first);
  start(writing(2, "bbbb"), second);
  server_.refuses = true;
  server_.crash();
  settle();
  // These come while all is down.
  start(writing(4, "cccc"), third);
  start(export_->read(2, room_of(buffer)), read);
  server_.log.clear();
  // The first is held back: whatever overlaps it has to wait.
  when("WRITE 0+4 a", Answer::kNo);
  server_.refuses = false;
  pass(150 * kMs);
  EXPECT_EQ(server_.log, (Log{"WRITE 0+4 k", "WRITE 0+4 a"}));
  well();
  server_.log.clear();
  hang_up();
  pass(1000 * kMs);
  ASSERT_TRUE(first && second && third && read);
  EXPECT_TRUE(*first && *second && *third && *read);
  ASSERT_GE(server_.log.size(), 3u);
  EXPECT_EQ(Log(server_.log.begin(), server_.log.begin() + 3),
            (Log{"WRITE 0+4 k", "WRITE 0+4 a", "WRITE 2+4 b"}));
  EXPECT_EQ(buffer.substr(0, 2), "bb");
  EXPECT_EQ(server_.cache.substr(0, 8), "aabbcccc");
}

TEST_F(RemoteExportTest, AllConnectionsUnflushedWritesCountAsLostOnce) {
  open(2);
  EXPECT_EQ(export_->connections(), 2u);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(write(4 * static_cast<unsigned>(i), "aaaa"), 0);
  server_.log.clear();
  server_.crash();
  settle();
  EXPECT_EQ(read(0, 4), "aaaa");
  EXPECT_EQ(read(0, 4), "aaaa");
  EXPECT_EQ(export_->statistics().reconnected, 2u);
  EXPECT_EQ(writes_sent(), 4);
}

TEST_F(RemoteExportTest, SendsNothingAgainToAServerThatAnswersOverAnotherConnection) {
  for (const bool kept : {true, false}) {
    SCOPED_TRACE(kept);
    server_ = Server();
    options_.keep_bytes = kept ? 1000 : 0;
    open(2);
    EXPECT_EQ(write(0, "aaaa"), 0);  // over the first
    server_.log.clear();
    lose(0);
    // If they were sent again, and held up, what comes after it would come before it.
    when("WRITE 0+4 a", Answer::kNo);
    EXPECT_EQ(read(0, 4), "aaaa");
    EXPECT_EQ(write(0, "bbbb"), 0);
    EXPECT_EQ(export_->statistics().reconnected, 1u);
    EXPECT_EQ(writes_sent(), 1);
    EXPECT_EQ(flush(), 0);
    // The second was there all the time; so is the third now.
    well();
    EXPECT_EQ(write(8, "cccc"), 0);
    EXPECT_EQ(write(16, "dddd"), 0);
    server_.crash();
    settle();
    EXPECT_EQ(read(0, 20), kept ? "bbbb....cccc....dddd" : "bbbb................");
    EXPECT_EQ(flush(), kept ? 0 : EIO);
    EXPECT_EQ(flush(), 0);
    close();
  }
}

TEST_F(RemoteExportTest, AConnectionThatDoesNotAnswerTellsNothingOfTheServer) {
  options_.goodbye_timeout_ns = 100 * kMs;
  open(2);
  EXPECT_EQ(write(0, "aaaa"), 0);            // over the first
  EXPECT_EQ(code(export_->cache(0, 4)), 0);  // over the second
  lose(0);
  server_.log.clear();
  when("READ 0+1", Answer::kNo);
  EXPECT_EQ(code(export_->cache(0, 4)), 0);  // finds the first lost
  std::optional<Done> written;
  start(writing(0, "bbbb"), written);
  EXPECT_FALSE(written);
  pass(101 * kMs);
  finish(written);
  EXPECT_TRUE(*written);
  ASSERT_GE(server_.log.size(), 4u);
  EXPECT_EQ(Log(server_.log.begin(), server_.log.begin() + 4),
            (Log{"CACHE 0+4", "READ 0+1", "WRITE 0+4 a", "WRITE 0+4 b"}));
  EXPECT_EQ(export_->statistics().lost, 2u);
}

TEST_F(RemoteExportTest, AfterAReplayThatBrokeOffOnlyNewConnectionsAreUsed) {
  open(2);
  EXPECT_EQ(write(0, "aaaa"), 0);
  server_.log.clear();
  when("WRITE 0+4 a", Answer::kNo);  // it may be carried out later
  server_.crash();
  settle();
  std::optional<Done> written;
  start(writing(0, "bbbb"), written);  // finds both lost
  ASSERT_EQ(server_.tries, 4);
  EXPECT_EQ(server_.log, (Log{"WRITE 0+4 a"}));
  const std::size_t first = server_.lines[2]->requests > 0 ? 2 : 3;
  server_.refuses = true;
  well();
  lose(first);
  EXPECT_EQ(server_.lines[5 - first]->requests, 0);
  EXPECT_EQ(writes_sent(), 1);
  server_.refuses = false;
  pass(1000 * kMs);
  finish(written);
  EXPECT_TRUE(*written);
  EXPECT_EQ(server_.log[1], "WRITE 0+4 a");
  EXPECT_EQ(server_.cache.substr(0, 4), "bbbb");
}

TEST_F(RemoteExportTest, OthersServeWhileOneIsDown) {
  open(2);
  server_.refuses = true;
  lose(1);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(write(0, "aaaa"), 0);
  EXPECT_EQ(flush(), 0);
  EXPECT_EQ(export_->statistics().lost, 1u);
  EXPECT_EQ(export_->statistics().reconnected, 0u);
}

TEST_F(RemoteExportTest, RequestsTakeAConnectionOfTheirOwnContext) {
  options_.contexts = {b_.get(), a_.get()};
  open(2);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(write(0, "aaaa"), 0);
  EXPECT_EQ(server_.lines[0]->requests, 0);
  EXPECT_EQ(server_.lines[1]->requests, 5);
  // Any will do where that is down.
  server_.refuses = true;
  lose(1);
  EXPECT_EQ(write(0, "aaaa"), 0);
  EXPECT_EQ(server_.lines[0]->requests, 1);
}

TEST_F(RemoteExportTest, DelaysAreThoseOfTheSeed) {
  std::vector<std::int64_t> delays[3];
  for (const std::size_t turn : {0u, 1u, 2u}) {
    server_ = Server();
    options_.seed = turn == 2 ? 7 : 1;
    open();
    hang_up();
    server_.refuses = true;
    std::optional<Done> written;
    const std::int64_t began = clock_.now_ns();
    server_.tried_at.clear();
    std::stop_source stop;
    // The first try succeeds until somebody notices the loss.
    start(writing(0, "aaaa", 0, stop.get_token()), written);
    for (int i = 0; i < 1000; ++i) pass(kMs);
    stop.request_stop();
    finish(written);
    for (const std::int64_t at : server_.tried_at) delays[turn].push_back(at - began);
    close();
  }
  EXPECT_GE(delays[0].size(), 4u);
  EXPECT_EQ(delays[0], delays[1]);
  EXPECT_NE(delays[0], delays[2]);
}

TEST_F(RemoteExportTest, AResizeThatWasNotAcknowledgedFails) {
  open();
  when("RESIZE", Answer::kNo);
  std::optional<Done> resized;
  start(export_->resize(8192), resized);
  hang_up();
  finish(resized);
  ASSERT_FALSE(*resized);
  EXPECT_EQ(resized->error().code(), ECONNRESET);
  EXPECT_EQ(export_->size(), kSize);
  close();
  well();
  open(2);
  EXPECT_EQ(code(export_->resize(8192)), ENOTSUP);
}

TEST_F(RemoteExportTest, AChangedSizeIsTheOneToComeBackWith) {
  open();
  EXPECT_EQ(code(export_->resize(8192)), 0);
  EXPECT_EQ(export_->size(), 8192u);
  server_.size = 8192;
  hang_up();
  EXPECT_EQ(write(0, "aaaa"), 0);
}

TEST_F(RemoteExportTest, DoesNotOpenWhereConnectionsDisagree) {
  options_.contexts = {a_.get()};
  options_.connections = 2;
  std::optional<Result<Export>> opened;
  start(RemoteExport::open(
            [this](std::stop_token stop) {
              server_.size = kSize * (1 + static_cast<unsigned>(server_.tries));
              return dial(std::move(stop));
            },
            options_),
        opened);
  finish(opened);
  ASSERT_FALSE(*opened);
  EXPECT_EQ(opened->error().code(), EMEDIUMTYPE);
}

TEST_F(RemoteExportTest, KeptWritesAreNotSentWhileOthersAreInFlight) {
  open(2);
  EXPECT_EQ(write(0, "aaaa"), 0);  // over the first
  when("WRITE 0+4 b", Answer::kNo);
  std::optional<Done> late, next;
  start(writing(0, "bbbb"), late);  // over the second
  server_.log.clear();
  lose(0);
  EXPECT_EQ(code(export_->cache(0, 4)), 0);  // finds the first lost
  EXPECT_EQ(server_.tries, 3);
  start(writing(0, "cccc"), next);
  EXPECT_EQ(server_.log, (Log{"CACHE 0+4"}));
  lose(1);
  finish(late);
  EXPECT_EQ(late->error().code(), ECONNRESET);
  finish(next);
  EXPECT_TRUE(*next);
  ASSERT_GE(server_.log.size(), 2u);
  EXPECT_EQ(server_.log[1], "WRITE 0+4 a");
  EXPECT_EQ(server_.cache.substr(0, 4), "cccc");
}

TEST_F(RemoteExportTest, TriesAtOnceThenTwiceAsLateEachTimeAndGivesUp) {
  options_.reconnect_timeout_ns = 2000 * kMs;
  open();
  server_.refuses = true;
  server_.tried_at.clear();
  hang_up();
  std::string buffer(4, '?');
  std::optional<Done> read;
  start(export_->read(0, room_of(buffer)), read);
  EXPECT_EQ(server_.tried_at.size(), 1u);
  for (int i = 0; i < 3000 && !read; ++i) pass(kMs);
  ASSERT_TRUE(read);
  ASSERT_FALSE(*read);
  EXPECT_EQ(read->error().code(), ECONNREFUSED);
  ASSERT_EQ(server_.tried_at.size(), 5u);  // 0, 100, 300, 700, 1500
  for (std::size_t i = 1; i < 5; ++i) {
    const std::int64_t gap = server_.tried_at[i] - server_.tried_at[i - 1];
    const std::int64_t wanted = (100 << (i - 1)) * kMs;
    EXPECT_GE(gap, wanted * 3 / 4);
    EXPECT_LE(gap, wanted * 5 / 4 + kMs);
  }
  // For good.
  EXPECT_EQ(write(0, "aaaa"), ECONNREFUSED);
}

TEST_F(RemoteExportTest, NeverReconnectsIfItIsNotTo) {
  options_.reconnect_timeout_ns = 0;
  open();
  hang_up();
  EXPECT_EQ(write(0, "aaaa"), ECONNRESET);
  EXPECT_EQ(server_.tries, 1);
}

TEST_F(RemoteExportTest, GivesUpAServerThatDoesNotGreet) {
  options_.reconnect_timeout_ns = 2000 * kMs;
  open();
  server_.greets = false;
  hang_up();
  std::optional<Done> written;
  start(writing(0, "aaaa"), written);
  EXPECT_FALSE(written);
  pass(2001 * kMs);
  finish(written);
  EXPECT_EQ(written->error().code(), ETIMEDOUT);
}

TEST_F(RemoteExportTest, GivesUpAServerThatDoesNotAnswerKeptWrites) {
  options_.reconnect_timeout_ns = 2000 * kMs;
  open();
  EXPECT_EQ(write(0, "aaaa"), 0);
  when("WRITE", Answer::kNo);
  server_.crash();
  std::optional<Done> flushed;
  start(export_->flush(), flushed);
  EXPECT_FALSE(flushed);
  pass(2001 * kMs);
  finish(flushed);
  EXPECT_FALSE(*flushed);
}

TEST_F(RemoteExportTest, StopsWhatWaitsForAReconnect) {
  open();
  server_.refuses = true;
  hang_up();
  std::stop_source stop;
  std::optional<Done> written;
  start(writing(0, "aaaa", 0, stop.get_token()), written);
  EXPECT_FALSE(written);
  stop.request_stop();
  finish(written);
  EXPECT_EQ(written->error().code(), ECANCELED);
}

TEST_F(RemoteExportTest, AStoppedWriteThatWasSentOnceMayHaveBeenCarriedOut) {
  options_.replay_writes = true;
  open();
  when("WRITE", Answer::kNo);
  std::stop_source stop;
  std::optional<Done> written;
  start(writing(0, "aaaa", 0, stop.get_token()), written);
  server_.refuses = true;
  hang_up();
  EXPECT_FALSE(written);
  stop.request_stop();
  finish(written);
  EXPECT_EQ(written->error().code(), EINPROGRESS);
}

TEST_F(RemoteExportTest, AnotherExportIsNotUsed) {
  struct Change {
    const char* words;
    std::function<void(Server&)> make;
  };
  const Change changes[] = {
      {"bytes instead of", [](Server& s) { s.size = 8192; }},
      {"flags", [](Server& s) { s.flags &= ~kTransmissionSendTrim; }},
      {"several connections are not allowed",
       [](Server& s) { s.flags &= ~kTransmissionCanMultiConn; }},
      {"read-only", [](Server& s) { s.flags |= kTransmissionReadOnly; }},
      {"metadata contexts", [](Server& s) { s.context = "qemu:other"; }},
  };
  for (const Change& change : changes) {
    SCOPED_TRACE(change.words);
    server_ = Server();
    open(2);
    change.make(server_);
    hang_up();
    EXPECT_EQ(write(0, "aaaa"), EMEDIUMTYPE);
    EXPECT_NE(words_.find(change.words), std::string::npos) << words_;
    EXPECT_EQ(flush(), EMEDIUMTYPE);
    close();
  }
}

TEST_F(RemoteExportTest, OneConnectionNeedsNoLeaveForSeveral) {
  open(1);
  server_.flags &= ~kTransmissionCanMultiConn;
  hang_up();
  EXPECT_EQ(write(0, "aaaa"), 0);
}

TEST_F(RemoteExportTest, ARequestThatLosesEveryConnectionIsGivenUp) {
  open();
  server_.hook = [this](const std::string& words) {
    if (words.starts_with("READ")) server_.hang_up();
    return Answer::kYes;
  };
  std::string buffer(4, '?');
  std::optional<Done> read;
  start(export_->read(0, room_of(buffer)), read);
  for (int i = 0; i < 100 && !read; ++i) pass(1000 * kMs);
  ASSERT_TRUE(read);
  EXPECT_FALSE(*read);
  EXPECT_LE(server_.log.size(), 10u);
}

TEST_F(RemoteExportTest, OnALineThatBreaksOftenOnlyTheOldestRequestIsToBlame) {
  open();
  constexpr int kRequests = 60;
  std::vector<std::string> buffers(kRequests, std::string(4, '?'));
  std::vector<std::optional<Done>> reads(kRequests);
  when("", Answer::kNo);
  for (int i = 0; i < kRequests; ++i) start(export_->read(0, room_of(buffers[i])), reads[i]);
  break_after(4);
  hang_up();
  for (int i = 0; i < 100; ++i) pass(100 * kMs);
  for (const auto& read : reads) {
    ASSERT_TRUE(read);
    EXPECT_TRUE(*read) << read->error().message();
  }
  // Most of them were in flight over more lost lines than one may be to blame for.
  EXPECT_GE(server_.tries, 15);
}

TEST_F(RemoteExportTest, ALineThatBreaksOftenCarriesKeptWritesInPortions) {
  options_.reconnect_timeout_ns = 2500 * kMs;
  open();
  constexpr int kWrites = 100;
  for (int i = 0; i < kWrites; ++i) {
    ASSERT_EQ(write(i * 8, std::string(4, static_cast<char>('a' + i % 26))), 0);
  }
  break_after(6);
  server_.crash();
  std::optional<Done> flushed;
  start(export_->flush(), flushed);
  // Longer than a server is waited for that tells nothing.
  for (int i = 0; i < 200 && !flushed; ++i) pass(100 * kMs);
  ASSERT_TRUE(flushed);
  EXPECT_TRUE(*flushed) << flushed->error().message();
  for (int i = 0; i < kWrites; ++i) {
    EXPECT_EQ(server_.disk.substr(i * 8, 4), std::string(4, static_cast<char>('a' + i % 26))) << i;
  }
  EXPECT_EQ(export_->statistics().kept_bytes, 0u);
  EXPECT_GE(server_.tries, 15);
}

TEST_F(RemoteExportTest, AFlushBehindAPortionThatFailsIsToldByTheNextOne) {
  open();
  for (int i = 0; i < 100; ++i) ASSERT_EQ(write(i * 8, "aaaa"), 0);
  server_.fails_flushes = true;
  server_.crash();
  EXPECT_EQ(read(0, 4), "aaaa");
  server_.fails_flushes = false;
  EXPECT_EQ(flush(), EIO);
  EXPECT_NE(export_->statistics().kept_bytes, 0u);
  EXPECT_EQ(flush(), 0);
  EXPECT_EQ(export_->statistics().kept_bytes, 0u);
}

TEST_F(RemoteExportTest, CloseDoesNotWaitForAServerThatNeverAnswers) {
  open();
  when("READ", Answer::kNo);
  std::string buffer(4, '?');
  std::optional<Done> read, closed;
  start(export_->read(0, room_of(buffer)), read);
  start(closing(*export_), closed);
  pass(4900 * kMs);
  EXPECT_FALSE(closed);
  pass(200 * kMs);
  finish(closed);
  finish(read);
  EXPECT_FALSE(*read);
  export_.reset();
}

// The reconnect waits for a server, which may be in no hurry: it is being drained, too.
TEST_F(RemoteExportTest, CloseDoesNotWaitForAServerThatNeverAnswersKeptWrites) {
  for (const bool soon : {true, false}) {
    SCOPED_TRACE(soon);
    server_ = Server();
    open();
    for (int i = 0; i < 100; ++i) ASSERT_EQ(write(i * 8, "aaaa"), 0);
    when("WRITE", Answer::kNo);
    crash_unseen();
    std::optional<Done> flushed, closed;
    start(export_->flush(), flushed);
    EXPECT_EQ(writes_sent(), 16);
    if (!soon) pass(30'000 * kMs);
    start(closing(*export_), closed);
    finish(flushed);
    EXPECT_EQ(flushed->error().code(), ESHUTDOWN);
    EXPECT_FALSE(closed);
    pass(5100 * kMs);
    ASSERT_TRUE(closed) << "close() takes for ever";
    EXPECT_EQ(closed->error().code(), EIO);
    EXPECT_EQ(writes_sent(), 16);
    export_.reset();
  }
}

TEST_F(RemoteExportTest, CloseLetsAServerAnswerTheKeptWritesThatItWasSent) {
  open();
  EXPECT_EQ(write(0, "aaaa"), 0);
  server_.flushes_slowly = true;
  for (int i = 0; i < 100; ++i) ASSERT_EQ(write(i * 8, "aaaa"), 0);
  crash_unseen();
  std::optional<Done> flushed, closed;
  start(export_->flush(), flushed);
  start(closing(*export_), closed);
  EXPECT_FALSE(closed);
  pass(2 * kMs);
  finish(closed);
  finish(flushed);
  EXPECT_FALSE(*flushed);
  EXPECT_FALSE(*closed);  // what came after the first portion was not sent
  export_.reset();
}

TEST_F(RemoteExportTest, CloseSaysThatKeptWritesWereNotSentAgain) {
  for (const bool flushed : {false, true}) {
    SCOPED_TRACE(flushed);
    server_ = Server();
    open();
    EXPECT_EQ(write(0, "aaaa"), 0);
    if (flushed) {
      EXPECT_EQ(flush(), 0);
    }
    server_.refuses = true;
    server_.crash();
    settle();
    EXPECT_EQ(code(closing(*export_)), flushed ? 0 : EIO) << words_;
    export_.reset();
  }
}

TEST_F(RemoteExportTest, CloseSaysGoodbyeAndDoesNotWaitForAReconnect) {
  open(2);
  close();
  EXPECT_EQ(server_.log, (Log{"DISC", "DISC"}));
  server_ = Server();
  open();
  server_.refuses = true;
  hang_up();
  std::optional<Done> written, closed;
  start(writing(0, "aaaa"), written);
  start(closing(*export_), closed);
  finish(closed);
  finish(written);
  EXPECT_EQ(written->error().code(), ESHUTDOWN);
  export_.reset();
}

}  // namespace
}  // namespace roost::nbd
