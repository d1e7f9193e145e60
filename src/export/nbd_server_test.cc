// SPDX-License-Identifier: MIT
// The server with a disk that the test holds in its hands: what reaches the disk, when replies go
// out, what a client may hold at a time, and how it all ends.
#include "roost/export/nbd_server.h"

#include <gtest/gtest.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <thread>

#include "export/test_nbd_server.h"

namespace roost {
namespace {

ROOST_ON_EACH_LOOP(NbdServerTest);

TEST_P(NbdServerTest, FlushAndForcedUnitAccessReachTheDisksOwn) {
  start();
  Client client = connect();
  client.negotiate();
  disk_.hold();
  client.send(Client::request(Command::kFlush, 1, 0));
  disk_.wait_for_total(1);
  EXPECT_EQ(disk_.count("flush"), 1);
  // Nothing is acknowledged before the disk has said so.
  EXPECT_TRUE(client.nothing_comes_for(20));
  disk_.release();
  EXPECT_EQ(client.reply(1), 0u);

  client.send(Client::request(Command::kWrite, 2, 512, nbd::kCommandFua));
  EXPECT_EQ(client.reply(2), 0u);
  EXPECT_EQ(disk_.count("write fua"), 1);
  client.send(
      Client::request(Command::kWriteZeroes, 3, 512, nbd::kCommandFua | nbd::kCommandNoHole));
  EXPECT_EQ(client.reply(3), 0u);
  EXPECT_EQ(disk_.count("zeroes no_hole fua"), 1);
  client.send(Client::request(Command::kTrim, 4, 512, nbd::kCommandFua));
  EXPECT_EQ(client.reply(4), 0u);
  EXPECT_EQ(disk_.count("discard"), 1);
  EXPECT_EQ(disk_.count("flush"), 2);
}

TEST_P(NbdServerTest, RepliesThatAreReadyTogetherGoOutInOneCall) {
  start();
  Client client = connect();
  client.negotiate();
  disk_.hold();
  constexpr int kRequests = 32;
  std::vector<std::byte> all;
  for (int i = 0; i < kRequests; ++i) {
    const auto one = Client::request(Command::kTrim, static_cast<std::uint64_t>(i), 512);
    all.insert(all.end(), one.begin(), one.end());
  }
  client.send(all);
  disk_.wait_for_total(kRequests);
  disk_.release();
  // A single small message arrives as a whole, so the first receive that finds anything finds all.
  std::vector<std::byte> replies(kRequests * nbd::kSimpleReplySize + 1);
  const ssize_t n = ::recv(client.fd(), replies.data(), replies.size(), 0);
  EXPECT_EQ(n, static_cast<ssize_t>(kRequests * nbd::kSimpleReplySize));
}

TEST_P(NbdServerTest, AClientHasNoMoreInFlightThanItsLimit) {
  start({.requests_in_flight = 4});
  Client client = connect();
  client.negotiate();
  disk_.hold();
  for (std::uint64_t i = 0; i < 10; ++i) client.send(Client::request(Command::kRead, i, 512));
  disk_.wait_for_total(4);
  EXPECT_TRUE(client.nothing_comes_for(20));
  EXPECT_EQ(disk_.total(), 4);
  disk_.release();
  for (std::uint64_t i = 0; i < 10; ++i) EXPECT_EQ(client.reply(i, 512), 0u);
}

TEST_P(NbdServerTest, BytesInFlightAreLimitedButALoneRequestPasses) {
  start({.bytes_in_flight = 64 << 10});
  Client client = connect();
  client.negotiate();
  disk_.hold();
  for (std::uint64_t i = 0; i < 3; ++i) {
    client.send(Client::request(Command::kRead, i, 256 << 10));
  }
  disk_.wait_for_total(1);
  EXPECT_TRUE(client.nothing_comes_for(20));
  EXPECT_EQ(disk_.total(), 1);
  disk_.release();
  for (std::uint64_t i = 0; i < 3; ++i) EXPECT_EQ(client.reply(i, 256 << 10), 0u);
}

TEST_P(NbdServerTest, ConnectionsOfOneExportAreSpreadOverTheThreads) {
  start();
  std::vector<Client> clients;
  for (int i = 0; i < 4; ++i) {
    clients.push_back(connect());
    clients.back().negotiate();
    clients.back().send(Client::request(Command::kRead, 7, 512));
    EXPECT_EQ(clients.back().reply(7, 512), 0u);
  }
  EXPECT_EQ(disk_.contexts()["io0"], 2);
  EXPECT_EQ(disk_.contexts()["io1"], 2);
}

TEST_P(NbdServerTest, ADiskErrorReachesTheClientAndTheLogAndTheConnectionGoesOn) {
  start();
  Client client = connect();
  client.negotiate();
  disk_.error = ENOSPC;
  client.send(Client::request(Command::kWrite, 1, 512));
  EXPECT_EQ(client.reply(1), nbd::kErrorNoSpc);
  disk_.error = EIO;
  client.send(Client::request(Command::kRead, 2, 512));
  EXPECT_EQ(client.reply(2), nbd::kErrorIo);
  disk_.error = 0;
  client.send(Client::request(Command::kRead, 3, 512));
  EXPECT_EQ(client.reply(3, 512), 0u);
  ASSERT_EQ(log().size(), 2u);
  EXPECT_NE(log()[0].find("write hand at 0+512: No space left on device"), std::string::npos);
  EXPECT_NE(log()[0].find("unix client (pid"), std::string::npos);
}

TEST_P(NbdServerTest, StoppingAnswersWhatWasRead) {
  start();
  Client client = connect();
  client.negotiate();
  disk_.hold();
  client.send(Client::request(Command::kRead, 1, 4096));
  disk_.wait_for_total(1);
  bool idle = false;
  server_->stop([&idle] { idle = true; });
  for (int i = 0; i < 20; ++i) main_->poll(false);
  EXPECT_FALSE(idle);
  disk_.release();
  while (!idle) main_->poll(true);
  EXPECT_EQ(client.reply(1, 4096), 0u);
  EXPECT_TRUE(client.receive(1).empty());  // and then the end of the stream
  EXPECT_EQ(server_->connections(), 0u);
  EXPECT_TRUE(log().empty());
}

// The server is stopped on the main thread while its connections receive, send and negotiate on
// theirs. Each descriptor is closed by its own thread, when it is through: a client gets whole
// replies, and then the end of the stream. ThreadSanitizer watches.
TEST_P(NbdServerTest, ClosingAConnectionFromTheWrongThread) {
  start();
  std::atomic<int> busy{0};
  std::atomic<int> replies{0};
  std::vector<std::thread> clients;
  for (int c = 0; c < 4; ++c) {
    clients.emplace_back([&, busy_one = connect(), idle_one = connect()]() mutable {
      EXPECT_EQ(idle_one.receive(nbd::kGreetingSize).size(), nbd::kGreetingSize);
      busy_one.negotiate();
      ++busy;
      for (std::uint64_t i = 0;; ++i) {
        const auto wanted = Client::request(Command::kRead, i, 4096);
        if (::send(busy_one.fd(), wanted.data(), wanted.size(), MSG_NOSIGNAL) < 0) break;
        if (busy_one.reply(i, 4096) != 0) break;
        ++replies;
      }
      EXPECT_TRUE(busy_one.receive(1).empty());
      EXPECT_TRUE(idle_one.receive(1).empty());
    });
  }
  while (busy < 4 || replies < 100) std::this_thread::yield();
  stop();
  EXPECT_EQ(server_->connections(), 0u);
  for (auto& client : clients) client.join();
  EXPECT_TRUE(log().empty()) << log()[0];
}

TEST_P(NbdServerTest, AClientThatDawdlesInTheHandshakeIsDropped) {
  start({.handshake_timeout_ns = 30'000'000});
  Client client = connect();
  EXPECT_EQ(client.receive(nbd::kGreetingSize).size(), nbd::kGreetingSize);
  EXPECT_TRUE(client.receive(1).empty());
  while (server_->connections() > 0) std::this_thread::yield();
  ASSERT_EQ(log().size(), 1u);
  EXPECT_NE(log()[0].find("negotiation timed out"), std::string::npos);
}

// Received into the chunk, into memory of their own, or partly each, and all of it in use until the
// disk lets go.
TEST_P(NbdServerTest, WritesOfAllSizesReachTheDiskWhole) {
  start();
  Client client = connect();
  client.negotiate();
  disk_.hold();
  const std::uint32_t sizes[] = {1,       300'000, 65'536,  5,      65'535, 4096,   65'536 + 4096,
                                 131'072, 4096,    200'000, 70'000, 3,      66'000, 4096};
  std::map<std::uint64_t, std::vector<std::byte>> expected;
  std::vector<std::byte> stream;
  std::uint64_t offset = 0;
  for (std::uint32_t size : sizes) {
    auto write = Client::request(Command::kWrite, offset, size, 0, offset);
    std::vector<std::byte>& data = expected[offset];
    for (std::uint32_t i = 0; i < size; ++i) {
      data.push_back(static_cast<std::byte>((i * 2654435761u + offset * 40503u) >> 13));
    }
    std::ranges::copy(data, write.end() - size);
    stream.insert(stream.end(), write.begin(), write.end());
    offset += 70'001;
  }
  ASSERT_LE(offset, kSize);
  client.send(stream);
  disk_.wait_for_total(std::size(sizes));
  disk_.release();
  for (std::uint64_t cookie = 0; cookie < offset; cookie += 70'001) {
    EXPECT_EQ(client.reply(cookie), 0u);
  }
  EXPECT_TRUE(disk_.written() == expected);
}

TEST_P(NbdServerTest, AClientThatVanishesWithinAWriteCostsOnlyItself) {
  start();
  Client good = connect();
  good.negotiate();
  Client bad = connect();
  bad.negotiate();
  auto write = Client::request(Command::kWrite, 1, 300'000);
  write.resize(write.size() / 2);
  bad.send(write);
  bad.close();
  while (server_->connections() > 1) std::this_thread::yield();
  ASSERT_EQ(log().size(), 1u);
  EXPECT_NE(log()[0].find("vanished"), std::string::npos) << log()[0];
  EXPECT_EQ(disk_.count("write"), 0);
  good.send(Client::request(Command::kRead, 2, 512));
  EXPECT_EQ(good.reply(2, 512), 0u);
}

TEST_P(NbdServerTest, AClientThatVanishesWithRequestsInFlightIsForgotten) {
  start();
  Client client = connect();
  client.negotiate();
  disk_.hold();
  for (std::uint64_t i = 0; i < 50; ++i) client.send(Client::request(Command::kRead, i, 65536));
  disk_.wait_for_total(50);
  client.close();
  disk_.release();
  while (server_->connections() > 0) std::this_thread::yield();
}

TEST_P(NbdServerTest, RequestsBeyondTheEndAreRefusedAndTheStreamStaysInStep) {
  start();
  Client client = connect();
  client.negotiate();
  client.send(Client::request(Command::kRead, 1, 512, 0, kSize));
  EXPECT_EQ(client.reply(1), nbd::kErrorInval);
  client.send(Client::request(Command::kWrite, 2, 70'000, 0, kSize - 512));
  EXPECT_EQ(client.reply(2), nbd::kErrorNoSpc);
  client.send(Client::request(Command{77}, 3, 0));
  EXPECT_EQ(client.reply(3), nbd::kErrorInval);
  client.send(Client::request(Command::kWrite, 4, 0));
  EXPECT_EQ(client.reply(4), 0u);
  client.send(Client::request(Command::kRead, 5, 512, 0, kSize - 512));
  EXPECT_EQ(client.reply(5, 512), 0u);
  EXPECT_EQ(disk_.total(), 1);
}

TEST_P(NbdServerTest, ManyClientsComeAndGoWhileOthersWork) {
  start();
  std::vector<std::thread> clients;
  for (int c = 0; c < 4; ++c) {
    std::vector<Client> mine;
    for (int i = 0; i < 10; ++i) mine.push_back(connect());
    clients.emplace_back([c, mine = std::move(mine)]() mutable {
      for (std::size_t i = 0; i < mine.size(); ++i) {
        mine[i].negotiate();
        for (std::uint64_t r = 0; r < 20; ++r) {
          const bool write = (r + i + static_cast<std::size_t>(c)) % 2;
          mine[i].send(Client::request(write ? Command::kWrite : Command::kRead, r, 4096));
          EXPECT_EQ(mine[i].reply(r, write ? 0 : 4096), 0u);
        }
        mine[i].close();
      }
    });
  }
  for (auto& client : clients) client.join();
  EXPECT_EQ(disk_.total(), 4 * 10 * 20);
}

// ---- connections

TEST_P(NbdServerTest, AClientTooManyIsTurnedAway) {
  start({}, 2);
  Client one = connect();
  Client two = connect();
  one.negotiate();
  two.negotiate();
  Client three = connect();
  EXPECT_TRUE(three.receive(1).empty());
  ASSERT_EQ(log().size(), 1u);
  EXPECT_NE(log()[0].find("turned away: there are 2 clients already"), std::string::npos);
  one.close();
  while (server_->connections() > 1) std::this_thread::yield();
  Client four = connect();
  four.negotiate();
}

}  // namespace
}  // namespace roost
