// SPDX-License-Identifier: MIT
// Drains that wait for what waits for them: a server whose disks are other servers' has its exports
// removed, or is stopped, while those are away, being drained themselves, or busy up to a limit.
//
// Threads: one polls all contexts by hand, on a clock that stands still.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "export/test_nbd_server.h"
#include "roost/base/clock.h"
#include "roost/block/nbd_disk.h"
#include "roost/io/memory_channel.h"
#include "roost/nbd/client.h"
#include "roost/nbd/target.h"

namespace roost {
namespace {

using Done = Result<void>;

constexpr std::int64_t kSecond = 1'000'000'000;
constexpr std::int64_t kReconnectS = 60;  // how long a disk that has lost its server looks for it

enum class Drain : std::uint8_t { kRemoveWhenUnused, kRemoveNow, kStop };
constexpr std::initializer_list<Drain> kDrains = {Drain::kRemoveWhenUnused, Drain::kRemoveNow,
                                                  Drain::kStop};

const char* name_of(Drain drain) {
  constexpr const char* kNames[] = {"removed when unused", "removed now", "stopped"};
  return kNames[static_cast<int>(drain)];
}

class DrainsTest : public OnEachLoop {
 protected:
  struct Request {
    std::vector<std::byte> data = std::vector<std::byte>(512);
    iovec piece{data.data(), data.size()};
    std::optional<Done> done{};
  };
  using Requests = std::vector<std::unique_ptr<Request>>;
  using Client = std::unique_ptr<nbd::NbdClient>;

  void SetUp() override {
    OnEachLoop::SetUp();
    if (IsSkipped()) return;
    char folder[] = "/tmp/roost-drains-XXXXXX";
    ASSERT_NE(::mkdtemp(folder), nullptr);
    folder_ = folder;
    for (const char* name : {"main", "a", "b"}) {
      AioContextOptions o = options(name);
      o.poll_max_ns = 0;
      o.clock = &clock_;
      contexts_.push_back(AioContext::create(std::move(o)));
    }
  }

  void TearDown() override {
    contexts_.clear();
    if (!folder_.empty()) std::filesystem::remove_all(folder_);
  }

  AioContext& main() { return *contexts_[0]; }
  AioContext& a() { return *contexts_[1]; }
  AioContext& b() { return *contexts_[2]; }

  // Polls all until nothing happens any more, at this time.
  void settle() {
    for (int quiet = 0; quiet < 3; ++quiet) {
      for (const auto& context : contexts_) {
        while (context->poll(false)) quiet = 0;
      }
    }
  }

  // Lets at most so many seconds pass, one after the other. How many it took until `happened()`.
  template <class Happened>
  std::int64_t seconds_until(std::int64_t most, Happened happened) {
    settle();
    std::int64_t passed = 0;
    for (; !happened() && passed < most; ++passed) {
      clock_.advance_ns(kSecond);
      settle();
    }
    EXPECT_TRUE(happened()) << "not within " << most << " seconds";
    return passed;
  }

  template <class T>
  static Task<void> keep(Task<T> task, std::optional<T>& result) {
    result.emplace(co_await std::move(task));
  }
  template <class T>
  void begin(AioContext& context, Task<T> task, std::optional<T>& result) {
    spawn(context, keep(std::move(task), result), "test");
    settle();
  }
  // Within no time.
  template <class T>
  T result_of(AioContext& context, Task<T> task) {
    std::optional<T> result;
    begin(context, std::move(task), result);
    EXPECT_TRUE(result) << "it has not ended";
    return std::move(*result);
  }

  // ---- servers

  // On a unix socket of that name.
  std::unique_ptr<NbdServer> serve(const std::string& socket, BlockDriver& disk, AioContext& io,
                                   NbdLimits limits = {}) {
    const ContextScope scope(main());
    NbdServer::Options o{.main_context = &main(),
                         .io_contexts = {&io},
                         .limits = limits,
                         .log = [](const std::string&) {}};
    NbdServer::Export exported{.name = "disk", .disk = &disk, .allow_resize = true};
    auto server = std::make_unique<NbdServer>(std::move(o), std::vector{std::move(exported)});
    auto listening = ListenSocket::open({.path = folder_ + "/" + socket});
    EXPECT_TRUE(listening) << listening.error().message();
    server->listen(std::move(*listening));
    return server;
  }

  static void offer(NbdServer& server, const std::string& name, BlockDriver& disk) {
    EXPECT_TRUE(server.add_export({.name = name, .disk = &disk}));
  }

  // `done` may be set at once, or when time passes.
  void drain(NbdServer& server, const std::string& name, Drain how, bool& done) {
    {
      const ContextScope scope(main());
      const auto say = [&done] { done = true; };
      if (how == Drain::kStop) {
        server.stop(say);
      } else {
        const auto removal =
            how == Drain::kRemoveNow ? NbdServer::Removal::kNow : NbdServer::Removal::kWhenUnused;
        EXPECT_TRUE(server.remove_export(name, removal, say));
      }
    }
    settle();
  }

  // Once its clients have gone, or without asking them.
  void end(std::unique_ptr<NbdServer>& server, bool cut_off = false) {
    bool idle = false;
    {
      const ContextScope scope(main());
      if (cut_off) server->disconnect_all();
      server->stop([&idle] { idle = true; });
    }
    settle();
    ASSERT_TRUE(idle);
    server.reset();
  }

  // ---- disks of servers

  std::unique_ptr<BlockDriver> open(const std::string& socket, AioContext& context,
                                    unsigned connections = 1) {
    auto target = nbd::NbdTarget::parse("nbd+unix:///disk?socket=" + folder_ + "/" + socket);
    EXPECT_TRUE(target) << target.error().message();
    auto disk = result_of(
        context, open_nbd_disk(std::move(*target), {.contexts = {&context},
                                                    .connections = connections,
                                                    .reconnect_timeout_ns = kReconnectS * kSecond,
                                                    .replay_writes = true}));
    EXPECT_TRUE(disk) << disk.error().message();
    return std::move(*disk);
  }

  // 0, or the error's code; within no time.
  int close(BlockDriver& disk) {
    const Done closed = result_of(main(), disk.close());
    return closed ? 0 : closed.error().code();
  }

  // ---- clients

  Client connect(NbdServer& server, const std::string& name) {
    auto ends = make_memory_channels();
    {
      const ContextScope scope(main());
      server.serve(std::move(ends.second));
    }
    nbd::NbdClientOptions wishes;
    wishes.wishes.export_name = name;
    auto client = result_of(main(), nbd::NbdClient::connect(std::move(ends.first), wishes));
    EXPECT_TRUE(client) << client.error().message();
    return std::move(*client);
  }

  void leave(Client& client) {
    std::optional<Done> left;
    begin(main(), leaving(*client), left);
    ASSERT_TRUE(left);
    client.reset();
  }
  static Task<Done> leaving(nbd::NbdClient& client) {
    co_await client.disconnect();
    co_return Done();
  }

  std::unique_ptr<Request> read(nbd::NbdClient& client) {
    auto request = std::make_unique<Request>();
    begin(main(), client.read(0, request->data), request->done);
    return request;
  }
  std::unique_ptr<Request> write(nbd::NbdClient& client, std::uint64_t offset) {
    auto request = std::make_unique<Request>();
    std::ranges::fill(request->data, static_cast<std::byte>(1 + offset / 512));
    begin(main(), client.write(offset, request->data), request->done);
    return request;
  }
  std::unique_ptr<Request> flush(nbd::NbdClient& client) {
    auto request = std::make_unique<Request>();
    begin(main(), client.flush(), request->done);
    return request;
  }
  // A read, writes of two places and a flush.
  void ask_for_all(nbd::NbdClient& client, Requests& requests) {
    requests.push_back(read(client));
    requests.push_back(write(client, 0));
    requests.push_back(write(client, 512));
    requests.push_back(flush(client));
  }

  static bool all_ended(const Requests& requests) {
    return std::ranges::all_of(requests, [](const auto& one) { return one->done.has_value(); });
  }
  static bool all_good(const Requests& requests) {
    return std::ranges::all_of(requests, [](const auto& one) { return one->done && *one->done; });
  }
  static bool all_failed(const Requests& requests) {
    return std::ranges::all_of(requests, [](const auto& one) { return one->done && !*one->done; });
  }

  ManualClock clock_;
  std::string folder_;
  std::vector<std::shared_ptr<AioContext>> contexts_;
};

ROOST_ON_EACH_LOOP(DrainsTest);

// ---- a reconnect

TEST_P(DrainsTest, ADrainWaitsForAReconnectThatWaitsForTheDrainNoLongerThanThatLasts) {
  for (const Drain how : kDrains) {
    SCOPED_TRACE(name_of(how));
    HandDisk far_disk;
    auto far = serve("far", far_disk, b());
    auto disk = open("far", a());
    auto near = serve("near", *disk, a());
    Client client = connect(*near, "disk");
    end(far, true);
    Requests requests;
    ask_for_all(*client, requests);
    ASSERT_FALSE(requests.front()->done);

    bool drained = false;
    drain(*near, "disk", how, drained);
    EXPECT_FALSE(drained);                                      // the disk is in use
    EXPECT_EQ(all_failed(requests), how == Drain::kRemoveNow);  // their client was cut off
    if (how == Drain::kRemoveWhenUnused) {
      seconds_until(kReconnectS + 1, [&] { return all_ended(requests); });
      EXPECT_FALSE(drained);
      leave(client);
      EXPECT_TRUE(drained);
    } else {
      const auto took = seconds_until(kReconnectS + 1, [&] { return drained; });
      EXPECT_GT(took, kReconnectS / 2);
    }
    EXPECT_TRUE(all_failed(requests));
    if (client) leave(client);
    if (how != Drain::kStop) end(near);
    near.reset();
    EXPECT_EQ(close(*disk), 0);
  }
}

TEST_P(DrainsTest, AReconnectThatSucceedsWhileADrainWaitsEndsIt) {
  for (const Drain how : kDrains) {
    SCOPED_TRACE(name_of(how));
    HandDisk far_disk;
    auto far = serve("far", far_disk, b());
    auto disk = open("far", a());
    auto near = serve("near", *disk, a());
    Client client = connect(*near, "disk");
    // Acknowledged and not flushed: has to be there again before anything else.
    Requests early;
    early.push_back(write(*client, 1024));
    ASSERT_TRUE(all_good(early));
    end(far, true);
    Requests requests;
    ask_for_all(*client, requests);
    bool drained = false;
    drain(*near, "disk", how, drained);

    HandDisk after_the_crash;
    far = serve("far", after_the_crash, b());
    if (how == Drain::kRemoveWhenUnused) {
      EXPECT_LT(seconds_until(kReconnectS, [&] { return all_ended(requests); }), 5);
      leave(client);
      EXPECT_TRUE(drained);
    } else {
      EXPECT_LT(seconds_until(kReconnectS, [&] { return drained; }), 5);
    }
    EXPECT_EQ(all_good(requests), how != Drain::kRemoveNow);
    // Whoever was told or not, what had begun was finished.
    const auto written = after_the_crash.written();
    ASSERT_EQ(written.size(), 3u);
    EXPECT_EQ(written.at(1024), early.front()->data);
    EXPECT_EQ(written.at(0), requests[1]->data);
    EXPECT_EQ(after_the_crash.count("read"), 1);
    EXPECT_GE(after_the_crash.count("flush"), 1);
    if (client) leave(client);
    if (how != Drain::kStop) end(near);
    near.reset();
    EXPECT_EQ(close(*disk), 0);
    end(far);
  }
}

// ---- two servers of each other

// Two servers in one process. Each has a disk of its own and offers, as "far", the other's.
class MutualDrainsTest : public DrainsTest {
 protected:
  struct Side {
    HandDisk own{};
    std::unique_ptr<NbdServer> server{};
    std::unique_ptr<BlockDriver> others{};
    Client client{};  // of "far", that is of the other side's own
    Requests requests{};
    bool drained = false;
  };

  // `two`: on a context each.
  void start(bool two, NbdLimits limits = {}) {
    sides_ = std::make_unique<Side[]>(2);
    AioContext* const at[] = {&a(), two ? &b() : &a()};
    for (int i = 0; i < 2; ++i) side(i).server = serve(name(i), side(i).own, *at[i], limits);
    for (int i = 0; i < 2; ++i) {
      side(i).others = open(name(1 - i), *at[i]);
      offer(*side(i).server, "far", *side(i).others);
      side(i).client = connect(*side(i).server, "far");
    }
  }

  // The drains have ended.
  void finish() {
    for (int i = 0; i < 2; ++i) leave(side(i).client);
    for (int i = 0; i < 2; ++i) side(i).server.reset();
    sides_.reset();
  }

  void hold() {
    for (int i = 0; i < 2; ++i) side(i).own.hold();
  }
  void release() {
    for (int i = 0; i < 2; ++i) side(i).own.release();
    settle();
  }
  void ask_both() {
    for (int i = 0; i < 2; ++i) ask_for_all(*side(i).client, side(i).requests);
  }
  void drain_both(Drain how) {
    for (int i = 0; i < 2; ++i) drain(*side(i).server, "far", how, side(i).drained);
  }
  bool both_drained() { return side(0).drained && side(1).drained; }

  // What was said to be written is there.
  void expect_kept() {
    for (int i = 0; i < 2; ++i) {
      const auto written = side(1 - i).own.written();
      for (std::size_t w = 0; w < 2; ++w) {
        const Request& request = *side(i).requests[1 + w];
        if (!request.done || !*request.done) continue;
        const auto found = written.find(512 * w);
        ASSERT_NE(found, written.end());
        EXPECT_EQ(found->second, request.data);
      }
    }
  }

  Side& side(int i) { return sides_[static_cast<std::size_t>(i)]; }
  static std::string name(int i) { return i == 0 ? "first" : "second"; }

  std::unique_ptr<Side[]> sides_;
};

ROOST_ON_EACH_LOOP(MutualDrainsTest);

TEST_P(MutualDrainsTest, ServerAndClientInOneProcessDrainingEachOther) {
  for (const bool two : {false, true}) {
    for (const Drain how : kDrains) {
      SCOPED_TRACE(std::string(two ? "two contexts, " : "one context, ") + name_of(how));
      start(two);
      hold();
      ask_both();
      drain_both(how);
      EXPECT_FALSE(side(0).drained || side(1).drained);
      release();
      // Within no time: nobody has to look for anybody, nor gives anybody up.
      if (how == Drain::kRemoveWhenUnused) {
        for (int i = 0; i < 2; ++i) {
          EXPECT_FALSE(side(i).drained);
          leave(side(i).client);
        }
      }
      EXPECT_TRUE(both_drained());
      for (int i = 0; i < 2; ++i) {
        EXPECT_TRUE(how == Drain::kRemoveNow ? all_failed(side(i).requests)
                                             : all_good(side(i).requests));
        EXPECT_EQ(side(i).own.total(), 4);  // all was carried out, told or not
      }
      expect_kept();
      // Both disks say goodbye at the same time, to servers that are there or have gone.
      std::optional<Done> closed[2];
      for (int i = 0; i < 2; ++i) {
        spawn(main(), keep(side(i).others->close(), closed[i]), "test");
      }
      settle();
      for (const auto& each : closed) {
        ASSERT_TRUE(each);
        // The flush began before the writes were acknowledged, and the server has gone.
        EXPECT_EQ(each->has_value(), how != Drain::kStop);
      }
      for (int i = 0; i < 2; ++i) {
        if (how != Drain::kStop) end(side(i).server);
        if (side(i).client) leave(side(i).client);
        side(i).server.reset();
      }
      sides_.reset();
    }
  }
}

// What a stopped server has not read is sent to nobody: the disk of the other, which may be stopped
// itself, looks for it as long as it may.
TEST_P(MutualDrainsTest, WhatNeitherHasReadFailsWithTheReconnect) {
  for (const bool two : {false, true}) {
    SCOPED_TRACE(two);
    start(two, {.requests_in_flight = 1});
    std::vector<Client> others;
    hold();
    // A client each for every request, since each may have but one in flight.
    for (int i = 0; i < 2; ++i) {
      for (int w = 0; w < 3; ++w) {
        others.push_back(connect(*side(i).server, "far"));
        side(i).requests.push_back(write(*others.back(), 512 * static_cast<std::uint64_t>(w)));
      }
    }
    drain_both(Drain::kStop);
    release();
    // One was being carried out, one had been read and was in line.
    const auto good = [&](int i) {
      return std::ranges::count_if(side(i).requests,
                                   [](const auto& one) { return one->done && *one->done; });
    };
    EXPECT_EQ(good(0), 2);
    EXPECT_EQ(good(1), 2);
    EXPECT_FALSE(both_drained());
    seconds_until(kReconnectS + 1, [&] { return both_drained(); });
    for (int i = 0; i < 2; ++i) {
      ASSERT_TRUE(all_ended(side(i).requests));
      EXPECT_EQ(good(i), 2);
      const auto written = side(1 - i).own.written();
      for (std::uint64_t w = 0; w < 3; ++w) {
        const Request& request = *side(i).requests[w];
        if (*request.done) {
          EXPECT_EQ(written.at(512 * w), request.data);
        }
      }
    }
    for (Client& one : others) leave(one);
    for (int i = 0; i < 2; ++i) {
      // The server that has the writes has gone, and nobody flushed them.
      EXPECT_EQ(close(*side(i).others), EIO);
    }
    finish();
  }
}

// One of them is a way to itself: what it is asked for, it asks the other for, which asks it.
TEST_P(MutualDrainsTest, AServerThatWaitsForItself) {
  for (const bool two : {false, true}) {
    SCOPED_TRACE(two);
    start(two, {.requests_in_flight = 2});
    offer(*side(1).server, "round", *side(1).others);
    auto target = nbd::NbdTarget::parse("nbd+unix:///round?socket=" + folder_ + "/second");
    ASSERT_TRUE(target);
    auto around = result_of(
        a(), open_nbd_disk(std::move(*target),
                           {.contexts = {&a()}, .reconnect_timeout_ns = kReconnectS * kSecond}));
    ASSERT_TRUE(around);
    offer(*side(0).server, "round", **around);
    hold();
    std::vector<Client> clients;
    Requests& requests = side(0).requests;
    for (int i = 0; i < 4; ++i) {
      clients.push_back(connect(*side(0).server, "round"));
      requests.push_back(read(*clients.back()));
    }
    EXPECT_EQ(side(0).own.total(), 2);
    drain_both(Drain::kStop);
    release();
    // The server that is asked gives up its reconnect, and only then is found to have gone.
    seconds_until(2 * kReconnectS + 1, [&] { return both_drained(); });
    ASSERT_TRUE(all_ended(requests));
    EXPECT_GE(
        std::ranges::count_if(requests, [](const auto& one) { return one->done->has_value(); }), 2);
    for (Client& one : clients) leave(one);
    EXPECT_EQ(close(**around), 0);
    for (int i = 0; i < 2; ++i) EXPECT_EQ(close(*side(i).others), 0);
    finish();
  }
}

// ---- requests behind a limit

TEST_P(DrainsTest, ThrottledRequestsThatADrainForgets) {
  const NbdLimits limits[] = {{.requests_in_flight = 1}, {.bytes_in_flight = 512}};
  for (const NbdLimits& limit : limits) {
    for (const Drain how : kDrains) {
      SCOPED_TRACE(std::string(limit.requests_in_flight == 1 ? "one request, " : "512 bytes, ") +
                   name_of(how));
      HandDisk disk;
      disk.hold();
      auto server = serve("server", disk, a(), limit);
      Client client = connect(*server, "disk");
      Requests requests;
      for (std::uint64_t i = 0; i < 4; ++i) requests.push_back(write(*client, 512 * i));
      EXPECT_EQ(disk.total(), 1);
      bool drained = false;
      drain(*server, "disk", how, drained);
      EXPECT_EQ(disk.total(), 1);
      EXPECT_FALSE(drained);
      disk.release();
      settle();
      switch (how) {
        case Drain::kRemoveWhenUnused:  // goes on as if nothing had happened
          EXPECT_TRUE(all_good(requests));
          EXPECT_EQ(disk.written().size(), 4u);
          EXPECT_FALSE(drained);
          break;
        case Drain::kRemoveNow:  // nobody could be told, so what had not begun never does
          EXPECT_TRUE(all_failed(requests));
          EXPECT_EQ(disk.written().size(), 1u);
          EXPECT_TRUE(drained);
          break;
        case Drain::kStop:  // the one in line was read; the others never were, and are not done
          for (std::size_t i = 0; i < 4; ++i) {
            ASSERT_TRUE(requests[i]->done);
            EXPECT_EQ(requests[i]->done->has_value(), i < 2);
          }
          EXPECT_EQ(disk.written().size(), 2u);
          EXPECT_TRUE(drained);
          break;
      }
      leave(client);
      EXPECT_TRUE(drained);
      if (how != Drain::kStop) end(server);
    }
  }
}

TEST_P(DrainsTest, AResizeInLineIsFinishedOrNotBegun) {
  for (const Drain how : kDrains) {
    SCOPED_TRACE(name_of(how));
    HandDisk disk;
    disk.hold();
    auto server = serve("server", disk, a());
    Client client = connect(*server, "disk");
    auto reading = read(*client);
    std::optional<Done> resized;
    begin(main(), client->resize(HandDisk::kSize / 2), resized);
    bool drained = false;
    drain(*server, "disk", how, drained);
    EXPECT_EQ(disk.count("resize"), 0);  // the read is in its way
    disk.release();
    settle();
    ASSERT_TRUE(resized);
    const bool told = how != Drain::kRemoveNow;
    EXPECT_EQ(resized->has_value(), told);
    EXPECT_EQ(disk.count("resize"), told ? 1 : 0);
    EXPECT_EQ(disk.size(), told ? HandDisk::kSize / 2 : HandDisk::kSize);
    leave(client);
    EXPECT_TRUE(drained);
    if (how != Drain::kStop) end(server);
  }
}

// They wait for a place at a disk that sends kept writes again, which they must not overtake.
TEST_P(DrainsTest, RequestsBehindKeptWritesAreNotForgottenByADrain) {
  for (const bool answers : {true, false}) {
    for (const Drain how : {Drain::kRemoveNow, Drain::kStop}) {
      SCOPED_TRACE(std::string(answers ? "answered, " : "never answered, ") + name_of(how));
      HandDisk far_disk;
      auto far = serve("far", far_disk, b());
      auto disk = open("far", a());
      auto near = serve("near", *disk, a());
      Client client = connect(*near, "disk");
      Requests early;
      early.push_back(write(*client, 1024));
      ASSERT_TRUE(all_good(early));
      end(far, true);
      HandDisk after_the_crash;
      after_the_crash.hold();
      far = serve("far", after_the_crash, b());
      Requests requests;
      ask_for_all(*client, requests);
      EXPECT_LT(seconds_until(kReconnectS, [&] { return after_the_crash.total() == 1; }), 5);
      bool drained = false;
      drain(*near, "disk", how, drained);
      EXPECT_EQ(after_the_crash.total(), 1);
      EXPECT_FALSE(drained);
      if (answers) {
        after_the_crash.release();
        settle();
        EXPECT_EQ(after_the_crash.written().size(), 3u);
        EXPECT_EQ(all_good(requests), how == Drain::kStop);
      } else {
        EXPECT_GT(seconds_until(kReconnectS + 1, [&] { return drained; }), kReconnectS / 2);
        after_the_crash.release();
        settle();
        EXPECT_EQ(after_the_crash.written().size(), 1u);
        EXPECT_TRUE(all_failed(requests));
      }
      EXPECT_TRUE(drained);
      leave(client);
      if (how != Drain::kStop) end(near);
      near.reset();
      // Some are not covered by the flush, and the server is there, or has been given up.
      EXPECT_EQ(close(*disk), answers ? 0 : EIO);
      end(far);
    }
  }
}

}  // namespace
}  // namespace roost
