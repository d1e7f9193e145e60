// SPDX-License-Identifier: MIT
// Threads for work that blocks: `co_await pool.run(function)`.
//
// Threads: everything from any thread; run() within a coroutine.
// Lifetime: the pool outlives what was submitted; its destructor waits for it.
//
// A worker is started when work comes and none is idle, up to the most that is allowed. The worker
// that became idle last is the next to work, so that those which a burst needed, and nobody needs
// any more, become idle long enough to end.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <list>
#include <mutex>
#include <stop_token>
#include <thread>
#include <type_traits>

namespace roost {

/// Some threads, and a queue of work for them.
class ThreadPool {
 public:
  struct Options {
    unsigned min_threads = 0;  // started at once, and kept
    unsigned max_threads = 16;
    std::int64_t idle_timeout_ns = 10'000'000'000;  // after which a worker above the minimum ends
  };

  struct Statistics {
    unsigned threads = 0;  // alive
    unsigned idle = 0;     // of them, without work
    unsigned peak_threads = 0;
    std::size_t queued = 0;  // not started
    std::size_t peak_queued = 0;
    std::uint64_t executed = 0;   // started, to be exact
    std::uint64_t cancelled = 0;  // withdrawn, or refused because they had been
  };

  /// A piece of work. It may be submitted once.
  struct Work {
    void (*run)(Work&) noexcept = nullptr;  // the last thing that touches it on the worker

   private:
    friend class ThreadPool;
    enum class State : std::uint8_t { kNew, kQueued, kStarted, kWithdrawn };
    State state = State::kNew;  // guarded by the pool's mutex
    Work* next = nullptr;
    Work* previous = nullptr;
  };

  /// Aborts where `max_threads` is 0 or less than `min_threads`. A thread that the system refuses
  /// is tried again when there is work.
  ThreadPool() : ThreadPool(Options{}) {}
  explicit ThreadPool(unsigned max_threads) : ThreadPool(Options{.max_threads = max_threads}) {}
  explicit ThreadPool(Options options);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// Queues the work. False: it has been withdrawn, and is not going to run. Where the system
  /// refuses to start a first worker, the work runs before this returns.
  bool submit(Work& work);

  /// Takes back what has not started. True: it was queued, it does not run, and the pool does not
  /// touch it any more. False: it has started (or ended); or it was not submitted yet, and
  /// submit() will refuse it.
  bool withdraw(Work& work) noexcept;

  /// Calls `function()` on a worker and gives its result, or rethrows its exception, at home.
  ///
  /// A callable that is passed by name is used in place and has to outlive the await, as it does in
  /// `auto hash = [&] { ... }; co_await pool.run(hash);`. A temporary is copied and has to be
  /// trivially copyable (GCC 12 destroys other temporaries of a co_await expression twice).
  template <class F>
  [[nodiscard]] auto run(F&& function);

  /// As run(), and gives up when `stop` is requested: a Result<T> of what the function gives, the
  /// function's own if that is one, or ECANCELED, which says that it was not started, and is not
  /// going to be. What has started is waited for.
  template <class F>
  [[nodiscard]] auto run(F&& function, std::stop_token stop);

  /// A snapshot.
  Statistics statistics() const;

 private:
  struct Worker {
    std::thread thread;
    std::condition_variable called_changed;
    bool called = false;          // taken off the idle stack, or the pool stops
    Worker* next_idle = nullptr;  // the one that has been idle longer
    std::list<Worker>::iterator self;
  };

  bool start_worker();
  void serve(Worker& worker);
  bool wait_for_call(Worker& worker, std::unique_lock<std::mutex>& lock);
  void remove_idle(Worker& worker) noexcept;
  void enqueue(Work& work) noexcept;
  void unlink(Work& work) noexcept;

  const Options options_;
  mutable std::mutex mutex_;  // guards everything below
  Work* head_ = nullptr;      // queued
  Work* tail_ = nullptr;
  Worker* idle_ = nullptr;  // a stack: the one that became idle last
  bool stopping_ = false;
  Statistics statistics_;
  std::list<Worker> workers_;
  std::list<Worker> ended_;  // to be joined
};

}  // namespace roost

#include "roost/aio/offload.h"  // IWYU pragma: export
