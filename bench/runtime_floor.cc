// SPDX-License-Identifier: MIT
//
// What the machine leaves at most: two cases of runtime_bench without a runtime, under the same
// names and timed by the same harness. There are no coroutines, no event loop and no sleep here.
#include <benchmark/benchmark.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#include "runtime_harness.h"

namespace {

using bench::Crew;

constexpr int kThreads = 2;

struct Token {
  explicit Token(int index) : random(index) {}
  Token* next = nullptr;
  bench::Random random;
};

// The newest of what was pushed, on a cache line of its own.
struct alignas(128) Inbox {
  void push(Token& token) noexcept {
    Token* seen = newest.load(std::memory_order_relaxed);
    do {
      token.next = seen;
    } while (!newest.compare_exchange_weak(seen, &token, std::memory_order_release,
                                           std::memory_order_relaxed));
  }
  // Looked at before it is taken: the line stays where it was written.
  Token* take() noexcept {
    if (newest.load(std::memory_order_relaxed) == nullptr) return nullptr;
    return newest.exchange(nullptr, std::memory_order_acquire);
  }

  std::atomic<Token*> newest{nullptr};
};

// Tokens hop for ever to a random thread. One compare-and-swap a hop to the other thread, none to
// the own one, as with a loop's inbox and its local queue.
void pass_on(Crew& crew, std::array<Inbox, kThreads>& inboxes, int here) {
  bench::Counter& hops = crew.counter(here);
  Token* local = nullptr;
  while (crew.running()) {
    Token* taken = inboxes[here].take();
    if (!taken) taken = std::exchange(local, nullptr);
    while (taken) {
      Token& token = *taken;
      taken = token.next;
      hops.add();
      const int there = static_cast<int>(token.random.below(kThreads));
      if (there == here) {
        token.next = std::exchange(local, &token);
      } else {
        inboxes[there].push(token);
      }
    }
  }
  crew.ended();
}

void hop_storm(benchmark::State& state) {
  std::array<Inbox, kThreads> inboxes;
  std::vector<Token> tokens;
  for (int i = 0; i < kThreads * bench::kCoroutinesPerContext; ++i) tokens.emplace_back(i);
  for (Token& token : tokens) inboxes[0].push(token);
  Crew crew(kThreads);
  std::vector<std::jthread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] { pass_on(crew, inboxes, i); });
  }
  crew.measure(state, kThreads);
}
BENCHMARK(hop_storm)->ArgName("contexts")->Arg(kThreads)->UseManualTime();

// A word that is taken and given back by a compare-and-swap each, and what it guards.
void mutex_uncontended(benchmark::State& state) {
  struct {
    alignas(128) std::atomic<uint64_t> word{0};
    alignas(128) uint64_t value = 0;
  } guarded;
  Crew crew(1);
  std::jthread thread([&] {
    bench::Counter& rounds = crew.counter(0);
    while (crew.running()) {
      uint64_t free = 0;
      guarded.word.compare_exchange_strong(free, 1, std::memory_order_acquire);
      benchmark::DoNotOptimize(++guarded.value);
      uint64_t held = 1;
      guarded.word.compare_exchange_strong(held, 0, std::memory_order_release);
      rounds.add();
    }
    crew.ended();
  });
  crew.measure(state, 1);
}
BENCHMARK(mutex_uncontended)->UseManualTime();

}  // namespace

int main(int argc, char** argv) { return bench::run_main(argc, argv); }
