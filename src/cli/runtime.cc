// SPDX-License-Identifier: MIT
#include "cli/runtime.h"

#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <optional>

#include "roost/block/nbd_disk.h"

namespace roost::cli {

namespace {

Task<void> keep(Task<int> task, std::optional<int>& result, bool& done) {
  result = co_await std::move(task);
  done = true;
}

}  // namespace

void report(const std::string& line) {
  // One write, so that lines of several threads do not mix. Whether anybody reads it is not ours.
  const std::string whole = "roost: " + line + "\n";
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, whole.data(), whole.size());
}

Runtime::Runtime(unsigned iothreads, EventLoop event_loop, std::int64_t poll_max_ns,
                 PollBudget* poll_budget)
    : signals_({SIGINT, SIGTERM, SIGUSR1}) {
  const auto options = [&](std::string name) {
    return AioContextOptions{.name = std::move(name),
                             .event_loop = event_loop,
                             .poll_max_ns = poll_max_ns,
                             .poll_budget = poll_budget,
                             .thread_pool = pool_};
  };
  AioContextOptions main_options = options("main");
  main_options.poll_max_ns = 0;  // nothing here is in a hurry
  main_ = AioContext::create(std::move(main_options));
  for (unsigned i = 0; i < iothreads; ++i) {
    threads_.push_back(std::make_unique<IOThread>(options(fmt::format("iothread{}", i))));
    contexts_.push_back(&threads_.back()->context());
  }
}

Runtime::~Runtime() {
  for (auto& thread : threads_) {
    thread->stop();
    thread->join();
  }
}

int Runtime::run(Task<int> task) {
  const ContextScope scope(*main_);
  main_->set_fd_handler(signals_.fd(), {.read =
                                            [this] {
                                              const int signal = signals_.take();
                                              if (signal == SIGUSR1) census_.print();
                                              if (signal == 0 || signal == SIGUSR1) return;
                                              if (interrupted()) ::_exit(kInterrupted);
                                              stop_.request_stop();
                                            },
                                        .write = {},
                                        .poll = {}});
  std::optional<int> result;
  bool done = false;
  Coroutine::create(keep(std::move(task), result, done), "command")->enter();
  main_->poll_until(done);
  main_->remove_fd_handler(signals_.fd());
  return *result;
}

Task<Result<std::unique_ptr<BlockDriver>>> open_any_disk(Runtime& runtime, std::string description,
                                                         OpenOptions options,
                                                         RemoteOptions remote) {
  if (!nbd::looks_like_nbd_uri(description)) co_return open_disk(description, options);
  Result<nbd::NbdTarget> target = nbd::NbdTarget::parse(description);
  if (!target) co_return std::unexpected(target.error());
  NbdDiskOptions how;
  how.contexts = runtime.contexts();
  how.connections = remote.connections;
  how.reconnect_timeout_ns = remote.reconnect_timeout_ns;
  how.read_only = options.read_only;
  // Whoever copies writes every block once, and nobody else writes.
  how.replay_writes = true;
  co_return co_await open_nbd_disk(std::move(*target), std::move(how), runtime.stop());
}

}  // namespace roost::cli
