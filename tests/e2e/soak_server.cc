// SPDX-License-Identifier: MIT
//
// An NBD server that is told what to do while it is busy, for soak.py.
//
//   soak_server SOCKET TLS_FOLDER IOTHREADS [NAME=DISK...]
//
// Serves on SOCKET and a port of 127.0.0.1, with TLS for those who ask for it. Each line on
// standard input is a number and a command; the answer is a line with that number and JSON, once it
// is done:
//
//   add NAME DISK      one more export
//   hide NAME          takes no new clients any more
//   remove NAME        at once: its clients are disconnected. Answered when its disk is gone
//   relay NAME URI     one more export, whose disk is that of another server, or of this one
//   load on|off        clients in this process, whose connections move between the threads while
//                      requests are in flight; off is answered when they have gone
//   census             every coroutine
//   statistics
//   trim               gives back what is free
//   leak descriptor|coroutine|memory      so that somebody notices
//   quit               ends in good order, as does the end of the input
//
// Threads: a control thread reads the commands, and posts them to the main context, but for the
// census, which waits for all contexts. The rest belongs to the main thread, unless it says
// otherwise.

#include <fcntl.h>
#include <fmt/format.h>
#include <malloc.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "roost/aio/aio_context.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/census_report.h"
#include "roost/aio/iothread.h"
#include "roost/aio/thread_pool.h"
#include "roost/aio/timer.h"
#include "roost/base/random.h"
#include "roost/block/block_driver.h"
#include "roost/block/nbd_disk.h"
#include "roost/export/nbd_server.h"
#include "roost/io/listener.h"
#include "roost/io/memory_channel.h"
#include "roost/io/socket_channel.h"
#include "roost/io/tls.h"
#include "roost/nbd/client.h"
#include "roost/nbd/target.h"

namespace roost {
namespace {

using Json = nlohmann::json;
using nbd::NbdClient;

constexpr std::size_t kSessions = 4;
constexpr std::size_t kWorkers = 3;  // of a session
constexpr std::size_t kRegion = 256 << 10;
constexpr const char* kOwnExport = "own";  // for the clients in this process

class SoakServer {
 public:
  SoakServer(const std::string& socket, const std::string& tls_folder, unsigned iothreads);
  ~SoakServer();

  void add(const std::string& name, const std::string& description);
  void run();

 private:
  using Done = std::function<void(const Json&)>;

  static AioContextOptions named(std::string name, const std::shared_ptr<ThreadPool>& pool) {
    return {.name = std::move(name), .poll_max_ns = 20'000, .thread_pool = pool};
  }
  AioContext& io(std::size_t number) { return threads_[number % threads_.size()]->context(); }

  void read_commands();
  void carry_out(const std::string& command, std::istringstream& arguments, Done done);
  static void answer(const std::string& number, const Json& what);

  void remove(const std::string& name, Done done);
  Task<void> close_and_forget(std::string name, Done done);
  Task<void> open_relay(std::string name, std::string uri, Done done);
  Task<void> be_left_behind();
  void leak(const std::string& what);
  void quit();

  void set_load(bool on, Done done);
  Task<void> be_clients(std::size_t which);
  Task<Result<void>> one_session(std::size_t which);
  Task<void> work(NbdClient& client, std::size_t region, std::atomic<std::size_t>& working);
  Task<void> one_request(NbdClient& client, std::size_t region, Random& random);
  void wrong(const std::string& what);

  const std::shared_ptr<ThreadPool> pool_ = std::make_shared<ThreadPool>();
  const std::shared_ptr<AioContext> main_;
  const ContextScope scope_;
  std::vector<std::unique_ptr<IOThread>> threads_;
  std::map<std::string, std::unique_ptr<BlockDriver>> disks_;
  std::unique_ptr<NbdServer> server_;
  std::thread control_;
  bool ended_ = false;

  // Clients in this process.
  std::atomic<bool> load_{false};
  std::size_t sessions_ = 0;
  Done unloaded_;
  std::atomic<std::uint64_t> requests_{0};
  std::atomic<std::uint64_t> moves_{0};
  std::mutex problems_mutex_;
  std::vector<std::string> problems_;
  // What the export holds; each region belongs to one worker at a time.
  std::array<std::vector<std::byte>, kSessions * kWorkers> models_;
};

[[noreturn]] void give_up(const Error& error) { throw std::runtime_error(error.message()); }

SoakServer::SoakServer(const std::string& socket, const std::string& tls_folder, unsigned iothreads)
    : main_(AioContext::create(named("main", pool_))), scope_(*main_) {
  auto credentials = TlsCredentials::load({.directory = tls_folder, .verify_peer = false});
  if (!credentials) give_up(credentials.error());
  NbdServer::Options options{.main_context = main_.get(),
                             .io_contexts = {},
                             .tls = nbd::TlsPolicy::kAllowed,
                             .credentials = *credentials,
                             .log = [](const std::string& line) { std::cerr << line + "\n"; }};
  // A machine that stands still for a while is nobody's fault.
  options.limits.handshake_timeout_ns = 600'000'000'000;
  for (unsigned i = 0; i < iothreads; ++i) {
    threads_.push_back(std::make_unique<IOThread>(named(fmt::format("iothread{}", i), pool_)));
    options.io_contexts.push_back(&threads_.back()->context());
  }
  server_ = std::make_unique<NbdServer>(std::move(options), std::vector<NbdServer::Export>());
  for (auto& model : models_) model.resize(kRegion);
  add(kOwnExport, fmt::format("mem:{}", models_.size() * kRegion));
  for (const SocketAddress& address :
       {SocketAddress{.path = socket},
        SocketAddress{.kind = SocketAddress::Kind::kTcp, .host = "127.0.0.1", .port = "0"}}) {
    auto opened = ListenSocket::open(address);
    if (!opened) give_up(opened.error());
    fmt::print("{}\n", opened->uri(""));
    server_->listen(std::move(*opened));
  }
  std::fflush(stdout);
}

SoakServer::~SoakServer() {
  if (control_.joinable()) control_.join();
}

// ---- Commands

void SoakServer::add(const std::string& name, const std::string& description) {
  auto disk = open_disk(description, {});
  if (!disk) give_up(disk.error());
  if (const auto added = server_->add_export({.name = name, .disk = disk->get()}); !added) {
    give_up(added.error());
  }
  disks_[name] = std::move(*disk);
}

void SoakServer::answer(const std::string& number, const Json& what) {
  const std::string line = number + " " + what.dump() + "\n";
  std::fwrite(line.data(), 1, line.size(), stdout);
  std::fflush(stdout);
}

void SoakServer::read_commands() {
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string number;
    std::string command;
    words >> number >> command;
    if (command == "census") {
      Json all = Json::array();
      for (const CoroutineReport& one : take_census()) {
        all.push_back({{"name", one.info.name},
                       {"context", one.context},
                       {"age_s", static_cast<double>(one.age_ns) / 1e9},
                       {"answered", one.answered},
                       {"waits_for", one.info.waits_for ? one.info.waits_for : ""},
                       {"text", to_text({one})}});
      }
      answer(number, all);
      continue;
    }
    const bool last = command == "quit";
    schedule_oneshot(*main_, [this, number, command, rest = std::move(words).str()] {
      std::istringstream arguments(rest);
      std::string skipped;
      arguments >> skipped >> skipped;
      try {
        carry_out(command, arguments, [number](const Json& what) { answer(number, what); });
      } catch (const std::exception& error) {
        answer(number, {{"error", error.what()}});
      }
    });
    if (last) return;
  }
  schedule_oneshot(*main_, [this] { quit(); });
}

void SoakServer::carry_out(const std::string& command, std::istringstream& arguments, Done done) {
  std::string name;
  std::string what;
  arguments >> name >> what;
  if (command == "add") {
    add(name, what);
    done({});
  } else if (command == "hide") {
    if (const auto hidden = server_->hide_export(name); !hidden) give_up(hidden.error());
    done({});
  } else if (command == "remove") {
    remove(name, std::move(done));
  } else if (command == "relay") {
    spawn(*main_, open_relay(name, what, std::move(done)), "relay");
  } else if (command == "load") {
    set_load(name == "on", std::move(done));
  } else if (command == "statistics") {
    const std::lock_guard lock(problems_mutex_);
    done({{"connections", server_->connections()},
          {"requests", requests_.load()},
          {"allocated", ::mallinfo2().uordblks + ::mallinfo2().hblkhd},
          {"moves", moves_.load()},
          {"problems", problems_}});
  } else if (command == "trim") {
    ::malloc_trim(0);
    done({});
  } else if (command == "leak") {
    leak(name);
    done({});
  } else if (command == "quit") {
    quit();
  } else {
    throw std::runtime_error("what is '" + command + "'?");
  }
}

void SoakServer::remove(const std::string& name, Done done) {
  const auto removed =
      server_->remove_export(name, NbdServer::Removal::kNow, [this, name, done = std::move(done)] {
        spawn(*main_, close_and_forget(name, done), "removal");
      });
  if (!removed) give_up(removed.error());
}

Task<void> SoakServer::close_and_forget(std::string name, Done done) {
  co_await disks_[name]->close();
  co_await move_to(*main_);
  disks_.erase(name);
  done({});
}

Task<void> SoakServer::open_relay(std::string name, std::string uri, Done done) {
  auto target = nbd::NbdTarget::parse(uri);
  if (!target) {
    done({{"error", target.error().message()}});
    co_return;
  }
  NbdDiskOptions options;
  for (const auto& thread : threads_) options.contexts.push_back(&thread->context());
  auto disk = co_await open_nbd_disk(std::move(*target), std::move(options));
  co_await move_to(*main_);
  if (!disk) {
    done({{"error", disk.error().message()}});
    co_return;
  }
  const auto added = server_->add_export({.name = name, .disk = disk->get()});
  disks_[name] = std::move(*disk);
  done(added ? Json() : Json{{"error", added.error().message()}});
}

Task<void> SoakServer::be_left_behind() { co_await yield(); }

void SoakServer::leak(const std::string& what) {
  if (what == "descriptor") ::fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 0);
  if (what == "coroutine") spawn(*main_, be_left_behind(), "left behind");
  if (what == "memory") {
    auto* const memory = new std::vector<std::byte>(64 << 20, std::byte{1});
    fmt::print(stderr, "{} is lost\n", static_cast<void*>(memory));
  }
}

// Clients in this process, then remote disks, then the others.
void SoakServer::quit() {
  set_load(false, [this](const Json&) {
    if (disks_.contains("relay")) {
      remove("relay", [this](const Json&) { server_->stop([this] { ended_ = true; }); });
    } else {
      server_->stop([this] { ended_ = true; });
    }
  });
}

void SoakServer::run() {
  control_ = std::thread([this] { read_commands(); });
  while (!ended_) main_->poll(true);
  server_.reset();
  for (const auto& thread : threads_) {
    thread->stop();
    thread->join();
  }
}

// ---- Clients in this process

void SoakServer::set_load(bool on, Done done) {
  if (load_.exchange(on) == on) {
    done({});
  } else if (on) {
    for (sessions_ = 0; sessions_ < kSessions; ++sessions_) {
      spawn(io(sessions_), be_clients(sessions_), "own client");
    }
    done({});
  } else {
    unloaded_ = std::move(done);
  }
}

void SoakServer::wrong(const std::string& what) {
  const std::lock_guard lock(problems_mutex_);
  if (problems_.size() < 20) problems_.push_back(what);
}

Task<void> SoakServer::be_clients(std::size_t which) {
  while (load_) {
    const Result<void> done = co_await one_session(which);
    if (!done) wrong(done.error().message());
    if (!done) break;
  }
  co_await move_to(*main_);
  if (--sessions_ == 0 && unloaded_) std::exchange(unloaded_, nullptr)({});
}

// One connection, over a socket or through memory, that does not stay where it is.
Task<Result<void>> SoakServer::one_session(std::size_t which) {
  co_await move_to(*main_);
  std::unique_ptr<Channel> channel;
  if (which % 2 == 0) {
    auto [ours, theirs] = make_memory_channels();
    server_->serve(std::move(theirs));
    channel = std::move(ours);
  } else {
    int pair[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) < 0) {
      co_return fail(errno, "socketpair");
    }
    server_->serve(UniqueFd(pair[0]));
    channel = std::make_unique<SocketChannel>(UniqueFd(pair[1]), "the server");
  }
  co_await move_to(io(which));
  nbd::NbdClientOptions options;
  options.wishes.export_name = kOwnExport;
  options.wishes.extended_headers = which / 2 == 0;
  auto connected = co_await NbdClient::connect(std::move(channel), options);
  if (!connected) co_return std::unexpected(connected.error());
  const std::unique_ptr<NbdClient> client = std::move(*connected);
  std::atomic<std::size_t> working{kWorkers};
  for (std::size_t i = 0; i < kWorkers; ++i) {
    spawn(io(which + i), work(*client, which * kWorkers + i, working), "own worker");
  }
  for (std::size_t turn = which; working > 0; ++turn) {
    const Result<void> moved = co_await client->move_to(io(turn));
    if (!moved) wrong(moved.error().message());
    ++moves_;
    co_await sleep_for(2'000'000);
  }
  co_await client->disconnect();
  co_return Result<void>();
}

Task<void> SoakServer::work(NbdClient& client, std::size_t region,
                            std::atomic<std::size_t>& working) {
  Random random(region + requests_);
  for (int round = 0; round < 100; ++round) co_await one_request(client, region, random);
  --working;
}

Task<void> SoakServer::one_request(NbdClient& client, std::size_t region, Random& random) {
  const std::size_t size = 1 + random.below(random.below(8) == 0 ? 128 << 10 : 4096);
  const std::size_t at = random.below(kRegion - size);
  const auto part = std::span(models_[region]).subspan(at, size);
  const std::uint64_t offset = region * kRegion + at;
  Result<void> done;
  switch (random.below(4)) {
    case 0:
      std::ranges::fill(part, static_cast<std::byte>(random.below(256)));
      done = co_await client.write(offset, part);
      break;
    case 1:
      std::ranges::fill(part, std::byte{0});
      done = co_await client.zero(offset, size);
      break;
    default: {
      std::vector<std::byte> buffer(size, std::byte{0xee});
      done = co_await client.read(offset, buffer);
      if (done && !std::ranges::equal(buffer, part)) {
        wrong(fmt::format("{} bytes at {} are not what was written", size, offset));
      }
      break;
    }
  }
  if (!done) wrong(done.error().message());
  ++requests_;
}

}  // namespace
}  // namespace roost

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: soak_server SOCKET TLS_FOLDER IOTHREADS [NAME=DISK...]\n";
    return 2;
  }
  try {
    roost::SoakServer server(argv[1], argv[2], static_cast<unsigned>(std::stoul(argv[3])));
    for (const std::string text : std::span(argv + 4, argv + argc)) {
      const auto equals = text.find('=');
      server.add(text.substr(0, equals), text.substr(equals + 1));
    }
    server.run();
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
