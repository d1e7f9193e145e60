// SPDX-License-Identifier: MIT
// A std::mutex that notices a coroutine about to wait while its thread holds it.
//
// A thread that holds a thread lock must not suspend a coroutine: whoever wants the lock next
// blocks its whole event loop, and if that is the home of whoever is to end the wait, for ever.
// With a ThreadMutex such a wait aborts, in release builds too, and names the coroutine: where it
// is for a lock or queue, a Completion, a Gate, a group's children or room, a timer, I/O, or a
// worker. move_to(), yield() and suspend(), which are for other uses and must cost nothing, do not
// look.
//
// Threads: any; lock and unlock on the same thread. CoQueue::wait() lets go of it and takes it
// again. Lifetime: as std::mutex.
#pragma once

#include <mutex>

#include "roost/coro/context.h"

namespace roost {

/// A lock for std::lock_guard and std::unique_lock.
class ThreadMutex {
 public:
  ThreadMutex() = default;
  ThreadMutex(const ThreadMutex&) = delete;
  ThreadMutex& operator=(const ThreadMutex&) = delete;

  void lock() {
    mutex_.lock();
    ++this_thread().thread_locks;
  }
  bool try_lock() {
    if (!mutex_.try_lock()) return false;
    ++this_thread().thread_locks;
    return true;
  }
  void unlock() {
    --this_thread().thread_locks;
    mutex_.unlock();
  }

 private:
  std::mutex mutex_;
};

}  // namespace roost
