// SPDX-License-Identifier: MIT
// The server with a disk that the test holds in its hands: what reaches the disk, when replies go
// out, what a client may hold at a time, and how it all ends.
#include "roost/export/nbd_server.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
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
#include "roost/nbd/transmission.h"

namespace roost {
namespace {

constexpr std::uint64_t kSize = 1 << 20;

// Counts what reaches it. While it is held, every operation waits; release() lets them go, in order
// and in one turn of each context.
class HandDisk final : public BlockDriver {
 public:
  HandDisk() : BlockDriver("hand", kSize, false) {}

  Task<Result<void>> read(std::uint64_t offset, std::span<std::byte> to) override {
    std::memset(to.data(), 0x5a, to.size());
    if (offset >= bad_from.load()) return failed_read();
    return operation("read");
  }
  Task<Result<void>> write(std::uint64_t offset, std::span<const iovec> from, bool fua) override {
    Result<void> done = co_await operation(fua ? "write fua" : "write");
    // After it was held, when the memory must still be the write's own.
    std::lock_guard lock(mutex_);
    std::vector<std::byte>& to = written_[offset];
    for (const iovec& piece : from) {
      const auto* const begin = static_cast<const std::byte*>(piece.iov_base);
      to.insert(to.end(), begin, begin + piece.iov_len);
    }
    co_return done;
  }
  Task<Result<void>> flush() override { return operation("flush"); }
  Task<Result<void>> discard(std::uint64_t, std::uint64_t) override { return operation("discard"); }
  Task<Result<void>> write_zeroes(std::uint64_t, std::uint64_t, ZeroFlags flags) override {
    return operation(std::string("zeroes") + (flags.may_unmap ? "" : " no_hole") +
                     (flags.fua ? " fua" : "") + (flags.fast ? " fast" : ""));
  }
  Task<Result<std::vector<Extent>>> block_status(std::uint64_t, std::uint64_t length,
                                                 std::size_t max_extents) override {
    Result<void> done = co_await operation("status");
    if (!done) co_return std::unexpected(done.error());
    std::vector<Extent> found;
    for (const Extent& extent : extents) {
      if (length == 0 || found.size() == max_extents) break;
      found.push_back(extent);
      found.back().length = std::min(extent.length, length);
      length -= found.back().length;
    }
    if (found.empty()) found.push_back({length, false, false});
    co_return found;
  }
  Task<Result<void>> cache(std::uint64_t, std::uint64_t) override { return operation("cache"); }
  Task<Result<void>> resize(std::uint64_t new_size) override {
    Result<void> done = co_await operation("resize");
    if (done) set_size(new_size);
    co_return done;
  }
  bool can_resize() const noexcept override { return true; }
  bool can_zero_fast() const noexcept override { return true; }

  int count(const std::string& what) {
    std::lock_guard lock(mutex_);
    return counts_[what];
  }
  int total() {
    std::lock_guard lock(mutex_);
    return total_;
  }
  // By offset, what was written there, piece by piece.
  std::map<std::uint64_t, std::vector<std::byte>> written() {
    std::lock_guard lock(mutex_);
    return written_;
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

  std::atomic<int> error{0};                   // what operations fail with
  std::atomic<std::uint64_t> bad_from{~0ull};  // reads from here on fail
  std::vector<Extent> extents;                 // from anywhere on; set before there are clients

 private:
  static Task<Result<void>> failed_read() { co_return fail(EIO, "read bad sector"); }

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
  std::map<std::uint64_t, std::vector<std::byte>> written_;
  std::map<std::string, int> contexts_;
  std::map<AioContext*, std::vector<Coroutine*>> waiting_;
};

using nbd::Command;
using nbd::ReplyStyle;

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

  void greet() {
    ASSERT_EQ(receive(nbd::kGreetingSize).size(), nbd::kGreetingSize);
    std::vector<std::byte> flags(4);
    store_be<std::uint32_t>(flags.data(), nbd::kClientFixedNewstyle | nbd::kClientNoZeroes);
    send(flags);
  }

  // The type of the last reply to an option; that of an error, or 0 at the end of the stream.
  std::uint32_t option(nbd::Option option, const std::vector<std::byte>& data = {}) {
    std::vector<std::byte> out(nbd::kOptionHeaderSize);
    store_be<std::uint64_t>(out.data(), nbd::kOptionMagic);
    store_be<std::uint32_t>(out.data() + 8, static_cast<std::uint32_t>(option));
    store_be<std::uint32_t>(out.data() + 12, static_cast<std::uint32_t>(data.size()));
    out.insert(out.end(), data.begin(), data.end());
    send(out);
    for (;;) {
      const auto header = receive(nbd::kOptionReplyHeaderSize);
      if (header.size() != nbd::kOptionReplyHeaderSize) return 0;
      const auto type = load_be<std::uint32_t>(header.data() + 12);
      const auto payload = receive(load_be<std::uint32_t>(header.data() + 16));
      if (payload.size() == 12 && load_be<std::uint16_t>(payload.data()) == 0) {
        told_size = load_be<std::uint64_t>(payload.data() + 2);
        told_flags = load_be<std::uint16_t>(payload.data() + 10);
      }
      if (type == kAck || (type & 0x80000000u)) return type;
    }
  }

  // A name with what follows it in GO, or with one query for a context.
  static std::vector<std::byte> named(const std::string& name, const std::string& query = {}) {
    std::vector<std::byte> data(4);
    store_be(data.data(), static_cast<std::uint32_t>(name.size()));
    const auto append = [&](const std::string& text) {
      for (char c : text) data.push_back(static_cast<std::byte>(c));
    };
    append(name);
    if (query.empty()) {
      data.resize(data.size() + 2);
    } else {
      append(std::string("\0\0\0\1\0\0\0", 7) + static_cast<char>(query.size()) + query);
    }
    return data;
  }

  std::uint32_t go(const std::string& name) { return option(nbd::Option::kGo, named(name)); }

  void negotiate(ReplyStyle style = ReplyStyle::kSimple, const std::string& name = "") {
    greet();
    if (style != ReplyStyle::kSimple) {
      ASSERT_EQ(option(style == ReplyStyle::kExtended ? nbd::Option::kExtendedHeaders
                                                      : nbd::Option::kStructuredReply),
                kAck);
      ASSERT_EQ(option(nbd::Option::kSetMetaContext, named(name, "base:allocation")), kAck);
    }
    ASSERT_EQ(go(name), kAck);
    style_ = style;
  }

  // As the agreed style has it; a write's data, or other payload, behind it.
  void ask(Command command, std::uint64_t cookie, std::uint64_t offset, std::uint64_t length,
           std::uint16_t flags = 0, std::vector<std::byte> payload = {}) {
    std::vector<std::byte> bytes;
    if (style_ == ReplyStyle::kExtended) {
      if (command == Command::kWrite) flags |= nbd::kCommandPayloadLen;
      bytes.resize(nbd::kExtendedRequestSize);
      store_be<std::uint32_t>(bytes.data(), nbd::kExtendedRequestMagic);
      store_be<std::uint64_t>(bytes.data() + 24, length);
    } else {
      bytes.resize(nbd::kRequestSize);
      store_be<std::uint32_t>(bytes.data(), nbd::kRequestMagic);
      store_be<std::uint32_t>(bytes.data() + 24, static_cast<std::uint32_t>(length));
    }
    store_be<std::uint16_t>(bytes.data() + 4, flags);
    store_be<std::uint16_t>(bytes.data() + 6, static_cast<std::uint16_t>(command));
    store_be<std::uint64_t>(bytes.data() + 8, cookie);
    store_be<std::uint64_t>(bytes.data() + 16, offset);
    if (command == Command::kWrite) payload.resize(length);
    bytes.insert(bytes.end(), payload.begin(), payload.end());
    send(bytes);
  }

  struct ReplyChunk {
    nbd::ChunkType type{};
    bool done = false;
    std::vector<std::byte> payload;

    std::uint32_t error() const { return load_be<std::uint32_t>(payload.data()); }
    std::string message() const {
      const auto size = load_be<std::uint16_t>(payload.data() + 4);
      return {reinterpret_cast<const char*>(payload.data()) + 6, size};
    }
    std::uint64_t offset() const { return load_be<std::uint64_t>(payload.data()); }
  };

  // The next chunk, which belongs to the request.
  ReplyChunk chunk(std::uint64_t cookie, std::uint64_t request_offset) {
    const bool extended = style_ == ReplyStyle::kExtended;
    const auto header = receive(nbd::chunk_header_size(style_));
    if (header.size() != nbd::chunk_header_size(style_)) {
      ADD_FAILURE() << "the stream ended";
      return {};
    }
    EXPECT_EQ(load_be<std::uint32_t>(header.data()),
              extended ? nbd::kExtendedReplyMagic : nbd::kStructuredReplyMagic);
    EXPECT_EQ(load_be<std::uint64_t>(header.data() + 8), cookie);
    if (extended) {
      EXPECT_EQ(load_be<std::uint64_t>(header.data() + 16), request_offset);
    }
    const std::uint64_t length = extended ? load_be<std::uint64_t>(header.data() + 24)
                                          : load_be<std::uint32_t>(header.data() + 16);
    return {nbd::ChunkType{load_be<std::uint16_t>(header.data() + 6)},
            load_be<std::uint16_t>(header.data() + 4) == nbd::kReplyDone, receive(length)};
  }

  // The error, or 0, of a request that brings no data.
  std::uint32_t outcome(std::uint64_t cookie, std::uint64_t request_offset = 0) {
    std::uint32_t magic = 0;
    EXPECT_EQ(::recv(fd_.get(), &magic, sizeof magic, MSG_PEEK | MSG_WAITALL), 4);
    if (magic == __builtin_bswap32(nbd::kSimpleReplyMagic)) {
      EXPECT_NE(style_, ReplyStyle::kExtended);
      return reply(cookie);
    }
    const ReplyChunk got = chunk(cookie, request_offset);
    EXPECT_TRUE(got.done);
    if (got.type == nbd::ChunkType::kNone) return 0;
    EXPECT_EQ(got.type, nbd::ChunkType::kError);
    return got.error();
  }

  static constexpr auto kAck = static_cast<std::uint32_t>(nbd::ReplyType::kAck);
  std::uint64_t told_size = 0;
  std::uint16_t told_flags = 0;

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
  ReplyStyle style_ = ReplyStyle::kSimple;
};

class NbdServerTest : public OnEachLoop {
 protected:
  void start(NbdLimits limits = {}, std::size_t max_connections = 0,
             nbd::TlsPolicy tls = nbd::TlsPolicy::kUnsupported) {
    main_ = AioContext::create(options("main"));
    scope_.emplace(*main_);
    NbdServer::Options o{.main_context = main_.get(),
                         .io_contexts = {},
                         .limits = limits,
                         .max_connections = max_connections,
                         .tls = tls,
                         .log = [this](const std::string& line) {
                           std::lock_guard lock(log_mutex_);
                           log_.push_back(line);
                         }};
    for (const char* name : {"io0", "io1"}) {
      threads_.push_back(std::make_unique<IOThread>(options(name)));
      o.io_contexts.push_back(&threads_.back()->context());
    }
    NbdServer::Export exported{.name = "", .disk = &disk_, .allow_resize = true};
    server_ = std::make_unique<NbdServer>(std::move(o),
                                          std::vector<NbdServer::Export>{std::move(exported)});
  }

  // Polls the main context until `done`.
  void until(const bool& done) {
    while (!done) main_->poll(true);
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

// ---- replies in chunks

constexpr ReplyStyle kChunked[] = {ReplyStyle::kStructured, ReplyStyle::kExtended};

Extent data(std::uint64_t length) { return {length, false, false}; }
Extent hole(std::uint64_t length) { return {length, true, true}; }

TEST_P(NbdServerTest, AReadIsOneChunkWithItsDataWhole) {
  start();
  for (ReplyStyle style : kChunked) {
    Client client = connect();
    client.negotiate(style);
    EXPECT_TRUE(client.told_flags & nbd::kTransmissionSendDf);
    for (std::uint64_t i = 1; i <= 3; ++i) client.ask(Command::kRead, i, 8192 * i, 4096);
    for (std::uint64_t i = 1; i <= 3; ++i) {
      const auto got = client.chunk(i, 8192 * i);
      EXPECT_EQ(got.type, nbd::ChunkType::kOffsetData);
      EXPECT_TRUE(got.done);
      ASSERT_EQ(got.payload.size(), 8u + 4096);
      EXPECT_EQ(got.offset(), 8192 * i);
      EXPECT_EQ(got.payload.back(), std::byte{0x5a});
    }
    // Of no bytes: a chunk without data.
    client.ask(Command::kRead, 4, 0, 0);
    const auto none = client.chunk(4, 0);
    EXPECT_EQ(none.type, nbd::ChunkType::kNone);
    EXPECT_TRUE(none.done);
  }
  EXPECT_EQ(disk_.count("status"), 0);
}

TEST_P(NbdServerTest, ALongReadLeavesOutZeroes) {
  disk_.extents = {data(8192), hole(65536), data(1 << 20)};
  start();
  for (ReplyStyle style : kChunked) {
    Client client = connect();
    client.negotiate(style);
    client.ask(Command::kRead, 1, 4096, 128 << 10);
    const auto first = client.chunk(1, 4096);
    EXPECT_EQ(first.type, nbd::ChunkType::kOffsetData);
    EXPECT_FALSE(first.done);
    EXPECT_EQ(first.offset(), 4096u);
    EXPECT_EQ(first.payload.size(), 8u + 8192);
    const auto second = client.chunk(1, 4096);
    EXPECT_EQ(second.type, nbd::ChunkType::kOffsetHole);
    EXPECT_FALSE(second.done);
    EXPECT_EQ(second.offset(), 4096u + 8192);
    ASSERT_EQ(second.payload.size(), 12u);
    EXPECT_EQ(load_be<std::uint32_t>(second.payload.data() + 8), 65536u);
    const auto third = client.chunk(1, 4096);
    EXPECT_EQ(third.type, nbd::ChunkType::kOffsetData);
    EXPECT_TRUE(third.done);
    EXPECT_EQ(third.offset(), 4096u + 8192 + 65536);
    EXPECT_EQ(third.payload.size(), 8u + (128 << 10) - 8192 - 65536);

    // Not to be fragmented: all of it is data.
    client.ask(Command::kRead, 2, 4096, 128 << 10, nbd::kCommandDf);
    const auto whole = client.chunk(2, 4096);
    EXPECT_EQ(whole.type, nbd::ChunkType::kOffsetData);
    EXPECT_TRUE(whole.done);
    EXPECT_EQ(whole.payload.size(), 8u + (128 << 10));
  }
  EXPECT_EQ(disk_.count("status"), 2);
}

TEST_P(NbdServerTest, PiecesOfAReadCountAsOneRequest) {
  disk_.extents = {hole(8192), data(8192), hole(8192), data(1 << 20)};
  start({.requests_in_flight = 2});
  Client client = connect();
  client.negotiate(ReplyStyle::kStructured);
  for (std::uint64_t i = 0; i < 20; ++i) client.ask(Command::kRead, i, 0, 64 << 10);
  std::map<std::uint64_t, int> chunks;
  for (int i = 0; i < 20 * 4; ++i) {
    const auto header = client.receive(nbd::kStructuredReplySize);
    ASSERT_EQ(header.size(), nbd::kStructuredReplySize);
    client.receive(load_be<std::uint32_t>(header.data() + 16));
    ++chunks[load_be<std::uint64_t>(header.data() + 8)];
  }
  EXPECT_EQ(chunks.size(), 20u);
  for (auto [cookie, count] : chunks) EXPECT_EQ(count, 4) << cookie;
}

TEST_P(NbdServerTest, ErrorsComeWithTheirMessageAndTheirPlace) {
  disk_.extents = {data(8192), hole(65536), data(1 << 20)};
  start();
  for (ReplyStyle style : kChunked) {
    Client client = connect();
    client.negotiate(style);
    disk_.error = ENOSPC;
    client.ask(Command::kWrite, 1, 0, 512);
    const auto full = client.chunk(1, 0);
    EXPECT_EQ(full.type, nbd::ChunkType::kError);
    EXPECT_TRUE(full.done);
    EXPECT_EQ(full.error(), nbd::kErrorNoSpc);
    EXPECT_EQ(full.message(), "write hand at 0+512: No space left on device");
    disk_.error = 0;

    client.ask(Command::kRead, 2, kSize, 512);
    const auto beyond = client.chunk(2, kSize);
    EXPECT_EQ(beyond.error(), nbd::kErrorInval);
    EXPECT_EQ(beyond.message(), "beyond the end of the export");

    // The first two pieces are sent before the third fails.
    disk_.bad_from = 50'000;
    client.ask(Command::kRead, 3, 0, 128 << 10);
    EXPECT_EQ(client.chunk(3, 0).type, nbd::ChunkType::kOffsetData);
    EXPECT_EQ(client.chunk(3, 0).type, nbd::ChunkType::kOffsetHole);
    const auto broken = client.chunk(3, 0);
    EXPECT_EQ(broken.type, nbd::ChunkType::kErrorOffset);
    EXPECT_TRUE(broken.done);
    EXPECT_EQ(broken.error(), nbd::kErrorIo);
    EXPECT_EQ(broken.message(), "read bad sector: Input/output error");
    EXPECT_EQ(load_be<std::uint64_t>(broken.payload.data() + broken.payload.size() - 8),
              8192u + 65536);
    disk_.bad_from = ~0ull;
    client.ask(Command::kFlush, 4, 0, 0);
    EXPECT_EQ(client.outcome(4), 0u);
  }
}

TEST_P(NbdServerTest, StatusTellsWhatTheDiskSays) {
  disk_.extents = {data(8192), hole(65536), {4096, false, true}, data(1 << 20)};
  start();
  for (ReplyStyle style : kChunked) {
    const bool extended = style == ReplyStyle::kExtended;
    const auto extents = [&](const Client::ReplyChunk& got) {
      EXPECT_TRUE(got.done);
      EXPECT_EQ(got.type,
                extended ? nbd::ChunkType::kBlockStatusExt : nbd::ChunkType::kBlockStatus);
      std::vector<std::pair<std::uint64_t, std::uint64_t>> result;
      const std::byte* at = got.payload.data();
      const std::byte* const end = at + got.payload.size();
      EXPECT_EQ(load_be<std::uint32_t>(at), nbd::kBaseAllocationId);
      at += extended ? 8 : 4;
      for (; at < end; at += extended ? 16 : 8) {
        if (extended) {
          result.emplace_back(load_be<std::uint64_t>(at), load_be<std::uint64_t>(at + 8));
        } else {
          result.emplace_back(load_be<std::uint32_t>(at), load_be<std::uint32_t>(at + 4));
        }
      }
      if (extended) {
        EXPECT_EQ(load_be<std::uint32_t>(got.payload.data() + 4), result.size());
      }
      return result;
    };
    using List = std::vector<std::pair<std::uint64_t, std::uint64_t>>;
    Client client = connect();
    client.negotiate(style);
    client.ask(Command::kBlockStatus, 1, 0, 100'000);
    EXPECT_EQ(extents(client.chunk(1, 0)),
              (List{{8192, 0}, {65536, 3}, {4096, 2}, {100'000 - 8192 - 65536 - 4096, 0}}));
    client.ask(Command::kBlockStatus, 2, 512, 100'000, nbd::kCommandReqOne);
    EXPECT_EQ(extents(client.chunk(2, 512)), (List{{8192, 0}}));
    client.ask(Command::kBlockStatus, 3, 0, 0);
    EXPECT_EQ(client.outcome(3), nbd::kErrorInval);
    EXPECT_EQ((client.told_flags & nbd::kTransmissionBlockStatusPayload) != 0, extended);
    if (!extended) continue;

    std::vector<std::byte> query(12);
    store_be<std::uint64_t>(query.data(), 10'000);
    store_be<std::uint32_t>(query.data() + 8, nbd::kBaseAllocationId);
    client.ask(Command::kBlockStatus, 4, 0, 12, nbd::kCommandPayloadLen, query);
    EXPECT_EQ(extents(client.chunk(4, 0)), (List{{8192, 0}, {10'000 - 8192, 3}}));
    store_be<std::uint32_t>(query.data() + 8, 77u);
    client.ask(Command::kBlockStatus, 5, 0, 12, nbd::kCommandPayloadLen, query);
    EXPECT_EQ(client.outcome(5), nbd::kErrorInval);
    query.resize(16);
    client.ask(Command::kBlockStatus, 6, 0, 16, nbd::kCommandPayloadLen, query);
    EXPECT_EQ(client.outcome(6), nbd::kErrorInval);
    client.ask(Command::kRead, 7, 0, 512);
    EXPECT_EQ(client.chunk(7, 0).payload.size(), 8u + 512);
  }
}

TEST_P(NbdServerTest, StatusNeedsItsContext) {
  start();
  Client client = connect();
  client.greet();
  ASSERT_EQ(client.option(nbd::Option::kStructuredReply), Client::kAck);
  ASSERT_EQ(client.go(""), Client::kAck);
  client.send(Client::request(Command::kBlockStatus, 1, 512));
  const auto header = client.receive(nbd::kStructuredReplySize);
  ASSERT_EQ(header.size(), nbd::kStructuredReplySize);
  EXPECT_EQ(load_be<std::uint16_t>(header.data() + 6),
            static_cast<std::uint16_t>(nbd::ChunkType::kError));
  EXPECT_EQ(disk_.count("status"), 0);
}

TEST_P(NbdServerTest, CachingAndQuickZeroesReachTheDisk) {
  start();
  Client client = connect();
  client.negotiate(ReplyStyle::kExtended);
  client.ask(Command::kCache, 1, 0, kSize);
  EXPECT_EQ(client.outcome(1), 0u);
  EXPECT_EQ(disk_.count("cache"), 1);
  client.ask(Command::kWriteZeroes, 2, 0, kSize, nbd::kCommandFastZero);
  EXPECT_EQ(client.outcome(2), 0u);
  EXPECT_EQ(disk_.count("zeroes fast"), 1);
  // That it would not be quick is an answer, not a failure.
  disk_.error = ENOTSUP;
  client.ask(Command::kWriteZeroes, 3, 0, kSize, nbd::kCommandFastZero);
  EXPECT_EQ(client.outcome(3), nbd::kErrorNotSup);
  EXPECT_TRUE(log().empty());
  // Otherwise the protocol does not know that word.
  client.ask(Command::kWriteZeroes, 4, 0, kSize);
  EXPECT_EQ(client.outcome(4), nbd::kErrorInval);
  EXPECT_EQ(log().size(), 1u);
}

TEST_P(NbdServerTest, RequestsKeepToTheExportsBlockSize) {
  disk_.extents = {data(1000), hole(1 << 20)};
  start();
  ASSERT_TRUE(server_->add_export({.name = "blocks", .disk = &disk_, .min_block = 4096}));
  Client client = connect();
  client.negotiate(ReplyStyle::kExtended, "blocks");
  client.ask(Command::kRead, 1, 4096, 512);
  EXPECT_EQ(client.outcome(1, 4096), nbd::kErrorInval);
  client.ask(Command::kRead, 2, 4096, 4096);
  EXPECT_EQ(client.chunk(2, 4096).payload.size(), 8u + 4096);
  // Nor does a status say anything about a part of a block.
  client.ask(Command::kBlockStatus, 3, 0, 16384, nbd::kCommandReqOne);
  const auto got = client.chunk(3, 0);
  ASSERT_EQ(got.payload.size(), 8u + 16);
  EXPECT_EQ(load_be<std::uint64_t>(got.payload.data() + 8), 4096u);
  EXPECT_EQ(load_be<std::uint64_t>(got.payload.data() + 16), 0u);
}

// ---- resizing

TEST_P(NbdServerTest, ADiskGrowsWhileOthersUseIt) {
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

TEST_P(NbdServerTest, ADiskShrinksForItsOnlyClient) {
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

TEST_P(NbdServerTest, AResizeWaitsForWhatIsUnderWayAndLetsNothingPass) {
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

TEST_P(NbdServerTest, ANewClientWaitsUntilTheDiskHasItsSize) {
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

TEST_P(NbdServerTest, ExportsAreAddedWhileClientsAreBusy) {
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

TEST_P(NbdServerTest, AHiddenExportTakesNoNewClientsAndKeepsItsOld) {
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

TEST_P(NbdServerTest, ARemovedExportGoesWithItsLastClient) {
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

TEST_P(NbdServerTest, AnExportRemovedNowFinishesWhatTheDiskIsDoing) {
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
TEST_P(NbdServerTest, ExportsComeAndGoUnderClientsThatAreBusy) {
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
