// SPDX-License-Identifier: MIT
#include "roost/aio/simulation.h"

#include <fmt/format.h>
#include <sys/socket.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "aio/simulated_context.h"
#include "roost/base/check.h"

namespace roost {

namespace {

// No descriptor of a process has such a number.
constexpr int kFirstFd = 1'000'000'000;

constexpr std::int64_t kMaxTurnNs = 2'000;     // what a turn costs
constexpr std::int64_t kMaxStallNs = 300'000;  // how long a thread may lose its CPU
constexpr std::int64_t kMaxPoolDelayNs = 100'000;

// How often a loop that waits for another thread looks although nothing seems to have happened:
// before time passes, and before it is given up where no time can pass.
constexpr unsigned kIdleLooks = 3;
constexpr unsigned kMaxIdleLooks = 10'000;

// How the threads of one run are scheduled; each seed draws one of each.
constexpr unsigned kStayOneIn[] = {0, 2, 1};      // fair, or with long turns for some
constexpr unsigned kStallOneIn[] = {0, 50, 400};  // never, often, seldom

}  // namespace

std::int64_t Simulation::VirtualClock::now_ns() const noexcept {
  simulation_.interrupt();
  return simulation_.now_ns_;
}

Simulation::Simulation(SimulationOptions options)
    : options_(std::move(options)), random_(options_.seed), next_fd_(kFirstFd) {
  stay_one_in_ = kStayOneIn[random_.below(std::size(kStayOneIn))];
  stall_one_in_ = kStallOneIn[random_.below(std::size(kStallOneIn))];
}

Simulation::~Simulation() {
  for (const auto& context : contexts_) {
    ROOST_CHECK(!context->context, "context '{}' outlives its simulation", context->name);
  }
  for (const auto& thread : threads_) {
    ROOST_CHECK(thread->fiber.ended(), "the simulation ends before its thread '{}'", thread->name);
  }
}

// ---- Who runs

SimulatedThread& Simulation::start_thread(std::string name, std::function<void()> body) {
  const std::size_t number = threads_.size();
  auto run = [this, number, body = std::move(body)] {
    this_thread().simulated = threads_[number].get();
    body();
  };
  return *threads_.emplace_back(
      std::make_unique<SimulatedThread>(*this, std::move(name), std::move(run)));
}

void Simulation::add_thread(std::string name, std::function<void()> body) {
  start_thread(std::move(name), std::move(body));
}

std::shared_ptr<AioContext> Simulation::make_context(std::string name) {
  auto& simulated = *contexts_.emplace_back(std::make_unique<SimulatedContext>(*this, name));
  AioContextOptions options;
  options.name = name;
  options.poll_max_ns = 0;
  options.clock = &clock_;
  options.provider = &simulated;
  auto context = AioContext::create(std::move(options));
  AioContext* const raw = context.get();
  simulated.context = raw;
  simulated.thread = &start_thread(std::move(name), [this, &simulated] { serve(simulated); });
  return {raw, [this, &simulated, last = std::move(context)](AioContext*) mutable {
            retire(simulated, std::move(last));
          }};
}

// What the thread of a context does.
void Simulation::serve(SimulatedContext& simulated) {
  AioContext& context = *simulated.context;
  // As one that polls by hand, or as an IOThread, which makes its context current once and keeps
  // the context lock from one iteration to the next.
  std::optional<ContextScope> scope;
  if (random_.one_in(2)) {
    scope.emplace(context);
    if (random_.one_in(2)) context.poll_until(simulated.stop.reached);
  }
  while (!simulated.stop.reached) {
    const bool blocking = random_.below(8) != 0;
    record("poll", simulated.name, blocking, 0);
    if (context.poll(blocking)) record("progress", simulated.name, 0, 0);
    if (random_.one_in(2)) give_turn(*current_);
  }
  context.release_back_end();
}

void Simulation::retire(SimulatedContext& simulated, std::shared_ptr<AioContext> last) {
  ROOST_CHECK(current_ != simulated.thread, "context '{}' is destroyed on its own thread",
              simulated.name);
  [[maybe_unused]] const bool open = last->post(simulated.stop);
  const std::function<bool()> ended = [&] { return simulated.thread->fiber.ended(); };
  wait("the end of a context's thread", ended, kNever);
  last.reset();
}

Task<void> Simulation::remember(Task<void> body, std::size_t number) {
  co_await std::move(body);
  spawned_.erase(number);
}

Coroutine* Simulation::spawn(AioContext& context, Task<void> task, const char* name) {
  const std::size_t number = next_spawned_++;
  Coroutine* co = Coroutine::create(remember(std::move(task), number), name);
  spawned_[number] = co;
  co_schedule(context, *co);
  return co;
}

void Simulation::at(std::int64_t time_ns, std::function<void()> action) {
  add_event(time_ns, "action", std::move(action));
}

void Simulation::submit(ThreadPool::Work& work) {
  add_event(now_ns_ + random_.between(0, kMaxPoolDelayNs), "pool", [w = &work] { w->run(*w); });
}

// ---- Time

void Simulation::add_event(std::int64_t time_ns, const char* what, std::function<void()> action) {
  const EventKey key{std::max(time_ns, now_ns_), random_.next()};
  const bool added = events_to_come_.try_emplace(key, what, std::move(action)).second;
  ROOST_CHECK(added, "two events of a simulation drew the same place");
}

void Simulation::run_due_events() {
  while (!events_to_come_.empty() && events_to_come_.begin()->first.first <= now_ns_) {
    Event event = std::move(events_to_come_.extract(events_to_come_.begin()).mapped());
    ++activity_;
    record(event.what, "", 0, 0);
    event.action();
  }
}

// To the next moment at which something happens or somebody may go on. False: there is none.
bool Simulation::pass_time() {
  std::int64_t next = kNever;
  if (!events_to_come_.empty()) next = events_to_come_.begin()->first.first;
  for (const auto& thread : threads_) {
    if (thread->fiber.ended()) continue;
    if (thread->done) {
      const std::int64_t wake_at = (*thread->done)() ? now_ns_ : thread->wake_at_ns;
      if (wake_at != kNever) next = std::min(next, std::max(wake_at, thread->stalled_until_ns));
    } else if (thread->stalled_until_ns > now_ns_) {
      next = std::min(next, thread->stalled_until_ns);
    }
  }
  if (next == kNever) return false;
  now_ns_ = std::max(now_ns_, next);
  return true;
}

// ---- Turns

// Who gets the next turn; null: nobody could do anything now.
SimulatedThread* Simulation::choose() {
  std::vector<SimulatedThread*> choices;
  for (const auto& thread : threads_) {
    if (thread->fiber.ended() || thread->stalled_until_ns > now_ns_) continue;
    if (thread->done && thread->wake_at_ns > now_ns_ && !(*thread->done)()) continue;
    if (thread->relaxing && thread->activity_seen == activity_ &&
        thread->idle_looks >= looks_allowed_) {
      continue;
    }
    choices.push_back(thread.get());
  }
  if (choices.empty()) return nullptr;
  const bool stay = random_.below(8) != 0 && random_.one_in(stay_one_in_);
  if (stay && std::ranges::find(choices, last_) != choices.end()) return last_;
  return choices[random_.below(choices.size())];
}

bool Simulation::take_turn() {
  run_due_events();
  SimulatedThread* const thread = choose();
  if (!thread) return false;
  ++turns_;
  now_ns_ += random_.between(0, kMaxTurnNs);
  record("turn", thread->name, 0, 0);
  if (std::exchange(thread->activity_seen, activity_) != activity_) thread->idle_looks = 0;
  thread->done = nullptr;
  thread->wake_at_ns = kNever;
  current_ = last_ = thread;
  thread->fiber.resume();
  current_ = nullptr;
  if (thread->relaxing) {
    ++thread->idle_looks;
  } else {
    ++activity_;
  }
  if (random_.one_in(stall_one_in_)) {
    thread->stalled_until_ns = now_ns_ + random_.between(0, kMaxStallNs);
  }
  return true;
}

bool Simulation::turn() {
  ROOST_CHECK(!current_, "thread '{}' of a simulation drives it", current_->name);
  do {
    if (take_turn()) return true;
  } while (pass_time());
  // Threads that look for something in a loop may be waiting for each other's stores, which nobody
  // else sees.
  looks_allowed_ = kMaxIdleLooks;
  const bool taken = take_turn();
  looks_allowed_ = kIdleLooks;
  return taken;
}

void Simulation::run_until(const std::function<bool()>& done) {
  for (const std::uint64_t end = turns_ + options_.max_turns; !done();) {
    // Its last event may have been what was waited for.
    if (!turn() && !done()) give_up("nothing can happen any more");
    if (turns_ > end) give_up("it does not come to an end");
  }
}

void Simulation::run() {
  for (const std::uint64_t end = turns_ + options_.max_turns; turn();) {
    if (turns_ > end) give_up("it does not come to an end");
  }
}

void Simulation::give_turn(SimulatedThread& thread) {
  ROOST_CHECK(undisturbed_ == 0, "thread '{}' of a simulation waits where nobody else may run",
              thread.name);
  thread.fiber.pause();
}

void Simulation::interrupt() {
  if (current_ && undisturbed_ == 0 && random_.one_in(options_.interrupt_one_in)) {
    give_turn(*current_);
  }
}

void Simulation::relax() {
  ROOST_CHECK(current_, "relax() is for simulated threads");
  SimulatedThread& thread = *current_;
  thread.relaxing = true;
  give_turn(thread);
  thread.relaxing = false;
}

void Simulation::block(const char* what, const std::function<bool()>& done) {
  wait(what, done, kNever);
}

void Simulation::wait(const char* what, const std::function<bool()>& done, std::int64_t until_ns) {
  if (!current_) {
    run_until([&] { return done() || now_ns_ >= until_ns; });
    return;
  }
  SimulatedThread& thread = *current_;
  thread.waits_for = what;
  while (!done() && now_ns_ < until_ns) {
    thread.done = &done;
    thread.wake_at_ns = until_ns;
    give_turn(thread);
  }
  thread.waits_for = nullptr;
}

// ---- Events

void Simulation::record(std::string_view what, std::string_view who, std::uint64_t a,
                        std::uint64_t b) {
  ++events_;
  const auto add = [this](std::uint64_t word) { hash_ = Random::mix(hash_ * 31 + word); };
  const auto add_text = [&add](std::string_view text) {
    std::uint64_t h = text.size();
    for (const char c : text) h = h * 131 + static_cast<unsigned char>(c);
    add(h);
  };
  add(static_cast<std::uint64_t>(now_ns_));
  add_text(what);
  add_text(who);
  add(a);
  add(b);
  if (options_.trace) {
    options_.trace(fmt::format("{:>12} {:>12} {} {} {}", now_ns_, who, what,
                               static_cast<std::int64_t>(a), static_cast<std::int64_t>(b)));
  }
}

void Simulation::note(std::string_view what, std::uint64_t a, std::uint64_t b) {
  record(what, current_ ? std::string_view(current_->name) : "", a, b);
}

std::string Simulation::report() const {
  std::string text = fmt::format("simulation, seed {}: {} ns, {} turns, {} events to come\n",
                                 options_.seed, now_ns_, turns_, events_to_come_.size());
  for (const auto& thread : threads_) {
    if (thread->fiber.ended()) continue;
    const char* const what = thread->waits_for;
    text += fmt::format("  thread '{}': {}{}", thread->name,
                        what               ? "waits for "
                        : thread->relaxing ? "waits in a loop"
                                           : "runs",
                        what ? what : "");
    if (thread->wake_at_ns != kNever) text += fmt::format(", until {} ns", thread->wake_at_ns);
    text += '\n';
  }
  for (const auto& [number, co] : spawned_) {
    const CoContext* home = co->home();
    const char* const what = co->waits_for();
    text += fmt::format("  coroutine '{}': {}{}{}, home '{}'\n", co->name(), to_string(co->state()),
                        what ? " for " : "", what ? what : "",
                        home ? std::string_view(home->name()) : "none");
  }
  for (const auto& [fd, device] : devices_) {
    if (const std::string waiting = device->in_flight(); !waiting.empty()) {
      text += fmt::format("  {} {}: {}\n", device->kind(), fd, waiting);
    }
  }
  return text;
}

void Simulation::give_up(std::string_view why) const { panicf("{}\n{}", why, report()); }

// ---- Devices

SimulatedDevice& Simulation::device(int fd, const char* what) const {
  const auto found = devices_.find(fd);
  ROOST_CHECK(found != devices_.end(),
              "{} of a simulated context is on descriptor {}, which is not the simulation's", what,
              fd);
  return *found->second;
}

std::pair<int, int> Simulation::make_channel(const SimulatedChannelOptions& options) {
  const int first = next_fd_++;
  const int second = next_fd_++;
  auto [a, b] = make_simulated_channel(*this, first, options);
  devices_[first] = std::move(a);
  devices_[second] = std::move(b);
  return {first, second};
}

int Simulation::make_disk(std::size_t size, const SimulatedDiskOptions& options) {
  const int fd = next_fd_++;
  devices_[fd] = make_simulated_disk(*this, fd, size, options);
  return fd;
}

void Simulation::close(int fd) {
  device(fd, "close()").close();
  devices_.erase(fd);
}

void Simulation::shut_down(int fd) { shut_down_simulated_channel(device(fd, "shut_down()")); }

void Simulation::break_channel(int fd) { break_simulated_channel(device(fd, "break_channel()")); }

std::int64_t Simulation::receive_now(int fd, std::span<std::byte> buffer) {
  IoRequest request(IoRequest::Op::kRecv, fd);
  request.address = buffer.data();
  request.length = static_cast<std::uint32_t>(buffer.size());
  request.flags = MSG_DONTWAIT;
  device(fd, "receive_now()").try_now(request);
  return request.result;
}

void Simulation::crash_disk(int fd) { crash_simulated_disk(device(fd, "crash_disk()")); }

int Simulation::take_disk_over(int fd, bool power_lost) {
  const int next = next_fd_++;
  devices_[next] =
      take_over_simulated_disk(*this, next, device(fd, "take_disk_over()"), power_lost);
  return next;
}

void Simulation::fail_next(int fd, IoRequest::Op op, int error) {
  fail_next_on_simulated_disk(device(fd, "fail_next()"), op, error);
}

std::span<const std::byte> Simulation::disk_contents(int fd) const {
  return simulated_disk_contents(device(fd, "disk_contents()"));
}

}  // namespace roost
