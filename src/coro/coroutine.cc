// SPDX-License-Identifier: MIT
#include "roost/coro/coroutine.h"

#include <fmt/format.h>

#include <cstdlib>
#include <string>

#include "coro/trace_points.h"
#include "roost/base/check.h"
#include "roost/base/prefetch.h"
#include "roost/coro/census.h"
#include "roost/coro/task.h"

namespace roost {

namespace {

[[gnu::tls_model("initial-exec")]] thread_local constinit ThreadState thread_state;

// Coroutines that one driver loop resumes from its wake list before it gives the rest to the
// context's queue, so that two that wake each other for ever do not starve descriptors and timers.
constexpr unsigned kMaxWakesPerDrive = 64;

}  // namespace

ThreadState& this_thread() noexcept { return thread_state; }

void trace::tell_scheduled(const CoContext& to, const Coroutine& co) noexcept {
  to.trace()->scheduled(co, co.placed_at());
}

const char* to_string(CoState state) noexcept {
  switch (state) {
    case CoState::kIdle:
      return "idle";
    case CoState::kWaiting:
      return "waiting";
    case CoState::kRunning:
      return "running";
    case CoState::kScheduled:
      return "scheduled";
    case CoState::kListed:
      return "about to be woken";
    case CoState::kEnded:
      return "ended";
    case CoState::kInspected:
      return "being looked at";
  }
  return "in an unknown state";
}

// The schedule is won: from here to the post, the outstanding entry keeps the block alive although
// the coroutine may already be entered directly, and end, elsewhere.
inline void Coroutine::post_schedule(CoContext& context, ThreadState& thread,
                                     const StateWord<RealPlatform>::Schedule& schedule,
                                     Place place) noexcept {
  placed_at_.store(place, std::memory_order_relaxed);
  trace::schedule(context, *this);
  CoroutineEntry& entry = schedule.embedded ? entry_ : make_spare_entry();
  entry.generation = schedule.generation;
  if (thread.context == &context) {
    context.post_here(entry);
  } else {
    post_elsewhere(context, entry);
  }
}

CoroutineEntry& Coroutine::make_spare_entry() noexcept {
  return *::new (allocate_frame(sizeof(SpareEntry))) SpareEntry(*this);
}

void Coroutine::post_elsewhere(CoContext& context, CoroutineEntry& entry) noexcept {
  if (!context.post(entry)) [[unlikely]] {
    panicf("coroutine '{}' scheduled on the closed context '{}' by {}", name(), context.name(),
           describe(placed_at()));
  }
}

// The loop that runs coroutines; lives on the stack of whoever enters one.
struct Driver {
  explicit Driver(ThreadState& on) noexcept
      : thread(on), outer(on.driver), outer_self(on.self), context(on.context) {
    thread.driver = this;
  }
  ~Driver() {
    thread.driver = outer;
    thread.self = outer_self;
  }
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  void append(Coroutine& co) noexcept {
    co.link_ = nullptr;
    if (wake_tail) {
      wake_tail->link_ = &co;
    } else {
      wake_head = &co;
    }
    wake_tail = &co;
  }

  Coroutine* take_first() noexcept {
    Coroutine* co = wake_head;
    wake_head = co->link_;
    if (!wake_head) wake_tail = nullptr;
    return co;
  }

  using Turn = TraceTrack::Turn;

  // Runs `co`, whose state is running, and then those that it, and they in turn, woke.
  static void drive(Coroutine& co, ThreadState& thread, Turn why) noexcept {
    Driver driver(thread);
    trace::enter(driver.outer_self, co);
    driver.run(co, thread, why);
    if (driver.wake_head) driver.run_woken(thread);
  }

  // Apart, as all that not each turn has: what a turn needs stays in registers.
  [[gnu::noinline]] void run_woken(ThreadState& on) noexcept {
    for (unsigned woken = 0; wake_head; ++woken) {
      Coroutine& next = *take_first();
      if (woken < kMaxWakesPerDrive) {
        next.state_.claim_listed(context->index());
        trace::enter(nullptr, next);
        run(next, on, Turn::kScheduled);
      } else {
        const auto schedule = next.state_.reschedule_listed(context->index());
        const auto place = next.placed_at_.load(std::memory_order_relaxed);
        if (!schedule.won) next.misuse("wake", place, schedule.seen);
        next.post_schedule(*context, on, schedule, place);
      }
    }
  }

  // (The thread is passed on, since the compiler cannot know that it stays the same.)
  void run(Coroutine& co, ThreadState& on, Turn why) noexcept {
    if (context->trace()) [[unlikely]] {
      run_traced(*context, co, on, why);
    } else {
      resume(co, on, context);
      settle(co, on);
    }
  }

  // One look decides for the whole turn.
  [[gnu::noinline, gnu::cold]] static void run_traced(CoContext& at, Coroutine& co, ThreadState& on,
                                                      Turn why) noexcept {
    TraceTrack& track = *at.trace();
    track.turn_begins(co, why);
    resume(co, on, &at);
    // What the suspension publishes belongs to the turn, but the coroutine may be gone by then.
    const bool ended = !co.publish_;
    const auto awaits_at = co.awaits_at_.load(std::memory_order_relaxed);
    settle(co, on);
    track.turn_ends(ended, awaits_at);
  }

  [[gnu::always_inline]] static void resume(Coroutine& co, ThreadState& on,
                                            CoContext* at) noexcept {
    on.self = &co;
    // Release: a waker that learns the home may go on to use what this context published.
    if (co.home_.load(std::memory_order_relaxed) != at) {
      co.home_.store(at, std::memory_order_release);
    }
    // Each frame that stops says what comes next: a child, its parent, or (null) nothing.
    co.next_ = co.suspended_at_;
    do {
      co.next_.resume();
    } while (co.next_);
    on.self = nullptr;
  }

  [[gnu::always_inline]] static void settle(Coroutine& co, ThreadState& on) noexcept {
    if (const auto publish = std::exchange(co.publish_, nullptr)) {
      trace::yield(co);
      publish(co, on, co.closure_);
    } else {
      trace::terminate(co);
      finish(co);
    }
  }

  static void finish(Coroutine& co) noexcept {
    auto root = Task<void>::Handle::from_address(co.root_.address());
    if (root.promise().exception) abandon_with_exception(co, root.promise().exception);
    root.destroy();
    if (co.locks() != 0) [[unlikely]]
      abandon_with_locks(co);
    if (co.state_.end()) Coroutine::release_block(co);
  }

  [[noreturn, gnu::cold]] static void abandon_with_locks(const Coroutine& co) {
    panicf("coroutine '{}' ended with {} of its coroutine locks held", co.name(), co.locks());
  }

  [[noreturn, gnu::cold]] static void abandon_with_exception(Coroutine& co,
                                                             std::exception_ptr exception) {
    std::string what = "an exception of unknown type";
    try {
      std::rethrow_exception(exception);
    } catch (const std::exception& e) {
      what = e.what();
    } catch (...) {
    }
    panicf("coroutine '{}' ended with an exception: {}", co.name(), what);
  }

  ThreadState& thread;
  Driver* const outer;
  Coroutine* const outer_self;  // what that one is resuming
  CoContext* const context;
  Coroutine* wake_head = nullptr;  // co_wake'd, run once the current one suspends; linked by link_
  Coroutine* wake_tail = nullptr;
};

void Coroutine::construct_block(void* block) noexcept {
  // The first coroutine of the process: look at exit whether one was forgotten.
  [[maybe_unused]] static const int registered = std::atexit([] { report_leaked_coroutines(); });
  ::new (block) Coroutine();
}

Coroutine* Coroutine::create(Task<void> task, const char* name, Place place) {
  // Memory first: if there is none, the task still owns its frame.
  auto* const co = static_cast<Coroutine*>(allocate_control_block(&construct_block));
  auto root = task.release();
  ROOST_CHECK(root, "coroutine '{}' made of a task that was moved from", name);
  CoContext* const home = this_thread().context;
  constexpr auto relaxed = std::memory_order_relaxed;
  co->state_.begin(home ? home->index() : 0);
  co->root_ = root;
  co->suspended_at_ = root;
  co->placed_at_.store(Place{}, relaxed);
  co->home_.store(home, relaxed);
  co->waits_for_.store(nullptr, relaxed);
  co->awaits_at_.store(Place{}, relaxed);
  co->created_at_.store(place, relaxed);
  co->since_.store(home ? home->tick() : 0, relaxed);
  // Release: a census that sees the name sees all of the above.
  co->name_.store(name, std::memory_order_release);
  root.promise().co = co;
  return co;
}

void Coroutine::release_block(Coroutine& co) noexcept {
  // Free, for the census. Relaxed: the state of the block's next coroutine is published after it.
  co.name_.store(nullptr, std::memory_order_relaxed);
  free_control_block(&co);
}

void Coroutine::destroy(Coroutine* co, Place place) {
  const auto claim = co->state_.claim_suspended(0, false);
  if (!claim.won) co->misuse("destroy", place, claim.seen);
  if (co->locks() != 0) [[unlikely]]
    Driver::abandon_with_locks(*co);
  co->root_.destroy();
  if (co->state_.end()) release_block(*co);
}

Coroutine* Coroutine::self() noexcept { return thread_state.self; }

bool Coroutine::runs_on_this_thread() const noexcept {
  const ThreadState& thread = this_thread();
  const Driver* driver = thread.driver;
  if (thread.self == this) return true;
  while (driver && driver->outer_self != this) driver = driver->outer;
  return driver;
}

void Coroutine::enter(Place place) {
  ThreadState& thread = this_thread();
  CoContext* context = thread.context;
  ROOST_CHECK(context, "enter of coroutine '{}' at {} outside of any context", name(),
              describe(place));
  const auto claim = state_.claim_direct(context->index());
  if (!claim.won) misuse("enter", place, claim.seen);
  placed_at_.store(place, std::memory_order_relaxed);
  Driver::drive(*this, thread, TraceTrack::Turn::kDirect);
}

void Coroutine::misuse(const char* what, Place place, CoStateValue seen) const {
  if (seen.entries() == CoStateValue::kMaxEntries) {
    panicf("{} of coroutine '{}' ({}) at {}: {} queue entries of it are outstanding", what, name(),
           fmt::ptr(this), describe(place), seen.entries());
  }
  const bool in_wait = seen.state() == CoState::kWaiting || seen.owned();
  const char* const wait = in_wait ? waits_for_.load(std::memory_order_relaxed) : nullptr;
  panicf("{} of coroutine '{}' ({}) at {}: it is {}{}{}, on context {}, by {}", what, name(),
         fmt::ptr(this), describe(place), to_string(seen.state()), wait ? " for " : "",
         wait ? wait : "", seen.context(), describe(placed_at_.load(std::memory_order_relaxed)));
}

[[gnu::flatten]] void Coroutine::finish_move(Coroutine& co, ThreadState& thread,
                                             const void* awaiter) noexcept {
  const MoveAwaiter move = *static_cast<const MoveAwaiter*>(awaiter);
  co.stamp(thread);
  const auto schedule = co.state_.suspend_scheduled(move.to_->index());
  if (!schedule.won) [[unlikely]]
    co.misuse("move", move.place_, schedule.seen);
  co.post_schedule(*move.to_, thread, schedule, move.place_);
}

void co_schedule(CoContext& context, Coroutine& co, Coroutine::Place place) {
  const auto schedule = co.state_.schedule(context.index(), false);
  if (!schedule.won) [[unlikely]]
    co.misuse("co_schedule", place, schedule.seen);
  co.post_schedule(context, this_thread(), schedule, place);
}

void Coroutine::wake(Coroutine& co, bool owner, Place place) {
  const char* const what = owner ? "wake-up of the waiting" : "co_wake";
  // The caller owns the next wake-up, so the coroutine does not run and its home does not change.
  CoContext* home = co.home();
  ROOST_CHECK(home, "{} of coroutine '{}' at {}: it has no home yet", what, co.name(),
              describe(place));
  trace::wake(home, co);
  ThreadState& thread = this_thread();
  if (thread.context != home) {
    const auto schedule = co.state_.schedule(home->index(), owner);
    if (!schedule.won) [[unlikely]]
      co.misuse(what, place, schedule.seen);
    co.post_schedule(*home, thread, schedule, place);
  } else if (thread.driver && thread.driver->context == home) {
    const auto claim = co.state_.list(owner);
    if (!claim.won) [[unlikely]]
      co.misuse(what, place, claim.seen);
    co.placed_at_.store(place, std::memory_order_relaxed);
    trace::list(*home, co);
    thread.driver->append(co);
  } else {
    const auto claim = co.state_.claim_suspended(home->index(), owner);
    if (!claim.won) [[unlikely]]
      co.misuse(what, place, claim.seen);
    co.placed_at_.store(place, std::memory_order_relaxed);
    Driver::drive(co, thread, TraceTrack::Turn::kDirect);
  }
}

void co_wake(Coroutine& co, Coroutine::Place place) { Coroutine::wake(co, false, place); }

void wake_waiter(Coroutine& co, Coroutine::Place place) { Coroutine::wake(co, true, place); }

void wake_waiter_later(Coroutine& co, Coroutine::Place place) {
  ThreadState& thread = this_thread();
  CoContext* const home = co.home();
  const bool would_enter =
      home && thread.context == home && !(thread.driver && thread.driver->context == home);
  if (!would_enter) {
    Coroutine::wake(co, true, place);
    return;
  }
  trace::wake(home, co);
  const auto schedule = co.state_.schedule(home->index(), true);
  if (!schedule.won) [[unlikely]]
    co.misuse("wake-up of the waiting", place, schedule.seen);
  co.post_schedule(*home, thread, schedule, place);
}

namespace {

// What an entry says, read before the claim: an embedded entry may be used again at once after it.
struct EntryCopy {
  explicit EntryCopy(CoroutineEntry& entry) noexcept
      : co(entry.coroutine()), generation(entry.generation), embedded(entry.embedded) {
    if (!embedded) free_spare(entry);
  }
  Coroutine& co;
  std::uint32_t generation;
  bool embedded;

 private:
  [[gnu::noinline]] static void free_spare(CoroutineEntry& entry) noexcept {
    free_frame(&entry, sizeof(SpareEntry));
  }
};

}  // namespace

// Flattened, as is finish_move(): together they are what a turn of a coroutine costs.
[[gnu::flatten]] bool run_entry(ThreadState& thread, CoContext& context,
                                CoroutineEntry& entry) noexcept {
  const EntryCopy copy(entry);
  using Outcome = StateWord<RealPlatform>::EntryOutcome;
  switch (copy.co.state_.claim_entry(context.index(), copy.generation, copy.embedded)) {
    case Outcome::kRun:
      trace::turn_has_come(context, copy.co);
      Driver::drive(copy.co, thread, TraceTrack::Turn::kScheduled);
      return true;
    case Outcome::kStale:
      return false;
    case Outcome::kFreeBlock:
      Coroutine::release_block(copy.co);
      return false;
  }
  return false;
}

void prefetch_entry(const CoroutineEntry& entry) noexcept {
  // The driver's part of the block, behind what the scheduler touched.
  const Coroutine& co = entry.coroutine();
  prefetch_for_write(&co.next_);
  // The root frame is most often the one that goes on, and its address never changes.
  const auto* frame = static_cast<const char*>(co.root_.address());
  prefetch_for_write(frame);
  prefetch_for_write(frame + 64);
}

bool drop_entry(CoroutineEntry& entry) noexcept {
  const EntryCopy copy(entry);
  const CoStateValue seen = copy.co.state_.peek();
  if (seen.state() == CoState::kScheduled && seen.generation() == copy.generation) return true;
  if (copy.co.state_.drop_entry(copy.embedded)) Coroutine::release_block(copy.co);
  return false;
}

CoroutineRef::CoroutineRef(Coroutine& co) : co_(&co) {
  ROOST_CHECK(co.state_.add_ref(), "too many references to coroutine '{}'", co.name());
}

CoroutineRef::CoroutineRef(const CoroutineRef& other) : co_(other.co_) {
  if (co_) {
    ROOST_CHECK(co_->state_.add_ref(), "too many references to coroutine '{}'", co_->name());
  }
}

CoroutineRef::~CoroutineRef() {
  if (co_ && co_->state_.drop_ref()) Coroutine::release_block(*co_);
}

bool CoroutineRef::try_enter(Coroutine::Place place) {
  ThreadState& thread = this_thread();
  CoContext* context = thread.context;
  ROOST_CHECK(context, "try_enter of coroutine '{}' at {} outside of any context", co_->name(),
              describe(place));
  if (!co_->state_.claim_direct(context->index()).won) return false;
  co_->placed_at_.store(place, std::memory_order_relaxed);
  Driver::drive(*co_, thread, TraceTrack::Turn::kDirect);
  return true;
}

bool CoroutineRef::ended() const noexcept { return co_->state() == CoState::kEnded; }

}  // namespace roost
