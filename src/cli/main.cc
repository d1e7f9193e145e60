// SPDX-License-Identifier: MIT
// The roost program: reads the command line.

#include <signal.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <map>
#include <string>

#include "cli/commands.h"
#include "cli/runtime.h"
#include "cli/serve.h"
#include "cli/signals.h"
#include "roost/block/block_driver.h"

namespace {

constexpr const char* kServeExamples = R"(Examples:
  roost serve disk.img
      Serve a file or block device on unix:./roost.sock.
  roost serve --create 10G new.img --listen tcp:127.0.0.1:10809
      Make a sparse image of 10 GiB, if there is none, and serve it over TCP.
  roost serve system=/dev/sdb1 scratch=mem:4G --iothreads 4 --listen unix:/run/roost.sock
      Two named exports, spread over four I/O threads.
  roost serve disk.img --listen tcp:0.0.0.0:10809 --tls-creds /etc/pki/nbd --tls-verify-peer
      Only clients with a certificate of our authority, and encrypted.
  nbdinfo 'nbd+unix:///?socket=roost.sock'
      See what a running server offers.
)";

// CLI11 numbers its errors from 100; the field says 2.
using roost::cli::kUsageError;

int usage_error(const std::string& message) {
  std::fprintf(stderr, "roost: %s\nRun with --help for more information.\n", message.c_str());
  return kUsageError;
}

int usage_error(const roost::Error& error) { return usage_error(error.message()); }

// What cannot be combined; empty: all is well.
std::string check_aio(const roost::cli::ServeOptions& options) {
  if (options.file_io == roost::FileIo::kLinuxAio) {
    if (!options.direct) return "--aio native only works past the page cache: add --direct";
    if (!roost::linux_aio_available()) {
      return "--aio native: the kernel refuses Linux AIO, or this program was built without libaio";
    }
  }
  if (options.file_io == roost::FileIo::kIoUring) {
    if (options.event_loop == roost::EventLoop::kEpoll) {
      return "--aio io_uring does not go with --event-loop epoll";
    }
  }
  return "";
}

int run(int argc, char** argv) {
  CLI::App app{
      "Roost: serves disks over NBD from several I/O threads, and copies and examines them.\n"
      "Without a command it serves ./roost-disk.img (made if absent, sparse, 1 GiB) on "
      "./roost.sock."};
  app.name("roost");
  app.set_version_flag("--version", "roost " ROOST_VERSION);
  app.footer(
      "Examples:\n"
      "  roost                     Serve ./roost-disk.img on ./roost.sock.\n"
      "  roost serve disk.img      Serve a disk image.\n"
      "  roost serve --help        What can be chosen.\n"
      "  roost copy A.img nbd://server/b\n"
      "  roost info nbd://server/b --map\n");
  app.require_subcommand(0, 1);

  roost::cli::ServeOptions options;
  std::vector<std::string> listen;
  std::string create_size;
  CLI::App* serve = app.add_subcommand("serve", "Serve disks over NBD until SIGINT or SIGTERM");
  serve->footer(kServeExamples);
  serve
      ->add_option("disk", options.disks,
                   "[NAME=]DISK: a file or block device, mem:SIZE or null:SIZE; without a NAME "
                   "it is the default export")
      ->required();
  serve
      ->add_option(
          "--listen", listen,
          "unix:PATH, tcp:HOST:PORT (IPv6 in brackets, port 0 picks one; all addresses of a "
          "name) or vsock:CID:PORT; may be repeated (default: the sockets of LISTEN_FDS, or "
          "else unix:./roost.sock)")
      ->allow_extra_args(false);
  const std::map<std::string, roost::nbd::TlsPolicy> tls_policies{
      {"off", roost::nbd::TlsPolicy::kUnsupported},
      {"allowed", roost::nbd::TlsPolicy::kAllowed},
      {"required", roost::nbd::TlsPolicy::kRequired}};
  CLI::Option* const tls =
      serve
          ->add_option("--tls", options.tls,
                       "off, allowed or required (the default with --tls-creds or --tls-psk)")
          ->transform(CLI::CheckedTransformer(tls_policies).description(""))
          ->type_name("POLICY")
          ->default_str("off");
  serve
      ->add_option("--tls-creds", options.tls_directory,
                   "Folder with ca-cert.pem, server-cert.pem and server-key.pem")
      ->type_name("DIR");
  serve->add_option("--tls-psk", options.tls_psk, "File of pre-shared keys, a line NAME:KEY each")
      ->type_name("FILE");
  serve->add_flag("--tls-verify-peer", options.tls_verify_peer,
                  "Let in only clients with a certificate that ca-cert.pem has signed");
  serve
      ->add_option("--tls-allow", options.tls_allow,
                   "Let in only clients of this NAME: the distinguished name of a certificate, or "
                   "the name of a pre-shared key; may be repeated")
      ->type_name("NAME")
      ->allow_extra_args(false);
  serve->add_option("--iothreads", options.iothreads, "I/O threads to serve clients from")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  const std::map<std::string, roost::EventLoop> loops{{"auto", roost::EventLoop::kAuto},
                                                      {"io_uring", roost::EventLoop::kIoUring},
                                                      {"epoll", roost::EventLoop::kEpoll}};
  serve
      ->add_option("--event-loop", options.event_loop,
                   "auto, io_uring or epoll; auto takes io_uring where the kernel allows it")
      ->transform(CLI::CheckedTransformer(loops).description(""))
      ->type_name("LOOP")
      ->default_str("auto");
  const std::map<std::string, roost::FileIo> engines{{"auto", roost::FileIo::kAuto},
                                                     {"threads", roost::FileIo::kPool},
                                                     {"native", roost::FileIo::kLinuxAio},
                                                     {"io_uring", roost::FileIo::kIoUring}};
  serve
      ->add_option("--aio", options.file_io,
                   "what reads and writes files: auto, threads, native (Linux AIO, with --direct) "
                   "or io_uring; auto takes what suits the event loop")
      ->transform(CLI::CheckedTransformer(engines).description(""))
      ->type_name("AIO")
      ->default_str("auto");
  serve->add_flag("--direct", options.direct, "Open files with O_DIRECT, past the page cache");
  serve
      ->add_option("--poll-max-us", options.poll_max_us,
                   "longest busy wait before an I/O thread sleeps, in microseconds; 0: never")
      ->check(CLI::Range(0, 1'000'000))
      ->capture_default_str();
  serve
      ->add_option("--handshake-timeout", options.handshake_timeout_s,
                   "seconds a client may take to negotiate")
      ->check(CLI::Range(1, 86'400))
      ->capture_default_str();
  serve
      ->add_option("--max-connections", options.max_connections,
                   "clients at one time; one more is turned away; 0: any number")
      ->check(CLI::Range(0, 1'000'000))
      ->capture_default_str();
  serve->add_flag("--read-only", options.read_only, "Refuse writes");
  serve->add_flag("--allow-resize", options.allow_resize,
                  "Let clients change the size of disks that can");
  serve
      ->add_option("--create", create_size,
                   "Make files that do not exist, sparse, of this SIZE (K, M, G, T)")
      ->type_name("SIZE");
  serve
      ->add_option("--trace", options.trace,
                   "At the end, write what coroutines and event loops did last to FILE, for "
                   "ui.perfetto.dev")
      ->type_name("FILE");
  serve
      ->add_option("--stall-ms", options.stall_ms,
                   "Report what keeps an event loop busy for this many milliseconds, with its "
                   "stack; 0: do not look")
      ->check(CLI::Range(0, 3'600'000))
      ->capture_default_str();
  serve->add_flag("--json", options.json, "Describe what is served as one line of JSON");

  roost::cli::Action action;
  roost::cli::add_copy(app, action);
  roost::cli::add_info(app, action);
  roost::cli::add_bench(app, action);
  roost::cli::add_proxy(app, action);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : kUsageError;
  }

  if (action) return action();
  if (!serve->parsed()) {
    options.disks = {"./roost-disk.img"};
    create_size = "1G";
    options.explain = true;
  }
  if (const std::string wrong = check_aio(options); !wrong.empty()) return usage_error(wrong);
  const bool has_credentials = !options.tls_directory.empty() || !options.tls_psk.empty();
  if (has_credentials && tls->count() == 0) options.tls = roost::nbd::TlsPolicy::kRequired;
  if (options.tls != roost::nbd::TlsPolicy::kUnsupported && !has_credentials) {
    return usage_error("--tls needs --tls-creds or --tls-psk");
  }
  if (options.tls == roost::nbd::TlsPolicy::kUnsupported &&
      (options.tls_verify_peer || !options.tls_allow.empty())) {
    return usage_error("--tls-verify-peer and --tls-allow need TLS");
  }
  for (const std::string& text : listen) {
    const auto address = roost::SocketAddress::parse(text);
    if (!address) return usage_error(address.error());
    options.listen.push_back(*address);
  }
  if (!create_size.empty()) {
    const auto size = roost::parse_size(create_size);
    if (!size) return usage_error(size.error());
    options.create_size = *size;
  }
  if (const auto good = roost::cli::check_disks(options.disks); !good) {
    return usage_error(good.error());
  }
  return roost::cli::serve(options);
}

}  // namespace

int main(int argc, char** argv) {
  // Peers and readers of our output may go away: write() tells.
  ::signal(SIGPIPE, SIG_IGN);
  // Asks for a census, also of one who is not quite there yet.
  roost::cli::hold_back(SIGUSR1);
  return run(argc, argv);
}
