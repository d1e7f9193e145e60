// SPDX-License-Identifier: MIT
// The server with a disk that the test holds in its hands: what reaches the disk, when replies go
// out, what a client may hold at a time, and how it all ends.
#include "roost/export/nbd_server.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>

#include "aio/test_loop.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/iothread.h"
#include "roost/base/bytes.h"
#include "roost/nbd/protocol.h"

namespace roost {
namespace {

constexpr std::uint64_t kSize = 1 << 20;

// Counts what reaches it. While it is held, every operation waits; release() lets them go, in order
// and in one turn of each context.
class HandDisk final : public BlockDriver {
 public:
  HandDisk() : BlockDriver("hand", kSize, false) {}

  Task<Result<void>> read(std::uint64_t, std::span<std::byte> to) override {
    std::memset(to.data(), 0x5a, to.size());
    return operation("read");
  }
  Task<Result<void>> write(std::uint64_t, std::span<const iovec>, bool fua) override {
    return operation(fua ? "write fua" : "write");
  }
  Task<Result<void>> flush() override { return operation("flush"); }
  Task<Result<void>> discard(std::uint64_t, std::uint64_t) override { return operation("discard"); }
  Task<Result<void>> write_zeroes(std::uint64_t, std::uint64_t, ZeroFlags flags) override {
    return operation(std::string("zeroes") + (flags.may_unmap ? "" : " no_hole") +
                     (flags.fua ? " fua" : ""));
  }

  int count(const std::string& what) {
    std::lock_guard lock(mutex_);
    return counts_[what];
  }
  int total() {
    std::lock_guard lock(mutex_);
    return total_;
  }
  std::map<std::string, int> contexts() {
    std::lock_guard lock(mutex_);
    return contexts_;
  }
  void wait_for_total(int wanted) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return total_ >= wanted; });
  }

  void hold() {
    std::lock_guard lock(mutex_);
    held_ = true;
  }
  void release() {
    std::lock_guard lock(mutex_);
    held_ = false;
    for (auto& [context, waiting] : waiting_) {
      // All in one turn, so that their replies are ready together.
      schedule_oneshot(*context, [list = std::move(waiting)] {
        for (Coroutine* co : list) co_wake(*co);
      });
    }
    waiting_.clear();
  }

  std::atomic<int> error{0};  // what operations fail with

 private:
  Task<Result<void>> operation(std::string what) {
    bool wait = false;
    {
      std::lock_guard lock(mutex_);
      ++counts_[what];
      ++contexts_[AioContext::current()->name()];
      wait = held_;
      if (!wait) ++total_;
    }
    if (wait) {
      // Counted once it can be released.
      const auto park = [this](Coroutine& co) noexcept {
        std::lock_guard lock(mutex_);
        waiting_[AioContext::current()].push_back(&co);
        ++total_;
        changed_.notify_all();
      };
      co_await suspend(park);
    } else {
      changed_.notify_all();
    }
    if (const int code = error.load()) co_return fail(code, what + " hand at 0+512");
    co_return Result<void>();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool held_ = false;
  int total_ = 0;
  std::map<std::string, int> counts_;
  std::map<std::string, int> contexts_;
  std::map<AioContext*, std::vector<Coroutine*>> waiting_;
};

// A blocking client, byte by byte as the protocol document says.
class Client {
 public:
  explicit Client(UniqueFd fd) : fd_(std::move(fd)) {}

  std::vector<std::byte> receive(std::size_t size) {
    std::vector<std::byte> bytes(size);
    std::size_t have = 0;
    while (have < size) {
      const ssize_t n = ::recv(fd_.get(), bytes.data() + have, size - have, 0);
      if (n <= 0) break;
      have += static_cast<std::size_t>(n);
    }
    bytes.resize(have);
    return bytes;
  }

  void send(const std::vector<std::byte>& bytes) {
    ASSERT_EQ(::send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(bytes.size()));
  }

  void negotiate() {
    ASSERT_EQ(receive(nbd::kGreetingSize).size(), nbd::kGreetingSize);
    std::vector<std::byte> out(4 + nbd::kOptionHeaderSize + 6);
    store_be<std::uint32_t>(out.data(), nbd::kClientFixedNewstyle | nbd::kClientNoZeroes);
    store_be<std::uint64_t>(out.data() + 4, nbd::kOptionMagic);
    store_be<std::uint32_t>(out.data() + 12, static_cast<std::uint32_t>(nbd::Option::kGo));
    store_be<std::uint32_t>(out.data() + 16, 6u);
    send(out);
    for (;;) {
      const auto header = receive(nbd::kOptionReplyHeaderSize);
      ASSERT_EQ(header.size(), nbd::kOptionReplyHeaderSize);
      const auto type = load_be<std::uint32_t>(header.data() + 12);
      receive(load_be<std::uint32_t>(header.data() + 16));
      ASSERT_EQ(type & 0x80000000u, 0u);
      if (type == static_cast<std::uint32_t>(nbd::ReplyType::kAck)) return;
    }
  }

  static std::vector<std::byte> request(nbd::Command command, std::uint64_t cookie,
                                        std::uint32_t length, std::uint16_t flags = 0,
                                        std::uint64_t offset = 0) {
    std::vector<std::byte> bytes(nbd::kRequestSize);
    store_be<std::uint32_t>(bytes.data(), nbd::kRequestMagic);
    store_be<std::uint16_t>(bytes.data() + 4, flags);
    store_be<std::uint16_t>(bytes.data() + 6, static_cast<std::uint16_t>(command));
    store_be<std::uint64_t>(bytes.data() + 8, cookie);
    store_be<std::uint64_t>(bytes.data() + 16, offset);
    store_be<std::uint32_t>(bytes.data() + 24, length);
    if (command == nbd::Command::kWrite) bytes.resize(bytes.size() + length);
    return bytes;
  }

  // The error of the reply to `cookie`, which has to come next.
  std::uint32_t reply(std::uint64_t cookie, std::size_t payload = 0) {
    const auto header = receive(nbd::kSimpleReplySize);
    if (header.size() != nbd::kSimpleReplySize) return ~0u;
    EXPECT_EQ(load_be<std::uint32_t>(header.data()), nbd::kSimpleReplyMagic);
    EXPECT_EQ(load_be<std::uint64_t>(header.data() + 8), cookie);
    const auto error = load_be<std::uint32_t>(header.data() + 4);
    if (error == 0) {
      EXPECT_EQ(receive(payload).size(), payload);
    }
    return error;
  }

  bool nothing_comes_for(int ms) {
    pollfd pfd{fd_.get(), POLLIN, 0};
    return ::poll(&pfd, 1, ms) == 0;
  }

  int fd() const { return fd_.get(); }
  void close() { fd_.reset(); }

 private:
  UniqueFd fd_;
};

class NbdServerTest : public OnEachLoop {
 protected:
  void start(NbdLimits limits = {}) {
    main_ = AioContext::create(options("main"));
    scope_.emplace(*main_);
    NbdServer::Options o{.main_context = main_.get(),
                         .io_contexts = {},
                         .limits = limits,
                         .log = [this](const std::string& line) {
                           std::lock_guard lock(log_mutex_);
                           log_.push_back(line);
                         }};
    for (const char* name : {"io0", "io1"}) {
      threads_.push_back(std::make_unique<IOThread>(options(name)));
      o.io_contexts.push_back(&threads_.back()->context());
    }
    server_ =
        std::make_unique<NbdServer>(std::move(o), std::vector<NbdServer::Export>{{"", &disk_}});
  }

  Client connect() {
    int pair[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    server_->serve(UniqueFd(pair[0]));
    return Client(UniqueFd(pair[1]));
  }

  void stop() {
    bool idle = false;
    server_->stop([&idle] { idle = true; });
    while (!idle) main_->poll(true);
  }

  void TearDown() override {
    if (!server_) return;
    disk_.release();
    stop();
    threads_.clear();
    server_.reset();
    scope_.reset();
  }

  std::vector<std::string> log() {
    std::lock_guard lock(log_mutex_);
    return log_;
  }

  HandDisk disk_;
  std::shared_ptr<AioContext> main_;
  std::optional<ContextScope> scope_;
  std::vector<std::unique_ptr<IOThread>> threads_;
  std::unique_ptr<NbdServer> server_;
  std::mutex log_mutex_;
  std::vector<std::string> log_;
};
ROOST_ON_EACH_LOOP(NbdServerTest);

using nbd::Command;

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

}  // namespace
}  // namespace roost
