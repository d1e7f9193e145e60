// SPDX-License-Identifier: MIT
#include "roost/aio/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <exception>

#include "roost/base/check.h"
#include "roost/base/probe.h"

namespace roost {

ThreadPool::ThreadPool(Options options) : options_(options) {
  ROOST_CHECK(options.max_threads > 0 && options.min_threads <= options.max_threads,
              "thread pool of {} to {} threads", options.min_threads, options.max_threads);
  std::lock_guard lock(mutex_);
  while (workers_.size() < options_.min_threads && start_worker()) {
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    for (Worker& worker : workers_) worker.called_changed.notify_one();
  }
  // A worker that ends from now on stays in its list.
  for (Worker& worker : ended_) worker.thread.join();
  for (Worker& worker : workers_) worker.thread.join();
}

bool ThreadPool::submit(Work& work) {
  ROOST_PROBE(thread_pool_submit, this, &work);
  std::list<Worker> ended;
  bool run_here = false;
  {
    std::lock_guard lock(mutex_);
    if (work.state == Work::State::kWithdrawn) {
      ++statistics_.cancelled;
      return false;
    }
    ROOST_CHECK(work.state == Work::State::kNew, "work submitted to a thread pool twice");
    ended.swap(ended_);
    Worker* const worker = idle_;
    if (worker) {
      remove_idle(*worker);
      worker->called = true;
      worker->called_changed.notify_one();
    } else if (workers_.size() < options_.max_threads && !stopping_) {
      start_worker();
    }
    // Where the system refuses another thread, those that are there do the work; where it gives us
    // none at all, late is better than never.
    run_here = workers_.empty();
    if (run_here) {
      work.state = Work::State::kStarted;
      ++statistics_.executed;
    } else {
      enqueue(work);
    }
  }
  if (run_here) {
    work.run(work);
    ROOST_PROBE(thread_pool_complete, this, &work);
  }
  for (Worker& worker : ended) worker.thread.join();
  return true;
}

bool ThreadPool::withdraw(Work& work) noexcept {
  std::lock_guard lock(mutex_);
  switch (work.state) {
    case Work::State::kNew:
      work.state = Work::State::kWithdrawn;
      return false;
    case Work::State::kQueued:
      unlink(work);
      work.state = Work::State::kWithdrawn;
      ++statistics_.cancelled;
      return true;
    case Work::State::kStarted:
    case Work::State::kWithdrawn:
      return false;
  }
  return false;
}

ThreadPool::Statistics ThreadPool::statistics() const {
  std::lock_guard lock(mutex_);
  return statistics_;
}

void ThreadPool::enqueue(Work& work) noexcept {
  work.state = Work::State::kQueued;
  work.next = nullptr;
  work.previous = tail_;
  (tail_ ? tail_->next : head_) = &work;
  tail_ = &work;
  statistics_.peak_queued = std::max(statistics_.peak_queued, ++statistics_.queued);
}

void ThreadPool::unlink(Work& work) noexcept {
  (work.previous ? work.previous->next : head_) = work.next;
  (work.next ? work.next->previous : tail_) = work.previous;
  --statistics_.queued;
}

bool ThreadPool::start_worker() {
  Worker& worker = workers_.emplace_back();
  worker.self = std::prev(workers_.end());
  try {
    worker.thread = std::thread([this, &worker] { serve(worker); });
  } catch (const std::exception&) {
    workers_.pop_back();
    return false;
  }
  statistics_.peak_threads = std::max(statistics_.peak_threads, ++statistics_.threads);
  return true;
}

void ThreadPool::serve(Worker& worker) {
  ::pthread_setname_np(::pthread_self(), "roost-worker");
  std::unique_lock lock(mutex_);
  do {
    while (Work* const work = head_) {
      unlink(*work);
      work->state = Work::State::kStarted;
      ++statistics_.executed;
      lock.unlock();
      work->run(*work);
      ROOST_PROBE(thread_pool_complete, this, work);
      lock.lock();
    }
  } while (wait_for_call(worker, lock));
  --statistics_.threads;
  // Once the lock is free, the thread has nothing more to do than to end.
  if (!stopping_) ended_.splice(ended_.end(), workers_, worker.self);
}

// False: the worker ends.
bool ThreadPool::wait_for_call(Worker& worker, std::unique_lock<std::mutex>& lock) {
  if (stopping_) return false;
  worker.called = false;
  worker.next_idle = idle_;
  idle_ = &worker;
  ++statistics_.idle;
  const auto is_called = [&] { return worker.called || stopping_; };
  if (statistics_.threads > options_.min_threads) {
    const auto timeout = std::chrono::nanoseconds(options_.idle_timeout_ns);
    worker.called_changed.wait_for(lock, timeout, is_called);
    if (!is_called() && statistics_.threads > options_.min_threads) {
      remove_idle(worker);
      return false;
    }
  }
  worker.called_changed.wait(lock, is_called);
  if (!worker.called) remove_idle(worker);
  return true;
}

void ThreadPool::remove_idle(Worker& worker) noexcept {
  Worker** place = &idle_;
  while (*place != &worker) place = &(*place)->next_idle;
  *place = worker.next_idle;
  --statistics_.idle;
}

}  // namespace roost
