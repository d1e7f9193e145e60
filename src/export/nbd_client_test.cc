// SPDX-License-Identifier: MIT
// The client against the server, on threads of their own: whatever is in flight, wherever the
// requests come from and the connection moves to, a disk reads as it was written.
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "roost/aio/aio_context.h"
#include "roost/aio/iothread.h"
#include "roost/block/block_driver.h"
#include "roost/coro/task.h"
#include "roost/export/nbd_server.h"
#include "roost/io/socket_channel.h"
#include "roost/nbd/client.h"

namespace roost {
namespace {

constexpr std::uint64_t kRegion = 256 << 10;
constexpr std::size_t kWorkers = 8;
constexpr int kRounds = 150;

using nbd::NbdClient;

class ClientAndServer : public testing::TestWithParam<nbd::ReplyStyle> {
 protected:
  static AioContextOptions named(const char* name) {
    AioContextOptions options;
    options.name = name;
    options.poll_max_ns = 0;  // there are more threads than CPUs
    return options;
  }

  void SetUp() override {
    main_ = AioContext::create(named("main"));
    scope_.emplace(*main_);
    disk_ = *make_memory_disk(kWorkers * kRegion, {});
    for (const char* name : {"io0", "io1"}) {
      threads_.push_back(std::make_unique<IOThread>(named(name)));
    }
    NbdServer::Options options{
        .main_context = main_.get(), .io_contexts = {}, .log = [](const std::string&) {}};
    for (const auto& thread : threads_) options.io_contexts.push_back(&thread->context());
    NbdServer::Export exported{.name = "disk", .disk = disk_.get(), .allow_resize = true};
    std::vector<NbdServer::Export> exports;
    exports.push_back(std::move(exported));
    server_ = std::make_unique<NbdServer>(std::move(options), std::move(exports));

    options_.wishes.export_name = "disk";
    options_.wishes.structured_replies = GetParam() != nbd::ReplyStyle::kSimple;
    options_.wishes.extended_headers = GetParam() == nbd::ReplyStyle::kExtended;
    options_.wishes.meta_contexts = {"base:allocation"};
  }

  void TearDown() override {
    bool idle = false;
    server_->stop([&idle] { idle = true; });
    while (!idle) main_->poll(true);
    server_.reset();
    threads_.clear();
    scope_.reset();
  }

  /// Runs `task` on the first I/O thread, and the main context meanwhile.
  void run(Task<void> task) {
    bool done = false;
    spawn(threads_[0]->context(), and_then_say(std::move(task), *main_, done), "test");
    while (!done) main_->poll(true);
  }
  static Task<void> and_then_say(Task<void> task, AioContext& main, bool& done) {
    co_await std::move(task);
    co_await move_to(main);
    done = true;
  }

  std::unique_ptr<Channel> connect_socket() {
    int pair[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair), 0);
    server_->serve(UniqueFd(pair[0]));
    return std::make_unique<SocketChannel>(UniqueFd(pair[1]), "the server");
  }

  Task<void> everything(std::unique_ptr<Channel> channel) {
    auto connected = co_await NbdClient::connect(std::move(channel), options_);
    EXPECT_TRUE(connected) << connected.error().message();
    if (!connected) co_return;
    client_ = *std::move(connected);
    EXPECT_EQ(client_->outcome().headers, GetParam());
    running_ = kWorkers;
    for (std::size_t i = 0; i < kWorkers; ++i) {
      spawn(threads_[i % 2]->context(), work(i), "worker");
    }
    for (std::size_t turn = 1; running_ > 0; ++turn) {
      const Result<void> moved = co_await client_->move_to(threads_[turn % 2]->context());
      EXPECT_TRUE(moved) << moved.error().message();
      if (moved) ++moves_;
      // Lets the others run between two moves.
      for (int i = 0; i < 20; ++i) co_await move_to(threads_[i % 2]->context());
    }
    co_await move_to(threads_[0]->context());
    co_await client_->disconnect();
    client_.reset();
  }

  Task<void> stop_soon(std::stop_source stop, std::uint32_t hops) {
    while (hops-- > 0) co_await move_to(threads_[hops % 2]->context());
    stop.request_stop();
    --running_;
  }

  /// Has a part of the disk for itself, and knows what is there.
  Task<void> work(std::size_t which) {
    const std::uint64_t begin = which * kRegion;
    std::vector<std::byte> model(kRegion);
    std::uint32_t seed = static_cast<std::uint32_t>(which) * 7919 + 1;
    const auto random = [&seed](std::uint32_t below) {
      seed = seed * 1664525 + 1013904223;
      return (seed >> 8) % below;
    };
    for (int round = 0; round < kRounds; ++round) {
      const std::uint32_t size = 1 + random(random(4) == 0 ? 128 << 10 : 4096);
      const std::uint32_t at = random(static_cast<std::uint32_t>(kRegion) - size);
      const auto part = std::span(model).subspan(at, size);
      Result<void> done;
      switch (random(5)) {
        case 0: {
          std::ranges::fill(part, static_cast<std::byte>(random(256)));
          done = co_await client_->write(begin + at, part);
          break;
        }
        case 1:
          std::ranges::fill(part, std::byte{0});
          done = co_await client_->zero(begin + at, size);
          break;
        case 2: {
          // Left, perhaps, while its reply may be on its way into the buffer, which goes at once.
          std::stop_source stop;
          ++running_;
          spawn(threads_[random(2)]->context(), stop_soon(stop, random(30)), "stop");
          auto buffer = std::make_unique<std::vector<std::byte>>(size);
          done = co_await client_->read(begin + at, *buffer, stop.get_token(),
                                        nbd::WhenStopped::kLeave);
          if (!done && done.error().code() == EINPROGRESS) ++left_;
          if (!done && (done.error().code() == ECANCELED || done.error().code() == EINPROGRESS)) {
            done = {};
          }
          break;
        }
        default: {
          std::vector<std::byte> buffer(size, std::byte{0xee});
          done = co_await client_->read(begin + at, buffer);
          if (!std::ranges::equal(buffer, part)) ++wrong_;
          break;
        }
      }
      EXPECT_TRUE(done) << done.error().message();
      if (!done) break;
      ++done_;
    }
    --running_;
  }

  Task<void> ask(std::unique_ptr<Channel> channel) {
    auto connected = co_await NbdClient::connect(std::move(channel), options_);
    EXPECT_TRUE(connected) << connected.error().message();
    if (!connected) co_return;
    NbdClient& client = **connected;
    Result<void> done = co_await client.flush();
    EXPECT_TRUE(done) << done.error().message();
    done = co_await client.trim(0, 65536, nbd::kCommandFua);
    EXPECT_TRUE(done) << done.error().message();
    done = co_await client.cache(0, 65536);
    EXPECT_TRUE(done || !client.offers(nbd::kTransmissionSendCache)) << done.error().message();
    const std::vector<std::byte> block(4096, std::byte{1});
    done = co_await client.write(1 << 20, block);
    EXPECT_TRUE(done) << done.error().message();
    const auto status = co_await client.block_status(0, client.size());
    if (GetParam() == nbd::ReplyStyle::kSimple) {
      EXPECT_FALSE(status);
    } else {
      EXPECT_TRUE(status) << status.error().message();
      if (status) {
        EXPECT_EQ(status->front().context, "base:allocation");
        EXPECT_EQ(status->front().extents.front().flags, nbd::kStateHole | nbd::kStateZero);
      }
    }
    const std::uint64_t size = client.size();
    if (client.offers(nbd::kTransmissionSendResize)) {
      done = co_await client.resize(size + 4096);
      EXPECT_TRUE(done) << done.error().message();
      EXPECT_EQ(client.size(), size + 4096);
    }
    co_await client.disconnect();
  }

  std::shared_ptr<AioContext> main_;
  std::optional<ContextScope> scope_;
  std::unique_ptr<BlockDriver> disk_;
  std::vector<std::unique_ptr<IOThread>> threads_;
  std::unique_ptr<NbdServer> server_;
  nbd::NbdClientOptions options_;
  std::unique_ptr<NbdClient> client_;
  std::atomic<std::size_t> running_{0};  // workers, and those who stop their requests
  std::atomic<int> done_{0};
  std::atomic<int> wrong_{0};
  std::atomic<int> left_{0};
  int moves_ = 0;
};

TEST_P(ClientAndServer, KeepADiskWhileTheConnectionMoves) {
  run(everything(connect_socket()));
  EXPECT_EQ(wrong_, 0);
  EXPECT_EQ(done_, static_cast<int>(kWorkers) * kRounds);
  EXPECT_GT(moves_, 0);
  EXPECT_GT(left_, 0);
}

TEST_P(ClientAndServer, AgreeOnWhatElseThereIs) { run(ask(connect_socket())); }

std::string name_of_style(const testing::TestParamInfo<nbd::ReplyStyle>& style) {
  constexpr std::array kNames{"Simple", "Structured", "Extended"};
  return kNames[static_cast<std::size_t>(style.param)];
}

INSTANTIATE_TEST_SUITE_P(Styles, ClientAndServer,
                         testing::Values(nbd::ReplyStyle::kSimple, nbd::ReplyStyle::kStructured,
                                         nbd::ReplyStyle::kExtended),
                         name_of_style);

}  // namespace
}  // namespace roost
