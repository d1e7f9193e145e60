// SPDX-License-Identifier: MIT
#include "roost/io/command_channel.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

#include "roost/base/check.h"

namespace roost {

namespace {

// What posix_spawn(3) is told. Its functions fail for want of memory only.
class SpawnSettings {
 public:
  SpawnSettings(int input, int output) {
    ::posix_spawn_file_actions_init(&actions_);
    ::posix_spawn_file_actions_adddup2(&actions_, input, STDIN_FILENO);
    ::posix_spawn_file_actions_adddup2(&actions_, output, STDOUT_FILENO);
    ::posix_spawn_file_actions_addclosefrom_np(&actions_, STDERR_FILENO + 1);
    ::posix_spawnattr_init(&attributes_);
    sigset_t set;
    ::sigemptyset(&set);
    ::posix_spawnattr_setsigmask(&attributes_, &set);
    ::sigaddset(&set, SIGPIPE);
    ::posix_spawnattr_setsigdefault(&attributes_, &set);
    ::posix_spawnattr_setflags(&attributes_, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  }
  SpawnSettings(const SpawnSettings&) = delete;
  SpawnSettings& operator=(const SpawnSettings&) = delete;
  ~SpawnSettings() {
    ::posix_spawnattr_destroy(&attributes_);
    ::posix_spawn_file_actions_destroy(&actions_);
  }

  const posix_spawn_file_actions_t* actions() const noexcept { return &actions_; }
  const posix_spawnattr_t* attributes() const noexcept { return &attributes_; }

 private:
  posix_spawn_file_actions_t actions_;
  posix_spawnattr_t attributes_;
};

}  // namespace

CommandChannel::CommandChannel(UniqueFd output, UniqueFd input, std::string name, pid_t pid,
                               UniqueFd pid_fd)
    : PipeChannel(std::move(output), std::move(input), std::move(name)),
      pid_(pid),
      pid_fd_(std::move(pid_fd)) {}

Result<std::unique_ptr<CommandChannel>> CommandChannel::start(
    const std::vector<std::string>& argv) {
  ROOST_CHECK(!argv.empty(), "a command without a name");
  const std::string what = "start " + argv.front();
  int to_child[2];
  int from_child[2];
  if (::pipe2(to_child, O_CLOEXEC) < 0) return fail(errno, what);
  UniqueFd child_input(to_child[0]);
  UniqueFd input(to_child[1]);
  if (::pipe2(from_child, O_CLOEXEC) < 0) return fail(errno, what);
  UniqueFd output(from_child[0]);
  UniqueFd child_output(from_child[1]);

  std::vector<char*> arguments;
  for (const std::string& one : argv) arguments.push_back(const_cast<char*>(one.c_str()));
  arguments.push_back(nullptr);
  const SpawnSettings settings(child_input.get(), child_output.get());
  pid_t pid = 0;
  const int error = ::posix_spawnp(&pid, arguments[0], settings.actions(), settings.attributes(),
                                   arguments.data(), environ);
  if (error != 0) return fail(error, what);
  // Ours and not reaped, so the number is still its.
  UniqueFd pid_fd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  if (!pid_fd) {
    const int why = errno;
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
    return fail(why, what);
  }
  return std::unique_ptr<CommandChannel>(new CommandChannel(
      std::move(output), std::move(input),
      "command " + argv.front() + " (pid " + std::to_string(pid) + ")", pid, std::move(pid_fd)));
}

CommandChannel::~CommandChannel() {
  if (reaped_) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
}

void CommandChannel::kill(int signal) noexcept {
  if (!reaped_) ::kill(pid_, signal);
}

Task<Result<int>> CommandChannel::wait(std::stop_token stop) {
  while (!reaped_) {
    const std::int64_t ready = co_await io_poll(pid_fd_.get(), POLLIN, stop);
    if (ready == -ECANCELED) co_return cancelled("wait for", "it runs");
    if (ready == -EINTR) continue;
    if (ready < 0) co_return failure("wait for", static_cast<int>(-ready));
    const pid_t ended = ::waitpid(pid_, &status_, WNOHANG);
    if (ended < 0 && errno != EINTR) co_return failure("wait for", errno);
    reaped_ = ended == pid_;
  }
  co_return status_;
}

}  // namespace roost
