// SPDX-License-Identifier: MIT
// Stands for a foreign library: a device that fills a buffer and calls back, on a thread of its
// own.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstring>
#include <mutex>
#include <thread>

#include "roost/coro/completion.h"

namespace foreign {

class Device {
 public:
  using Done = void (*)(void* opaque, int bytes);

  /// The buffer is the device's until `done` has been called.
  void read(char* buffer, std::size_t size, Done done, void* opaque) {
    thread_ = std::jthread([=](std::stop_token stop) {
      std::mutex mutex;
      std::condition_variable_any changed;
      std::unique_lock lock(mutex);
      changed.wait(lock, stop, [] { return false; });  // this one answers when it is told to
      std::memset(buffer, 'x', size);
      done(opaque, static_cast<int>(size));
    });
  }

  /// The read that is under way ends soon; its callback comes as ever.
  void hurry() { thread_.request_stop(); }

 private:
  std::jthread thread_;
};

inline void fire(void* opaque, int bytes) {
  roost::CompletionToken<int>::from_opaque(opaque).fire(bytes);
}

}  // namespace foreign
