// SPDX-License-Identifier: MIT
// `roost bench`: how many requests an NBD server answers, and how quickly.

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/latency.h"
#include "cli/progress.h"
#include "cli/runtime.h"
#include "roost/aio/poll_budget.h"
#include "roost/base/random.h"
#include "roost/nbd/target.h"
#include "roost/sync/task_group.h"

namespace roost::cli {

namespace {

constexpr const char* kExamples = R"(Examples:
  roost bench 'nbd+unix:///?socket=roost.sock'
      4 KiB random reads, 32 in flight, for five seconds.
  roost bench nbd://server/disk --depth 1 --poll
      The quickest answer: one request at a time, and no sleep on this side.
  roost bench nbd://server/scratch --writes 30 --size 64K --connections 4 --plot latency.svg
      A mix, which destroys what the export holds, and a picture.
)";

struct BenchCommand {
  std::string uri;
  unsigned writes = 0;  // percent
  unsigned depth = 32;
  unsigned connections = 1;
  unsigned iothreads = 1;
  std::string size = "4K";
  bool sequential = false;
  double seconds = 5;
  double warm_up_seconds = 0.5;
  std::uint64_t seed = 1;
  bool poll = false;
  bool json = false;
  std::string plot;
};

struct Measured {
  LatencyHistogram reads;
  LatencyHistogram writes;
};

// One connection, and the requests in flight on it.
class Lane {
 public:
  Lane(nbd::NbdClient& client, const BenchCommand& command, std::size_t size, std::uint64_t seed,
       std::int64_t begin_ns, std::int64_t end_ns)
      : client_(client),
        command_(command),
        size_(size),
        blocks_(client.size() / size),
        random_(seed),
        begin_ns_(begin_ns),
        end_ns_(end_ns) {}

  Task<Result<void>> worker(std::stop_token stop) {
    const std::unique_ptr<std::byte, decltype(&std::free)> buffer(
        static_cast<std::byte*>(std::aligned_alloc(4096, (size_ + 4095) / 4096 * 4096)),
        &std::free);
    if (!buffer) co_return fail(ENOMEM, "bench");
    const std::span<std::byte> bytes(buffer.get(), size_);
    // Not zeroes, which some disks would not write.
    std::ranges::generate(bytes, [this] { return static_cast<std::byte>(random_.next()); });
    const Clock& clock = real_clock();
    while (!stop.stop_requested()) {
      const std::int64_t began_ns = clock.now_ns();
      if (began_ns >= end_ns_) co_return Result<void>();
      const std::uint64_t offset = next_block() * size_;
      const bool write = random_.below(100) < command_.writes;
      Result<void> done;
      if (write) {
        done = co_await client_.write(offset, bytes);
      } else {
        done = co_await client_.read(offset, bytes);
      }
      if (!done) co_return done;
      if (began_ns >= begin_ns_) {
        (write ? measured_.writes : measured_.reads).add(clock.now_ns() - began_ns);
      }
    }
    co_return fail(ECANCELED, "bench");
  }

  const Measured& measured() const noexcept { return measured_; }

 private:
  std::uint64_t next_block() noexcept {
    if (command_.sequential) return next_++ % blocks_;
    // Exports may have more blocks than below() takes.
    return random_.next() % blocks_;
  }

  nbd::NbdClient& client_;
  const BenchCommand& command_;
  const std::size_t size_;
  const std::uint64_t blocks_;
  // The connection's context.
  Random random_;
  std::uint64_t next_ = 0;
  const std::int64_t begin_ns_;
  const std::int64_t end_ns_;
  Measured measured_;
};

std::int64_t to_ns(double seconds) { return static_cast<std::int64_t>(seconds * 1e9); }

class Benchmark {
 public:
  Benchmark(Runtime& runtime, const BenchCommand& command, std::size_t size)
      : runtime_(runtime), command_(command), size_(size) {}

  Task<int> run() {
    Result<void> done;
    try {
      done = co_await work();
    } catch (const std::bad_alloc&) {
      done = fail(ENOMEM, "bench");
    }
    for (const auto& client : clients_) co_await client->disconnect();
    if (done) done = tell();
    if (done) co_return kSuccess;
    report(runtime_.interrupted() ? "interrupted" : done.error().message());
    co_return runtime_.interrupted() ? kInterrupted : kFailure;
  }

 private:
  Task<Result<void>> connect_all() {
    const Result<nbd::NbdTarget> target = nbd::NbdTarget::parse(command_.uri);
    if (!target) co_return std::unexpected(target.error());
    const std::vector<AioContext*>& contexts = runtime_.contexts();
    const nbd::ClientWishes wishes;
    Result<void> good;
    for (unsigned i = 0; i < command_.connections && good; ++i) {
      co_await move_to(*contexts[i % contexts.size()]);
      auto client = co_await target->connect(wishes, runtime_.stop());
      if (!client) {
        good = std::unexpected(std::move(client.error()));
        break;
      }
      clients_.push_back(std::move(*client));
      // Before the next one: a server that serves one client at a time would never answer it.
      if (command_.connections > 1 && !clients_.front()->offers(nbd::kTransmissionCanMultiConn)) {
        good = fail(ENOTSUP, command_.uri + ": the server does not allow several connections");
      }
    }
    co_await move_to(runtime_.main());
    if (!good) co_return good;
    const nbd::NbdClient& first = *clients_.front();
    if (command_.writes > 0 && first.offers(nbd::kTransmissionReadOnly)) {
      co_return fail(EROFS, command_.uri);
    }
    if (first.size() < size_) {
      co_return fail(EINVAL, fmt::format("{}: the export is smaller than a request", command_.uri));
    }
    co_return Result<void>();
  }

  Task<void> start_workers(TaskGroup& group) {
    const std::vector<AioContext*>& contexts = runtime_.contexts();
    for (std::size_t i = 0; i < lanes_.size(); ++i) {
      for (unsigned n = 0; n < command_.depth; ++n) {
        group.spawn(*contexts[i % contexts.size()], lanes_[i]->worker(group.stop_token()));
      }
    }
    co_return;
  }

  Task<Result<void>> work() {
    const Result<void> connected = co_await connect_all();
    if (!connected) co_return connected;
    const std::int64_t begin_ns = real_clock().now_ns() + to_ns(command_.warm_up_seconds);
    const std::int64_t end_ns = begin_ns + to_ns(command_.seconds);
    for (std::size_t i = 0; i < clients_.size(); ++i) {
      lanes_.push_back(std::make_unique<Lane>(*clients_[i], command_, size_,
                                              Random::mix(command_.seed + i), begin_ns, end_ns));
    }
    TaskGroup group({.name = "bench", .stop = runtime_.stop()});
    co_return co_await group.run(start_workers(group));
  }

  std::string title() const {
    std::string what = command_.writes == 0 ? "reads"
                       : command_.writes == 100
                           ? "writes"
                           : fmt::format("reads, {} % writes", command_.writes);
    return fmt::format("{} {} {}, {} connection{}, depth {}, {:g} s",
                       human_size(static_cast<double>(size_)),
                       command_.sequential ? "sequential" : "random", what, command_.connections,
                       command_.connections == 1 ? "" : "s", command_.depth, command_.seconds);
  }

  static nlohmann::json summary(const LatencyHistogram& latencies, std::size_t size,
                                double seconds) {
    const auto us = [](double ns) { return std::round(ns) / 1e3; };
    nlohmann::json percentiles;
    for (const double percent : {50.0, 90.0, 99.0, 99.9, 99.99}) {
      percentiles[fmt::format("{:g}", percent)] =
          us(static_cast<double>(latencies.percentile(percent)));
    }
    const double rate = static_cast<double>(latencies.count()) / seconds;
    return {{"requests", latencies.count()},
            {"iops", std::round(rate)},
            {"bytes_per_second", std::round(rate * static_cast<double>(size))},
            {"latency_us",
             {{"min", us(static_cast<double>(latencies.min()))},
              {"mean", us(latencies.mean())},
              {"max", us(static_cast<double>(latencies.max()))},
              {"percentiles", percentiles}}}};
  }

  static void print(const char* name, const LatencyHistogram& latencies, std::size_t size,
                    double seconds) {
    if (latencies.count() == 0) return;
    const double rate = static_cast<double>(latencies.count()) / seconds;
    const auto us = [&](double percent) {
      return static_cast<double>(latencies.percentile(percent)) / 1e3;
    };
    fmt::print("{:<7} {:.0f}/s, {}/s\n", name, rate, human_size(rate * static_cast<double>(size)));
    fmt::print(
        "        latency in us: min {:.1f}, 50 % {:.1f}, 90 % {:.1f}, 99 % {:.1f}, "
        "99.9 % {:.1f}, max {:.1f}\n",
        static_cast<double>(latencies.min()) / 1e3, us(50), us(90), us(99), us(99.9),
        static_cast<double>(latencies.max()) / 1e3);
  }

  Result<void> tell() const {
    Measured all;
    for (const auto& lane : lanes_) {
      all.reads.add(lane->measured().reads);
      all.writes.add(lane->measured().writes);
    }
    if (!command_.plot.empty()) {
      std::FILE* const file = std::fopen(command_.plot.c_str(), "we");
      if (!file) return fail(errno, command_.plot);
      const std::string picture = plot_latencies(title(), all.reads, all.writes);
      const bool written = std::fwrite(picture.data(), 1, picture.size(), file) == picture.size();
      if ((std::fclose(file) != 0) || !written) return fail(errno, command_.plot);
    }
    if (command_.json) {
      nlohmann::json out{{"uri", command_.uri},
                         {"size", size_},
                         {"depth", command_.depth},
                         {"connections", command_.connections},
                         {"pattern", command_.sequential ? "sequential" : "random"},
                         {"write_percent", command_.writes},
                         {"seconds", command_.seconds},
                         {"polling", command_.poll}};
      if (all.reads.count() > 0) out["reads"] = summary(all.reads, size_, command_.seconds);
      if (all.writes.count() > 0) out["writes"] = summary(all.writes, size_, command_.seconds);
      fmt::print("{}\n", out.dump());
      return {};
    }
    fmt::print("{}\n", title());
    print("reads", all.reads, size_, command_.seconds);
    print("writes", all.writes, size_, command_.seconds);
    return {};
  }

  Runtime& runtime_;
  const BenchCommand& command_;
  const std::size_t size_;
  std::vector<std::unique_ptr<nbd::NbdClient>> clients_;
  std::vector<std::unique_ptr<Lane>> lanes_;
};

int bench(const BenchCommand& command) {
  const Result<std::uint64_t> size = parse_size(command.size);
  if (!size || *size == 0 || *size > (32u << 20)) {
    report("--size is from 1 to 32M");
    return kUsageError;
  }
  try {
    // Who polls never sleeps while a request is in flight, however few CPUs there are.
    PollBudget unlimited(std::numeric_limits<int>::max());
    Runtime runtime(std::min(command.iothreads, command.connections), EventLoop::kAuto,
                    command.poll ? std::int64_t{10'000'000'000} : std::int64_t{0}, &unlimited);
    Benchmark benchmark(runtime, command, *size);
    return runtime.run(benchmark.run());
  } catch (const std::exception& e) {
    report(e.what());
    return kFailure;
  }
}

}  // namespace

void add_bench(CLI::App& app, Action& action) {
  const auto command = std::make_shared<BenchCommand>();
  CLI::App* const bench_app = app.add_subcommand("bench", "Measure an NBD server");
  bench_app->footer(kExamples);
  bench_app->add_option("uri", command->uri, "An NBD URI, as `roost serve` prints it")->required();
  bench_app
      ->add_option("--writes", command->writes,
                   "Percent of requests that write, and destroy what the export holds")
      ->check(CLI::Range(0, 100))
      ->capture_default_str();
  bench_app->add_option("--depth", command->depth, "Requests in flight on each connection")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  bench_app->add_option("--connections", command->connections, "Connections, if the server allows")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  bench_app->add_option("--iothreads", command->iothreads, "Threads that the connections live on")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  bench_app->add_option("--size", command->size, "Of each request: 1 to 32M")
      ->type_name("SIZE")
      ->capture_default_str();
  bench_app->add_flag("--sequential", command->sequential,
                      "One block after the other on each connection, not at random");
  bench_app->add_option("--seconds", command->seconds, "How long to measure")
      ->check(CLI::Range(0.01, 86'400.0))
      ->capture_default_str();
  bench_app->add_option("--warm-up", command->warm_up_seconds, "Seconds before that")
      ->check(CLI::Range(0.0, 3'600.0))
      ->capture_default_str();
  bench_app->add_option("--seed", command->seed, "What random offsets are drawn from")
      ->capture_default_str();
  bench_app->add_flag("--poll", command->poll,
                      "Wait busily for replies: measures the server without a client's sleeps");
  bench_app->add_flag("--json", command->json, "For other programs");
  bench_app->add_option("--plot", command->plot, "Write a picture of the latencies to FILE (SVG)")
      ->type_name("FILE");
  bench_app->callback([command, &action] { action = [command] { return bench(*command); }; });
}

}  // namespace roost::cli
