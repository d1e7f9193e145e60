// SPDX-License-Identifier: MIT
// roost_sim_test: runs the scenarios of the runtime in a simulation, with one seed after the other.
//
//   roost_sim_test [--seeds N] [--first S] [--seed S] [--scenario NAME] [--trace] [--list]
//                  [--expect-failure] [--fresh] [--stops-in-one-step]
//
// Every seed is run in two processes, which take the seeds in opposite order, and has to give the
// same hash of events: nothing of it may depend on where memory lies, on time or on the runs before
// it (run_memory.cc). With --fresh, each run of the second process has a process of its own, as a
// replay has. A failure names the scenario, the seed and the command that replays it.

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "aio/simulated_context.h"
#include "interruptible_stop.h"
#include "roost/coro/context.h"
#include "roost/coro/coroutine.h"
#include "scenario.h"

namespace roost::sim {
namespace {

constexpr int kSilenceS = 60;                        // of a process, after which it hangs
constexpr std::uint64_t kCountersCheckedFrom = 500;  // seeds

struct Options {
  std::uint64_t first = 1;
  std::uint64_t seeds = 100;
  std::string scenario;  // empty: all
  bool single = false;
  bool trace = false;
  bool list = false;
  bool expect_failure = false;
  bool fresh = false;
  bool stops_in_one_step = false;
  // For the processes it starts:
  bool child = false;
  bool downwards = false;
};

std::vector<Scenario> all_scenarios() {
  std::vector<Scenario> all;
  for (const auto& group :
       {runtime_scenarios(), lockfree_scenarios(), device_scenarios(), sync_scenarios(),
        wait_scenarios(), stop_scenarios(), structured_scenarios(), pool_scenarios(),
        nbd_scenarios(), crash_scenarios()}) {
    all.insert(all.end(), group.begin(), group.end());
  }
  return all;
}

// ---- One run

Simulation* running = nullptr;
std::optional<Simulation::Undisturbed> kept_turn;

constexpr InterruptHooks kHooks{
    // Atomic operations are many; a few of them are interrupted.
    .interrupt =
        []() noexcept {
          if (running->random().one_in(8)) running->interrupt();
        },
    .stall =
        []() noexcept {
          SimulatedThread* const thread = this_thread().simulated;
          if (!thread || !running->random().one_in(8)) return;
          // As one that loses its CPU for long: it does not wait for anything.
          const std::int64_t until = running->now_ns() + running->random().between(0, 100'000);
          thread->stalled_until_ns = until;
          while (running->now_ns() < until) running->interrupt();
        },
    .keep_turn =
        [](bool begins) noexcept {
          if (begins) {
            kept_turn.emplace(*running);
          } else {
            kept_turn.reset();
          }
        },
    .let_others_run =
        []() noexcept {
          if (this_thread().simulated) {
            running->relax();
          } else {
            running->turn();
          }
        },
    .wait_until = [](const char* what,
                     const bool& over) noexcept { running->block(what, [&over] { return over; }); },
    .current_thread = []() noexcept -> const void* { return this_thread().simulated; },
    .start_thread =
        [](std::function<void()> body) { running->add_thread("worker", std::move(body)); },
    .call_after = [](std::int64_t delay_ns,
                     std::function<void()> action) { running->after(delay_ns, std::move(action)); },
};

struct Ran {
  std::uint64_t hash;
  std::uint64_t events;
  std::int64_t time_ns;
};

Task<void> nothing() { co_return; }

// A context that goes looks at all control blocks that were ever made, and they are made by the
// batch. So each process has one from the start, whatever runs first.
void make_control_blocks() {
  Simulation simulation({.seed = 1});
  const auto context = simulation.make_context("first");
  simulation.spawn(*context, nothing(), "first");
}

Ran run(const Scenario& scenario, std::uint64_t seed, bool trace, Counters& counters) {
  SimulationOptions options{.seed = seed};
  if (trace) {
    options.trace = [](std::string_view line) {
      std::printf("%.*s\n", static_cast<int>(line.size()), line.data());
    };
  }
  Simulation simulation(options);
  running = &simulation;
  interrupt_hooks = kHooks;
  stop_callbacks_awaited = 0;
  {
    SimulatedMachine machine(simulation);
    scenario.run(simulation, machine, counters);
  }
  interrupt_hooks = {};
  simulation.run();
  return {simulation.hash(), simulation.events(), simulation.now_ns()};
}

// A line for each run, before and after: whoever reads them knows what was running when it ends.
void run_and_tell(const Scenario& scenario, std::uint64_t seed, bool trace) {
  std::printf("begin %s %lu\n", scenario.name, seed);
  std::fflush(stdout);
  Counters counters(scenario.counters);
  const Ran ran = run(scenario, seed, trace, counters);
  std::printf("end %s %lu %016lx %lu\n", scenario.name, seed, ran.hash, ran.events);
  for (const auto& [name, value] : counters.values()) {
    std::printf("count %s.%s %lu\n", scenario.name, name.c_str(), value);
  }
  std::fflush(stdout);
}

// A run as a replay has it, in a process of its own. False: it failed.
bool run_in_fresh_process(const Scenario& scenario, std::uint64_t seed, bool trace) {
  const pid_t pid = ::fork();
  if (pid < 0) return false;
  if (pid == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // one that hangs goes with the process that began it
    run_and_tell(scenario, seed, trace);
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  if (WIFSIGNALED(status)) {
    // End as it ended.
    ::signal(WTERMSIG(status), SIG_DFL);
    ::raise(WTERMSIG(status));
  }
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int run_as_child(const Options& options) {
  const auto scenarios = all_scenarios();
  for (std::uint64_t i = 0; i < options.seeds; ++i) {
    const std::uint64_t seed = options.first + (options.downwards ? options.seeds - 1 - i : i);
    for (const Scenario& scenario : scenarios) {
      if (!options.scenario.empty() && options.scenario != scenario.name) continue;
      if (!options.fresh) {
        run_and_tell(scenario, seed, options.trace);
      } else if (!run_in_fresh_process(scenario, seed, options.trace)) {
        return 1;
      }
    }
  }
  return 0;
}

// ---- Two processes

using Run = std::pair<std::string, std::uint64_t>;

struct Child {
  pid_t pid = -1;
  int out = -1;
  std::string errors_path;
  std::string rest;  // of what was read: an incomplete line
  std::optional<Run> current;
  std::map<Run, std::string> hashes;
  std::map<std::string, std::uint64_t> counters;
  std::uint64_t events = 0;
  std::time_t last_heard = 0;
  std::string failure;  // empty: none

  void line(std::string_view text) {
    std::array<char, 100> name{};
    std::array<char, 100> word{};
    std::uint64_t number = 0;
    std::uint64_t events_of_run = 0;
    const std::string copy(text);
    if (std::sscanf(copy.c_str(), "begin %99s %lu", name.data(), &number) == 2) {
      current = Run(name.data(), number);
    } else if (std::sscanf(copy.c_str(), "end %99s %lu %99s %lu", name.data(), &number, word.data(),
                           &events_of_run) == 4) {
      hashes[Run(name.data(), number)] = word.data();
      events += events_of_run;
      current.reset();
    } else if (std::sscanf(copy.c_str(), "count %99s %lu", name.data(), &number) == 2) {
      counters[name.data()] += number;
    }
  }

  void read_some() {
    std::array<char, 65536> buffer;
    const ssize_t n = ::read(out, buffer.data(), buffer.size());
    if (n <= 0) {
      ::close(out);
      out = -1;
      return;
    }
    last_heard = std::time(nullptr);
    rest.append(buffer.data(), static_cast<std::size_t>(n));
    std::size_t begin = 0;
    for (std::size_t end; (end = rest.find('\n', begin)) != std::string::npos; begin = end + 1) {
      line(std::string_view(rest).substr(begin, end - begin));
    }
    rest.erase(0, begin);
  }

  void reap() {
    int status = 0;
    ::waitpid(pid, &status, 0);
    if (WIFSIGNALED(status)) {
      if (failure.empty()) failure = fmt::format("died of signal {}", WTERMSIG(status));
    } else if (WEXITSTATUS(status) != 0) {
      failure = fmt::format("ended with status {}", WEXITSTATUS(status));
    }
  }
};

std::string self_path() {
  std::array<char, 4096> path{};
  const ssize_t n = ::readlink("/proc/self/exe", path.data(), path.size() - 1);
  return n > 0 ? std::string(path.data(), static_cast<std::size_t>(n)) : "roost_sim_test";
}

Child start_child(const Options& options, bool downwards) {
  Child child;
  std::array<char, 64> errors{"/tmp/roost_sim_test.XXXXXX"};
  const int errors_fd = ::mkstemp(errors.data());
  child.errors_path = errors.data();
  std::array<int, 2> pipe{};
  if (errors_fd < 0 || ::pipe2(pipe.data(), O_CLOEXEC) < 0) {
    std::perror("roost_sim_test");
    std::exit(2);
  }
  std::vector<std::string> words{self_path(), "--child",
                                 "--first",   std::to_string(options.first),
                                 "--seeds",   std::to_string(options.seeds)};
  if (!options.scenario.empty()) words.insert(words.end(), {"--scenario", options.scenario});
  if (options.stops_in_one_step) words.emplace_back("--stops-in-one-step");
  if (downwards) words.emplace_back("--downwards");
  if (downwards && options.fresh) words.emplace_back("--fresh");
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  child.pid = ::fork();
  if (child.pid == 0) {
    ::dup2(pipe[1], STDOUT_FILENO);
    ::dup2(errors_fd, STDERR_FILENO);
    ::execv(arguments[0], arguments.data());
    ::_exit(127);
  }
  ::close(pipe[1]);
  ::close(errors_fd);
  child.out = pipe[0];
  child.last_heard = std::time(nullptr);
  return child;
}

void print_file(const std::string& path) {
  if (std::FILE* file = std::fopen(path.c_str(), "r")) {
    std::array<char, 4096> buffer;
    for (std::size_t n; (n = std::fread(buffer.data(), 1, buffer.size(), file)) > 0;) {
      std::fwrite(buffer.data(), 1, n, stdout);
    }
    std::fclose(file);
  }
}

// Prints what is wrong with that run, and how to have it again.
void report(const Run& failed, std::string_view why) {
  std::printf(
      "FAILED: scenario %s, seed %lu: %.*s\n  replay: %s --scenario %s --seed %lu --trace\n",
      failed.first.c_str(), failed.second, static_cast<int>(why.size()), why.data(),
      self_path().c_str(), failed.first.c_str(), failed.second);
}

int run_in_two_processes(const Options& options) {
  std::printf("seeds %lu to %lu\n", options.first, options.first + options.seeds - 1);
  std::fflush(stdout);
  std::array<Child, 2> children{start_child(options, false), start_child(options, true)};
  while (children[0].out >= 0 || children[1].out >= 0) {
    std::array<pollfd, 2> fds{pollfd{children[0].out, POLLIN, 0}, {children[1].out, POLLIN, 0}};
    ::poll(fds.data(), fds.size(), 1000);
    for (std::size_t i = 0; i < children.size(); ++i) {
      Child& child = children[i];
      if (fds[i].revents) child.read_some();
      if (child.out >= 0 && std::time(nullptr) - child.last_heard > kSilenceS) {
        child.failure = fmt::format("hangs for {} s", kSilenceS);
        ::kill(child.pid, SIGKILL);
      }
    }
  }
  int failures = 0;
  for (Child& child : children) {
    child.reap();
    if (!child.failure.empty()) {
      ++failures;
      print_file(child.errors_path);
      report(child.current.value_or(Run("none", 0)), child.failure);
    }
    ::unlink(child.errors_path.c_str());
  }
  std::size_t compared = 0;
  for (const auto& [run, hash] : children[0].hashes) {
    const auto other = children[1].hashes.find(run);
    if (other == children[1].hashes.end()) continue;
    ++compared;
    if (other->second == hash) continue;
    if (++failures <= 10) report(run, "two processes had different events");
  }
  std::printf("%zu runs, each twice, %lu events each time\n", compared, children[0].events);
  for (const auto& [name, value] : children[0].counters) {
    std::printf("  %-45s %lu\n", name.c_str(), value);
    // A fault that is to be found is not found by this.
    if (value == 0 && failures == 0 && options.seeds >= kCountersCheckedFrom &&
        !options.stops_in_one_step && !options.expect_failure) {
      std::printf("FAILED: no seed reached %s\n", name.c_str());
      ++failures;
    }
  }
  if (compared == 0 && failures == 0) {
    std::printf("FAILED: nothing was run\n");
    ++failures;
  }
  if (options.expect_failure) {
    std::printf(failures ? "The fault was found, as expected.\n"
                         : "FAILED: the fault was not found within these seeds.\n");
    return failures ? 0 : 1;
  }
  return failures ? 1 : 0;
}

// ---- One seed, in this process

int replay(const Options& options) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // whatever ends it
  for (const Scenario& scenario : all_scenarios()) {
    if (!options.scenario.empty() && options.scenario != scenario.name) continue;
    std::printf("scenario %s, seed %lu\n", scenario.name, options.first);
    std::fflush(stdout);
    Counters counters(scenario.counters);
    const Ran ran = run(scenario, options.first, options.trace, counters);
    std::printf("hash %016lx, %lu events, %ld ns\n", ran.hash, ran.events,
                static_cast<long>(ran.time_ns));
  }
  return 0;
}

// A number, or a text (a commit's name) that becomes one.
std::uint64_t to_seed(const char* text) {
  std::uint64_t number = 0;
  const char* const end = text + std::strlen(text);
  if (const auto [rest, error] = std::from_chars(text, end, number);
      error == std::errc() && rest == end) {
    return number;
  }
  for (const char* c = text; c != end; ++c)
    number = Random::mix(number + static_cast<unsigned char>(*c));
  return number % 1'000'000'000;  // readable
}

[[noreturn]] void usage() {
  std::fprintf(stderr,
               "usage: roost_sim_test [--seeds N] [--first S] [--seed S] [--scenario NAME]\n"
               "                      [--trace] [--list] [--expect-failure] [--fresh]\n"
               "                      [--stops-in-one-step]\n"
               "S is a number, or any text (a commit) that is made into one.\n");
  std::exit(2);
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    const auto value = [&]() -> const char* { return ++i < argc ? argv[i] : (usage(), ""); };
    if (word == "--seeds") {
      options.seeds = std::strtoull(value(), nullptr, 10);
    } else if (word == "--first") {
      options.first = to_seed(value());
    } else if (word == "--seed") {
      options.first = to_seed(value());
      options.single = true;
    } else if (word == "--scenario") {
      options.scenario = value();
    } else if (word == "--trace") {
      options.trace = true;
    } else if (word == "--list") {
      options.list = true;
    } else if (word == "--expect-failure") {
      options.expect_failure = true;
    } else if (word == "--fresh") {
      options.fresh = true;
    } else if (word == "--stops-in-one-step") {
      options.stops_in_one_step = true;
    } else if (word == "--child") {
      options.child = true;
    } else if (word == "--downwards") {
      options.downwards = true;
    } else {
      usage();
    }
  }
  return options;
}

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  if (options.list) {
    for (const Scenario& scenario : all_scenarios()) {
      std::printf("%-20s %s\n", scenario.name, scenario.what);
    }
    return 0;
  }
  stops_in_one_step = options.stops_in_one_step;
  make_control_blocks();
  if (options.child) return run_as_child(options);
  if (options.single) return replay(options);
  return run_in_two_processes(options);
}

}  // namespace
}  // namespace roost::sim

int main(int argc, char** argv) { return roost::sim::main(argc, argv); }
