// SPDX-License-Identifier: MIT
#include "cli/serve.h"

#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string_view>
#include <system_error>

#include "cli/census_printer.h"
#include "cli/runtime.h"
#include "cli/signals.h"
#include "roost/aio/iothread.h"
#include "roost/aio/stall_detector.h"
#include "roost/aio/thread_pool.h"
#include "roost/aio/tracer.h"
#include "roost/block/block_driver.h"
#include "roost/export/nbd_server.h"
#include "roost/io/tls.h"

namespace roost::cli {

namespace {

// How long clients may take to fetch their last replies.
constexpr std::int64_t kStopTimeoutNs = 10'000'000'000;

struct Disk {
  std::string export_name;
  std::unique_ptr<BlockDriver> driver;
};

// "NAME=DISK", unless what stands before the '=' is a directory of a path.
std::pair<std::string, std::string> split_name(const std::string& text) {
  const auto equals = text.find('=');
  if (equals == std::string::npos || text.find('/') < equals) return {"", text};
  return {text.substr(0, equals), text.substr(equals + 1)};
}

Result<std::vector<Disk>> open_disks(const ServeOptions& options) {
  const OpenOptions open{
      .read_only = options.read_only, .create_size = options.create_size, .direct = options.direct};
  std::vector<Disk> disks;
  for (const std::string& text : options.disks) {
    auto [name, description] = split_name(text);
    auto driver = open_disk(description, open);
    if (!driver) return std::unexpected(driver.error());
    disks.push_back({std::move(name), std::move(*driver)});
  }
  return disks;
}

// Those of a service manager and those that were asked for; where there are neither, the default.
Result<std::vector<ListenSocket>> open_sockets(const ServeOptions& options) {
  Result<std::vector<ListenSocket>> sockets = take_activated_sockets();
  if (!sockets) return sockets;
  std::vector<SocketAddress> addresses = options.listen;
  if (addresses.empty() && sockets->empty()) addresses.push_back({.path = "./roost.sock"});
  for (const SocketAddress& address : addresses) {
    Result<std::vector<ListenSocket>> all = ListenSocket::open_all(address);
    if (!all) return all;
    for (ListenSocket& socket : *all) sockets->push_back(std::move(socket));
  }
  return sockets;
}

// What executes the operations on files, in the words of --aio.
const char* aio_name(const ServeOptions& options, std::string_view event_loop) {
  if (options.file_io == FileIo::kPool) return "threads";
  if (options.file_io == FileIo::kLinuxAio) return "native";
  if (event_loop == "io_uring") return "io_uring";
  return options.direct && linux_aio_available() ? "native" : "threads";
}

// What --trace asks for. The file is opened at the start, so that one that cannot be is an error
// then, and not after a week.
class TraceFile {
 public:
  explicit TraceFile(std::string path) : path_(std::move(path)) {
    if (path_.empty()) return;
    file_.reset(std::fopen(path_.c_str(), "we"));
    if (!file_) throw std::system_error(errno, std::generic_category(), path_);
    tracer_.emplace();
  }

  /// Null: nothing is traced.
  Tracer* tracer() noexcept { return tracer_ ? &*tracer_ : nullptr; }

  /// REQUIRES: nobody polls the contexts any more. False after an error, which it has reported.
  bool write() {
    if (!tracer_) return true;
    if (!tracer_->write(file_.get()) || std::fclose(file_.release()) != 0) {
      report(fmt::format("{}: {}", path_, std::strerror(errno)));
      return false;
    }
    const auto [kept, dropped] = tracer_->statistics();
    report(fmt::format("{}: {} events; {} older ones were dropped", path_, kept, dropped));
    return true;
  }

 private:
  struct Close {
    void operator()(std::FILE* file) const noexcept { std::fclose(file); }
  };

  const std::string path_;
  std::unique_ptr<std::FILE, Close> file_;
  std::optional<Tracer> tracer_;
};

void announce(const ServeOptions& options, const std::vector<Disk>& disks,
              const std::vector<ListenSocket>& sockets, const char* event_loop) {
  const bool tls = options.tls == nbd::TlsPolicy::kRequired;
  if (options.json) {
    nlohmann::json out{{"event_loop", event_loop},
                       {"aio", aio_name(options, event_loop)},
                       {"direct", options.direct},
                       {"iothreads", options.iothreads},
                       {"exports", nlohmann::json::array()}};
    for (const Disk& disk : disks) {
      nlohmann::json uris = nlohmann::json::array();
      for (const ListenSocket& socket : sockets) uris.push_back(socket.uri(disk.export_name, tls));
      out["exports"].push_back({{"name", disk.export_name},
                                {"disk", disk.driver->name()},
                                {"size", disk.driver->size()},
                                {"read_only", disk.driver->read_only()},
                                {"uris", uris}});
    }
    fmt::print("{}\n", out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
  } else {
    for (const Disk& disk : disks) {
      for (const ListenSocket& socket : sockets)
        fmt::print("{}\n", socket.uri(disk.export_name, tls));
    }
    if (options.explain) {
      fmt::print("Connect with: nbdinfo '{0}'  or  qemu-img info '{0}'\n",
                 sockets.front().uri(disks.front().export_name));
    }
  }
  std::fflush(stdout);
  report(fmt::format("serving with {} I/O thread{} on {}, files by {}{}", options.iothreads,
                     options.iothreads == 1 ? "" : "s", event_loop, aio_name(options, event_loop),
                     options.direct ? ", directly" : ""));
}

Task<void> flush_all(const std::vector<Disk>& disks, bool& failed, bool& done) {
  for (const Disk& disk : disks) {
    if (disk.driver->read_only()) continue;
    const Result<void> flushed = co_await disk.driver->flush();
    if (!flushed) {
      report(flushed.error().message());
      failed = true;
    }
  }
  done = true;
}

int serve_or_throw(const ServeOptions& options) {
  Signals signals({SIGINT, SIGTERM, SIGUSR1});

  auto disks = open_disks(options);
  if (!disks) {
    report(disks.error().message());
    return 1;
  }

  auto sockets = open_sockets(options);
  if (!sockets) {
    report(sockets.error().message());
    return 1;
  }

  std::shared_ptr<const TlsCredentials> credentials;
  if (options.tls != nbd::TlsPolicy::kUnsupported) {
    auto loaded = TlsCredentials::load(
        {.role = TlsRole::kServer,
         .directory = options.tls_directory,
         .psk_file = options.tls_psk,
         // A pre-shared key is as good a proof.
         .verify_peer =
             options.tls_verify_peer || (!options.tls_allow.empty() && options.tls_psk.empty())});
    if (!loaded) {
      report(loaded.error().message());
      return 1;
    }
    credentials = std::move(*loaded);
  }

  // Before the contexts, which they outlive.
  TraceFile trace(options.trace);
  std::optional<StallDetector> stalls;
  if (options.stall_ms > 0) {
    stalls.emplace(StallDetector::Options{.threshold_ns = options.stall_ms * 1'000'000});
  }

  // Shared by all contexts: the epoll loop does its file I/O there.
  const auto pool = std::make_shared<ThreadPool>();
  const auto context_options = [&](std::string name) {
    return AioContextOptions{.name = std::move(name),
                             .event_loop = options.event_loop,
                             .poll_max_ns = options.poll_max_us * 1000,
                             .file_io = options.file_io,
                             .thread_pool = pool,
                             .tracer = trace.tracer(),
                             .stall_detector = stalls ? &*stalls : nullptr};
  };
  CensusPrinter census;  // goes last: it may wait for the contexts, or their ends
  AioContextOptions main_options = context_options("main");
  main_options.poll_max_ns = 0;  // nothing here is in a hurry
  const auto main_context = AioContext::create(std::move(main_options));
  const ContextScope scope(*main_context);

  std::vector<std::unique_ptr<IOThread>> threads;
  NbdServer::Options server_options{.main_context = main_context.get(),
                                    .io_contexts = {},
                                    .limits = {},
                                    .max_connections = options.max_connections,
                                    .tls = options.tls,
                                    .credentials = credentials,
                                    .log = [](const std::string& line) { report(line); }};
  if (!options.tls_allow.empty()) {
    server_options.authorize = [allowed = options.tls_allow](const std::string& who) {
      return std::ranges::find(allowed, who) != allowed.end();
    };
  }
  server_options.limits.handshake_timeout_ns = options.handshake_timeout_s * 1'000'000'000;
  for (unsigned i = 0; i < options.iothreads; ++i) {
    threads.push_back(std::make_unique<IOThread>(context_options(fmt::format("iothread{}", i))));
    server_options.io_contexts.push_back(&threads.back()->context());
  }

  std::vector<NbdServer::Export> exports;
  for (const Disk& disk : *disks) {
    exports.push_back({.name = disk.export_name,
                       .disk = disk.driver.get(),
                       .allow_resize = options.allow_resize});
  }
  NbdServer server(std::move(server_options), std::move(exports));

  announce(options, *disks, *sockets, threads.front()->context().back_end_name());
  for (ListenSocket& socket : *sockets) server.listen(std::move(socket));

  bool stopping = false;
  bool idle = false;
  Timer impatience(*main_context, [&] { server.disconnect_all(); });
  main_context->set_fd_handler(signals.fd(), {.read =
                                                  [&] {
                                                    const int signal = signals.take();
                                                    if (signal == SIGUSR1) census.print();
                                                    if (signal == 0 || signal == SIGUSR1) return;
                                                    if (std::exchange(stopping, true)) ::_exit(1);
                                                    impatience.arm_after(kStopTimeoutNs);
                                                    server.stop([&] { idle = true; });
                                                  },
                                              .write = {},
                                              .poll = {}});
  while (!idle) main_context->poll(true);
  impatience.cancel();
  for (auto& thread : threads) {
    thread->stop();
    thread->join();
  }

  bool failed = false;
  bool flushed = false;
  Coroutine::create(flush_all(*disks, failed, flushed), "final flush")->enter();
  while (!flushed) main_context->poll(true);
  main_context->remove_fd_handler(signals.fd());
  if (!trace.write()) failed = true;
  return failed ? 1 : 0;
}

}  // namespace

Result<void> check_disks(const std::vector<std::string>& disks) {
  std::set<std::string> names;
  for (const std::string& text : disks) {
    const auto [name, description] = split_name(text);
    if (const auto good = check_description(description); !good) return good;
    if (const auto good = nbd::check_export({.name = name}); !good) return good;
    if (names.insert(name).second) continue;
    return fail(EEXIST, name.empty() ? text + ": a second disk without a name (use NAME=DISK)"
                                     : text + ": a second export of that name");
  }
  return {};
}

int serve(const ServeOptions& options) {
  try {
    return serve_or_throw(options);
  } catch (const std::exception& e) {
    report(e.what());
    return 1;
  }
}

}  // namespace roost::cli
