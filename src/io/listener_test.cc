// SPDX-License-Identifier: MIT
#include "roost/io/listener.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <optional>

#include "io/test_channel.h"
#include "roost/io/socket_channel.h"

namespace roost {
namespace {

class ListenSocketTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string folder = (std::filesystem::temp_directory_path() / "roost-sock-XXXXXX").string();
    ASSERT_NE(::mkdtemp(folder.data()), nullptr);
    folder_ = folder;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  SocketAddress unix_address() const { return *SocketAddress::parse("unix:" + path()); }
  std::string path() const { return (folder_ / "s").string(); }

  std::filesystem::path folder_;
};

TEST_F(ListenSocketTest, ALiveSocketIsAnErrorAndItsFileGoesWithIt) {
  {
    const auto first = ListenSocket::open(unix_address());
    ASSERT_TRUE(first) << first.error().message();
    const auto second = ListenSocket::open(unix_address());
    ASSERT_FALSE(second);
    EXPECT_EQ(second.error().code(), EADDRINUSE);
    EXPECT_TRUE(std::filesystem::exists(path()));
  }
  EXPECT_FALSE(std::filesystem::exists(path()));
}

TEST_F(ListenSocketTest, AStaleSocketIsReplaced) {
  {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strcpy(address.sun_path, path().c_str());
    UniqueFd killed(::socket(AF_UNIX, SOCK_STREAM, 0));
    ASSERT_EQ(::bind(killed.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  }
  ASSERT_TRUE(std::filesystem::exists(path()));
  EXPECT_TRUE(ListenSocket::open(unix_address()));
}

TEST_F(ListenSocketTest, AnAbstractNameInUseIsAnErrorAndNoFile) {
  const SocketAddress address = *SocketAddress::parse("unix:@" + path());
  const auto first = ListenSocket::open(address);
  ASSERT_TRUE(first) << first.error().message();
  const auto second = ListenSocket::open(address);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code(), EADDRINUSE);
  EXPECT_FALSE(std::filesystem::exists(path()));
}

TEST_F(ListenSocketTest, AFileThatIsNoSocketIsLeftAlone) {
  std::fclose(std::fopen(path().c_str(), "w"));
  EXPECT_FALSE(ListenSocket::open(unix_address()));
  EXPECT_TRUE(std::filesystem::is_regular_file(path()));
}

TEST_F(ListenSocketTest, UrisNameTheExportAndThePort) {
  const auto on_unix = ListenSocket::open(unix_address());
  ASSERT_TRUE(on_unix);
  EXPECT_EQ(on_unix->uri(""), "nbd+unix:///?socket=" + path());
  EXPECT_EQ(on_unix->uri("a b/c"), "nbd+unix:///a%20b%2Fc?socket=" + path());
  const auto tcp = ListenSocket::open(*SocketAddress::parse("tcp:127.0.0.1:0"));
  ASSERT_TRUE(tcp) << tcp.error().message();
  EXPECT_NE(tcp->address().port, "0");
  EXPECT_EQ(tcp->uri("disk"), "nbd://127.0.0.1:" + tcp->address().port + "/disk");
}

TEST_F(ListenSocketTest, APathThatDoesNotFitIsAnError) {
  const auto socket = ListenSocket::open({.path = std::string(200, 'x')});
  ASSERT_FALSE(socket);
  EXPECT_EQ(socket.error().code(), ENAMETOOLONG);
}

TEST_F(ListenSocketTest, EveryAddressOfAHostIsListenedOnAtOnePort) {
  const auto sockets = ListenSocket::open_all(*SocketAddress::parse("tcp:localhost:0"));
  ASSERT_TRUE(sockets) << sockets.error().message();
  ASSERT_FALSE(sockets->empty());
  for (const ListenSocket& socket : *sockets) {
    EXPECT_EQ(socket.address().port, sockets->front().address().port);
  }
}

// What a service manager does, in a child, since the descriptors have fixed numbers.
TEST_F(ListenSocketTest, ActivatedSocketsAreTakenOnce) {
  auto listening = ListenSocket::open(unix_address());
  ASSERT_TRUE(listening);
  const std::string path_wanted = path();
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ::dup2(listening->fd(), 3);
    ::setenv("LISTEN_PID", std::to_string(::getpid()).c_str(), 1);
    ::setenv("LISTEN_FDS", "1", 1);
    auto sockets = take_activated_sockets();
    if (!sockets || sockets->size() != 1) ::_exit(1);
    if (sockets->front().address().path != path_wanted) ::_exit(2);
    if (!(::fcntl(3, F_GETFD) & FD_CLOEXEC)) ::_exit(3);
    if (::getenv("LISTEN_FDS")) ::_exit(4);
    auto again = take_activated_sockets();
    ::_exit(again && again->empty() ? 0 : 5);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_TRUE(std::filesystem::exists(path()));
}

TEST_F(ListenSocketTest, ActivationThatMakesNoSenseIsAnError) {
  ::setenv("LISTEN_PID", std::to_string(::getpid()).c_str(), 1);
  ::setenv("LISTEN_FDS", "x", 1);
  const auto sockets = take_activated_sockets();
  ASSERT_FALSE(sockets);
  EXPECT_EQ(sockets.error().code(), EINVAL);
  EXPECT_EQ(::getenv("LISTEN_FDS"), nullptr);
  // Another process's are left to it.
  ::setenv("LISTEN_PID", "1", 1);
  ::setenv("LISTEN_FDS", "1", 1);
  const auto others = take_activated_sockets();
  ASSERT_TRUE(others);
  EXPECT_TRUE(others->empty());
  EXPECT_NE(::getenv("LISTEN_FDS"), nullptr);
  ::unsetenv("LISTEN_PID");
  ::unsetenv("LISTEN_FDS");
}

class Accepting : public ChannelTest {};

TEST_F(Accepting, WaitsOutAShortageOfDescriptorsAndKeepsTheClient) {
  auto listening = ListenSocket::open(*SocketAddress::parse("tcp:127.0.0.1:0"));
  ASSERT_TRUE(listening);
  std::optional<Result<std::unique_ptr<SocketChannel>>> client;
  run(SocketChannel::connect(listening->address()), client);
  ASSERT_TRUE(client && *client) << (*client).error().message();

  // None is left.
  rlimit old{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &old), 0);
  const int next = ::dup(0);
  ::close(next);
  const rlimit none{static_cast<rlim_t>(next), old.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);

  unsigned reports = 0;
  const std::function<void(const Error&)> report = [&](const Error& error) {
    EXPECT_EQ(error.code(), EMFILE);
    // There is one again, for the next try.
    if (++reports == 1) ::setrlimit(RLIMIT_NOFILE, &old);
  };
  std::optional<Result<UniqueFd>> accepted;
  run(listening->accept({}, &report), accepted);
  ::setrlimit(RLIMIT_NOFILE, &old);
  ASSERT_TRUE(accepted && *accepted);
  EXPECT_EQ(reports, 1u);
}

TEST_F(Accepting, EndsWhenItIsStopped) {
  auto listening = ListenSocket::open(*SocketAddress::parse("tcp:127.0.0.1:0"));
  ASSERT_TRUE(listening);
  std::stop_source stop;
  std::optional<Result<UniqueFd>> accepted;
  start(listening->accept(stop.get_token()), accepted);
  settle();
  EXPECT_FALSE(accepted);
  stop.request_stop();
  finish(accepted);
  ASSERT_FALSE(*accepted);
  EXPECT_EQ(accepted->error().code(), ECANCELED);
}

}  // namespace
}  // namespace roost
