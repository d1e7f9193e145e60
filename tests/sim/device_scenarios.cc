// SPDX-License-Identifier: MIT
// Channels, disks and the pool, with everything that goes wrong with them.

#include <algorithm>
#include <array>
#include <cerrno>
#include <memory>
#include <vector>

#include "roost/aio/bottom_half.h"
#include "roost/aio/io.h"
#include "scenario.h"

namespace roost::sim {

namespace {

std::byte byte_at(std::uint64_t stream, std::uint64_t position) {
  return static_cast<std::byte>(Random::mix(stream * 1'000'003 + position));
}

// ---- Channels

struct Connection {
  int client_fd = -1;
  int server_fd = -1;
  std::uint64_t stream = 0;
  std::uint64_t total = 0;
  std::uint64_t received = 0;
  bool lost = false;        // the fault was injected
  std::int64_t failed = 0;  // the first error the client saw
  int running = 0;          // coroutines
};

Task<std::int64_t> send_all(int fd, std::span<std::byte> bytes) {
  std::size_t sent = 0;
  while (sent < bytes.size()) {
    iovec piece{bytes.data() + sent, bytes.size() - sent};
    msghdr message{};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    const std::int64_t n = co_await io_sendmsg(fd, message);
    ROOST_CHECK(n != 0, "a send moved nothing");
    if (n < 0) co_return n;
    sent += static_cast<std::size_t>(n);
  }
  co_return static_cast<std::int64_t>(sent);
}

Task<void> echo_server(Connection& c, AioContext& other) {
  std::array<std::byte, 300> buffer;
  for (;;) {
    const std::int64_t n = co_await io_recv(c.server_fd, buffer);
    if (n <= 0) break;
    // A connection may move between two operations.
    if (n % 7 == 0) co_await move_to(other);
    if (co_await send_all(c.server_fd, std::span(buffer).first(static_cast<std::size_t>(n))) < 0) {
      break;
    }
  }
  --c.running;
}

Task<void> echo_sender(Connection& c, Random& random) {
  std::uint64_t position = 0;
  std::vector<std::byte> bytes;
  while (position < c.total) {
    bytes.resize(1 + random.below(std::min<std::uint64_t>(c.total - position, 500)));
    for (std::byte& b : bytes) b = byte_at(c.stream, position++);
    const std::int64_t n = co_await send_all(c.client_fd, bytes);
    if (n < 0) {
      if (c.failed == 0) c.failed = n;
      break;
    }
  }
  --c.running;
}

Task<void> echo_receiver(Simulation& simulation, Connection& c) {
  std::array<std::byte, 400> buffer;
  while (c.received < c.total) {
    const std::int64_t n = co_await io_recv(c.client_fd, buffer);
    if (n <= 0) {
      ROOST_CHECK(c.lost, "an echo of a healthy connection ended: {}", n);
      if (c.failed == 0) c.failed = n;
      break;
    }
    for (std::int64_t i = 0; i < n; ++i) {
      ROOST_CHECK(buffer[static_cast<std::size_t>(i)] == byte_at(c.stream, c.received),
                  "byte {} of stream {} is wrong", c.received, c.stream);
      ++c.received;
    }
    simulation.note("echo", c.stream, c.received);
  }
  --c.running;
}

void echo(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Random& random = simulation.random();
  std::array<std::shared_ptr<AioContext>, 3> contexts;
  for (auto& context : contexts) context = machine.add_context("echo");
  const auto any_context = [&]() -> AioContext& { return *contexts[random.below(3)]; };
  // Shared with the faults, which may come when all is over.
  const auto shared = std::make_shared<std::vector<Connection>>(4);
  std::vector<Connection>& connections = *shared;
  for (std::size_t i = 0; i < connections.size(); ++i) {
    Connection& c = connections[i];
    std::tie(c.client_fd, c.server_fd) = simulation.make_channel({.capacity = 1000});
    c.stream = i;
    c.total = 1 + random.below(5000);
    c.running = 3;
    simulation.spawn(any_context(), echo_server(c, any_context()), "echo server");
    simulation.spawn(any_context(), echo_sender(c, random), "echo sender");
    simulation.spawn(any_context(), echo_receiver(simulation, c), "echo receiver");
    if (random.one_in(2)) {
      const bool shut_down = random.one_in(2);
      simulation.after(random.between(0, 1'000'000), [&simulation, shared, &c, shut_down] {
        if (c.received == c.total) return;
        c.lost = true;
        shut_down ? simulation.shut_down(c.server_fd) : simulation.break_channel(c.server_fd);
      });
    }
  }
  machine.wait_until([&] {
    return std::ranges::all_of(connections, [](const Connection& c) { return c.running <= 1; });
  });
  for (Connection& c : connections) {
    ROOST_CHECK(c.lost || c.received == c.total, "{} of {} bytes came back", c.received, c.total);
    counters.add("echoed", c.received);
    counters.add("lost_peers", c.lost);
    counters.add("saw_reset", c.failed == -ECONNRESET);
    counters.add("saw_end", c.lost && c.failed == 0);
    simulation.shut_down(c.client_fd);  // which ends the server
  }
  machine.wait_until([&] {
    return std::ranges::all_of(connections, [](const Connection& c) { return c.running == 0; });
  });
  for (Connection& c : connections) {
    simulation.close(c.client_fd);
    simulation.close(c.server_fd);
  }
}

// Handlers of descriptors: bytes go round between contexts that react to readiness.
void handlers(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  auto context = machine.add_context("handlers");
  auto sender_context = machine.add_context("sender");
  const auto [left, right] = simulation.make_channel({.capacity = 500});
  std::uint64_t received = 0;
  constexpr std::uint64_t kTotal = 2000;
  bool removed = false;
  const std::function<void()> read = [&, fd = right] {
    ROOST_CHECK(!removed, "a handler was called after its removal");
    std::array<std::byte, 64> buffer;
    const std::int64_t n = simulation.receive_now(fd, buffer);
    ROOST_CHECK(n > 0, "a handler was called although nothing was there: {}", n);
    for (std::int64_t i = 0; i < n; ++i) {
      ROOST_CHECK(buffer[static_cast<std::size_t>(i)] == byte_at(9, received++), "wrong byte");
    }
    counters.add("handled", 1);
    // Each may replace or remove itself.
    if (received == kTotal) {
      context->remove_fd_handler(fd);
      removed = true;
    }
  };
  context->run([&, fd = right] { context->set_fd_handler(fd, {.read = read}); });
  bool sent = false;
  const auto send = [&, fd = left]() -> Task<void> {
    std::vector<std::byte> bytes(kTotal);
    for (std::uint64_t i = 0; i < kTotal; ++i) bytes[i] = byte_at(9, i);
    co_await send_all(fd, bytes);
    sent = true;
  };
  simulation.spawn(*sender_context, send(), "sender");
  machine.wait_until([&] { return removed && sent; });
}

// ---- Disks

constexpr std::size_t kBlock = 1024;
constexpr std::size_t kBlocks = 16;

// What a block may hold after a power loss: what was there at the last sync that covers it, or
// anything written since; each sector by itself.
struct BlockModel {
  std::vector<std::uint64_t> since_sync{0};  // versions, the durable one first
};

struct DiskWorld {
  Simulation& simulation;
  Counters& counters;
  int fd;
  std::array<BlockModel, kBlocks> blocks;
  std::uint64_t next_version = 1;
  bool crashed = false;
  int running = 0;
};

std::byte block_byte(std::uint64_t version, std::size_t sector) {
  return version == 0 ? std::byte{0} : static_cast<std::byte>(Random::mix(version) + sector);
}

// Each owns some of the blocks, so that the order of writes to one is known.
Task<void> disk_user(DiskWorld& world, std::size_t me, std::size_t users) {
  Random& random = world.simulation.random();
  std::array<std::byte, kBlock> data;
  for (int i = 0; i < 12 && !world.crashed; ++i) {
    const std::size_t block = me + users * random.below(kBlocks / users);
    BlockModel& model = world.blocks[block];
    if (random.one_in(4)) {
      // What is in the cache when a sync starts is durable when it has ended without an error.
      std::vector<std::size_t> covered(kBlocks);
      for (std::size_t b = 0; b < kBlocks; ++b) covered[b] = world.blocks[b].since_sync.size();
      const std::int64_t result = co_await io_data_sync(world.fd);
      if (result == 0 && !world.crashed) {
        for (std::size_t b = me; b < kBlocks; b += users) {
          auto& versions = world.blocks[b].since_sync;
          versions.erase(versions.begin(),
                         versions.begin() + static_cast<std::ptrdiff_t>(covered[b]) - 1);
        }
        world.counters.add("syncs", 1);
      }
      continue;
    }
    const std::uint64_t version = world.next_version++;
    for (std::size_t at = 0; at < kBlock; ++at) data[at] = block_byte(version, at / 512);
    model.since_sync.push_back(version);
    std::size_t done = 0;
    while (done < kBlock && !world.crashed) {
      iovec piece{data.data() + done, kBlock - done};
      const std::int64_t n =
          co_await io_writev(world.fd, std::span(&piece, 1), block * kBlock + done);
      if (n < 0) break;
      if (static_cast<std::size_t>(n) < piece.iov_len) world.counters.add("short_writes", 1);
      done += static_cast<std::size_t>(n);
    }
    if (done < kBlock) break;  // unknown: any part of it may be there
    world.simulation.note("written", block, version);
    std::array<std::byte, kBlock> read;
    done = 0;
    while (done < kBlock && !world.crashed) {
      const std::int64_t n =
          co_await io_read(world.fd, std::span(read).subspan(done), block * kBlock + done);
      if (n <= 0) break;
      done += static_cast<std::size_t>(n);
    }
    if (done == kBlock && !world.crashed) {
      ROOST_CHECK(read == data, "block {} is not what was written last", block);
      world.counters.add("read_back", 1);
    }
  }
  --world.running;
}

void disk(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Random& random = simulation.random();
  std::array<std::shared_ptr<AioContext>, 3> contexts;
  for (auto& context : contexts) context = machine.add_context("disk");
  DiskWorld world{.simulation = simulation,
                  .counters = counters,
                  .fd = simulation.make_disk(kBlock * kBlocks),
                  .blocks = {},
                  .running = 4};
  for (std::size_t i = 0; i < 4; ++i) {
    simulation.spawn(*contexts[random.below(3)], disk_user(world, i, 4), "disk user");
  }
  const std::int64_t crash_at = random.between(0, 3'000'000);
  simulation.after(crash_at, [&] {
    world.crashed = true;
    simulation.crash_disk(world.fd);
    const auto contents = simulation.disk_contents(world.fd);
    for (std::size_t b = 0; b < kBlocks; ++b) {
      const auto& versions = world.blocks[b].since_sync;
      for (std::size_t at = 0; at < kBlock; ++at) {
        const std::byte found = contents[b * kBlock + at];
        const bool possible = std::ranges::any_of(
            versions, [&](std::uint64_t v) { return block_byte(v, at / 512) == found; });
        ROOST_CHECK(possible, "byte {} of block {} lost what was synced", at, b);
      }
      if (versions.size() > 1) counters.add("unsynced_at_crash", 1);
    }
  });
  machine.wait_until([&] { return world.running == 0 && world.crashed; });
  simulation.close(world.fd);
}

// ---- The pool

struct PoolJob : ThreadPool::Work {
  Coroutine* co = nullptr;
  std::uint64_t input = 0;
  std::uint64_t output = 0;
};

// A coroutine hands work to the pool and is woken by it, at home.
void pool(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  std::array<std::shared_ptr<AioContext>, 3> contexts;
  for (auto& context : contexts) context = machine.add_context("pool user");
  int ended = 0;
  const auto body = [&](std::uint64_t me) -> Task<void> {
    for (std::uint64_t i = 0; i < 6; ++i) {
      AioContext* const home = AioContext::current();
      PoolJob job;
      job.input = me * 100 + i;
      job.run = [](ThreadPool::Work& work) noexcept {
        auto& j = static_cast<PoolJob&>(work);
        ROOST_CHECK(!AioContext::current(), "the pool runs work within a context");
        j.output = j.input * 3;
        wake_waiter(*j.co);
      };
      co_await suspend_waiting("the pool", [&simulation, j = &job](Coroutine& co) noexcept {
        j->co = &co;
        simulation.submit(*j);
      });
      ROOST_CHECK(AioContext::current() == home, "work of the pool woke its waiter elsewhere");
      ROOST_CHECK(job.output == job.input * 3, "the pool's result is wrong");
      counters.add("jobs", 1);
      if (i % 2) co_await move_to(*contexts[(me + i) % 3]);
    }
    ++ended;
  };
  for (std::uint64_t i = 0; i < 5; ++i) simulation.spawn(*contexts[i % 3], body(i), "pool user");
  machine.wait_until([&] { return ended == 5; });
}

constexpr Scenario kScenarios[] = {
    {"echo", "connections with slow, short and lost peers", echo,
     "echoed lost_peers saw_reset saw_end"},
    {"handlers", "handlers of ready descriptors", handlers, "handled"},
    {"disk", "disks that answer late, partly or with power lost", disk,
     "syncs short_writes read_back unsynced_at_crash"},
    {"pool", "work of a thread pool", pool, "jobs"},
};

}  // namespace

std::span<const Scenario> device_scenarios() { return kScenarios; }

}  // namespace roost::sim
