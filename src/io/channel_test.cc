// SPDX-License-Identifier: MIT
// Every kind of channel passes the same tests, in so far as it is one of two ends.
#include "roost/io/channel.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <functional>
#include <numeric>

#include "io/test_channel.h"
#ifdef ROOST_TEST_TLS
#include "io/test_certificates.h"
#include "roost/io/tls.h"
#endif
#include "roost/io/command_channel.h"
#include "roost/io/file_channel.h"
#include "roost/io/listener.h"
#include "roost/io/memory_channel.h"
#include "roost/io/pipe_channel.h"
#include "roost/io/socket_channel.h"

namespace {

// A name server that does not answer before it is told to.
struct SlowLookup {
  std::atomic<bool> begun{false};
  std::atomic<bool> may_end{false};
  std::atomic<bool> ended{false};
} slow_lookup;

}  // namespace

// In place of the C library's.
extern "C" int getaddrinfo(const char* host, const char* port, const addrinfo* hints,
                           addrinfo** list) {
  if (std::strcmp(host, "slow.test") == 0) {
    if (hints->ai_flags & AI_NUMERICHOST) return EAI_NONAME;
    slow_lookup.begun = true;
    slow_lookup.begun.notify_all();
    slow_lookup.may_end.wait(false);
    slow_lookup.ended = true;
    slow_lookup.ended.notify_all();
    return EAI_AGAIN;
  }
  static const auto next = reinterpret_cast<decltype(&getaddrinfo)>(::dlsym(RTLD_NEXT, __func__));
  return next(host, port, hints, list);
}

namespace roost {
namespace {

using Size = Result<std::size_t>;
using Done = Result<void>;
using Ends = std::pair<std::unique_ptr<Channel>, std::unique_ptr<Channel>>;

struct Kind {
  const char* name;
  std::function<Ends(ChannelTest&)> make;
};

Ends make_sockets(ChannelTest&) {
  auto ends = SocketChannel::pair();
  return {std::move(ends->first), std::move(ends->second)};
}

Ends make_pipes(ChannelTest&) {
  int to[2];
  int fro[2];
  EXPECT_EQ(::pipe2(to, O_CLOEXEC), 0);
  EXPECT_EQ(::pipe2(fro, O_CLOEXEC), 0);
  return {std::make_unique<PipeChannel>(UniqueFd(fro[0]), UniqueFd(to[1]), "one"),
          std::make_unique<PipeChannel>(UniqueFd(to[0]), UniqueFd(fro[1]), "other")};
}

Ends make_memory(ChannelTest&) { return make_memory_channels(); }

#ifdef ROOST_TEST_TLS
Ends make_tls(ChannelTest& test) {
  static const TestCertificates certificates;
  const auto server =
      TlsCredentials::load({.role = TlsRole::kServer, .directory = certificates.folder()});
  const auto client =
      TlsCredentials::load({.role = TlsRole::kClient, .directory = certificates.folder()});
  auto below = SocketChannel::pair();
  std::optional<Result<std::unique_ptr<TlsChannel>>> one;
  std::optional<Result<std::unique_ptr<TlsChannel>>> other;
  test.start(TlsChannel::handshake(std::move(below->first), *server), one);
  test.run(TlsChannel::handshake(std::move(below->second), *client, "localhost"), other);
  test.finish(one);
  if (!*one || !*other) ADD_FAILURE() << (*one ? other : one)->error().message();
  return {std::move(**one), std::move(**other)};
}
#endif

class Channels : public ChannelTest, public testing::WithParamInterface<Kind> {
 protected:
  void SetUp() override {
    ::signal(SIGPIPE, SIG_IGN);
    ends_ = GetParam().make(*this);
  }

  Channel& near() { return *ends_.first; }
  Channel& far() { return *ends_.second; }

  void send(std::string_view text) {
    std::optional<Done> sent;
    run(far().write_full(bytes_of(text)), sent);
    ASSERT_TRUE(*sent) << sent->error().message();
  }

  Ends ends_;
};

TEST_P(Channels, CarryBytesBothWaysAndEndWithTheEndOfTheStream) {
  std::string got(16, '\0');
  std::optional<Size> read;
  start(near().read(room_of(got)), read);
  settle();
  EXPECT_FALSE(read) << "there is nothing to read";
  send("hello");
  finish(read);
  ASSERT_TRUE(*read);
  EXPECT_EQ(got.substr(0, **read), "hello");

  std::optional<Done> ended;
  run(far().shutdown(StreamEnd::kWrite), ended);
  ASSERT_TRUE(*ended);
  read.reset();
  run(near().read(room_of(got)), read);
  ASSERT_TRUE(*read);
  EXPECT_EQ(**read, 0u);

  // The other way is still open.
  std::optional<Done> sent;
  start(near().write_full(bytes_of("back")), sent);
  std::string back(4, '\0');
  std::optional<Done> received;
  run(far().read_full(room_of(back)), received);
  EXPECT_EQ(back, "back");
  finish(sent);
}

TEST_P(Channels, MoveMoreThanTheyHoldWhileOneReadsAndTheOtherWrites) {
  std::string much(3 << 20, '\0');
  std::iota(much.begin(), much.end(), '\1');
  std::optional<Done> sent;
  std::optional<Done> received;
  start(far().write_full(bytes_of(much)), sent);
  settle();
  EXPECT_FALSE(sent) << "nobody reads";
  std::string got(much.size(), '\0');
  start_on(b(), near().read_full(room_of(got)), received);
  finish(received);
  finish(sent);
  EXPECT_TRUE(*sent);
  EXPECT_EQ(got, much);
}

TEST_P(Channels, ReadAndWriteSeveralPieces) {
  std::string one = "on";
  std::string two = "etwo";
  const iovec from[] = {as_iovec(bytes_of(one)), as_iovec({}), as_iovec(bytes_of(two))};
  std::optional<Done> sent;
  run(far().writev_full(from), sent);
  std::string first(3, '\0');
  std::string second(3, '\0');
  const iovec to[] = {as_iovec(bytes_of(first)), as_iovec(bytes_of(second))};
  std::optional<Done> received;
  run(near().readv_full(to), received);
  EXPECT_EQ(first, "one");
  EXPECT_EQ(second, "two");
}

TEST_P(Channels, AStoppedReadTakesNothing) {
  std::stop_source stop;
  std::string got(8, '\0');
  std::optional<Size> read;
  start(near().read(room_of(got), stop.get_token()), read);
  settle();
  stop.request_stop();
  finish(read);
  ASSERT_FALSE(*read);
  EXPECT_EQ(read->error().code(), ECANCELED);
  EXPECT_NE(read->error().message().find("nothing was taken"), std::string::npos);
  read.reset();
  run(near().read(room_of(got), stop.get_token()), read);
  EXPECT_FALSE(*read) << "it was stopped beforehand";

  send("kept");
  read.reset();
  run(near().read(room_of(got)), read);
  EXPECT_EQ(got.substr(0, **read), "kept");
}

TEST_P(Channels, WhatAStoppedReadFullHadTakenStaysInTheChannel) {
  std::stop_source stop;
  std::string got(8, '\0');
  std::optional<Done> full;
  send("half");
  start(near().read_full(room_of(got), stop.get_token()), full);
  settle();
  EXPECT_FALSE(full);
  stop.request_stop();
  finish(full);
  ASSERT_FALSE(*full);
  EXPECT_EQ(full->error().code(), ECANCELED);

  send(" and half");
  std::string all(13, '\0');
  full.reset();
  run(near().read_full(room_of(all)), full);
  EXPECT_EQ(all, "half and half");
}

TEST_P(Channels, AStoppedWriteFullSaysHowMuchWasSent) {
  std::stop_source stop;
  const std::string much(3 << 20, 'x');
  std::size_t count = 0;
  std::optional<Done> sent;
  start(far().write_full(bytes_of(much), stop.get_token(), &count), sent);
  settle();
  stop.request_stop();
  finish(sent);
  ASSERT_FALSE(*sent);
  EXPECT_EQ(sent->error().code(), ECANCELED);
  EXPECT_GT(count, 0u);
  EXPECT_LT(count, much.size());

  // A channel that had taken some, but not sent it, does so now.
  std::optional<Done> ended;
  start(far().shutdown(StreamEnd::kWrite), ended);
  std::string got(count, '\0');
  std::optional<Done> received;
  run(near().read_full(room_of(got)), received);
  EXPECT_TRUE(*received);
  finish(ended);
  std::optional<Size> read;
  run(near().read(room_of(got)), read);
  EXPECT_EQ(read->value_or(1), 0u) << "more was sent than was said";
}

TEST_P(Channels, AStreamThatEndsInTheMiddleIsAnErrorThatSaysWhere) {
  send("abc");
  std::optional<Done> ended;
  run(far().shutdown(StreamEnd::kWrite), ended);
  std::string got(5, '\0');
  std::optional<Done> full;
  run(near().read_full(room_of(got)), full);
  ASSERT_FALSE(*full);
  EXPECT_EQ(full->error().code(), ECONNRESET);
  EXPECT_NE(full->error().message().find(near().name() + ": the stream ended after 3 of 5 bytes"),
            std::string::npos)
      << full->error().message();
}

TEST_P(Channels, WritingToWhoHasGoneIsAnError) {
  ends_.second.reset();
  const std::string much(1 << 20, 'x');
  std::optional<Done> sent;
  run(near().write_full(bytes_of(much)), sent);
  ASSERT_FALSE(*sent);
  EXPECT_TRUE(sent->error().code() == EPIPE || sent->error().code() == ECONNRESET)
      << sent->error().message();
}

TEST_P(Channels, AReadThatWaitsReturnsWhenItsDirectionIsShutDown) {
  std::string got(8, '\0');
  std::optional<Size> read;
  start(near().read(room_of(got)), read);
  settle();
  std::optional<Done> ended;
  run(near().shutdown(StreamEnd::kBoth), ended);
  finish(read);
  EXPECT_EQ(read->value_or(1), 0u);
}

TEST_P(Channels, FollowTheirCoroutine) {
  const auto write_from_both = [](Channel& channel, AioContext& b, AioContext*& first,
                                  AioContext*& second) -> Task<Done> {
    Done done = co_await channel.write_full(bytes_of("1"));
    first = channel.context();
    co_await move_to(b);
    if (done) done = co_await channel.write_full(bytes_of("2"));
    second = channel.context();
    co_return done;
  };
  AioContext* first = nullptr;
  AioContext* second = nullptr;
  std::optional<Done> done;
  run(write_from_both(near(), b(), first, second), done);
  EXPECT_EQ(first, &a());
  EXPECT_EQ(second, &b());
}

Task<Size> read_and_say_where(Channel& channel, std::string& got, AioContext*& where) {
  Size size = co_await channel.read(room_of(got));
  where = AioContext::current();
  co_return size;
}

TEST_P(Channels, AreMovedWhileACoroutineWaitsAndTakeItAlong) {
  std::string got(8, '\0');
  AioContext* where = nullptr;
  std::optional<Size> read;
  start(read_and_say_where(near(), got, where), read, "reader");
  settle();
  ASSERT_FALSE(read);
  ASSERT_EQ(near().context(), &a());

  std::optional<Done> moved;
  start_on(b(), near().move_to(b()), moved, "mover");
  finish(moved);
  ASSERT_TRUE(*moved);
  EXPECT_EQ(near().context(), &b());
  EXPECT_FALSE(read);
  send("there");
  finish(read);
  EXPECT_EQ(got.substr(0, read->value_or(0)), "there");
  EXPECT_EQ(where, &b());
}

TEST_P(Channels, AreMovedWhileBothDirectionsWaitAndLoseNothing) {
  std::string much(3 << 20, '\0');
  std::iota(much.begin(), much.end(), '\1');
  std::string got;
  std::string answer(6, '\0');
  std::optional<Done> sent;
  std::optional<Done> received;
  std::optional<Done> answered;
  start(far().write_full(bytes_of(much)), sent, "writer");
  start(far().read_full(room_of(answer)), answered, "reader of the answer");
  settle();
  for (AioContext* to : {&b(), &a(), &b()}) {
    std::optional<Done> moved;
    run(far().move_to(*to), moved);
    ASSERT_TRUE(*moved);
    std::string part(1000, '\0');
    received.reset();
    run(near().read_full(room_of(part)), received);
    ASSERT_TRUE(*received);
    got += part;
  }
  std::string rest(much.size() - got.size(), '\0');
  received.reset();
  run(near().read_full(room_of(rest)), received);
  EXPECT_EQ(got + rest, much);
  finish(sent);
  std::optional<Done> wrote;
  run(near().write_full(bytes_of("answer")), wrote);
  finish(answered);
  EXPECT_EQ(answer, "answer");
}

TEST_P(Channels, ACoroutineElsewhereGoesToWhereTheOtherDirectionIsInUse) {
  std::string got(8, '\0');
  std::optional<Size> read;
  start(near().read(room_of(got)), read, "reader");
  settle();
  std::optional<Done> sent;
  start_on(b(), near().write_full(bytes_of("x")), sent, "writer");
  finish(sent);
  EXPECT_EQ(near().context(), &a());
  send("y");
  finish(read);
}

TEST_P(Channels, ASecondReaderAborts) {
  const auto second_reader = [this] {
    std::string got(8, '\0');
    std::optional<Size> read;
    std::optional<Size> again;
    start(near().read(room_of(got)), read, "first");
    settle();
    start(near().read(room_of(got)), again, "second");
  };
  EXPECT_DEATH(second_reader(), "coroutine 'second' is a second reader of channel .*: 'first' is");
}

INSTANTIATE_TEST_SUITE_P(Kinds, Channels,
                         testing::Values(
#ifdef ROOST_TEST_TLS
                             Kind{"Tls", make_tls},
#endif
                             Kind{"Socket", make_sockets}, Kind{"Pipe", make_pipes},
                             Kind{"Memory", make_memory}),
                         [](const auto& kind) { return std::string(kind.param.name); });

// ---- What only some can do

class OtherChannels : public ChannelTest {};

TEST_F(OtherChannels, TcpConnectsByNameAndSaysWhoRefused) {
  auto listening = ListenSocket::open(*SocketAddress::parse("tcp:localhost:0"));
  ASSERT_TRUE(listening);
  std::optional<Result<std::unique_ptr<SocketChannel>>> client;
  run(SocketChannel::connect(listening->address()), client);
  ASSERT_TRUE(*client) << client->error().message();
  const SocketAddress address = listening->address();
  listening = fail(0, "");
  client.reset();
  run(SocketChannel::connect(address), client);
  ASSERT_FALSE(*client);
  EXPECT_EQ(client->error().message(), "connect to " + address.text() + ": Connection refused");
}

TEST_F(OtherChannels, VsockConnectsWhereTheKernelHasIt) {
  auto listening = ListenSocket::open(*SocketAddress::parse("vsock:*:47110"));
  if (!listening) GTEST_SKIP() << "no vsock: " << listening.error().message();
  SocketAddress address = listening->address();
  address.cid = 1;  // this machine
  std::optional<Result<std::unique_ptr<SocketChannel>>> client;
  run(SocketChannel::connect(address), client);
  if (!*client) GTEST_SKIP() << "no vsock loopback: " << client->error().message();
  std::optional<Result<UniqueFd>> accepted;
  run(listening->accept(), accepted);
  ASSERT_TRUE(*accepted);
  SocketChannel server(std::move(**accepted), "vsock server");
  std::optional<Done> sent;
  run((**client)->write_full(bytes_of("over vsock")), sent);
  ASSERT_TRUE(*sent);
  std::string got(10, '\0');
  std::optional<Done> received;
  run(server.read_full(room_of(got)), received);
  EXPECT_EQ(got, "over vsock");
}

TEST_F(OtherChannels, AReadIntoMoreThanFourGigabytesIsNoEndOfTheStream) {
  auto ends = SocketChannel::pair();
  ASSERT_TRUE(ends);
  constexpr std::size_t kSize = std::size_t{4} << 30;
  void* const room = ::mmap(nullptr, kSize, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(room, MAP_FAILED);
  std::optional<Done> sent;
  run(ends->second->write_full(bytes_of("something")), sent);
  std::optional<Size> read;
  run(ends->first->read(std::span(static_cast<std::byte*>(room), kSize)), read);
  EXPECT_EQ(read->value_or(0), 9u);
  ::munmap(room, kSize);
}

TEST_F(OtherChannels, AConnectThatIsStoppedLeavesALookupBehind) {
  std::stop_source stop;
  std::optional<Result<std::unique_ptr<SocketChannel>>> connected;
  start(SocketChannel::connect(*SocketAddress::parse("tcp:slow.test:1"), stop.get_token()),
        connected);
  slow_lookup.begun.wait(false);
  settle();
  EXPECT_FALSE(connected);
  stop.request_stop();
  finish(connected);
  ASSERT_FALSE(*connected);
  EXPECT_EQ(connected->error().code(), ECANCELED);
  EXPECT_FALSE(slow_lookup.ended);
  slow_lookup.may_end = true;
  slow_lookup.may_end.notify_all();
  slow_lookup.ended.wait(false);
}

TEST_F(OtherChannels, AConnectThatIsStoppedEnds) {
  // A queue that is full keeps a unix socket's client waiting.
  char folder[] = "/tmp/roost-channel-XXXXXX";
  ASSERT_NE(::mkdtemp(folder), nullptr);
  const std::string path = std::string(folder) + "/s";
  const auto address = *SocketAddress::parse("unix:" + path);
  auto listening = ListenSocket::open(address);
  ASSERT_TRUE(listening);
  ASSERT_EQ(::listen(listening->fd(), 0), 0);
  std::optional<Result<std::unique_ptr<SocketChannel>>> first;
  run(SocketChannel::connect(address), first);
  ASSERT_TRUE(*first);
  std::stop_source stop;
  std::optional<Result<std::unique_ptr<SocketChannel>>> second;
  start(SocketChannel::connect(address, stop.get_token()), second);
  settle();
  EXPECT_FALSE(second);
  stop.request_stop();
  finish(second);
  ASSERT_FALSE(*second);
  EXPECT_EQ(second->error().code(), ECANCELED);
  listening = fail(0, "");
  ::rmdir(folder);
}

TEST_F(OtherChannels, UnixSocketsCarryDescriptors) {
  auto ends = SocketChannel::pair();
  ASSERT_TRUE(ends);
  int pipe_fds[2];
  ASSERT_EQ(::pipe2(pipe_fds, O_CLOEXEC), 0);
  UniqueFd read_end(pipe_fds[0]);
  const UniqueFd write_end(pipe_fds[1]);
  const int given[] = {read_end.get(), write_end.get()};
  std::optional<Done> sent;
  run(ends->first->send_with_descriptors(bytes_of("two"), given), sent);
  ASSERT_TRUE(*sent);
  std::string got(8, '\0');
  std::vector<UniqueFd> descriptors;
  std::optional<Size> read;
  run(ends->second->read_with_descriptors(room_of(got), descriptors), read);
  EXPECT_EQ(got.substr(0, read->value_or(0)), "two");
  ASSERT_EQ(descriptors.size(), 2u);
  EXPECT_TRUE(::fcntl(descriptors[0].get(), F_GETFD) & FD_CLOEXEC);
  ASSERT_EQ(::write(descriptors[1].get(), "!", 1), 1);
  char c = 0;
  ASSERT_EQ(::read(read_end.get(), &c, 1), 1);
  EXPECT_EQ(c, '!');
}

class SentFiles : public ChannelTest {
 protected:
  static constexpr std::size_t kSize = 12 << 20;  // more than a socket holds

  void SetUp() override {
    ::signal(SIGPIPE, SIG_IGN);
    std::iota(content_.begin(), content_.end(), '\1');
    for (std::size_t i = 0; i < content_.size(); i += 4096)
      content_[i] = static_cast<char>(i / 4096);
    ASSERT_TRUE(file_);
    ASSERT_EQ(::pwrite(file_.get(), content_.data(), content_.size(), 0),
              static_cast<ssize_t>(content_.size()));
    auto ends = SocketChannel::pair();
    near_ = std::move(ends->first);
    far_ = std::move(ends->second);
  }

  static UniqueFd make_file() {
    const std::string folder = std::filesystem::temp_directory_path();
    return UniqueFd(::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  }

  std::string content_ = std::string(kSize, '\0');
  UniqueFd file_ = make_file();
  std::unique_ptr<SocketChannel> near_, far_;
};

TEST_F(SentFiles, ArriveWholeAfterAndBeforeOtherBytes) {
  ASSERT_TRUE(near_->can_send_files());
  std::optional<Done> sent;
  const auto send = [&]() -> Task<Done> {
    Done done = co_await near_->write_full(bytes_of("before"));
    if (done) done = co_await near_->send_file({file_.get(), 5000, kSize - 5000});
    if (done) done = co_await near_->write_full(bytes_of("behind"));
    co_return done;
  };
  start(send(), sent);
  settle();
  EXPECT_FALSE(sent) << "nobody reads";
  std::string got(kSize - 5000 + 12, '\0');
  std::optional<Done> received;
  start_on(b(), far_->read_full(room_of(got)), received);
  finish(received);
  finish(sent);
  ASSERT_TRUE(*sent) << sent->error().message();
  EXPECT_TRUE(got == "before" + content_.substr(5000) + "behind");
}

// The pages themselves are on their way: the peer sees what is written to them before it reads.
TEST_F(SentFiles, AreNotCopied) {
  std::optional<Done> sent;
  run(near_->send_file({file_.get(), 0, 65536}), sent);
  ASSERT_TRUE(*sent);
  ASSERT_EQ(::pwrite(file_.get(), "later", 5, 8192), 5);
  std::string got(65536, '\0');
  std::optional<Done> received;
  run(far_->read_full(room_of(got)), received);
  EXPECT_EQ(got.substr(8192, 5), "later");
}

TEST_F(SentFiles, ThatEndTooSoonAreAnErrorThatSaysWhere) {
  std::optional<Done> sent;
  std::size_t count = 0;
  run(near_->send_file({file_.get(), kSize - 4096, 8192}, {}, &count), sent);
  ASSERT_FALSE(*sent);
  EXPECT_EQ(sent->error().code(), ENODATA);
  EXPECT_NE(sent->error().message().find("after 4096 of 8192 bytes"), std::string::npos)
      << sent->error().message();
  EXPECT_EQ(count, 4096u);
}

TEST_F(SentFiles, AreStopped) {
  std::stop_source stop;
  std::optional<Done> sent;
  std::size_t count = 0;
  start(near_->send_file({file_.get(), 0, kSize}, stop.get_token(), &count), sent);
  settle();
  EXPECT_FALSE(sent);
  stop.request_stop();
  finish(sent);
  ASSERT_FALSE(*sent);
  EXPECT_EQ(sent->error().code(), ECANCELED);
  EXPECT_GT(count, 0u);
  EXPECT_LT(count, kSize);
  std::string got(count, '\0');
  std::optional<Done> received;
  run(far_->read_full(room_of(got)), received);
  EXPECT_TRUE(got == content_.substr(0, count));
}

TEST_F(SentFiles, GoOnWhereTheChannelIsMoved) {
  std::optional<Done> sent;
  start(near_->send_file({file_.get(), 0, kSize}), sent);
  settle();
  std::optional<Done> moved;
  run(near_->move_to(b()), moved);
  ASSERT_TRUE(*moved);
  EXPECT_EQ(near_->context(), &b());
  std::string got(kSize, '\0');
  std::optional<Done> received;
  run(far_->read_full(room_of(got)), received);
  finish(sent);
  EXPECT_TRUE(*sent);
  EXPECT_TRUE(got == content_);
}

TEST_F(SentFiles, ToAPeerThatHasGoneAreAnError) {
  far_.reset();
  std::optional<Done> sent;
  run(near_->send_file({file_.get(), 0, kSize}), sent);
  ASSERT_FALSE(*sent);
  EXPECT_EQ(sent->error().code(), EPIPE);
}

TEST_F(OtherChannels, AFileIsReadAndWrittenFromFrontToBack) {
  char path[] = "/tmp/roost-channel-XXXXXX";
  UniqueFd made(::mkstemp(path));
  ASSERT_TRUE(made);
  auto file = FileChannel::open(path, O_RDWR);
  ASSERT_TRUE(file);
  std::optional<Done> done;
  run((*file)->write_full(bytes_of("front ")), done);
  done.reset();
  run((*file)->write_full(bytes_of("back")), done);
  done.reset();
  run((*file)->shutdown(StreamEnd::kWrite), done);
  ASSERT_TRUE(*done) << done->error().message();
  std::string got(10, '\0');
  done.reset();
  run((*file)->read_full(room_of(got)), done);
  EXPECT_EQ(got, "front back");
  std::optional<Size> read;
  run((*file)->read(room_of(got)), read);
  EXPECT_EQ(read->value_or(1), 0u);
  ::unlink(path);
  EXPECT_EQ(FileChannel::open(path, O_RDONLY).error().code(), ENOENT);
}

TEST_F(OtherChannels, ACommandIsFedReadAndReaped) {
  auto command = CommandChannel::start({"tr", "a-z", "A-Z"});
  ASSERT_TRUE(command) << command.error().message();
  std::optional<Done> done;
  run((*command)->write_full(bytes_of("shout")), done);
  done.reset();
  run((*command)->shutdown(StreamEnd::kWrite), done);
  std::string got(5, '\0');
  done.reset();
  run((*command)->read_full(room_of(got)), done);
  EXPECT_EQ(got, "SHOUT");
  std::optional<Result<int>> status;
  run((*command)->wait(), status);
  EXPECT_EQ(status->value_or(-1), 0);
}

TEST_F(OtherChannels, ACommandThatIsNotThereIsAnErrorAndOneThatRunsIsKilled) {
  const auto absent = CommandChannel::start({"/nonexistent/command"});
  ASSERT_FALSE(absent);
  EXPECT_EQ(absent.error().message(), "start /nonexistent/command: No such file or directory");
  auto endless = CommandChannel::start({"sleep", "1000"});
  ASSERT_TRUE(endless);
  const pid_t pid = (*endless)->pid();
  endless = fail(0, "");
  EXPECT_LT(::kill(pid, 0), 0) << "it lives";
}

}  // namespace
}  // namespace roost
