// SPDX-License-Identifier: MIT
// A RemoteExport and its server, whole, over simulated sockets and a simulated disk: connections
// are cut, and servers crash, with what their disk had not been told to keep. An oracle knows what
// may be left of the data.

#include <algorithm>
#include <cerrno>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "block/file_disk.h"
#include "contexts.h"
#include "crash_oracle.h"
#include "roost/aio/timer.h"
#include "roost/export/nbd_server.h"
#include "roost/nbd/client.h"
#include "roost/nbd/remote_export.h"
#include "roost/sync/co_event.h"
#include "roost/sync/stop_scope.h"
#include "scenario.h"
#include "simulated_socket.h"

namespace roost::sim {

namespace {

constexpr std::size_t kWorkers = 3;
constexpr std::size_t kCells = 128;  // of each worker, which nobody else writes
constexpr std::size_t kPart = kCells * kCellSize;
constexpr std::size_t kDiskSize = kWorkers * kPart;
constexpr unsigned kSteps = 45;  // of all workers
// A request may lose nine connections before it is given up.
constexpr unsigned kMostLosses = 9;

// Of what happens in a run.
struct Plan {
  bool crashes;
  bool cuts;
};

// One connection, as both its ends and the simulation see it.
struct Line {
  int client_fd = -1;
  int server_fd = -1;
  std::shared_ptr<bool> client_gone = std::make_shared<bool>(false);
  std::shared_ptr<bool> server_gone = std::make_shared<bool>(false);
  bool cut = false;
  bool crashed = false;  // with its server: what that has still in hand gets nowhere

  // The server may still carry out what it had been sent.
  bool trails() const { return !crashed && !*server_gone && (cut || *client_gone); }
};

// What all coroutines of one run share.
struct World {
  World(Simulation& s, SimulatedMachine& m, Counters& c, Plan p, AioContext& main_context)
      : simulation(s), plan(p), main(main_context), contexts(s, m), counters(c) {
    Random& random = s.random();
    connections = 1 + static_cast<unsigned>(random.below(3));
    replay = random.one_in(2);
    keep_bytes = random.one_in(2) ? 64 << 20 : random.below(2) * 1500;
    const bool kept = keep_bytes == 64 << 20;
    for (std::size_t i = 0; i < kWorkers; ++i) oracles.emplace_back(history, kCells, kept);
  }

  Simulation& simulation;
  const Plan plan;
  AioContext& main;
  Contexts contexts;
  Counters& counters;
  // Drawn for the run.
  unsigned connections;
  bool replay;
  std::uint64_t keep_bytes;

  int disk_fd = -1;
  std::unique_ptr<BlockDriver> disk;
  std::unique_ptr<NbdServer> server;  // null: it is down
  bool impostor = false;              // it has another export under the same name
  std::vector<std::shared_ptr<Line>> lines;
  unsigned faults = 0;

  History history;
  std::vector<CrashOracle> oracles;
  WriteNumber last_write = 0;

  std::unique_ptr<nbd::RemoteExport> remote;
  nbd::ClientWishes wishes;
  unsigned steps_left = kSteps;
  unsigned steps_of_this = 0;  // left of this RemoteExport
  std::size_t working = 0;
  CoEvent idle{"the end of the workers"};
  bool lived = false;  // the client has done all it wanted
  CoEvent client_over{"the end of the client"};
  CoEvent faults_over{"the end of all faults"};

  bool everything_kept() const { return keep_bytes == 64 << 20; }
  bool settled() const {
    return std::ranges::none_of(lines, [](const auto& line) { return line->trails(); });
  }
};

// ---- The server and what befalls it

void start_server(World& w) {
  std::uint64_t size = kDiskSize;
  NbdServer::Export exported{.name = "disk", .disk = nullptr};
  if (w.impostor) {
    switch (w.simulation.random().below(3)) {
      case 0:
        size -= 512;
        break;
      case 1:
        exported.read_only = true;
        break;
      default:
        exported.min_block = 4096;
        break;
    }
  }
  // A simulation's descriptor is no number that close() knows.
  w.disk = make_file_disk("disk", size, false, UniqueFd(w.disk_fd), std::nullopt);
  exported.disk = w.disk.get();
  NbdServer::Options options{.main_context = &w.main,
                             .io_contexts = {&w.contexts.at(0), &w.contexts.at(1)},
                             .log = [](const std::string&) {}};
  std::vector<NbdServer::Export> exports;
  exports.push_back(std::move(exported));
  w.server = std::make_unique<NbdServer>(std::move(options), std::move(exports));
}

Task<void> stop(NbdServer& server) {
  CoEvent stopped{"the end of a server"};
  server.stop([&] { stopped.set(); });
  co_await stopped.wait();
}

// The client sees the end of the stream, after what was sent, or an error.
void cut(World& w, Line& line) {
  line.cut = true;
  if (!*line.server_gone) {
    if (w.simulation.random().one_in(2)) {
      w.simulation.break_channel(line.server_fd);
    } else {
      w.simulation.shut_down(line.server_fd);
    }
  } else if (!*line.client_gone) {
    w.simulation.break_channel(line.client_fd);
  }
}

void cut_some(World& w) {
  const Simulation::Undisturbed alone(w.simulation);
  // What is sent again over another connection could be overtaken by what one that only seems lost
  // still brings: who wants it knows that none does.
  const bool all = w.replay || w.simulation.random().one_in(2);
  for (const auto& line : w.lines) {
    if (all || w.simulation.random().one_in(2)) cut(w, *line);
  }
  ++w.faults;
  w.simulation.note("cut", all);
  w.counters.add("cut", 1);
}

// Takes the server down, and with it what its disk has not made durable, if the power is lost.
Task<void> crash(World& w, bool power_lost) {
  const int old_fd = w.disk_fd;
  {
    const Simulation::Undisturbed alone(w.simulation);
    w.disk_fd = w.simulation.take_disk_over(old_fd, power_lost);
    for (const auto& line : w.lines) {
      if (line->crashed) continue;
      cut(w, *line);
      line->crashed = true;
    }
    const auto contents = w.simulation.disk_contents(w.disk_fd);
    for (std::size_t i = 0; i < kWorkers; ++i) {
      w.oracles[i].check_medium(contents.subspan(i * kPart, kPart), i);
    }
    ++w.faults;
    if (power_lost) {
      ++w.history.power_losses;
      for (CrashOracle& oracle : w.oracles) oracle.power_lost();
    }
  }
  w.simulation.note("crash", power_lost, w.impostor);
  // What is left of it has nobody to talk to, and no disk.
  const std::unique_ptr<BlockDriver> disk = std::move(w.disk);
  const std::unique_ptr<NbdServer> server = std::move(w.server);
  co_await stop(*server);
  w.simulation.close(old_fd);
}

Task<void> crash_and_come_back(World& w) {
  Random& random = w.simulation.random();
  const bool power_lost = !random.one_in(4);
  // Only who knows what was there can tell that it is something else.
  w.impostor = w.remote && random.one_in(8);
  co_await crash(w, power_lost);
  w.counters.add(power_lost ? "power_lost" : "killed", 1);
  if (random.one_in(2)) co_await sleep_for(random.between(0, 2'000'000));
  start_server(w);
  if (!w.impostor) co_return;
  w.counters.add("another_export", 1);
  while (w.remote) co_await sleep_for(50'000);
  co_await crash(w, false);
  w.impostor = false;
  start_server(w);
}

Task<void> have_faults(World& w) {
  Random& random = w.simulation.random();
  for (unsigned left = kMostLosses / w.connections; left > 0 && !w.lived; --left) {
    co_await sleep_for(random.between(0, 2'500'000));
    if (w.plan.crashes && (!w.plan.cuts || random.one_in(2))) {
      co_await crash_and_come_back(w);
    } else {
      cut_some(w);
    }
  }
  w.faults_over.set();
}

// ---- The client

Task<Result<std::unique_ptr<nbd::NbdClient>>> dial(World& w, std::stop_token stop) {
  using R = Result<std::unique_ptr<nbd::NbdClient>>;
  AioContext& home = *AioContext::current();
  co_await move_to(w.main);
  Result<void> patience;
  while (patience && !w.settled()) patience = co_await sleep_for(20'000, stop);
  std::unique_ptr<SimulatedSocket> socket;
  // Who opens the other export cannot know that it is another one.
  if (patience && w.server && (w.remote || !w.impostor)) {
    const auto line = std::make_shared<Line>();
    std::tie(line->client_fd, line->server_fd) = w.simulation.make_channel({.capacity = 4 << 10});
    socket = std::make_unique<SimulatedSocket>(w.simulation, line->client_fd, "the server",
                                               line->client_gone);
    std::erase_if(w.lines, [](const auto& old) { return *old->client_gone && *old->server_gone; });
    w.lines.push_back(line);
    w.server->serve(std::make_unique<SimulatedSocket>(w.simulation, line->server_fd, "a client",
                                                      line->server_gone));
  }
  if (&home != &w.main) co_await move_to(home);
  if (!patience) co_return R(std::unexpected(patience.error()));
  if (!socket) co_return R(fail(ECONNREFUSED, "the server is down"));
  nbd::NbdClientOptions options;
  options.wishes = w.wishes;
  co_return co_await nbd::NbdClient::connect(std::move(socket), options, std::move(stop));
}

// May end a request before it was begun, or while it waits.
class Patience {
 public:
  explicit Patience(World& w) : limited_(w.simulation.random().one_in(5)) {
    if (!limited_) return;
    scope_.set_deadline(w.simulation.now_ns() + w.simulation.random().between(0, 1'500'000));
  }
  std::stop_token token() const { return limited_ ? scope_.token() : std::stop_token(); }
  bool limited() const { return limited_; }

 private:
  const bool limited_;
  StopScope scope_;
};

// Checks that a request may fail like that. True: it was only stopped.
bool stopped(World& w, const Error& error, const Patience& patience) {
  if (error.code() == ECANCELED) {
    ROOST_CHECK(patience.limited(), "a request was given up that nobody stopped");
    w.counters.add("stopped", 1);
    return true;
  }
  ROOST_CHECK(error.code() == EMEDIUMTYPE && w.impostor, "a request failed: {}", error.message());
  return false;
}

Task<bool> write_something(World& w, std::size_t worker) {
  Random& random = w.simulation.random();
  CrashOracle& oracle = w.oracles[worker];
  CrashOracle::Write write{};
  write.first = random.below(kCells);
  write.count = 1 + random.below(std::min<std::size_t>(kCells - write.first, 60));
  write.durable = random.one_in(5);
  const unsigned what = static_cast<unsigned>(random.below(6));
  if (what > 1) write.number = ++w.last_write;
  std::vector<std::byte> bytes(write.count * kCellSize);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = byte_of(write.number, i);
  const std::uint64_t offset = worker * kPart + write.first * kCellSize;
  const std::uint16_t flags = write.durable ? nbd::kCommandFua : 0;
  const bool wrong_server = w.impostor;
  oracle.begin(write);
  w.simulation.note(write.durable ? "write, durable" : "write", worker, write.number);
  w.simulation.note("  cells", write.first, write.count);
  Result<void> done;
  bool given_up = false;
  {
    const Patience patience(w);
    if (what == 0) {
      done = co_await w.remote->zero(offset, bytes.size(), flags, patience.token());
    } else if (what == 1) {
      // A hole of this disk reads as zeroes.
      done = co_await w.remote->trim(offset, bytes.size(), flags, patience.token());
    } else {
      const iovec piece{bytes.data(), bytes.size()};
      done = co_await w.remote->writev(offset, std::span(&piece, 1), flags, patience.token());
    }
    const int code = done ? 0 : done.error().code();
    if (code == EINPROGRESS) {
      ROOST_CHECK(w.replay && patience.limited(), "{}", done.error().message());
    } else if (code == ECONNRESET) {
      ROOST_CHECK(!w.replay && w.faults > 0, "{}", done.error().message());
    } else if (!done) {
      given_up = stopped(w, done.error(), patience);
    }
  }
  w.simulation.note("written", write.number, done.has_value());
  if (done) {
    ROOST_CHECK(!wrong_server, "a write to another export succeeded");
    oracle.acknowledged(write);
  } else if (given_up) {
    oracle.never_happened(write);
  } else {
    w.counters.add("perhaps_written", 1);
    while (!w.settled()) co_await sleep_for(20'000);
    oracle.may_have_happened(write);
    co_return done.error().code() != EMEDIUMTYPE;
  }
  co_return true;
}

Task<bool> read_something(World& w, std::size_t worker) {
  Random& random = w.simulation.random();
  const std::size_t first = random.below(kCells);
  std::vector<std::byte> bytes((1 + random.below(kCells - first)) * kCellSize);
  const std::uint64_t begin = w.history.now;
  const bool wrong_server = w.impostor;
  const Patience patience(w);
  const Result<void> done =
      co_await w.remote->read(worker * kPart + first * kCellSize, bytes, patience.token());
  if (!done) co_return stopped(w, done.error(), patience);
  ROOST_CHECK(!wrong_server, "a read of another export succeeded");
  w.simulation.note("read", worker, first);
  const std::size_t lost = w.oracles[worker].read(first, bytes, begin, worker);
  if (lost > 0) {
    ROOST_CHECK(w.history.power_losses > 0, "{} cells were lost without a power loss", lost);
    w.counters.add("cells_lost", lost);
  }
  co_return true;
}

// What the server says is zero, is.
Task<bool> ask_for_extents(World& w, std::size_t worker) {
  const std::uint64_t at = worker * kPart;
  const std::uint64_t begin = w.history.now;
  const Patience patience(w);
  const auto status = co_await w.remote->block_status(at, kPart, 0, patience.token());
  if (!status) co_return stopped(w, status.error(), patience);
  std::uint64_t first = 0;
  for (const nbd::StatusExtent& extent : status->front().extents) {
    if (first >= kPart) break;
    const std::uint64_t length = std::min<std::uint64_t>(extent.length, kPart - first);
    if (extent.flags & nbd::kStateZero) {
      const std::vector<std::byte> zeroes(length);
      w.oracles[worker].read(first / kCellSize, zeroes, begin, worker);
    }
    first += length;
  }
  co_return true;
}

Task<bool> flush(World& w) {
  const std::uint64_t begin = w.history.now;
  const Patience patience(w);
  ++w.history.flushes;
  const Result<void> done = co_await w.remote->flush(patience.token());
  --w.history.flushes;
  w.simulation.note("flushed", begin, done.has_value());
  if (done) {
    for (CrashOracle& oracle : w.oracles) oracle.flushed(begin);
    co_return true;
  }
  if (done.error().code() != EIO) co_return stopped(w, done.error(), patience);
  ROOST_CHECK(!w.everything_kept() && w.faults > 0, "{}", done.error().message());
  w.counters.add("told", 1);
  ++w.history.told;
  for (CrashOracle& oracle : w.oracles) oracle.told();
  co_return true;
}

Task<void> work(World& w, std::size_t worker) {
  Random& random = w.simulation.random();
  bool good = true;
  while (good && w.steps_of_this > 0) {
    --w.steps_of_this;
    switch (random.below(9)) {
      case 0:
        good = co_await flush(w);
        break;
      case 1:
        co_await move_to(w.contexts.any());
        break;
      case 2:
        if (!w.remote->outcome().contexts.empty()) good = co_await ask_for_extents(w, worker);
        break;
      case 3:
      case 4:
      case 5:
        good = co_await read_something(w, worker);
        break;
      default:
        good = co_await write_something(w, worker);
        break;
    }
  }
  w.simulation.note("worker ends", worker, good);
  if (--w.working == 0) w.idle.set();
}

Task<void> open(World& w) {
  Random& random = w.simulation.random();
  nbd::RemoteExportOptions options;
  options.contexts = {&w.contexts.at(0), &w.contexts.at(1), &w.contexts.at(2)};
  options.connections = w.connections;
  options.first_delay_ns = random.between(50'000, 500'000);
  options.longest_delay_ns = 2'000'000;
  options.keep_bytes = w.keep_bytes;
  options.replay_writes = w.replay;
  options.seed = random.next();
  w.wishes.export_name = "disk";
  w.wishes.structured_replies = !random.one_in(3);
  w.wishes.extended_headers = w.wishes.structured_replies && random.one_in(2);
  w.wishes.meta_contexts = {std::string(nbd::kBaseAllocation)};
  std::unique_ptr<nbd::RemoteExport> opened;
  while (!opened) {
    nbd::RemoteExport::Connect connect = [&w](std::stop_token stop) {
      return dial(w, std::move(stop));
    };
    auto opening = nbd::RemoteExport::open(std::move(connect), options);
    auto result = co_await std::move(opening);
    if (result) {
      opened = std::move(*result);
    } else {
      ROOST_CHECK(w.faults > 0, "no connection: {}", result.error().message());
      co_await sleep_for(100'000);
    }
  }
  w.simulation.note("opened");
  w.counters.add("opened", 1);
  w.remote = std::move(opened);
}

Task<void> close(World& w) {
  const nbd::RemoteExport::Statistics statistics = w.remote->statistics();
  w.counters.add("connections_lost", statistics.lost);
  w.counters.add("reconnected", statistics.reconnected);
  w.counters.add("written_again", statistics.replayed);
  (void)co_await w.remote->close();
  w.remote.reset();
  w.simulation.note("closed");
  for (CrashOracle& oracle : w.oracles) oracle.abandoned();
}

// Has one RemoteExport after the other.
Task<void> live(World& w) {
  Random& random = w.simulation.random();
  while (w.steps_left > 0) {
    co_await open(w);
    w.steps_of_this = std::min<unsigned>(w.steps_left, 1 + static_cast<unsigned>(random.below(40)));
    w.steps_left -= w.steps_of_this;
    w.idle.reset();
    w.working = kWorkers;
    for (std::size_t i = 0; i < kWorkers; ++i) {
      w.simulation.spawn(w.contexts.any(), work(w, i), "worker");
    }
    co_await w.idle.wait();
    if (random.one_in(2)) co_await flush(w);
    co_await close(w);
  }
  w.lived = true;
  w.client_over.set();
}

Task<void> run(World& w, bool& over) {
  w.disk_fd = w.simulation.make_disk(kDiskSize, {.short_one_in = 4});
  start_server(w);
  w.simulation.spawn(w.main, live(w), "client");
  w.simulation.spawn(w.main, have_faults(w), "faults");
  co_await w.client_over.wait();
  co_await w.faults_over.wait();
  // What is durable in the end is what the oracle knows.
  co_await open(w);
  const std::uint64_t begin = w.history.now;
  const Result<void> flushed = co_await w.remote->flush();
  ROOST_CHECK(flushed, "the last flush failed: {}", flushed.error().message());
  for (CrashOracle& oracle : w.oracles) oracle.flushed(begin);
  co_await close(w);
  co_await crash(w, true);
  over = true;
}

void simulate(Simulation& simulation, SimulatedMachine& machine, Counters& counters, Plan plan) {
  const auto main = machine.add_context("main");
  World world(simulation, machine, counters, plan, *main);
  bool over = false;
  simulation.spawn(*main, run(world, over), "everything");
  machine.wait_until([&] { return over; });
  simulation.close(world.disk_fd);
}

void nbd_crash(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  simulate(simulation, machine, counters, {.crashes = true, .cuts = simulation.random().one_in(2)});
}

void nbd_cut(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  simulate(simulation, machine, counters, {.crashes = false, .cuts = true});
}

constexpr Scenario kScenarios[] = {
    {"nbd_crash", "NBD servers that crash, clients that reconnect, an oracle of what may be lost",
     nbd_crash,
     "cut power_lost killed another_export stopped perhaps_written cells_lost told opened "
     "connections_lost reconnected written_again"},
    {"nbd_cut", "NBD clients whose connections are cut, an oracle of what may be lost", nbd_cut,
     "cut stopped told opened connections_lost reconnected written_again perhaps_written"},
};

}  // namespace

std::span<const Scenario> crash_scenarios() { return kScenarios; }

}  // namespace roost::sim
