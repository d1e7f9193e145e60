// SPDX-License-Identifier: MIT
//
// What hopping, waking, yielding, spawning and awaiting cost in roost. runtime_bench_asio has the
// same cases under the same names; runtime_harness.h says how they are timed, bench/compare sets
// them side by side. Everything runs with the default options of an IOThread.
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <memory>
#include <stop_token>
#include <thread>
#include <vector>

#include "roost/aio/aio_context.h"
#include "roost/aio/iothread.h"
#include "roost/coro/completion.h"
#include "roost/coro/coroutine.h"
#include "roost/coro/task.h"
#include "roost/sync/co_mutex.h"
#include "roost/sync/co_queue.h"
#include "roost/sync/task_group.h"
#include "runtime_harness.h"

namespace {

using bench::Burst;
using bench::Crew;
using bench::Random;
using roost::AioContext;
using roost::Coroutine;
using roost::Task;

// An IOThread whose context watches one descriptor on which nothing happens.
class Loop {
 public:
  Loop() : idle_fd_(::eventfd(0, EFD_CLOEXEC)) {
    context().run([this] {
      roost::FdHandler handler;
      handler.read = [] {};
      context().set_fd_handler(idle_fd_, std::move(handler));
    });
  }
  ~Loop() {
    context().run([this] { context().remove_fd_handler(idle_fd_); });
    ::close(idle_fd_);
  }
  AioContext& context() noexcept { return thread_.context(); }

 private:
  const int idle_fd_;
  roost::IOThread thread_;
};

std::vector<std::unique_ptr<Loop>> make_loops(int count) {
  std::vector<std::unique_ptr<Loop>> loops;
  for (int i = 0; i < count; ++i) loops.push_back(std::make_unique<Loop>());
  return loops;
}

Task<> storm(Crew& crew, int index, const std::vector<AioContext*>& contexts) {
  Random random(index + 1);
  bench::Counter& hops = crew.counter(index);
  while (crew.running()) {
    co_await move_to(*contexts[random.below(contexts.size())]);
    hops.add();
  }
  crew.ended();
}

void hop_storm(benchmark::State& state) {
  const int count = static_cast<int>(state.range(0));
  const int coroutines = count * bench::kCoroutinesPerContext;
  Crew crew(coroutines);
  std::vector<AioContext*> contexts;
  auto loops = make_loops(count);
  for (auto& loop : loops) contexts.push_back(&loop->context());
  for (int i = 0; i < coroutines; ++i) spawn(*contexts[i % count], storm(crew, i, contexts));
  crew.measure(state, coroutines);
}
BENCHMARK(hop_storm)->ArgName("contexts")->Arg(2)->Arg(5)->UseManualTime();

Task<> bounce(Crew& crew, AioContext& here, AioContext& there) {
  bench::Counter& hops = crew.counter(0);
  while (crew.running()) {
    co_await move_to(there);
    hops.add();
    co_await move_to(here);
    hops.add();
  }
  crew.ended();
}

void ping_pong(benchmark::State& state) {
  Crew crew(1);
  auto loops = make_loops(2);
  AioContext& here = loops[0]->context();
  spawn(here, bounce(crew, here, loops[1]->context()));
  crew.measure(state, 1);
}
BENCHMARK(ping_pong)->UseManualTime();

Task<> sleeper(Burst& burst, Coroutine*& slot) {
  const auto park = [&slot](Coroutine& co) noexcept { slot = &co; };
  co_await roost::suspend(park);
  burst.woken();
}

void burst(benchmark::State& state) {
  const int producers = static_cast<int>(state.range(0));
  Loop consumer;
  AioContext& context = consumer.context();
  std::vector<Coroutine*> slots(bench::kBurstCoroutines);
  for ([[maybe_unused]] auto _ : state) {
    Burst round;
    context.run([&] {
      for (Coroutine*& slot : slots) Coroutine::create(sleeper(round, slot))->enter();
    });
    state.SetIterationTime(round.run(producers, [&](int first, int last) {
      for (int i = first; i < last; ++i) co_schedule(context, *slots[i]);
    }));
    // The last coroutine may still be ending: let the loop pass it before its round goes away.
    context.run([] {});
  }
  state.SetItemsProcessed(state.iterations() * bench::kBurstCoroutines);
}
BENCHMARK(burst)->ArgName("producers")->Arg(1)->Arg(4)->Iterations(3)->UseManualTime();

Task<> yielder(Crew& crew, AioContext& context) {
  bench::Counter& yields = crew.counter(0);
  while (crew.running()) {
    co_await move_to(context);
    yields.add();
  }
  crew.ended();
}

void yield(benchmark::State& state) {
  const int coroutines = static_cast<int>(state.range(0));
  Crew crew(coroutines);
  Loop loop;
  for (int i = 0; i < coroutines; ++i) spawn(loop.context(), yielder(crew, loop.context()));
  crew.measure(state, 1);
}
BENCHMARK(yield)->ArgName("coroutines")->Arg(1)->Arg(1000)->UseManualTime();

Task<> nothing() { co_return; }

Task<> spawner(Crew& crew, AioContext& context) {
  bench::Counter& spawned = crew.counter(0);
  while (crew.running()) {
    for (int i = 0; i < bench::kSpawnBatch; ++i) Coroutine::create(nothing())->enter();
    co_await move_to(context);
    spawned.add(bench::kSpawnBatch);
  }
  crew.ended();
}

void spawn_root(benchmark::State& state) {
  Crew crew(1);
  Loop loop;
  spawn(loop.context(), spawner(crew, loop.context()));
  crew.measure(state, 1);
}
BENCHMARK(spawn_root)->Name("spawn")->UseManualTime();

Task<int> child(int value) { co_return value; }

Task<> parent(Crew& crew) {
  bench::Counter& awaits = crew.counter(0);
  int sum = 0;
  while (crew.running()) {
    sum += co_await child(1);
    benchmark::DoNotOptimize(sum);
    awaits.add();
  }
  crew.ended();
}

void await_child(benchmark::State& state) {
  Crew crew(1);
  Loop loop;
  spawn(loop.context(), parent(crew));
  crew.measure(state, 1);
}
BENCHMARK(await_child)->UseManualTime();

// A plain counter and the mutex that guards it, on cache lines of their own.
struct Guarded {
  alignas(128) roost::CoMutex mutex;
  alignas(128) uint64_t value = 0;
};

// One lock, increment and unlock an item. Now and then the loop gets its turn.
Task<> locker(Crew& crew, int index, Guarded& guarded, AioContext& context) {
  bench::Counter& rounds = crew.counter(index);
  for (unsigned round = 1; crew.running(); ++round) {
    {
      const auto guard = co_await guarded.mutex.lock();
      ++guarded.value;
    }
    rounds.add();
    if (round % bench::kRoundsPerTurn == 0) co_await move_to(context);
  }
  crew.ended();
}

void contend(benchmark::State& state, int count, int coroutines) {
  Guarded guarded;
  Crew crew(coroutines);
  auto loops = make_loops(count);
  for (int i = 0; i < coroutines; ++i) {
    AioContext& context = loops[i % count]->context();
    spawn(context, locker(crew, i, guarded, context));
  }
  crew.measure(state, coroutines);
  crew.report_fairness(state);
  benchmark::DoNotOptimize(guarded.value);
}

void mutex(benchmark::State& state) {
  const int count = static_cast<int>(state.range(0));
  contend(state, count, count * bench::kCoroutinesPerContext);
}
BENCHMARK(mutex)->ArgName("contexts")->Arg(1)->Arg(2)->Arg(5)->UseManualTime();

void mutex_uncontended(benchmark::State& state) { contend(state, 1, 1); }
BENCHMARK(mutex_uncontended)->UseManualTime();

// A bounded queue of numbers: a ring, a mutex, and a queue of waiters for either end.
struct Pipe {
  roost::CoMutex mutex;
  roost::CoQueue not_empty;
  roost::CoQueue not_full;
  std::array<uint64_t, bench::kPipeCapacity> ring;
  uint64_t put = 0;
  uint64_t got = 0;
};

Task<> producer(Crew& crew, Pipe& pipe, AioContext& context) {
  for (unsigned round = 1; crew.running(); ++round) {
    {
      auto guard = co_await pipe.mutex.lock();
      while (pipe.put - pipe.got == pipe.ring.size()) co_await pipe.not_full.wait(guard);
      pipe.ring[pipe.put++ % pipe.ring.size()] = round;
      pipe.not_empty.wake_one();
    }
    if (round % bench::kRoundsPerTurn == 0) co_await move_to(context);
  }
  // The end of the stream.
  auto guard = co_await pipe.mutex.lock();
  while (pipe.put - pipe.got == pipe.ring.size()) co_await pipe.not_full.wait(guard);
  pipe.ring[pipe.put++ % pipe.ring.size()] = 0;
  pipe.not_empty.wake_one();
  guard.unlock();
  crew.ended();
}

Task<> consumer(Crew& crew, Pipe& pipe, AioContext& context) {
  bench::Counter& items = crew.counter(0);
  for (uint64_t item = 1, round = 1; item != 0; ++round) {
    {
      auto guard = co_await pipe.mutex.lock();
      while (pipe.put == pipe.got) co_await pipe.not_empty.wait(guard);
      item = pipe.ring[pipe.got++ % pipe.ring.size()];
      pipe.not_full.wake_one();
    }
    items.add();
    if (round % bench::kRoundsPerTurn == 0) co_await move_to(context);
  }
  crew.ended();
}

void queue(benchmark::State& state) {
  Pipe pipe;
  Crew crew(2);
  auto loops = make_loops(2);
  spawn(loops[0]->context(), producer(crew, pipe, loops[0]->context()));
  spawn(loops[1]->context(), consumer(crew, pipe, loops[1]->context()));
  crew.measure(state, 1);
}
BENCHMARK(queue)->UseManualTime();
// An operation that completes on the loop it was started on, in its next iteration.
struct LocalOperation : roost::CallbackEntry {
  LocalOperation() noexcept : CallbackEntry(&complete) {}
  static bool complete(CallbackEntry& entry) noexcept {
    void* const opaque = static_cast<LocalOperation&>(entry).opaque;
    roost::CompletionToken<int>::from_opaque(opaque).fire(1);
    return true;
  }
  void* opaque = nullptr;
};

Task<> wait_here(Crew& crew, AioContext& context) {
  bench::Counter& completions = crew.counter(0);
  LocalOperation operation;
  int sum = 0;
  while (crew.running()) {
    roost::Completion<int> done("an operation");
    operation.opaque = done.token().release();
    context.post_here(operation);
    sum += *co_await done.wait();
    completions.add();
  }
  benchmark::DoNotOptimize(sum);
  crew.ended();
}

// A thread that roost does not know, which completes one operation after the other.
Task<> wait_elsewhere(Crew& crew, std::atomic<void*>& mailbox) {
  bench::Counter& completions = crew.counter(0);
  int sum = 0;
  while (crew.running()) {
    roost::Completion<int> done("an operation");
    mailbox.store(done.token().release(), std::memory_order_release);
    sum += *co_await done.wait();
    completions.add();
  }
  benchmark::DoNotOptimize(sum);
  crew.ended();
}

void completion(benchmark::State& state) {
  Crew crew(1);
  std::atomic<void*> mailbox{nullptr};
  std::jthread foreign;
  Loop loop;
  if (state.range(0)) {
    foreign = std::jthread([&mailbox](std::stop_token stop) {
      while (!stop.stop_requested()) {
        if (void* const opaque = mailbox.exchange(nullptr, std::memory_order_acquire)) {
          roost::CompletionToken<int>::from_opaque(opaque).fire(1);
        }
      }
    });
    spawn(loop.context(), wait_elsewhere(crew, mailbox));
  } else {
    spawn(loop.context(), wait_here(crew, loop.context()));
  }
  crew.measure(state, 1);
}
BENCHMARK(completion)->ArgName("foreign")->Arg(0)->Arg(1)->UseManualTime();

Task<> group_of(Crew& crew, int children) {
  bench::Counter& ended = crew.counter(0);
  while (crew.running()) {
    roost::TaskGroup group;
    for (int i = 0; i < children; ++i) group.spawn(nothing());
    (void)co_await group.join();
    ended.add(static_cast<uint64_t>(children));
  }
  crew.ended();
}

void task_group(benchmark::State& state) {
  Crew crew(1);
  Loop loop;
  spawn(loop.context(), group_of(crew, static_cast<int>(state.range(0))));
  crew.measure(state, 1);
}
BENCHMARK(task_group)->ArgName("children")->Arg(2)->Arg(100)->UseManualTime();

Task<> busy(Crew& crew, AioContext& context) {
  while (crew.running()) co_await move_to(context);
  crew.ended();
}

// A control thread takes and leaves the lock of a context that sleeps, or that is never idle.
void acquire(benchmark::State& state) {
  const int coroutines = static_cast<int>(state.range(0));
  Crew crew(1 + coroutines);
  Loop loop;
  for (int i = 0; i < coroutines; ++i) spawn(loop.context(), busy(crew, loop.context()));
  std::jthread control([&] {
    bench::Counter& acquired = crew.counter(0);
    while (crew.running()) {
      const roost::ContextGuard guard(loop.context());
      acquired.add();
    }
    crew.ended();
  });
  crew.measure(state, 1);
}
BENCHMARK(acquire)->ArgName("busy")->Arg(0)->Arg(1)->UseManualTime();

}  // namespace

int main(int argc, char** argv) { return bench::run_main(argc, argv); }
