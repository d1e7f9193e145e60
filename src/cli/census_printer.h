// SPDX-License-Identifier: MIT
// CensusPrinter: what SIGUSR1 asks for.
//
// Threads: the main thread; it has one of its own, which waits for the contexts.
// Lifetime: outlives the contexts, so that its end need not wait for one that nobody polls any
// more.
#pragma once

#include <atomic>
#include <thread>

namespace roost::cli {

class CensusPrinter {
 public:
  CensusPrinter() = default;
  ~CensusPrinter();
  CensusPrinter(const CensusPrinter&) = delete;
  CensusPrinter& operator=(const CensusPrinter&) = delete;

  /// Every coroutine, on stderr, in one piece. One at a time: nothing, while one is being taken.
  void print();

 private:
  std::atomic<bool> running_{false};  // set by print(), cleared by the thread
  std::thread thread_;
};

}  // namespace roost::cli
