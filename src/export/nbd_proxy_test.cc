// SPDX-License-Identifier: MIT
// The proxy between the client and the server of this project, over channels in memory.
#include "roost/export/nbd_proxy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "roost/aio/aio_context.h"
#include "roost/block/block_driver.h"
#include "roost/coro/task.h"
#include "roost/export/nbd_server.h"
#include "roost/io/memory_channel.h"
#include "roost/nbd/client.h"
#include "roost/sync/task_group.h"

namespace roost {
namespace {

using Fault = NbdProxy::Fault;
using nbd::NbdClient;

constexpr std::uint64_t kProxied = 1 << 20;

class NbdProxyTest : public testing::TestWithParam<nbd::ReplyStyle> {
 protected:
  void SetUp() override {
    AioContextOptions context_options;
    context_options.name = "main";
    context_options.poll_max_ns = 0;
    main_ = AioContext::create(context_options);
    scope_.emplace(*main_);
    disk_ = *make_memory_disk(kProxied, {});
    NbdServer::Options options{.main_context = main_.get(),
                               .io_contexts = {main_.get()},
                               .log = [](const std::string&) {}};
    NbdServer::Export exported{.name = "", .disk = disk_.get()};
    std::vector<NbdServer::Export> exports;
    exports.push_back(std::move(exported));
    server_ = std::make_unique<NbdServer>(std::move(options), std::move(exports));
    options_.wishes.structured_replies = GetParam() != nbd::ReplyStyle::kSimple;
    options_.wishes.extended_headers = GetParam() == nbd::ReplyStyle::kExtended;
  }

  void TearDown() override {
    bool idle = false;
    server_->stop([&idle] { idle = true; });
    while (!idle) main_->poll(true);
    server_.reset();
    scope_.reset();
  }

  void run(Task<void> task) {
    bool done = false;
    Coroutine::create(keep(std::move(task), done), "test")->enter();
    const std::int64_t give_up_at = real_clock().now_ns() + 60'000'000'000;
    while (!done && real_clock().now_ns() < give_up_at) main_->poll(true);
    ASSERT_TRUE(done) << "it has not ended";
  }
  static Task<void> keep(Task<void> task, bool& done) {
    co_await std::move(task);
    done = true;
  }

  // A new proxy; the client's end of a connection through it.
  std::unique_ptr<Channel> through(const NbdFaults& faults) {
    proxy_ = std::make_unique<NbdProxy>(faults);
    return again();
  }
  std::unique_ptr<Channel> again() {
    auto [client, near] = make_memory_channels();
    auto [far, server] = make_memory_channels();
    server_->serve(std::move(server));
    carried_ = false;
    Coroutine::create(keep(proxy_->carry(std::move(near), std::move(far)), carried_), "carry")
        ->enter();
    return std::move(client);
  }

  void until_carried() {
    while (!carried_) main_->poll(true);
  }

  // A client that reads, again and again, until something is wrong.
  Task<void> read_until_it_fails(std::unique_ptr<Channel> channel, int most) {
    wrong_ = {};
    reads_ = 0;
    auto client = co_await NbdClient::connect(std::move(channel), options_);
    EXPECT_TRUE(client) << client.error().message();
    if (!client) co_return;
    std::vector<std::byte> buffer(4096);
    while (reads_ < most) {
      wrong_ = co_await (*client)->read(0, buffer);
      if (!wrong_) break;
      ++reads_;
    }
    co_await (*client)->disconnect();
  }

  // Many at once: writes to places of their own, which are read again.
  Task<void> work_in_parallel(std::unique_ptr<Channel> channel) {
    auto client = co_await NbdClient::connect(std::move(channel), options_);
    EXPECT_TRUE(client) << client.error().message();
    if (!client) co_return;
    EXPECT_EQ((*client)->outcome().headers, GetParam());
    TaskGroup group({.name = "workers"});
    for (std::uint64_t i = 0; i < 16; ++i) group.spawn(work(**client, i * 65536));
    const Result<void> joined = co_await group.join();
    EXPECT_TRUE(joined) << joined.error().message();
    co_await (*client)->disconnect();
  }
  Task<Result<void>> work(NbdClient& client, std::uint64_t offset) {
    for (int round = 0; round < 20; ++round) {
      const std::vector<std::byte> data(
          16384, static_cast<std::byte>(offset / 65536 * 16 + static_cast<std::uint64_t>(round)));
      Result<void> done = co_await client.write(offset, data);
      if (!done) co_return done;
      std::vector<std::byte> back(data.size());
      done = co_await client.read(offset, back);
      if (!done) co_return done;
      EXPECT_EQ(back, data);
    }
    co_return Result<void>();
  }

  Task<void> check_data(std::unique_ptr<Channel> channel) {
    auto client = co_await NbdClient::connect(std::move(channel), options_);
    EXPECT_TRUE(client);
    if (!client) co_return;
    const std::vector<std::byte> data(70000, std::byte{7});
    const Result<void> written = co_await (*client)->write(1000, data);
    EXPECT_TRUE(written) << "a reply without data is left alone";
    std::vector<std::byte> back(data.size());
    const Result<void> read = co_await (*client)->read(1000, back);
    EXPECT_TRUE(read) << read.error().message();
    EXPECT_EQ(std::ranges::count(back, std::byte{7}), 69999);
    co_await (*client)->disconnect();
  }

  std::shared_ptr<AioContext> main_;
  std::optional<ContextScope> scope_;
  std::unique_ptr<BlockDriver> disk_;
  std::unique_ptr<NbdServer> server_;
  nbd::NbdClientOptions options_;
  std::unique_ptr<NbdProxy> proxy_;
  bool carried_ = true;
  Result<void> wrong_;
  int reads_ = 0;
};

TEST_P(NbdProxyTest, WithoutFaultsNothingIsChanged) {
  run(work_in_parallel(through({})));
  until_carried();
  EXPECT_EQ(proxy_->totals().requests, 16u * 20 * 2 + 1);  // and a DISC
  EXPECT_EQ(proxy_->totals().replies, 16u * 20 * 2);
  EXPECT_EQ(proxy_->totals().unfollowed, 0u);
  EXPECT_EQ(proxy_->totals().faults, 0u);
}

TEST_P(NbdProxyTest, DelayedAndReorderedRepliesAreStillRight) {
  const NbdFaults faults{
      .seed = 5, .delay_least_ns = 10'000, .delay_most_ns = 300'000, .reorder = 0.4};
  run(work_in_parallel(through(faults)));
  until_carried();
  EXPECT_EQ(proxy_->totals().replies, 16u * 20 * 2);
  EXPECT_GT(proxy_->totals().faults, 50u) << "hardly a reply was overtaken";
}

TEST_P(NbdProxyTest, ARequestThatIsTheLastIsNotAnswered) {
  run(read_until_it_fails(through({.kill_at = 5}), 100));
  until_carried();
  EXPECT_EQ(reads_, 4);
  EXPECT_FALSE(wrong_);
  EXPECT_EQ(proxy_->faults(), (std::vector{Fault{1, 5, "kill"}}));
  // Each connection counts for itself.
  run(read_until_it_fails(again(), 100));
  until_carried();
  EXPECT_EQ(reads_, 4);
}

TEST_P(NbdProxyTest, TheSameSeedBringsTheSameFaults) {
  for (const NbdFaults& kind :
       {NbdFaults{.drop = 0.1}, NbdFaults{.truncate = 0.1}, NbdFaults{.corrupt = 0.1}}) {
    std::vector<std::vector<Fault>> seen;
    for (const std::uint64_t seed : {1, 1, 2}) {
      NbdFaults faults = kind;
      faults.seed = seed;
      std::unique_ptr<Channel> channel = through(faults);
      for (int connection = 0; connection < 20; ++connection) {
        run(read_until_it_fails(connection ? again() : std::move(channel), 100));
        until_carried();
      }
      EXPECT_GE(proxy_->faults().size(), 20u);
      seen.push_back(proxy_->faults());
    }
    EXPECT_EQ(seen[0], seen[1]);
    EXPECT_NE(seen[0], seen[2]);
  }
}

TEST_P(NbdProxyTest, ATruncatedReplyFails) {
  run(read_until_it_fails(through({.truncate = 1}), 100));
  until_carried();
  EXPECT_EQ(reads_, 0);
  EXPECT_FALSE(wrong_);
}

TEST_P(NbdProxyTest, AWrongCookieOrMagicFails) {
  for (const auto field : {NbdFaults::Field::kCookie, NbdFaults::Field::kMagic}) {
    run(read_until_it_fails(through({.corrupt = 1, .corrupt_field = field}), 100));
    until_carried();
    EXPECT_EQ(reads_, 0);
    ASSERT_FALSE(wrong_);
  }
}

TEST_P(NbdProxyTest, WrongDataIsOneWrongByteOfARead) {
  run(check_data(through({.corrupt = 1, .corrupt_field = NbdFaults::Field::kData})));
  until_carried();
}

TEST_P(NbdProxyTest, AConnectionEndsAfterSoManyBytes) {
  run(read_until_it_fails(through({.drop_after = 100'000}), 100));
  until_carried();
  EXPECT_FALSE(wrong_);
  EXPECT_GT(reads_, 20);
  EXPECT_LT(reads_, 25);
  EXPECT_EQ(proxy_->totals().to_client + proxy_->totals().to_server, 100'000u);
}

TEST_P(NbdProxyTest, ARateIsKept) {
  const std::int64_t begin = real_clock().now_ns();
  run(read_until_it_fails(through({.rate = 1'000'000}), 25));
  until_carried();
  EXPECT_EQ(reads_, 25);
  EXPECT_GT(real_clock().now_ns() - begin, 90'000'000);
}

TEST_P(NbdProxyTest, WhatIsNotTheProtocolGoesThrough) {
  auto [client, near] = make_memory_channels();
  auto [far, server] = make_memory_channels();
  proxy_ = std::make_unique<NbdProxy>(NbdFaults{});
  carried_ = false;
  Coroutine::create(keep(proxy_->carry(std::move(near), std::move(far)), carried_), "carry")
      ->enter();
  const auto talk = [](Channel& one, Channel& other) -> Task<void> {
    const std::string text = "a greeting that nobody has agreed upon";
    for (int i = 0; i < 3; ++i) {
      for (const auto& [from, to] : {std::pair{&one, &other}, std::pair{&other, &one}}) {
        const Result<void> sent = co_await from->write_full(std::as_bytes(std::span(text)));
        EXPECT_TRUE(sent);
        std::string got(text.size(), '\0');
        const Result<void> read = co_await to->read_full(std::as_writable_bytes(std::span(got)));
        EXPECT_TRUE(read);
        EXPECT_EQ(got, text);
      }
    }
  };
  run(talk(*server, *client));
  client.reset();
  server.reset();
  until_carried();
  EXPECT_EQ(proxy_->totals().unfollowed, 1u);
}

INSTANTIATE_TEST_SUITE_P(Styles, NbdProxyTest,
                         testing::Values(nbd::ReplyStyle::kSimple, nbd::ReplyStyle::kStructured,
                                         nbd::ReplyStyle::kExtended),
                         [](const auto& style) {
                           switch (style.param) {
                             case nbd::ReplyStyle::kSimple:
                               return "Simple";
                             case nbd::ReplyStyle::kStructured:
                               return "Structured";
                             default:
                               return "Extended";
                           }
                         });

}  // namespace
}  // namespace roost
