// SPDX-License-Identifier: MIT
#include "roost/aio/thread_pool.h"

#include <pthread.h>

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
  bool start_one;
  {
    std::lock_guard lock(mutex_);
    work.next = nullptr;
    if (tail_) {
      tail_->next = &work;
    } else {
      head_ = &work;
    }
    tail_ = &work;
    ++queued_;
    start_one = queued_ > waiting_ && threads_.size() < max_threads_;
    if (start_one) threads_.emplace_back([this] { serve(); });
  }
  if (!start_one) work_available_.notify_one();
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
