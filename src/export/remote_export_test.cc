// SPDX-License-Identifier: MIT
// Connections that come back, against the server, on threads of their own: whenever all of them are
// cut, a disk reads as it was written.
#include "roost/nbd/remote_export.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "roost/aio/aio_context.h"
#include "roost/aio/iothread.h"
#include "roost/aio/timer.h"
#include "roost/base/random.h"
#include "roost/block/block_driver.h"
#include "roost/coro/task.h"
#include "roost/export/nbd_server.h"
#include "roost/io/socket_channel.h"

namespace roost {
namespace {

constexpr std::uint64_t kRegion = 64 << 10;
constexpr std::size_t kWorkers = 8;
constexpr int kCuts = 25;

// The server's end of a connection, and a second handle of the client's.
struct Line {
  UniqueFd client;
  bool cut = false;
  std::atomic<bool> gone{false};  // the server has done with it
};

class TellingChannel final : public SocketChannel {
 public:
  TellingChannel(UniqueFd fd, std::shared_ptr<Line> line)
      : SocketChannel(std::move(fd), "the client"), line_(std::move(line)) {}
  ~TellingChannel() override { line_->gone = true; }

 private:
  const std::shared_ptr<Line> line_;
};

class CutConnections : public testing::TestWithParam<unsigned> {
 protected:
  static AioContextOptions named(const char* name) {
    AioContextOptions options;
    options.name = name;
    options.poll_max_ns = 0;
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
    std::vector<NbdServer::Export> exports;
    exports.push_back(NbdServer::Export{.name = "disk", .disk = disk_.get()});
    server_ = std::make_unique<NbdServer>(std::move(options), std::move(exports));
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

  // Not before the server has done with all that were cut: it might still carry out a write that is
  // sent again.
  Task<Result<std::unique_ptr<nbd::NbdClient>>> dial(std::stop_token stop) {
    AioContext& home = *AioContext::current();
    int pair[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair), 0);
    const auto line = std::make_shared<Line>();
    line->client = UniqueFd(::dup(pair[1]));
    while (!take_in(line)) co_await sleep_for(100'000);
    co_await move_to(*main_);
    server_->serve(std::make_unique<TellingChannel>(UniqueFd(pair[0]), line));
    co_await move_to(home);
    nbd::NbdClientOptions options;
    options.wishes.export_name = "disk";
    auto channel = std::make_unique<SocketChannel>(UniqueFd(pair[1]), "the server");
    co_return co_await nbd::NbdClient::connect(std::move(channel), options, std::move(stop));
  }

  bool take_in(const std::shared_ptr<Line>& line) {
    const std::lock_guard lock(mutex_);
    if (std::ranges::any_of(lines_, [](auto& one) { return one->cut && !one->gone; })) return false;
    std::erase_if(lines_, [](auto& one) { return one->cut; });
    lines_.push_back(line);
    return true;
  }

  void cut_all() {
    const std::lock_guard lock(mutex_);
    for (const auto& line : lines_) {
      line->cut = true;
      ::shutdown(line->client.get(), SHUT_RDWR);
    }
  }

  Task<void> everything() {
    nbd::RemoteExportOptions options;
    for (const auto& thread : threads_) options.contexts.push_back(&thread->context());
    options.connections = GetParam();
    options.replay_writes = true;
    options.first_delay_ns = 1'000'000;
    nbd::RemoteExport::Connect connect = [this](std::stop_token stop) {
      return dial(std::move(stop));
    };
    auto opening = nbd::RemoteExport::open(std::move(connect), options);
    auto opened = co_await std::move(opening);
    EXPECT_TRUE(opened) << opened.error().message();
    if (!opened) co_return;
    export_ = std::move(*opened);
    running_ = kWorkers;
    for (std::size_t i = 0; i < kWorkers; ++i) {
      spawn(threads_[i % 2]->context(), work(i), "worker");
    }
    Random random(GetParam());
    for (int cut = 0; cut < kCuts; ++cut) {
      const int goal = done_ + static_cast<int>(random.below(200));
      while (done_ < goal && running_ == kWorkers) co_await sleep_for(100'000);
      cut_all();
    }
    ended_ = true;
    while (running_ > 0) co_await sleep_for(100'000);
    (void)co_await export_->close();
    lost_ = export_->statistics().lost;
    export_.reset();
  }

  /// Has a part of the disk for itself, and knows what is there.
  Task<void> work(std::size_t which) {
    const std::uint64_t begin = which * kRegion;
    std::vector<std::byte> model(kRegion);
    Random random(which + 1);
    while (!ended_) {
      const std::size_t size = 1 + random.below(random.one_in(4) ? kRegion / 2 : 4096);
      const std::size_t at = random.below(kRegion - size);
      const auto part = std::span(model).subspan(at, size);
      Result<void> done;
      switch (random.below(6)) {
        case 0:
        case 1: {
          std::ranges::generate(part, [&] { return static_cast<std::byte>(random.next()); });
          const iovec piece{part.data(), part.size()};
          done = co_await export_->writev(begin + at, std::span(&piece, 1));
          break;
        }
        case 2:
          std::ranges::fill(part, std::byte{0});
          done = co_await export_->zero(begin + at, size);
          break;
        case 3:
          if (random.one_in(4)) done = co_await export_->flush();
          break;
        default: {
          std::vector<std::byte> buffer(size, std::byte{0xee});
          done = co_await export_->read(begin + at, buffer);
          if (!std::ranges::equal(buffer, part)) ++wrong_;
          break;
        }
      }
      EXPECT_TRUE(done) << done.error().message();
      if (!done) break;
      ++done_;
    }
    std::vector<std::byte> all(kRegion);
    const Result<void> read = co_await export_->read(begin, all);
    EXPECT_TRUE(read) << read.error().message();
    if (all != model) ++wrong_;
    --running_;
  }

  std::shared_ptr<AioContext> main_;
  std::optional<ContextScope> scope_;
  std::unique_ptr<BlockDriver> disk_;
  std::vector<std::unique_ptr<IOThread>> threads_;
  std::unique_ptr<NbdServer> server_;
  std::unique_ptr<nbd::RemoteExport> export_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Line>> lines_;  // under the mutex
  std::atomic<std::size_t> running_{0};
  std::atomic<int> done_{0};
  std::atomic<int> wrong_{0};
  std::atomic<bool> ended_{false};
  std::uint64_t lost_ = 0;
};

TEST_P(CutConnections, ADiskReadsAsItWasWritten) {
  run(everything());
  EXPECT_EQ(wrong_, 0);
  EXPECT_GE(lost_, static_cast<std::uint64_t>(kCuts / 2));
  EXPECT_GT(done_, kCuts);
}

INSTANTIATE_TEST_SUITE_P(Connections, CutConnections, testing::Values(1u, 2u));

}  // namespace
}  // namespace roost
