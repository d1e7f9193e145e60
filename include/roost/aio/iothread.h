// SPDX-License-Identifier: MIT
// IOThread: a thread that owns an AioContext and polls it until it is stopped.
//
// Threads: start, stop and join from one controlling thread.
// Lifetime: the destructor stops and joins. Whoever keeps a shared_ptr of the context may keep it
// longer, but nobody polls it then.
//
// It does not stop coroutines. One that waits for I/O when the thread leaves its loop (the kernel
// has its buffer, and no one would take the result) aborts the process, by name; one that waits for
// anything else, or has yielded, is not resumed there any more, and is reported when the context
// goes. So: ask what waits to stop, wait until it has ended, then stop the thread.
#pragma once

#include <atomic>
#include <exception>
#include <memory>
#include <semaphore>
#include <thread>

#include "roost/aio/aio_context.h"

namespace roost {

/// A context and the thread that polls it.
class IOThread {
 public:
  /// Makes the context, starts the thread, and waits until that has its back end. Throws
  /// std::system_error. The thread is called as the context is (the first 15 characters).
  explicit IOThread(AioContextOptions options = {});
  ~IOThread();
  IOThread(const IOThread&) = delete;
  IOThread& operator=(const IOThread&) = delete;

  /// Any thread.
  AioContext& context() noexcept { return *context_; }
  /// Any thread. Who keeps it beyond the thread's end keeps a context that nobody polls.
  std::shared_ptr<AioContext> share_context() noexcept { return context_; }

  /// Asks the thread to leave its loop; what was posted before still runs. Any number of times.
  /// REQUIRES: by then no coroutine waits for I/O on it (checked).
  void stop() noexcept;

  /// Waits for the thread's end. Blocks: aborts inside a coroutine.
  void join();

 private:
  void run();

  struct StopEntry : CallbackEntry {
    explicit StopEntry() noexcept : CallbackEntry(&take_effect) {}
    static bool take_effect(CallbackEntry& entry) noexcept;
    bool reached = false;  // home thread
  };

  std::shared_ptr<AioContext> context_;
  std::atomic<bool> stop_requested_{false};
  StopEntry stop_entry_;
  // Released once by the thread, when it has a back end, or has failed to get one. (Not a future:
  // compiling that costs whoever includes this more than all of the rest.)
  std::binary_semaphore started_{0};
  std::exception_ptr start_failure_;  // the thread, until it releases started_
  std::thread thread_;
};

}  // namespace roost
