// SPDX-License-Identifier: MIT
// What the tests of the NBD server share: a disk that the test holds in its hands, a client that
// blocks, and a fixture with a server between them.
//
// Threads: the disk from any; a client in one at a time; the fixture's main context is the test's.
#pragma once

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "aio/test_loop.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/iothread.h"
#include "roost/base/bytes.h"
#include "roost/export/nbd_server.h"
#include "roost/nbd/protocol.h"
#include "roost/nbd/transmission.h"

namespace roost {

/// Counts what reaches it. While it is held, every operation waits; release() lets them go, in
/// order and in one turn of each context.
class HandDisk final : public BlockDriver {
 public:
  static constexpr std::uint64_t kSize = 1 << 20;

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

/// A blocking client, byte by byte as the protocol document says.
class NbdTestClient {
 public:
  using Command = nbd::Command;
  using ReplyStyle = nbd::ReplyStyle;

  explicit NbdTestClient(UniqueFd fd) : fd_(std::move(fd)) {}

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

/// A server of one such disk, with two I/O threads, on each loop.
class NbdServerTest : public OnEachLoop {
 protected:
  using Client = NbdTestClient;
  using Command = nbd::Command;
  using ReplyStyle = nbd::ReplyStyle;
  static constexpr std::uint64_t kSize = HandDisk::kSize;

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

}  // namespace roost
