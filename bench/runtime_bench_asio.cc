// SPDX-License-Identifier: MIT
//
// The cases of runtime_bench on Boost.Asio: C++20 awaitables, one io_context a thread with
// concurrency hint 1, concrete executors (no any_io_executor anywhere), Asio's recycling allocator.
// A hop is one post: the token is bound to the target's executor, so the coroutine resumes there
// directly instead of being posted there and sent back to the executor it was spawned on.
// `deferred` rather than use_awaitable where it is awaited at once: it needs no coroutine frame for
// the operation.
#include <sys/eventfd.h>

#include <atomic>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/basic_waitable_timer.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/deferred.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/experimental/channel.hpp>
#include <boost/asio/experimental/concurrent_channel.hpp>
#include <boost/asio/experimental/parallel_group.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/basic_stream_descriptor.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <chrono>
#include <cstddef>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <semaphore>
#include <stop_token>
#include <string_view>
#include <thread>
#include <vector>

#include "runtime_harness.h"

namespace asio = boost::asio;

namespace {

using bench::Burst;
using bench::Crew;
using bench::Random;

using Executor = asio::io_context::executor_type;
template <typename T = void>
using Awaitable = asio::awaitable<T, Executor>;

// With --bare the loops own no I/O object. Asio then never makes its reactor: the io_context is a
// queue with a condition variable, which cannot wait for a descriptor or a timer. That is not what
// the other side offers, so it is not the default; it shows what the reactor costs Asio.
bool bare = false;

// An io_context and the one thread that runs it, waiting for one descriptor on which nothing
// happens.
class Loop {
 public:
  Loop() {
    if (!bare) {
      idle_.emplace(context_, ::eventfd(0, EFD_CLOEXEC));
      idle_->async_wait(asio::posix::descriptor_base::wait_read, [](boost::system::error_code) {});
    }
    thread_ = std::thread([this] { context_.run(); });
  }
  ~Loop() {
    asio::post(context_, [this] {
      if (idle_) idle_->cancel();
      work_.reset();
    });
    thread_.join();
  }
  Executor executor() noexcept { return context_.get_executor(); }

 private:
  asio::io_context context_{1};
  asio::executor_work_guard<Executor> work_{context_.get_executor()};
  std::optional<asio::posix::basic_stream_descriptor<Executor>> idle_;
  std::thread thread_;
};

std::vector<std::unique_ptr<Loop>> make_loops(int count) {
  std::vector<std::unique_ptr<Loop>> loops;
  for (int i = 0; i < count; ++i) loops.push_back(std::make_unique<Loop>());
  return loops;
}

// Resumes the calling coroutine on the loop of `target`.
auto hop_to(Executor target) { return asio::post(asio::bind_executor(target, asio::deferred)); }

Awaitable<> storm(Crew& crew, int index, const std::vector<Executor>& executors) {
  Random random(index + 1);
  bench::Counter& hops = crew.counter(index);
  while (crew.running()) {
    co_await hop_to(executors[random.below(executors.size())]);
    hops.add();
  }
  crew.ended();
}

void hop_storm(benchmark::State& state) {
  const int contexts = static_cast<int>(state.range(0));
  const int coroutines = contexts * bench::kCoroutinesPerContext;
  Crew crew(coroutines);
  std::vector<Executor> executors;
  auto loops = make_loops(contexts);
  for (auto& loop : loops) executors.push_back(loop->executor());
  for (int i = 0; i < coroutines; ++i) {
    asio::co_spawn(executors[i % contexts], storm(crew, i, executors), asio::detached);
  }
  crew.measure(state, coroutines);
}
BENCHMARK(hop_storm)->ArgName("contexts")->Arg(2)->Arg(5)->UseManualTime();

Awaitable<> bounce(Crew& crew, Executor here, Executor there) {
  bench::Counter& hops = crew.counter(0);
  while (crew.running()) {
    co_await hop_to(there);
    hops.add();
    co_await hop_to(here);
    hops.add();
  }
  crew.ended();
}

void ping_pong(benchmark::State& state) {
  Crew crew(1);
  auto loops = make_loops(2);
  const Executor here = loops[0]->executor();
  asio::co_spawn(here, bounce(crew, here, loops[1]->executor()), asio::detached);
  crew.measure(state, 1);
}
BENCHMARK(ping_pong)->UseManualTime();

// A suspended coroutine: its completion handler, and how to post it. The handler's type has no
// public name, so it is kept in place with the one function that knows it; nothing is allocated.
class Parked {
 public:
  template <typename Handler>
  void park(Handler handler) {
    static_assert(sizeof(Handler) <= sizeof(storage_));
    new (storage_) Handler(std::move(handler));
    post_ = [](void* storage) {
      Handler& parked = *std::launder(static_cast<Handler*>(storage));
      asio::post(std::move(parked));  // to the handler's own executor, which is the consumer's
      parked.~Handler();
    };
  }
  void post() { post_(storage_); }

 private:
  alignas(void*) std::byte storage_[sizeof(void*)];
  void (*post_)(void*);
};

Awaitable<> sleeper(Burst& burst, Parked& slot) {
  co_await asio::async_initiate<const asio::deferred_t, void()>(
      [&slot](auto&& handler) { slot.park(std::move(handler)); }, asio::deferred);
  burst.woken();
}

void burst(benchmark::State& state) {
  const int producers = static_cast<int>(state.range(0));
  Loop consumer;
  std::vector<Parked> slots(bench::kBurstCoroutines);
  for ([[maybe_unused]] auto _ : state) {
    Burst round;
    std::promise<void> parked;
    asio::post(consumer.executor(), [&] {
      // On the loop's own thread co_spawn runs the coroutine up to its first suspension at once.
      for (auto& slot : slots) {
        asio::co_spawn(consumer.executor(), sleeper(round, slot), asio::detached);
      }
      parked.set_value();
    });
    parked.get_future().wait();
    state.SetIterationTime(round.run(producers, [&slots](int first, int last) {
      for (int i = first; i < last; ++i) slots[i].post();
    }));
    // The last coroutine may still be ending: let the loop pass it before its round goes away.
    std::promise<void> idle;
    asio::post(consumer.executor(), [&] { idle.set_value(); });
    idle.get_future().wait();
  }
  state.SetItemsProcessed(state.iterations() * bench::kBurstCoroutines);
}
BENCHMARK(burst)->ArgName("producers")->Arg(1)->Arg(4)->Iterations(3)->UseManualTime();

Awaitable<> yielder(Crew& crew) {
  bench::Counter& yields = crew.counter(0);
  while (crew.running()) {
    co_await asio::post(asio::deferred);
    yields.add();
  }
  crew.ended();
}

void yield(benchmark::State& state) {
  const int coroutines = static_cast<int>(state.range(0));
  Crew crew(coroutines);
  Loop loop;
  for (int i = 0; i < coroutines; ++i) {
    asio::co_spawn(loop.executor(), yielder(crew), asio::detached);
  }
  crew.measure(state, 1);
}
BENCHMARK(yield)->ArgName("coroutines")->Arg(1)->Arg(1000)->UseManualTime();

Awaitable<> nothing() { co_return; }

Awaitable<> spawner(Crew& crew, Executor executor) {
  bench::Counter& spawned = crew.counter(0);
  while (crew.running()) {
    for (int i = 0; i < bench::kSpawnBatch; ++i) {
      asio::co_spawn(executor, nothing(), asio::detached);
    }
    // A detached coroutine ends through the queue: once this one has its turn, they are gone.
    co_await asio::post(asio::deferred);
    spawned.add(bench::kSpawnBatch);
  }
  crew.ended();
}

void spawn(benchmark::State& state) {
  Crew crew(1);
  Loop loop;
  asio::co_spawn(loop.executor(), spawner(crew, loop.executor()), asio::detached);
  crew.measure(state, 1);
}
BENCHMARK(spawn)->UseManualTime();

Awaitable<int> child(int value) { co_return value; }

Awaitable<> parent(Crew& crew) {
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
  asio::co_spawn(loop.executor(), parent(crew), asio::detached);
  crew.measure(state, 1);
}
BENCHMARK(await_child)->UseManualTime();

using boost::system::error_code;

// Asio has no mutex for coroutines; a channel with room for one message is what its users take:
// full means locked. The message goes in without an operation where there is room.
template <typename Channel>
struct Guarded {
  explicit Guarded(Executor executor) : mutex(executor, 1) {}
  Channel mutex;
  alignas(128) uint64_t value = 0;
};

template <typename Channel>
Awaitable<> locker(Crew& crew, int index, Guarded<Channel>& guarded) {
  bench::Counter& rounds = crew.counter(index);
  for (unsigned round = 1; crew.running(); ++round) {
    if (!guarded.mutex.try_send(error_code())) {
      co_await guarded.mutex.async_send(error_code(), asio::deferred);
    }
    ++guarded.value;
    guarded.mutex.try_receive([](error_code) {});
    rounds.add();
    if (round % bench::kRoundsPerTurn == 0) co_await asio::post(asio::deferred);
  }
  crew.ended();
}

template <typename Channel>
void contend(benchmark::State& state, int count, int coroutines) {
  Crew crew(coroutines);
  auto loops = make_loops(count);
  Guarded<Channel> guarded(loops[0]->executor());
  for (int i = 0; i < coroutines; ++i) {
    asio::co_spawn(loops[i % count]->executor(), locker(crew, i, guarded), asio::detached);
  }
  crew.measure(state, coroutines);
  crew.report_fairness(state);
  benchmark::DoNotOptimize(guarded.value);
}

// Of one thread, and of several.
using Channel = asio::experimental::channel<Executor, void(error_code)>;
using ConcurrentChannel = asio::experimental::concurrent_channel<Executor, void(error_code)>;

void mutex(benchmark::State& state) {
  const int count = static_cast<int>(state.range(0));
  const int coroutines = count * bench::kCoroutinesPerContext;
  if (count == 1) {
    contend<Channel>(state, count, coroutines);
  } else {
    contend<ConcurrentChannel>(state, count, coroutines);
  }
}
BENCHMARK(mutex)->ArgName("contexts")->Arg(1)->Arg(2)->Arg(5)->UseManualTime();

void mutex_uncontended(benchmark::State& state) { contend<Channel>(state, 1, 1); }
BENCHMARK(mutex_uncontended)->UseManualTime();

using Pipe = asio::experimental::concurrent_channel<Executor, void(error_code, uint64_t)>;

Awaitable<> producer(Crew& crew, Pipe& pipe) {
  for (unsigned round = 1; crew.running(); ++round) {
    if (!pipe.try_send(error_code(), round)) {
      co_await pipe.async_send(error_code(), round, asio::deferred);
    }
    if (round % bench::kRoundsPerTurn == 0) co_await asio::post(asio::deferred);
  }
  co_await pipe.async_send(error_code(), 0, asio::deferred);  // the end of the stream
  crew.ended();
}

Awaitable<> consumer(Crew& crew, Pipe& pipe) {
  bench::Counter& items = crew.counter(0);
  for (uint64_t item = 1, round = 1; item != 0; ++round) {
    if (!pipe.try_receive([&item](error_code, uint64_t value) { item = value; })) {
      item = co_await pipe.async_receive(asio::deferred);
    }
    items.add();
    if (round % bench::kRoundsPerTurn == 0) co_await asio::post(asio::deferred);
  }
  crew.ended();
}

void queue(benchmark::State& state) {
  Crew crew(2);
  auto loops = make_loops(2);
  Pipe pipe(loops[0]->executor(), bench::kPipeCapacity);
  asio::co_spawn(loops[0]->executor(), producer(crew, pipe), asio::detached);
  asio::co_spawn(loops[1]->executor(), consumer(crew, pipe), asio::detached);
  crew.measure(state, 1);
}
BENCHMARK(queue)->UseManualTime();
// An operation that completes on the loop it was started on, in its next iteration.
Awaitable<> wait_here(Crew& crew, Executor executor) {
  bench::Counter& completions = crew.counter(0);
  auto initiate = [&executor](auto&& handler) {
    asio::post(executor, [handler = std::move(handler)]() mutable { std::move(handler)(1); });
  };
  int sum = 0;
  while (crew.running()) {
    sum +=
        co_await asio::async_initiate<const asio::deferred_t, void(int)>(initiate, asio::deferred);
    completions.add();
  }
  benchmark::DoNotOptimize(sum);
  crew.ended();
}

// What `Parked` is for a handler that takes the result.
class Pending {
 public:
  template <typename Handler>
  void park(Handler handler) {
    static_assert(sizeof(Handler) <= sizeof(storage_));
    new (storage_) Handler(std::move(handler));
    complete_ = [](void* storage, int result) {
      Handler& parked = *std::launder(static_cast<Handler*>(storage));
      Handler taken = std::move(parked);
      parked.~Handler();
      const auto executor = asio::get_associated_executor(taken);
      asio::post(executor,
                 [taken = std::move(taken), result]() mutable { std::move(taken)(result); });
    };
  }
  void complete(int result) { complete_(storage_, result); }

 private:
  alignas(void*) std::byte storage_[2 * sizeof(void*)];
  void (*complete_)(void*, int);
};

// A thread that Asio does not know, which completes one operation after the other.
Awaitable<> wait_elsewhere(Crew& crew, std::atomic<Pending*>& mailbox) {
  bench::Counter& completions = crew.counter(0);
  Pending pending;
  auto initiate = [&pending, &mailbox](auto&& handler) {
    pending.park(std::move(handler));
    mailbox.store(&pending, std::memory_order_release);
  };
  int sum = 0;
  while (crew.running()) {
    sum +=
        co_await asio::async_initiate<const asio::deferred_t, void(int)>(initiate, asio::deferred);
    completions.add();
  }
  benchmark::DoNotOptimize(sum);
  crew.ended();
}

void completion(benchmark::State& state) {
  Crew crew(1);
  std::atomic<Pending*> mailbox{nullptr};
  std::jthread foreign;
  Loop loop;
  if (state.range(0)) {
    foreign = std::jthread([&mailbox](std::stop_token stop) {
      while (!stop.stop_requested()) {
        if (Pending* const pending = mailbox.exchange(nullptr, std::memory_order_acquire)) {
          pending->complete(1);
        }
      }
    });
    asio::co_spawn(loop.executor(), wait_elsewhere(crew, mailbox), asio::detached);
  } else {
    asio::co_spawn(loop.executor(), wait_here(crew, loop.executor()), asio::detached);
  }
  crew.measure(state, 1);
}
BENCHMARK(completion)->ArgName("foreign")->Arg(0)->Arg(1)->UseManualTime();

// What an expert takes for a number of children that is known at run time only.
Awaitable<> group_of(Crew& crew, Executor executor, int children) {
  bench::Counter& ended = crew.counter(0);
  using Child = decltype(asio::co_spawn(executor, nothing(), asio::deferred));
  while (crew.running()) {
    std::vector<Child> tasks;
    tasks.reserve(static_cast<std::size_t>(children));
    for (int i = 0; i < children; ++i) {
      tasks.push_back(asio::co_spawn(executor, nothing(), asio::deferred));
    }
    co_await asio::experimental::make_parallel_group(std::move(tasks))
        .async_wait(asio::experimental::wait_for_one_error(), asio::deferred);
    ended.add(static_cast<uint64_t>(children));
  }
  crew.ended();
}

void task_group(benchmark::State& state) {
  Crew crew(1);
  Loop loop;
  asio::co_spawn(loop.executor(), group_of(crew, loop.executor(), static_cast<int>(state.range(0))),
                 asio::detached);
  crew.measure(state, 1);
}
BENCHMARK(task_group)->ArgName("children")->Arg(2)->Arg(100)->UseManualTime();

using Timer = asio::basic_waitable_timer<std::chrono::steady_clock,
                                         asio::wait_traits<std::chrono::steady_clock>, Executor>;
constexpr std::chrono::hours kFarAway{1};

// A timer and a cancellation signal for each wait, as a request with a deadline has.
Awaitable<> waiter(Crew& crew, Executor executor, std::optional<asio::cancellation_signal>& stop) {
  bench::Counter& waits = crew.counter(0);
  while (crew.running()) {
    stop.emplace();
    Timer timer(executor, kFarAway);
    boost::system::error_code error;
    // Not deferred, which redirect_error and as_tuple do not take together with a slot.
    co_await timer.async_wait(asio::bind_cancellation_slot(
        stop->slot(), asio::redirect_error(asio::use_awaitable_t<Executor>(), error)));
    if (error == asio::error::operation_aborted) waits.add();
  }
  stop.reset();
  crew.ended();
}

Awaitable<> stopper(Crew& crew, std::optional<asio::cancellation_signal>& stop) {
  while (stop) {
    stop->emit(asio::cancellation_type::all);
    co_await asio::post(asio::deferred);
  }
  crew.ended();
}

void cancel(benchmark::State& state) {
  Crew crew(2);
  Loop loop;
  std::optional<asio::cancellation_signal> stop;
  asio::co_spawn(loop.executor(), waiter(crew, loop.executor(), stop), asio::detached);
  asio::co_spawn(loop.executor(), stopper(crew, stop), asio::detached);
  crew.measure(state, 1);
}
BENCHMARK(cancel)->UseManualTime();

Awaitable<> busy(Crew& crew) {
  while (crew.running()) co_await asio::post(asio::deferred);
  crew.ended();
}

// Nothing keeps an io_context from dispatching; who wants to touch what its handlers touch, from
// another thread and synchronously, posts a function and waits until it has run.
void acquire(benchmark::State& state) {
  const int coroutines = static_cast<int>(state.range(0));
  Crew crew(1 + coroutines);
  std::binary_semaphore done(0);
  Loop loop;
  for (int i = 0; i < coroutines; ++i) {
    asio::co_spawn(loop.executor(), busy(crew), asio::detached);
  }
  std::jthread control([&] {
    bench::Counter& acquired = crew.counter(0);
    while (crew.running()) {
      asio::post(loop.executor(), [&] { done.release(); });
      done.acquire();
      acquired.add();
    }
    crew.ended();
  });
  crew.measure(state, 1);
}
BENCHMARK(acquire)->ArgName("busy")->Arg(0)->Arg(1)->UseManualTime();

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string_view(argv[1]) == "--bare") {
    bare = true;
    argv[1] = argv[0];
    ++argv;
    --argc;
  }
  return bench::run_main(argc, argv);
}
