// SPDX-License-Identifier: MIT
#include "roost/export/listen_address.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>

namespace roost {
namespace {

TEST(ListenAddress, UnderstandsUnixAndTcp) {
  for (const char* good : {"unix:./roost.sock", "unix:/run/a b", "tcp:localhost:10809",
                           "tcp:127.0.0.1:0", "tcp:[::1]:10809"}) {
    const auto address = ListenAddress::parse(good);
    ASSERT_TRUE(address) << good;
    EXPECT_EQ(address->text(), good);
  }
  EXPECT_EQ(ListenAddress::parse("tcp:[::1]:1")->host, "::1");
}

TEST(ListenAddress, RefusesTheRest) {
  for (const char* bad :
       {"", "unix:", "tcp:", "tcp:host", "tcp:host:", "tcp::1", "tcp:::1:10809", "localhost:10809",
        "udp:localhost:1", "tcp:host:65536", "tcp:host:http"}) {
    const auto address = ListenAddress::parse(bad);
    ASSERT_FALSE(address) << bad;
    EXPECT_EQ(address.error().code(), EINVAL);
  }
}

class ListenSocketTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string folder = (std::filesystem::temp_directory_path() / "roost-sock-XXXXXX").string();
    ASSERT_NE(::mkdtemp(folder.data()), nullptr);
    folder_ = folder;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  ListenAddress unix_address() const { return *ListenAddress::parse("unix:" + path()); }
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
  const auto tcp = ListenSocket::open(*ListenAddress::parse("tcp:127.0.0.1:0"));
  ASSERT_TRUE(tcp) << tcp.error().message();
  EXPECT_NE(tcp->address().port, "0");
  EXPECT_EQ(tcp->uri("disk"), "nbd://127.0.0.1:" + tcp->address().port + "/disk");
}

TEST_F(ListenSocketTest, APathThatDoesNotFitIsAnError) {
  const auto socket = ListenSocket::open({.path = std::string(200, 'x')});
  ASSERT_FALSE(socket);
  EXPECT_EQ(socket.error().code(), ENAMETOOLONG);
}

}  // namespace
}  // namespace roost
