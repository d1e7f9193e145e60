// SPDX-License-Identifier: MIT
#include "roost/io/socket_address.h"

#include <gtest/gtest.h>

#include <cerrno>

namespace roost {
namespace {

TEST(SocketAddresses, AreUnderstood) {
  for (const char* good : {"unix:./roost.sock", "unix:/run/a b", "tcp:localhost:10809",
                           "tcp:127.0.0.1:0", "tcp:[::1]:10809", "vsock:2:10809", "vsock:*:1"}) {
    const auto address = SocketAddress::parse(good);
    ASSERT_TRUE(address) << good;
    EXPECT_EQ(address->text(), good);
  }
  EXPECT_EQ(SocketAddress::parse("tcp:[::1]:1")->host, "::1");
}

TEST(SocketAddresses, RefuseTheRest) {
  for (const char* bad : {"", "unix:", "tcp:", "tcp:host", "tcp:host:", "tcp::1", "tcp:::1:10809",
                          "localhost:10809", "udp:localhost:1", "tcp:host:65536", "tcp:host:http",
                          "vsock:1", "vsock:x:1", "vsock:4294967295:1", "vsock:2:4294967296"}) {
    const auto address = SocketAddress::parse(bad);
    ASSERT_FALSE(address) << bad;
    EXPECT_EQ(address.error().code(), EINVAL);
  }
}

TEST(SocketAddresses, GiveNbdUris) {
  EXPECT_EQ(SocketAddress::parse("unix:/run/a b")->nbd_uri("x/y"),
            "nbd+unix:///x%2Fy?socket=/run/a%20b");
  EXPECT_EQ(SocketAddress::parse("tcp:[::1]:1")->nbd_uri("", true), "nbds://[::1]:1/");
  EXPECT_EQ(SocketAddress::parse("vsock:2:10809")->nbd_uri("d"), "nbd+vsock://2:10809/d");
}

}  // namespace
}  // namespace roost
