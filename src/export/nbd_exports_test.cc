// SPDX-License-Identifier: MIT
// Exports that change while they have clients: their size does, and they come and go.
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <atomic>
#include <mutex>
#include <thread>

#include "export/test_nbd_server.h"

namespace roost {
namespace {

class NbdExportsTest : public NbdServerTest {};
ROOST_ON_EACH_LOOP(NbdExportsTest);

// ---- resizing

TEST_P(NbdExportsTest, ADiskGrowsWhileOthersUseIt) {
  start();
  Client client = connect();
  Client other = connect();
  client.negotiate(ReplyStyle::kExtended);
  other.negotiate();
  EXPECT_EQ(client.told_size, kSize);
  EXPECT_TRUE(client.told_flags & nbd::kTransmissionSendResize);
  client.ask(Command::kResize, 1, 2 * kSize, 0);
  EXPECT_EQ(client.outcome(1, 2 * kSize), 0u);
  client.ask(Command::kRead, 2, kSize, 512);
  EXPECT_EQ(client.chunk(2, kSize).type, nbd::ChunkType::kOffsetData);
  other.ask(Command::kRead, 3, 2 * kSize - 512, 512);
  EXPECT_EQ(other.reply(3, 512), 0u);
  Client later = connect();
  later.negotiate();
  EXPECT_EQ(later.told_size, 2 * kSize);
  // But it does not shrink under them.
  client.ask(Command::kResize, 4, kSize, 0);
  EXPECT_EQ(client.outcome(4, kSize), nbd::kErrorPerm);
  EXPECT_EQ(disk_.count("resize"), 1);
}

TEST_P(NbdExportsTest, ADiskShrinksForItsOnlyClient) {
  start();
  Client client = connect();
  client.negotiate();
  client.ask(Command::kResize, 1, kSize / 2, 0);
  EXPECT_EQ(client.outcome(1), 0u);
  client.ask(Command::kRead, 2, kSize / 2, 512);
  EXPECT_EQ(client.reply(2), nbd::kErrorNoSpc);
  client.ask(Command::kRead, 3, kSize, 512);
  EXPECT_EQ(client.reply(3), nbd::kErrorInval);
  client.ask(Command::kRead, 4, kSize / 2 - 512, 512);
  EXPECT_EQ(client.reply(4, 512), 0u);
}

TEST_P(NbdExportsTest, AResizeWaitsForWhatIsUnderWayAndLetsNothingPass) {
  start();
  Client client = connect();
  client.negotiate();
  disk_.hold();
  client.ask(Command::kRead, 1, kSize - 512, 512);
  disk_.wait_for_total(1);
  client.ask(Command::kResize, 2, kSize / 2, 0);
  client.ask(Command::kRead, 3, kSize - 512, 512);
  EXPECT_TRUE(client.nothing_comes_for(20));
  EXPECT_EQ(disk_.total(), 1);
  disk_.release();
  EXPECT_EQ(client.reply(1, 512), 0u);
  EXPECT_EQ(client.reply(2), 0u);
  EXPECT_EQ(client.reply(3), nbd::kErrorNoSpc);
}

TEST_P(NbdExportsTest, ANewClientWaitsUntilTheDiskHasItsSize) {
  start();
  Client client = connect();
  client.negotiate();
  disk_.hold();
  client.ask(Command::kResize, 1, kSize / 2, 0);
  disk_.wait_for_total(1);
  Client newcomer = connect();
  newcomer.greet();
  std::vector<std::byte> go(nbd::kOptionHeaderSize + 6);
  store_be<std::uint64_t>(go.data(), nbd::kOptionMagic);
  store_be<std::uint32_t>(go.data() + 8, 7u);
  store_be<std::uint32_t>(go.data() + 12, 6u);
  newcomer.send(go);
  EXPECT_TRUE(newcomer.nothing_comes_for(20));
  disk_.release();
  EXPECT_EQ(client.reply(1), 0u);
  EXPECT_FALSE(newcomer.receive(nbd::kOptionReplyHeaderSize).empty());
}

// ---- exports that come and go

TEST_P(NbdExportsTest, ExportsAreAddedWhileClientsAreBusy) {
  start();
  Client early = connect();
  early.greet();
  EXPECT_EQ(early.go("second"), static_cast<std::uint32_t>(nbd::ReplyType::kErrUnknown));
  HandDisk second;
  ASSERT_TRUE(server_->add_export({.name = "second", .disk = &second, .read_only = true}));
  EXPECT_EQ(early.go("second"), Client::kAck);
  EXPECT_TRUE(early.told_flags & nbd::kTransmissionReadOnly);
  early.ask(Command::kRead, 1, 0, 512);
  EXPECT_EQ(early.reply(1, 512), 0u);
  EXPECT_EQ(second.count("read"), 1);
  EXPECT_EQ(disk_.count("read"), 0);

  const auto again = server_->add_export({.name = "second", .disk = &second});
  ASSERT_FALSE(again);
  EXPECT_EQ(again.error().code(), EEXIST);
  const auto bad = server_->add_export({.name = "bad", .disk = &second, .min_block = 3});
  ASSERT_FALSE(bad);
  EXPECT_EQ(bad.error().code(), EINVAL);
  EXPECT_EQ(server_->hide_export("third").error().code(), ENOENT);
  EXPECT_EQ(server_->remove_export("third", NbdServer::Removal::kNow, {}).error().code(), ENOENT);
  stop();
}

TEST_P(NbdExportsTest, AHiddenExportTakesNoNewClientsAndKeepsItsOld) {
  start();
  Client client = connect();
  client.negotiate();
  ASSERT_TRUE(server_->hide_export(""));
  Client late = connect();
  late.greet();
  EXPECT_EQ(late.go(""), static_cast<std::uint32_t>(nbd::ReplyType::kErrUnknown));
  client.ask(Command::kRead, 1, 0, 512);
  EXPECT_EQ(client.reply(1, 512), 0u);
}

TEST_P(NbdExportsTest, ARemovedExportGoesWithItsLastClient) {
  start();
  Client one = connect();
  Client two = connect();
  one.negotiate();
  two.negotiate();
  bool gone = false;
  ASSERT_TRUE(server_->remove_export("", NbdServer::Removal::kWhenUnused, [&] { gone = true; }));
  EXPECT_EQ(server_->add_export({.name = "", .disk = &disk_}).error().code(), EEXIST);
  one.close();
  while (server_->connections() > 1) std::this_thread::yield();
  for (int i = 0; i < 20; ++i) main_->poll(false);
  EXPECT_FALSE(gone);
  two.ask(Command::kRead, 1, 0, 512);
  EXPECT_EQ(two.reply(1, 512), 0u);
  two.close();
  until(gone);
  // The name is free again.
  EXPECT_TRUE(server_->add_export({.name = "", .disk = &disk_}));
  Client three = connect();
  three.negotiate();
}

TEST_P(NbdExportsTest, AnExportRemovedNowFinishesWhatTheDiskIsDoing) {
  start();
  HandDisk other_disk;
  ASSERT_TRUE(server_->add_export({.name = "other", .disk = &other_disk}));
  Client client = connect();
  client.negotiate();
  Client other = connect();
  other.negotiate(ReplyStyle::kSimple, "other");
  disk_.hold();
  for (std::uint64_t i = 0; i < 3; ++i) client.ask(Command::kRead, i, 0, 4096);
  disk_.wait_for_total(3);
  bool gone = false;
  bool gone_too = false;
  ASSERT_TRUE(server_->remove_export("", NbdServer::Removal::kWhenUnused, [&] { gone = true; }));
  ASSERT_TRUE(server_->remove_export("", NbdServer::Removal::kNow, [&] { gone_too = true; }));
  EXPECT_TRUE(client.receive(1).empty());  // disconnected at once
  for (int i = 0; i < 20; ++i) main_->poll(false);
  EXPECT_FALSE(gone || gone_too);  // but the disk is still in use
  disk_.release();
  until(gone);
  until(gone_too);
  other.ask(Command::kRead, 9, 0, 512);
  EXPECT_EQ(other.reply(9, 512), 0u);
  EXPECT_TRUE(log().empty()) << log()[0];
  stop();
}

// Exports come and go on the main thread while clients choose, use and lose them on the others'.
// Every client is either served or sees the stream end; every removal calls back.
TEST_P(NbdExportsTest, ExportsComeAndGoUnderClientsThatAreBusy) {
  start();
  HandDisk busy_disk;
  std::atomic<bool> enough{false};
  std::atomic<int> served{0};
  std::atomic<int> lost{0};
  std::vector<std::thread> clients;
  std::mutex connect_mutex;
  std::vector<Client> waiting;
  for (int c = 0; c < 3; ++c) {
    clients.emplace_back([&] {
      while (!enough) {
        std::optional<Client> client;
        {
          std::lock_guard lock(connect_mutex);
          if (waiting.empty()) continue;
          client.emplace(std::move(waiting.back()));
          waiting.pop_back();
        }
        client->greet();
        if (client->go("busy") != Client::kAck) {
          ++lost;
          continue;
        }
        for (std::uint64_t i = 0;; ++i) {
          const auto wanted = Client::request(Command::kRead, i, 4096);
          if (::send(client->fd(), wanted.data(), wanted.size(), MSG_NOSIGNAL) < 0) break;
          const auto got = client->receive(nbd::kSimpleReplySize + 4096);
          if (got.size() != nbd::kSimpleReplySize + 4096) break;
          ++served;
        }
      }
    });
  }
  int rounds = 0;
  while (rounds < 30 || served < 100) {
    ASSERT_TRUE(server_->add_export({.name = "busy", .disk = &busy_disk}));
    for (int i = 0; i < 3; ++i) {
      Client client = connect();
      std::lock_guard lock(connect_mutex);
      waiting.push_back(std::move(client));
    }
    const int before = served;
    while (rounds % 2 == 0 && served < before + 10) std::this_thread::yield();
    bool gone = false;
    ASSERT_TRUE(server_->remove_export("busy", NbdServer::Removal::kNow, [&] { gone = true; }));
    until(gone);
    ++rounds;
  }
  enough = true;
  {
    std::lock_guard lock(connect_mutex);
    waiting.clear();
  }
  for (auto& client : clients) client.join();
  EXPECT_GE(served, 100);
  stop();
}

}  // namespace
}  // namespace roost
