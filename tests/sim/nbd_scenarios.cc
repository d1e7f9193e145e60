// SPDX-License-Identifier: MIT
// The NBD client and server, whole, over simulated sockets and a simulated disk, with moves and
// lost connections, against what should be on the disk.

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "block/file_disk.h"
#include "contexts.h"
#include "roost/aio/timer.h"
#include "roost/export/nbd_server.h"
#include "roost/nbd/client.h"
#include "roost/sync/co_event.h"
#include "scenario.h"
#include "simulated_socket.h"

namespace roost::sim {

namespace {

constexpr std::size_t kRegion = 12 << 10;  // of one worker, which nobody else writes
constexpr std::size_t kClients = 2;
constexpr std::size_t kWorkers = 3;  // on each client
constexpr unsigned kSteps = 12;      // of each worker

// What a byte of a region may be: more than one thing after a write whose fate is not known.
class Oracle {
 public:
  void write(std::size_t at, std::span<const std::byte> bytes) {
    std::ranges::copy(bytes, sure_.begin() + static_cast<std::ptrdiff_t>(at));
    others_.erase(others_.lower_bound(at), others_.lower_bound(at + bytes.size()));
  }
  // The connection was lost under it: each byte may be the new one, or what it may have been.
  void may_have_written(std::size_t at, std::span<const std::byte> bytes) {
    for (const std::byte b : bytes) others_[at++].push_back(b);
  }
  // What is read is what is there from now on.
  void read(std::size_t at, std::span<const std::byte> bytes, std::uint64_t region) {
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      if (bytes[i] == sure_[at + i]) continue;
      const auto other = others_.find(at + i);
      ROOST_CHECK(other != others_.end() &&
                      std::ranges::find(other->second, bytes[i]) != other->second.end(),
                  "byte {} of region {} is {:#x}, should be {:#x}", at + i, region,
                  std::to_integer<int>(bytes[i]), std::to_integer<int>(sure_[at + i]));
    }
    write(at, bytes);
  }

 private:
  std::vector<std::byte> sure_ = std::vector<std::byte>(kRegion);
  std::map<std::size_t, std::vector<std::byte>> others_;  // what else it may be
};

// What all coroutines of one run share.
struct World {
  World(Simulation& s, SimulatedMachine& m, Counters& c)
      : simulation(s), contexts(s, m), counters(c) {}

  Simulation& simulation;
  Contexts contexts;
  Counters& counters;
  std::unique_ptr<NbdServer> server;
  std::size_t clients_left = kClients;
  CoEvent over{"the end of all clients"};
};

// One client: a connection that is made again when it is lost, and its workers' data.
struct Customer {
  Customer(World& w, std::uint64_t n) : world(w), number(n), oracles(kWorkers) {}

  World& world;
  const std::uint64_t number;
  std::unique_ptr<nbd::NbdClient> client;
  int server_fd = -1;                 // the other end
  std::shared_ptr<bool> server_gone;  // the server has done with it
  std::vector<Oracle> oracles;
  unsigned steps_left = kWorkers * kSteps;
  std::size_t working = 0;
  CoEvent idle{"the end of a client's workers"};
};

std::uint64_t first_byte(const Customer& c, std::size_t worker) {
  return (c.number * kWorkers + worker) * kRegion;
}

// Random bytes, or zeroes, at a random place; false: the connection is lost.
Task<bool> write_something(Customer& c, std::size_t worker) {
  Random& random = c.world.simulation.random();
  const std::size_t at = random.below(kRegion);
  std::vector<std::byte> bytes(1 + random.below(std::min<std::size_t>(kRegion - at, 4000)));
  const std::uint64_t offset = first_byte(c, worker) + at;
  const bool zeroes = random.one_in(3);
  const std::uint16_t flags = random.one_in(4) ? nbd::kCommandFua : 0;
  Result<void> done;
  if (zeroes) {
    done = co_await c.client->zero(offset, bytes.size(), flags);
  } else {
    for (std::byte& b : bytes) b = static_cast<std::byte>(random.next());
    done = co_await c.client->write(offset, bytes, flags);
  }
  if (done) {
    c.oracles[worker].write(at, bytes);
  } else {
    c.oracles[worker].may_have_written(at, bytes);
  }
  co_return done.has_value();
}

Task<bool> read_something(Customer& c, std::size_t worker) {
  Random& random = c.world.simulation.random();
  const std::size_t at = random.below(kRegion);
  std::vector<std::byte> bytes(1 + random.below(kRegion - at));
  const Result<void> done = co_await c.client->read(first_byte(c, worker) + at, bytes);
  if (done) c.oracles[worker].read(at, bytes, c.number * kWorkers + worker);
  co_return done.has_value();
}

// What the server says is zero, is.
Task<bool> ask_for_extents(Customer& c, std::size_t worker) {
  const std::uint64_t begin = first_byte(c, worker);
  const Result<std::vector<nbd::ContextExtents>> status =
      co_await c.client->block_status(begin, kRegion);
  if (!status) co_return false;
  std::uint64_t at = 0;
  for (const nbd::StatusExtent& extent : status->front().extents) {
    if (at >= kRegion) break;
    const std::uint64_t length = std::min<std::uint64_t>(extent.length, kRegion - at);
    if (extent.flags & nbd::kStateZero) {
      const std::vector<std::byte> zeroes(length);
      c.oracles[worker].read(at, zeroes, c.number * kWorkers + worker);
    }
    at += length;
  }
  co_return true;
}

Task<void> work(Customer& c, std::size_t worker) {
  Random& random = c.world.simulation.random();
  while (c.steps_left > 0) {
    --c.steps_left;
    bool good = false;
    switch (random.below(8)) {
      case 0:
      case 1:
      case 2:
        good = co_await write_something(c, worker);
        break;
      case 3:
        good = co_await ask_for_extents(c, worker);
        break;
      case 4: {
        const Result<void> flushed = co_await c.client->flush();
        good = flushed.has_value();
        break;
      }
      case 5: {
        const Result<void> moved = co_await c.client->move_to(c.world.contexts.any());
        if (moved) c.world.counters.add("moved", 1);
        good = true;
        break;
      }
      default:
        good = co_await read_something(c, worker);
        break;
    }
    if (!good) break;
  }
  c.world.simulation.note("nbd worker ends", c.number, worker);
  if (--c.working == 0) c.idle.set();
}

Task<Result<void>> connect(Customer& c) {
  World& w = c.world;
  int client_fd = -1;
  std::tie(client_fd, c.server_fd) = w.simulation.make_channel({.capacity = 8 << 10});
  c.server_gone = std::make_shared<bool>(false);
  w.server->serve(
      std::make_unique<SimulatedSocket>(w.simulation, c.server_fd, "a client", c.server_gone));
  nbd::NbdClientOptions options;
  options.wishes.structured_replies = !w.simulation.random().one_in(3);
  options.wishes.extended_headers =
      options.wishes.structured_replies && w.simulation.random().one_in(2);
  options.wishes.meta_contexts = {std::string(nbd::kBaseAllocation)};
  auto channel = std::make_unique<SimulatedSocket>(w.simulation, client_fd, "the server");
  auto client = co_await nbd::NbdClient::connect(std::move(channel), options);
  if (!client) co_return std::unexpected(client.error());
  c.client = std::move(*client);
  co_return Result<void>();
}

// Connects, works until there is nothing left to do or the connection is lost, and begins anew.
Task<void> live(Customer& c) {
  World& w = c.world;
  Random& random = w.simulation.random();
  AioContext& home = *AioContext::current();
  while (c.steps_left > 0) {
    const Result<void> connected = co_await connect(c);
    ROOST_CHECK(connected, "no connection: {}", connected.error().message());
    w.counters.add("connected", 1);
    if (random.one_in(2)) {
      const int fd = c.server_fd;
      w.simulation.after(random.between(0, 3'000'000), [&c, fd] {
        // Not if it has been closed, or is another one's number by now.
        if (c.server_fd == fd && c.working > 0) c.world.simulation.break_channel(fd);
      });
    }
    // Without the context, extents are not told.
    const bool tells = !c.client->outcome().contexts.empty();
    if (tells) w.counters.add("told_extents", 1);
    c.idle.reset();
    c.working = kWorkers;
    for (std::size_t i = 0; i < kWorkers; ++i) {
      w.simulation.spawn(w.contexts.any(), work(c, i), "nbd worker");
    }
    co_await c.idle.wait();
    if (!c.client->state()) w.counters.add("lost", 1);
    c.server_fd = -1;
    co_await c.client->disconnect();
    c.client.reset();
    // What the server has still in hand of it may be written late.
    while (!*c.server_gone) co_await sleep_for(10'000);
  }
  co_await move_to(home);
  if (--w.clients_left == 0) w.over.set();
}

Task<void> run_server(World& w, AioContext& main, BlockDriver& disk, bool& over) {
  NbdServer::Options options{.main_context = &main,
                             .io_contexts = {&w.contexts.at(0), &w.contexts.at(1)},
                             .log = [](const std::string&) {}};
  std::vector<NbdServer::Export> exports;
  exports.push_back({.name = "", .disk = &disk});
  w.server = std::make_unique<NbdServer>(std::move(options), std::move(exports));
  std::vector<std::unique_ptr<Customer>> customers;
  for (std::uint64_t i = 0; i < kClients; ++i) {
    customers.push_back(std::make_unique<Customer>(w, i));
    w.simulation.spawn(main, live(*customers.back()), "nbd client");
  }
  co_await w.over.wait();
  CoEvent stopped{"the end of the server"};
  w.server->stop([&] { stopped.set(); });
  co_await stopped.wait();
  w.server.reset();
  // Faults that are still to come find nobody.
  co_await sleep_for(4'000'000);
  over = true;
}

void nbd_service(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  const int fd = simulation.make_disk(kClients * kWorkers * kRegion, {.short_one_in = 4});
  const auto main = machine.add_context("main");
  {
    World world(simulation, machine, counters);
    // A simulation's descriptor is no number that close() knows.
    const auto disk =
        make_file_disk("disk", kClients * kWorkers * kRegion, false, UniqueFd(fd), std::nullopt);
    bool over = false;
    simulation.spawn(*main, run_server(world, *main, *disk, over), "nbd server");
    machine.wait_until([&] { return over; });
  }
  simulation.close(fd);
}

constexpr Scenario kScenarios[] = {
    {"nbd", "NBD clients and a server, lost connections, moves, an oracle of the data", nbd_service,
     "moved connected told_extents lost"},
};

}  // namespace

std::span<const Scenario> nbd_scenarios() { return kScenarios; }

}  // namespace roost::sim
