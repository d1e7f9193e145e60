// SPDX-License-Identifier: MIT
// CommandChannel: a child process; what is written goes to its standard input, and what it writes
// to its standard output is read. Its standard error is this process's.
//
// Threads and lifetime: as every Channel; wait() in a coroutine, one at a time, and not after the
// channel was moved meanwhile. A child that still runs when the channel goes is killed, and reaped.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "roost/io/pipe_channel.h"

namespace roost {

/// A running command.
class CommandChannel : public PipeChannel {
 public:
  /// Starts `argv`, whose first is looked for in PATH, with this process's environment. Signals are
  /// as a new process expects them; no other descriptor is inherited.
  static Result<std::unique_ptr<CommandChannel>> start(const std::vector<std::string>& argv);

  ~CommandChannel() override;

  pid_t pid() const noexcept { return pid_; }

  /// Sends a signal; nothing if it has ended.
  void kill(int signal) noexcept;

  /// Waits for its end, and gives its status as waitpid(2) does. It should be told first, by the
  /// end of its input.
  Task<Result<int>> wait(std::stop_token stop = {});

 private:
  CommandChannel(UniqueFd output, UniqueFd input, std::string name, pid_t pid, UniqueFd pid_fd);

  const pid_t pid_;
  const UniqueFd pid_fd_;
  bool reaped_ = false;
  int status_ = 0;
};

}  // namespace roost
