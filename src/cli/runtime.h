// SPDX-License-Identifier: MIT
// What the commands that end by themselves have in common: a main context, I/O threads, a task that
// runs on them, a census on SIGUSR1, and an end by SIGINT or SIGTERM.
//
// Threads: the main thread. Lifetime: outlives what runs on its contexts.
#pragma once

#include <memory>
#include <stop_token>
#include <string>
#include <vector>

#include "cli/census_printer.h"
#include "cli/signals.h"
#include "roost/aio/iothread.h"
#include "roost/aio/poll_budget.h"
#include "roost/aio/thread_pool.h"
#include "roost/block/block_driver.h"

namespace roost::cli {

// Exit statuses, as every command gives them.
inline constexpr int kSuccess = 0;
inline constexpr int kFailure = 1;
inline constexpr int kUsageError = 2;
inline constexpr int kInterrupted = 130;  // as a shell says it of SIGINT

/// "roost: LINE" on standard error, in one piece.
void report(const std::string& line);

/// The contexts and threads of one command.
class Runtime {
 public:
  /// Throws std::system_error. `poll_max_ns` is the I/O threads' longest busy wait,
  /// and `poll_budget`, which outlives this, says how many may; null: the process's.
  explicit Runtime(unsigned iothreads, EventLoop event_loop = EventLoop::kAuto,
                   std::int64_t poll_max_ns = 100'000, PollBudget* poll_budget = nullptr);
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  /// Runs `task` on the main context to its end, and gives its result. The first SIGINT or SIGTERM
  /// requests stop(), the second ends the process; SIGUSR1 prints every coroutine.
  int run(Task<int> task);

  std::stop_token stop() const noexcept { return stop_.get_token(); }
  bool interrupted() const noexcept { return stop_.stop_requested(); }

  AioContext& main() noexcept { return *main_; }
  /// Those of the I/O threads.
  const std::vector<AioContext*>& contexts() const noexcept { return contexts_; }

 private:
  std::stop_source stop_;
  Signals signals_;  // blocked before any thread starts
  CensusPrinter census_;
  std::shared_ptr<ThreadPool> pool_ = std::make_shared<ThreadPool>();
  std::shared_ptr<AioContext> main_;
  std::vector<std::unique_ptr<IOThread>> threads_;
  std::vector<AioContext*> contexts_;
};

/// How an NBD server is used.
struct RemoteOptions {
  unsigned connections = 0;  // 0: one for each I/O thread
  /// How long a lost connection is tried to be made again; 0: not at all.
  std::int64_t reconnect_timeout_ns = 60'000'000'000;
};

/// A disk of this machine, as open_disk() understands it, or an NBD URI's. In a coroutine on the
/// main context.
Task<Result<std::unique_ptr<BlockDriver>>> open_any_disk(Runtime& runtime, std::string description,
                                                         OpenOptions options, RemoteOptions remote);

}  // namespace roost::cli
