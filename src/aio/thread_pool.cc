// SPDX-License-Identifier: MIT
#include "roost/aio/thread_pool.h"

#include <pthread.h>

#include <exception>

namespace roost {

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_available_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::submit(Work& work) {
  {
    std::lock_guard lock(mutex_);
    if (queued_ + 1 > waiting_ && threads_.size() < max_threads_) start_thread();
    if (!threads_.empty()) {
      work.next = nullptr;
      (tail_ ? tail_->next : head_) = &work;
      tail_ = &work;
      ++queued_;
      work_available_.notify_one();
      return;
    }
  }
  // The system gives us no thread at all: late is better than never.
  work.run(work);
}

// Where the system refuses another thread, those that are there do the work.
void ThreadPool::start_thread() {
  try {
    threads_.emplace_back([this] { serve(); });
  } catch (const std::exception&) {
  }
}

void ThreadPool::serve() {
  ::pthread_setname_np(::pthread_self(), "roost-worker");
  std::unique_lock lock(mutex_);
  for (;;) {
    ++waiting_;
    work_available_.wait(lock, [this] { return head_ || stopping_; });
    --waiting_;
    if (!head_) return;  // stopping, and everything is done
    Work* work = head_;
    head_ = work->next;
    if (!head_) tail_ = nullptr;
    --queued_;
    lock.unlock();
    work->run(*work);
    lock.lock();
  }
}

}  // namespace roost
