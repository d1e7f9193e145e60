// SPDX-License-Identifier: MIT
// Threads for work that blocks.
//
// Threads: submit() from any thread; `run` is called on a worker.
// Lifetime: the pool outlives what was submitted; its destructor waits for it.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace roost {

class ThreadPool {
 public:
  struct Work {
    void (*run)(Work&) noexcept = nullptr;  // the last thing that touches it on the worker
    Work* next = nullptr;
  };

  /// Workers are started as needed, up to `max_threads`.
  explicit ThreadPool(unsigned max_threads = 16) : max_threads_(max_threads) {}
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// Where the system refuses to start a first worker, the work runs before this returns.
  void submit(Work& work);

 private:
  void start_thread();
  void serve();

  const unsigned max_threads_;
  std::mutex mutex_;  // guards everything below
  std::condition_variable work_available_;
  Work* head_ = nullptr;
  Work* tail_ = nullptr;
  unsigned waiting_ = 0;  // workers that wait for work
  unsigned queued_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace roost
