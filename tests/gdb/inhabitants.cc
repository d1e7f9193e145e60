// SPDX-License-Identifier: MIT
// A program whose coroutines are known, for check.py to look at from outside. Lines that an await
// chain names are marked "at:".
//
//   inhabitants crash    aborts in a coroutine, others being in every state
//   inhabitants wait     as above, but says "ready" and waits there until its input ends
//   inhabitants empty    aborts after its only coroutine has ended
//   inhabitants many     aborts with a thousand, made among others that are gone
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <string>
#include <string_view>

#include "roost/aio/census_report.h"
#include "roost/aio/iothread.h"
#include "roost/aio/timer.h"
#include "roost/coro/completion.h"
#include "roost/coro/task.h"
#include "roost/sync/co_event.h"
#include "roost/sync/co_mutex.h"

using roost::AioContext;
using roost::Coroutine;
using roost::Task;

namespace {

Task<void> innermost() {
  co_await roost::yield();  // at: innermost
}

Task<int> middle(int depth) {
  co_await innermost();  // at: middle
  co_return depth;
}

Task<void> outermost() {
  [[maybe_unused]] const int depth = co_await middle(3);  // at: outermost
}

Task<void> hold(roost::CoMutex& ledger, roost::Completion<int>& answer) {
  auto guard = co_await ledger.lock();
  co_await answer.wait();  // at: hold
}

Task<void> contend(roost::CoMutex& ledger) {
  auto guard = co_await ledger.lock();  // at: contend
}

Task<void> sleep_long() {
  co_await roost::sleep_for(3'600'000'000'000);  // at: sleep
}

Task<void> await_event(roost::CoEvent& event) {
  co_await event.wait();  // at: event
}

Task<void> nothing() { co_return; }

// Not inlined, so that it has a frame of its own.
[[gnu::noinline]] void stop_here(bool crash) {
  if (crash) std::abort();
  fmt::print("ready\n");
  std::fflush(stdout);
  char byte;
  while (::read(STDIN_FILENO, &byte, 1) > 0) {
  }
  std::_Exit(0);
}

Task<void> stop(bool crash) {
  stop_here(crash);
  co_return;
}

Task<void> work(Coroutine& next, bool crash) {
  roost::co_wake(next);
  co_await stop(crash);  // at: work
}

// Until the thread is in the system call in which it waits for work: it has nothing else to do.
void wait_until_asleep(pid_t thread) {
  const std::string name = fmt::format("/proc/self/task/{}/stat", thread);
  char state = 0;
  while (state != 'S') {
    char text[512];
    const int fd = ::open(name.c_str(), O_RDONLY | O_CLOEXEC);
    const ssize_t size = fd < 0 ? -1 : ::read(fd, text, sizeof text);
    if (size <= 0) std::exit(2);
    ::close(fd);
    const std::string_view stat(text, static_cast<std::size_t>(size));
    state = stat.at(stat.rfind(')') + 2);
  }
}

std::shared_ptr<AioContext> make_context(const char* name) {
  roost::AioContextOptions options;
  options.name = name;
  options.poll_max_ns = 0;
  return AioContext::create(options);
}

int inhabited(bool crash) {
  roost::AioContextOptions options;
  options.name = "worker";
  options.poll_max_ns = 0;
  roost::IOThread worker(options);
  roost::CoMutex ledger("the ledger");
  roost::Completion<int> answer("the answer");
  const auto token = answer.token();
  // How long something has lasted is known once the loop has looked at its clock.
  while (worker.context().run([&worker] { return worker.context().tick(); }) == 0) {
  }
  spawn(worker.context(), outermost(), "deep");
  spawn(worker.context(), hold(ledger, answer), "holder");
  spawn(worker.context(), contend(ledger), "contender");
  spawn(worker.context(), sleep_long(), "sleeper");
  // Entries of one thread keep their order.
  const pid_t thread = worker.context().run([] { return ::gettid(); });

  const auto main_loop = make_context("main loop");
  roost::ContextScope scope(*main_loop);
  // What the program itself says about those.
  fmt::print("{}end of census\n", to_text(roost::take_census(60'000'000'000)));
  std::fflush(stdout);

  const auto parked = make_context("parked");
  roost::CoEvent event;
  Coroutine* moved = nullptr;
  {
    roost::ContextScope there(*parked);
    Coroutine::create(await_event(event), "notified")->enter();
    moved = Coroutine::create(outermost(), "moved");
    moved->enter();
  }
  event.set();
  spawn(*parked, nothing(), "queued");
  co_schedule(*parked, *moved);
  Coroutine::create(outermost(), "fresh");

  Coroutine* const listed = Coroutine::create(innermost(), "listed");
  listed->enter();
  wait_until_asleep(thread);
  Coroutine::create(work(*listed, crash), "busy")->enter();
  return 2;
}

int empty() {
  const auto main_loop = make_context("main loop");
  roost::ContextScope scope(*main_loop);
  Coroutine::create(nothing(), "gone")->enter();
  std::abort();
}

int many() {
  const auto main_loop = make_context("main loop");
  roost::ContextScope scope(*main_loop);
  for (int i = 0; i < 2000; ++i) {
    Coroutine* const co = Coroutine::create(nothing(), "one of many");
    if (i % 2 == 0) co->enter();
  }
  std::abort();
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view mode = argc == 2 ? argv[1] : "";
  if (mode == "empty") return empty();
  if (mode == "many") return many();
  if (mode == "crash" || mode == "wait") return inhabited(mode == "crash");
  return 2;
}
