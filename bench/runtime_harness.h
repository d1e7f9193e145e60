// SPDX-License-Identifier: MIT
//
// What runtime_bench, runtime_bench_asio and runtime_floor share: how a case is timed. They run
// the same cases under the same names with this harness; only the runtime underneath differs.
//
// Most cases run "for ever" on threads that were started before the clock: the measuring thread
// sleeps through a window and compares the counters before and after. So neither the start nor the
// end of the work is in the figure, and no case needs to know beforehand how much work a window
// takes.
//
// Threads: a Counter has one writer at a time and any number of readers.
// Lifetime: what a case starts ends before the case returns (Crew::stop).
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <future>
#include <latch>
#include <memory>
#include <span>
#include <string_view>
#include <thread>
#include <vector>

namespace bench {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kWindow{50};
constexpr int kCoroutinesPerContext = 4;
constexpr int kBurstCoroutines = 1'000'000;
// Roots made between two turns of the loop in `spawn`: the number that suits Asio best, where the
// turn is shared by a few and the frames still come from its recycling allocator.
constexpr int kSpawnBatch = 8;
// Rounds of a lock between two turns of the loop, so that descriptors are served meanwhile.
constexpr unsigned kRoundsPerTurn = 64;
// Items that fit between the producer and the consumer of `queue`.
constexpr unsigned kPipeCapacity = 64;

// Counts the items of one coroutine, or of all coroutines of one thread.
struct alignas(64) Counter {
  // Relaxed, and no read-modify-write: there is one writer, and a reader that is a few items late
  // is late by the same amount at both ends of its window.
  void add(uint64_t count = 1) noexcept {
    value.store(value.load(std::memory_order_relaxed) + count, std::memory_order_relaxed);
  }
  uint64_t get() const noexcept { return value.load(std::memory_order_relaxed); }

  std::atomic<uint64_t> value{0};
};

// The coroutines of a case that run until they are told to stop.
class Crew {
 public:
  explicit Crew(int coroutines) : live_(coroutines), counters_(coroutines) {}

  bool running() const noexcept { return !stop_.load(std::memory_order_relaxed); }
  Counter& counter(int index) noexcept { return counters_[index]; }

  // The last thing a coroutine of the crew does.
  void ended() {
    if (live_.fetch_sub(1, std::memory_order_acq_rel) == 1) all_ended_.set_value();
  }

  // Waits until each coroutine has counted something, measures windows, and stops the coroutines.
  // `writers` is the number of counters in use.
  void measure(benchmark::State& state, int writers) {
    const std::span<const Counter> counters = std::span(counters_).first(writers);
    for (const Counter& counter : counters) {
      while (counter.get() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    uint64_t items = 0;
    for ([[maybe_unused]] auto _ : state) {
      const uint64_t before = total(counters);
      const Clock::time_point start = Clock::now();
      std::this_thread::sleep_for(kWindow);
      const uint64_t after = total(counters);
      state.SetIterationTime(std::chrono::duration<double>(Clock::now() - start).count());
      items += after - before;
    }
    state.SetItemsProcessed(static_cast<int64_t>(items));
    stop_.store(true, std::memory_order_relaxed);
    all_ended_.get_future().wait();
  }

  // How even the turns were, as slowest / median.
  void report_fairness(benchmark::State& state) const {
    std::vector<uint64_t> turns;
    for (const Counter& counter : counters_) turns.push_back(counter.get());
    std::ranges::sort(turns);
    state.counters["slowest_to_median"] =
        static_cast<double>(turns.front()) / static_cast<double>(turns[turns.size() / 2]);
  }

 private:
  static uint64_t total(std::span<const Counter> counters) {
    uint64_t sum = 0;
    for (const Counter& counter : counters) sum += counter.get();
    return sum;
  }

  std::atomic<bool> stop_{false};
  std::atomic<int> live_;
  std::promise<void> all_ended_;
  std::vector<Counter> counters_;
};

// One round of `burst`: `producers` threads wait at a gate, each wakes its share of the coroutines,
// and the consumer's thread counts them as they run.
class Burst {
 public:
  // Called by each coroutine once it runs again, on the consumer's thread.
  void woken() {
    if (++woken_ == kBurstCoroutines) all_woken_.set_value(Clock::now());
  }

  // Calls wake(first, last) on each producer's thread; returns the seconds from opening the gate
  // until the last coroutine has run.
  template <typename Wake>
  double run(int producers, Wake wake) {
    std::latch ready(producers);
    std::atomic<bool> open{false};
    std::vector<std::jthread> threads;
    for (int producer = 0; producer < producers; ++producer) {
      const int first = static_cast<int>(int64_t{kBurstCoroutines} * producer / producers);
      const int last = static_cast<int>(int64_t{kBurstCoroutines} * (producer + 1) / producers);
      threads.emplace_back([&, first, last] {
        ready.count_down();
        open.wait(false);
        wake(first, last);
      });
    }
    ready.wait();
    const Clock::time_point start = Clock::now();
    open.store(true);
    open.notify_all();
    return std::chrono::duration<double>(all_woken_.get_future().get() - start).count();
  }

 private:
  int woken_ = 0;  // the consumer's thread only
  std::promise<Clock::time_point> all_woken_;
};

// Small, quick and the same on both sides: which context comes next.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ULL + 1) {}
  unsigned below(unsigned bound) noexcept {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<unsigned>(((state_ >> 32) * bound) >> 32);
  }

 private:
  uint64_t state_;
};

// Reports a case under its plain name ("ping_pong", not "ping_pong/manual_time"), so that figures
// of two programs and of two days are looked up by the same key.
class PlainNames : public benchmark::BenchmarkReporter {
 public:
  explicit PlainNames(benchmark::BenchmarkReporter* inner) : inner_(inner) {}

  bool ReportContext(const Context& context) override {
    inner_->SetOutputStream(&GetOutputStream());
    inner_->SetErrorStream(&GetErrorStream());
    return inner_->ReportContext(context);
  }
  void ReportRuns(const std::vector<Run>& report) override {
    std::vector<Run> plain = report;
    for (Run& run : plain) {
      run.run_name.iterations.clear();
      run.run_name.time_type.clear();
    }
    inner_->ReportRuns(plain);
  }
  void Finalize() override { inner_->Finalize(); }

 private:
  std::unique_ptr<benchmark::BenchmarkReporter> inner_;
};

// The main function of the programs.
inline int run_main(int argc, char** argv) {
  bool to_file = false;
  for (int i = 1; i < argc; ++i) {
    to_file |= std::string_view(argv[i]).starts_with("--benchmark_out=");
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  PlainNames display(benchmark::CreateDefaultDisplayReporter());
  PlainNames file(new benchmark::JSONReporter);
  benchmark::RunSpecifiedBenchmarks(&display, to_file ? &file : nullptr);
  benchmark::Shutdown();
  return 0;
}

}  // namespace bench
