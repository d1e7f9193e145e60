// SPDX-License-Identifier: MIT
// `roost proxy`: stands between NBD clients and a server, and makes things go wrong.

#include <fmt/format.h>
#include <unistd.h>

#include <charconv>
#include <cmath>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "cli/commands.h"
#include "cli/runtime.h"
#include "export/nbd_proxy.h"
#include "roost/io/listener.h"
#include "roost/io/socket_channel.h"
#include "roost/nbd/target.h"
#include "roost/sync/task_group.h"

namespace roost::cli {

namespace {

constexpr const char* kExamples = R"(Examples:
  roost proxy unix:./roost.sock --listen unix:./slow.sock --delay 5:50
      A server far away: each reply takes from 5 to 50 ms more.
  roost proxy nbd://server/disk --listen tcp:127.0.0.1:10810 --seed 7 --truncate 0.01 --verbose
      One reply in a hundred is cut off; the same ones each time.
  roost proxy unix:./roost.sock --listen unix:./bad.sock --corrupt 1 --corrupt-field cookie
      No reply is for a request that the client has sent.
)";

struct ProxyCommand {
  std::string server;
  std::string listen;
  std::string delay;
  std::string drop_after;
  std::string rate;
  NbdFaults faults;
  bool exit = false;
  bool verbose = false;
  bool json = false;

  // From the above.
  SocketAddress server_address{};
  SocketAddress listen_address{};
  std::string export_name{};
  bool tls = false;
};

Result<std::int64_t> parse_ms(const std::string& text) {
  double ms = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), ms);
  if (error != std::errc() || end != text.data() + text.size() || !(ms >= 0 && ms <= 3.6e6)) {
    return fail(EINVAL, fmt::format("--delay: \"{}\" is no number of milliseconds", text));
  }
  return std::llround(ms * 1e6);
}

// Puts the words of the command line into what they mean.
Result<void> understand(ProxyCommand& command) {
  if (nbd::looks_like_nbd_uri(command.server)) {
    const Result<nbd::NbdUri> uri = nbd::parse_uri(command.server);
    if (!uri) return std::unexpected(uri.error());
    command.server_address = nbd::address_of(*uri);
    command.export_name = uri->export_name;
    command.tls = uri->tls_required;
  } else {
    const Result<SocketAddress> address = SocketAddress::parse(command.server);
    if (!address) return std::unexpected(address.error());
    command.server_address = *address;
  }
  const Result<SocketAddress> listen = SocketAddress::parse(command.listen);
  if (!listen) return std::unexpected(listen.error());
  command.listen_address = *listen;

  NbdFaults& faults = command.faults;
  if (!command.delay.empty()) {
    const std::size_t colon = command.delay.find(':');
    const auto least = parse_ms(command.delay.substr(0, colon));
    if (!least) return std::unexpected(least.error());
    const auto most =
        colon == std::string::npos ? least : parse_ms(command.delay.substr(colon + 1));
    if (!most) return std::unexpected(most.error());
    if (*most < *least) return fail(EINVAL, "--delay " + command.delay);
    faults.delay_least_ns = *least;
    faults.delay_most_ns = *most;
  }
  for (const auto& [text, number] : {std::pair{&command.drop_after, &faults.drop_after},
                                     std::pair{&command.rate, &faults.rate}}) {
    if (text->empty()) continue;
    const Result<std::uint64_t> size = parse_size(*text);
    if (!size) return std::unexpected(size.error());
    *number = *size;
  }
  return {};
}

class Proxying {
 public:
  Proxying(Runtime& runtime, const ProxyCommand& command, ListenSocket socket)
      : runtime_(runtime),
        command_(command),
        socket_(std::move(socket)),
        proxy_(
            command.faults, [this](const NbdProxy::Fault& fault) { say(fault); },
            [this] { killed(); }) {}

  Task<int> run() {
    fmt::print("{}\n", socket_.uri(command_.export_name, command_.tls));
    std::fflush(stdout);
    const std::function<void(const Error&)> complain = [](const Error& error) {
      report(error.message());
    };
    TaskGroup clients({.name = "clients"});
    for (;;) {
      Result<UniqueFd> fd = co_await socket_.accept(runtime_.stop(), &complain);
      if (!fd) break;
      clients.spawn(carry(std::move(*fd)));
    }
    [[maybe_unused]] const Result<void> joined = co_await clients.join();
    tell();
    co_return runtime_.interrupted() ? kSuccess : kFailure;
  }

 private:
  Task<void> carry(UniqueFd fd) {
    std::string name = describe_peer(fd.get());
    auto client = std::make_unique<SocketChannel>(std::move(fd), std::move(name));
    Result<std::unique_ptr<SocketChannel>> server =
        co_await SocketChannel::connect(command_.server_address, runtime_.stop());
    if (!server) {
      report(client->name() + ": " + server.error().message());
      co_return;
    }
    co_await proxy_.carry(std::move(client), std::move(*server), runtime_.stop());
  }

  void say(const NbdProxy::Fault& fault) const {
    if (!command_.verbose) return;
    report(fault.request == 0 ? fmt::format("connection {}: {}", fault.connection, fault.what)
                              : fmt::format("connection {}, request {}: {}", fault.connection,
                                            fault.request, fault.what));
  }

  // As if it had crashed, but for what it has to tell.
  void killed() const {
    if (!command_.exit) return;
    tell();
    ::_exit(kFailure);
  }

  void tell() const {
    if (!command_.json) return;
    const NbdProxy::Totals& totals = proxy_.totals();
    nlohmann::json faults = nlohmann::json::array();
    for (const NbdProxy::Fault& fault : proxy_.faults()) {
      faults.push_back(
          {{"connection", fault.connection}, {"request", fault.request}, {"what", fault.what}});
    }
    const nlohmann::json out{{"seed", command_.faults.seed},
                             {"connections", totals.connections},
                             {"connections_not_followed", totals.unfollowed},
                             {"requests", totals.requests},
                             {"replies", totals.replies},
                             {"bytes_to_server", totals.to_server},
                             {"bytes_to_client", totals.to_client},
                             {"fault_count", totals.faults},
                             {"faults", faults}};
    fmt::print("{}\n", out.dump());
    std::fflush(stdout);
  }

  Runtime& runtime_;
  const ProxyCommand& command_;
  const ListenSocket socket_;
  NbdProxy proxy_;
};

int proxy(ProxyCommand& command) {
  try {
    if (const Result<void> good = understand(command); !good) {
      report(good.error().message());
      return kUsageError;
    }
    Runtime runtime(0);
    Result<ListenSocket> socket = ListenSocket::open(command.listen_address);
    if (!socket) {
      report(socket.error().message());
      return kFailure;
    }
    Proxying proxying(runtime, command, std::move(*socket));
    return runtime.run(proxying.run());
  } catch (const std::exception& e) {
    report(e.what());
    return kFailure;
  }
}

}  // namespace

void add_proxy(CLI::App& app, Action& action) {
  const auto command = std::make_shared<ProxyCommand>();
  NbdFaults& faults = command->faults;
  CLI::App* const proxy =
      app.add_subcommand("proxy", "Stand between NBD clients and a server, and make things fail");
  proxy->footer(kExamples);
  proxy
      ->add_option(
          "server", command->server,
          "unix:PATH, tcp:HOST:PORT or vsock:CID:PORT, or an NBD URI, whose TLS is left to "
          "the client")
      ->required();
  proxy->add_option("--listen", command->listen, "Where clients connect, likewise")
      ->type_name("ADDR")
      ->required();
  proxy->add_option("--seed", faults.seed, "What faults are drawn from")->capture_default_str();
  proxy
      ->add_option("--delay", command->delay,
                   "Of each reply, in milliseconds, or from one to another")
      ->type_name("MS[:MS]");
  const auto probability = [&](const char* name, double& value, const char* help) {
    proxy->add_option(name, value, help)->type_name("P")->check(CLI::Range(0.0, 1.0));
  };
  probability("--drop", faults.drop, "Probability that a connection ends at a request");
  probability("--truncate", faults.truncate,
              "... that only a part of a reply is sent, and the connection ends");
  probability("--corrupt", faults.corrupt, "... that a byte of a reply is wrong");
  probability("--reorder", faults.reorder, "... that a reply waits until another has overtaken it");
  const std::map<std::string, NbdFaults::Field> fields{{"any", NbdFaults::Field::kAny},
                                                       {"magic", NbdFaults::Field::kMagic},
                                                       {"cookie", NbdFaults::Field::kCookie},
                                                       {"error", NbdFaults::Field::kError},
                                                       {"data", NbdFaults::Field::kData}};
  proxy
      ->add_option("--corrupt-field", faults.corrupt_field,
                   "Which byte: of the magic, cookie, error or data, or any of the first three")
      ->transform(CLI::CheckedTransformer(fields).description(""))
      ->type_name("FIELD")
      ->default_str("any");
  CLI::Option* const kill =
      proxy->add_option("--kill-at", faults.kill_at, "End a connection at its request N, from 1")
          ->type_name("N");
  proxy->add_flag("--exit", command->exit, "End the proxy then, as if it had crashed")->needs(kill);
  proxy->add_option("--drop-after", command->drop_after, "End a connection after so many bytes")
      ->type_name("BYTES");
  proxy->add_option("--rate", command->rate, "Bytes a second that a connection gets, each way")
      ->type_name("BYTES");
  proxy->add_flag("--verbose", command->verbose, "Say on standard error what is done");
  proxy->add_flag("--json", command->json, "Say at the end what was done, as a line of JSON");
  proxy->callback([command, &action] { action = [command] { return cli::proxy(*command); }; });
}

}  // namespace roost::cli
