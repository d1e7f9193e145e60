// SPDX-License-Identifier: MIT
// The iterations of a context, its lock, and its door for other threads. How it begins and ends is
// in aio_context_life.cc, the rest in fd_handler.cc and remote_call.cc.
#include "roost/aio/aio_context.h"

#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>

#include "aio/bottom_half_core.h"
#include "aio/simulated_context.h"
#include "roost/aio/poll_budget.h"
#include "roost/aio/stall_detector.h"
#include "roost/aio/tracer.h"
#include "roost/base/check.h"
#include "roost/base/probe.h"
#include "roost/coro/frame_allocator.h"

namespace roost {

namespace {

constexpr unsigned kMaxEntriesBeforeIo = 64;
constexpr std::int64_t kMaxNsBeforeIo = 50'000;
constexpr unsigned kEntriesPerClockReading = 32;
constexpr std::int64_t kIdlePeriodNs = 10'000'000;
constexpr int kFramesAhead = 3;
constexpr unsigned kSmallBatch = 32;
constexpr int kStreamPauses = 16;

// Busy waiting. It starts short and doubles, looks at the clock after a handful of checks, and
// offers the CPU to others now and then: an offer that was taken shows that it is wanted.
constexpr std::int64_t kFirstSpinNs = 4'000;
constexpr int kChecksPerClockReading = 16;
constexpr std::int64_t kOfferCpuEveryNs = 20'000;
constexpr std::int64_t kCpuWasTakenNs = 20'000;
constexpr std::int64_t kCpuIsWantedNs = 2'000'000;
constexpr unsigned kMaxSpinPenalty = 1024;

}  // namespace

// ---- Scopes

// Whenever a context becomes current, what this thread (among others) posted to it from outside is
// taken first, so that it stays in front of what the thread then posts from inside.
ContextScope::ContextScope(AioContext& context) noexcept : outer_(this_thread().context) {
  this_thread().context = &context;
  context.take_inbox();
}

ContextScope::~ContextScope() {
  this_thread().context = outer_;
  if (outer_) static_cast<AioContext*>(outer_)->take_inbox();
}

// ---- From any thread

bool AioContext::post(QueueEntry& entry) noexcept {
  ThreadState& thread = this_thread();
  if (thread.context == this) {
    post_here(entry);
    return true;
  }
  entry.ahead.set(thread.posted.exchange(&entry));
  switch (inbox_.push(entry)) {
    case decltype(inbox_)::Push::kQueued:
      return true;
    case decltype(inbox_)::Push::kClosed:
      return false;
    case decltype(inbox_)::Push::kWakeOwed:
      break;
  }
  // The context counts this signal as owed and stays until it has come.
  if (options_.provider) [[unlikely]] {
    options_.provider->signal();
    return true;
  }
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(wake_fd_.get(), &one, sizeof one);
  return true;
}

void AioContext::notify() noexcept {
  // Acq_rel pairs with end_of_notify(): a notify() that is coalesced with a queued entry comes
  // before that entry's turn.
  if (notify_entry_.queued.exchange(true, std::memory_order_acq_rel)) return;
  [[maybe_unused]] const bool open = post(notify_entry_);
}

bool AioContext::end_of_notify(CallbackEntry& entry) noexcept {
  auto& notify = static_cast<NotifyEntry&>(entry);
  notify.queued.exchange(false, std::memory_order_acq_rel);
  notify.context.notified_ = true;
  return false;
}

void AioContext::blocking_call_check(const char* what) const {
  if (Coroutine* co = Coroutine::self()) {
    panicf("{} of context '{}' would block inside coroutine '{}'", what, name(), co->name());
  }
}

// ---- The context lock

namespace {

// What a thread has to do with context locks. Its address is the thread's id.
struct LockState {
  AioContext* dispatching = nullptr;  // the context of the innermost poll on this thread's stack
  std::vector<AioContext*> acquired;

  ~LockState() {
    ROOST_CHECK(acquired.empty(), "a thread ended with context '{}' acquired",
                acquired.front()->name());
  }
};

// Never inlined: as this_thread().
[[gnu::noinline]] LockState& lock_state() noexcept {
  if (SimulatedThread* const simulated = this_thread().simulated) [[unlikely]] {
    if (!simulated->lock_state) simulated->lock_state = std::make_shared<LockState>();
    return *static_cast<LockState*>(simulated->lock_state.get());
  }
  thread_local LockState state;
  return state;
}

std::uint64_t id_of(const LockState& state) noexcept {
  return reinterpret_cast<std::uint64_t>(&state);
}

}  // namespace

// One poll on the stack. The outermost takes the lock as soon as there is something to dispatch,
// and gives up what it holds when it returns.
class AioContext::PollScope {
 public:
  explicit PollScope(AioContext& context)
      : context_(context),
        thread_(lock_state()),
        outer_(std::exchange(thread_.dispatching, &context)),
        acquired_before_(context.callbacks_acquired_) {
    if (context_.polls_++ > 0) return;
    if (context_.stall_watch_) [[unlikely]]
      context_.stall_watch_->enter();
    context_.activity_.works();
    if (context_.lock_.owned_by(id_of(thread_))) context_.holds_ = Lock::kAcquired;
  }

  ~PollScope() {
    thread_.dispatching = outer_;
    ROOST_CHECK(context_.callbacks_acquired_ == acquired_before_,
                "a callback of context '{}' returned without releasing it", context_.name());
    if (--context_.polls_ > 0) return;
    if (context_.holds_ == Lock::kHeld && context_.give_up_lock()) {
      ++context_.statistics_.lock_passed_idle;
    }
    context_.holds_ = Lock::kNo;
    context_.activity_.rests();
    if (context_.stall_watch_) [[unlikely]]
      context_.stall_watch_->leave();
  }

  PollScope(const PollScope&) = delete;
  PollScope& operator=(const PollScope&) = delete;

 private:
  AioContext& context_;
  LockState& thread_;
  AioContext* const outer_;
  const unsigned acquired_before_;
};

void AioContext::acquire() {
  ThreadState& thread = this_thread();
  if (thread.driver) [[unlikely]] {
    const Coroutine* co = Coroutine::self();
    panicf("acquire of context '{}' inside coroutine '{}'", name(), co ? co->name() : "?");
  }
  LockState& me = lock_state();
  if (me.dispatching == this) {
    ++callbacks_acquired_;
    return;
  }
  ROOST_CHECK(!me.dispatching, "acquire of context '{}' in a callback of context '{}'", name(),
              me.dispatching->name());
  if (lock_.acquire(id_of(me))) me.acquired.push_back(this);
}

void AioContext::release() {
  ThreadState& thread = this_thread();
  if (thread.driver) [[unlikely]] {
    const Coroutine* co = Coroutine::self();
    panicf("release of context '{}' inside coroutine '{}'", name(), co ? co->name() : "?");
  }
  LockState& me = lock_state();
  if (me.dispatching == this) {
    ROOST_CHECK(callbacks_acquired_ > 0,
                "release of context '{}' by a callback that has not acquired it", name());
    --callbacks_acquired_;
    return;
  }
  ROOST_CHECK(lock_.owned_by(id_of(me)),
              "release of context '{}' by a thread that has not acquired it", name());
  if (lock_.release()) std::erase(me.acquired, this);
}

bool AioContext::acquired_here() const noexcept {
  const LockState& me = lock_state();
  return me.dispatching == this || lock_.owned_by(id_of(me));
}

// The home takes the lock, behind those who wait for it.
void AioContext::take_lock() noexcept {
  if (!lock_.try_lock()) {
    ++statistics_.lock_waits;
    // Here too this thread leaves its CPU to others.
    activity_.rests();
    poll_budget_.sleeps();
    lock_.lock();
    poll_budget_.woke();
    activity_.works();
  }
  holds_ = Lock::kHeld;
}

void AioContext::check_callbacks_released() const noexcept {
  ROOST_CHECK(callbacks_acquired_ == 0, "a callback of context '{}' returned without releasing it",
              name());
}

// The outermost poll gives it up, between two callbacks; true if somebody had waited for it.
bool AioContext::give_up_lock() noexcept {
  check_callbacks_released();
  holds_ = Lock::kNo;
  return lock_.unlock();
}

void AioContext::let_others_have_lock() noexcept {
  if (polls_ > 1) return;
  check_callbacks_released();
  activity_.rests();
  poll_budget_.sleeps();
  if (lock_.let_others()) ++statistics_.lock_passed_busy;
  poll_budget_.woke();
  activity_.works();
}

// Off the fast path of iterate(): the lock is not held, or somebody wants it.
void AioContext::begin_iteration(bool blocking) {
  if (holds_ == Lock::kHeld) {
    let_others_have_lock();
  } else if (holds_ == Lock::kNo && !(blocking && batch_.empty() && added_.empty())) {
    take_lock();
  }
}

// ---- One iteration

bool AioContext::poll(bool blocking) {
  ThreadState& thread = this_thread();
  if (blocking && thread.driver) blocking_call_check("a blocking poll");
  const PollScope polling(*this);
  if (thread.context == this) return iterate(thread, blocking);
  ContextScope scope(*this);
  return iterate(thread, blocking);
}

void AioContext::poll_until(const bool& stop) {
  ThreadState& thread = this_thread();
  blocking_call_check("a blocking poll");
  ROOST_CHECK(thread.context == this, "context '{}' is not current", name());
  const PollScope polling(*this);
  while (!stop) iterate(thread, true);
}

inline bool AioContext::iterate(ThreadState& thread, bool blocking) {
  // While there is a rest of what was taken before, it comes first.
  if (batch_.empty() && (inbox_.has_entries() || taken_last_ > 0)) take_stream();
  if (holds_ != Lock::kHeld || lock_.wanted()) [[unlikely]]
    begin_iteration(blocking);
  bool idle_wanted = false;
  bool progress = dispatch_entries(thread);
  if (!progress || entries_since_io_ >= kMaxEntriesBeforeIo) {
    const bool more = !batch_.empty() || !added_.empty() || !idle_due_.empty();
    progress |= serve_io(blocking && !progress && !more && !notified_);
    if (!progress) {
      take_inbox();
      const bool before = std::exchange(notified_, false);
      progress = dispatch_entries(thread);
      // An idle bottom half that was scheduled after all came with a notify(), but the idle ones
      // have had their turn already: the next iteration must not wait before theirs.
      idle_wanted = notified_ && !idle_.empty();
      notified_ |= before;
    }
  }
  // A blocking poll that returns has heeded the notify() that it met, if any.
  if (blocking) notified_ = idle_wanted;
  return progress;
}

void AioContext::take_inbox() noexcept {
  const auto taken = inbox_.take();
  // What another CPU has just written. The first few are fetched at once, with all that their turns
  // touch; later ones while those before them run.
  const QueueEntry* entry = taken.oldest;
  for (int i = 0; i < kFramesAhead && entry; ++i, entry = entry->next.get()) {
    if (entry->kind == QueueEntry::Kind::kCoroutine) {
      prefetch_entry(static_cast<const CoroutineEntry&>(*entry));
    }
  }
  added_.append(taken.oldest, taken.newest);
  taken_last_ = taken.count;
}

// Where producer and consumer are about equally quick, each would fetch the inbox's cache line from
// the other for every entry. A consumer that has just found a few entries, twice in a row, looks
// away for a moment and then finds more.
void AioContext::take_stream() noexcept {
  const unsigned before = taken_last_;
  if (before > 0 && before < kSmallBatch && streaming_) {
    for (int i = 0; i < kStreamPauses; ++i) RealPlatform::cpu_relax();
  }
  take_inbox();
  streaming_ = before > 0 && taken_last_ > 0;
}

// Runs what had been queued when it was called, as far as the limits go.
bool AioContext::dispatch_entries(ThreadState& thread) {
  batch_.append(added_);
  bool progress = false;
  while (entries_since_io_ < kMaxEntriesBeforeIo) {
    QueueEntry* const entry = batch_.pop();
    if (!entry) break;
    if (const QueueEntry* ahead = entry->ahead.get()) fetch_ahead(*ahead);
    if (entry->kind == QueueEntry::Kind::kCoroutine) {
      progress |= run_entry(thread, *this, static_cast<CoroutineEntry&>(*entry));
    } else {
      auto& callback = static_cast<CallbackEntry&>(*entry);
      progress |= callback.run(callback);
    }
    ++entries_since_io_;
    if (entries_to_clock_-- == 0) look_at_clock();
  }
  return progress;
}

// A long queue from other threads is cold: fetches an entry that comes later, and the frame of one
// that comes sooner, whose entry was fetched some turns ago.
void AioContext::fetch_ahead(const QueueEntry& ahead) noexcept {
  __builtin_prefetch(&ahead);
  const QueueEntry* soon = batch_.front();
  for (int i = 0; i < kFramesAhead && soon; ++i) soon = soon->next.get();
  if (soon && soon->kind == QueueEntry::Kind::kCoroutine) {
    prefetch_entry(static_cast<const CoroutineEntry&>(*soon));
  }
}

// Ends the turn of the entries once they have had their time. The clock costs as much as a few
// short entries, so it is looked at seldom as long as they are short.
void AioContext::look_at_clock() noexcept {
  const std::int64_t now = clock().now_ns();
  const bool over = now - last_io_ns_ > kMaxNsBeforeIo;
  if (over) entries_since_io_ = kMaxEntriesBeforeIo;
  entries_to_clock_ = over ? 0 : kEntriesPerClockReading;
}

bool AioContext::serve_io(bool may_block) {
  idle_due_.append(idle_);
  bool progress = wait(may_block ? wait_limit_ns() : 0);
  last_io_ns_ = clock().now_ns();
  tick_ = tick_of(last_io_ns_);
  entries_since_io_ = 0;
  activity_.gets_on();
  if (!timers_.empty()) progress |= timers_.run_due(last_io_ns_);
  run_idle();
  return progress;
}

// How long there is nothing to do but wait; negative: until woken.
std::int64_t AioContext::wait_limit_ns() const noexcept {
  std::int64_t limit = idle_due_.empty() ? -1 : kIdlePeriodNs;
  if (!timers_.empty()) {
    const std::int64_t until =
        std::max<std::int64_t>(0, timers_.next_deadline_ns() - clock().now_ns());
    limit = limit < 0 ? until : std::min(limit, until);
  }
  return limit;
}

bool AioContext::may_wait_busily() const noexcept {
  return options_.poll_max_ns > 0 && poll_budget_.may_spin();
}

bool AioContext::wait(std::int64_t timeout_ns) {
  BackEnd& io = back_end();
  if (timeout_ns == 0) return poll_now();

  const std::int64_t start = clock().now_ns();
  if (waits_busily()) {
    const std::int64_t limit = timeout_ns < 0 ? spin_ns_ : std::min(spin_ns_, timeout_ns);
    io.flush();
    if (poll_hooks_ > 0 && holds_ == Lock::kNo) take_lock();
    ROOST_PROBE(run_poll_handlers_begin, this, limit, timeout_ns);
    activity_.rests();
    const bool found = spin(limit);
    activity_.works();
    ROOST_PROBE(run_poll_handlers_end, this, found, timeout_ns);
    if (found) {
      ++statistics_.spins_paid;
      if (spin_penalty_ > 0) --spin_penalty_;
      const bool hooked = call_poll_hooks();
      return poll_now() || hooked;
    }
    ++statistics_.spins_in_vain;
    if (timeout_ns > 0) {
      timeout_ns = std::max<std::int64_t>(0, timeout_ns - (clock().now_ns() - start));
      if (timeout_ns == 0) return poll_now();
    }
  }

  // A piece at a time, looking at what has come in between.
  // (Not where a simulation's events would then depend on what ran before it in the process.)
  if (!options_.provider && release_frame_memory()) return poll_now();
  if (!inbox_.try_sleep()) return poll_now();
  ++statistics_.sleeps;
  poll_budget_.sleeps();
  wait_began_ns_ = start;
  asleep_ = true;
  // A nested wait has a callback below it, and keeps the lock.
  if (polls_ == 1 && holds_ == Lock::kHeld && give_up_lock()) ++statistics_.lock_passed_idle;
  if (trace_) [[unlikely]]
    trace_->sleeps();
  activity_.rests();
  const bool progress = io.poll(timeout_ns);
  wait_ended();
  return progress;
}

bool AioContext::poll_now() {
  if (holds_ == Lock::kNo) take_lock();
  return back_end_->poll(0);
}

void AioContext::wake_up() noexcept {
  asleep_ = false;
  activity_.works();
  if (trace_) [[unlikely]]
    trace_->woke();
  poll_budget_.woke();
  if (inbox_.wake_up()) ++signals_owed_;
  adapt_spinning(clock().now_ns() - wait_began_ns_);
  if (holds_ == Lock::kNo) take_lock();
}

// Busy-waits; true as soon as there is something to do.
bool AioContext::spin(std::int64_t limit_ns) {
  const std::int64_t start = real_clock().now_ns();
  std::int64_t offered = start;
  for (;;) {
    for (int i = 0; i < kChecksPerClockReading; ++i) {
      if (inbox_.has_entries() || back_end_->ready()) return true;
      RealPlatform::cpu_relax();
    }
    if (back_end_->try_held()) return true;
    if (holds_ == Lock::kHeld && lock_.wanted()) let_others_have_lock();
    if (poll_hooks_ > 0) {
      for (auto& [fd, watch] : watches_) {
        if (watch->handler->poll && watch->handler->poll()) return true;
      }
    }
    const std::int64_t now = real_clock().now_ns();
    if (now - start >= limit_ns || !poll_budget_.may_spin()) return false;
    if (now - offered >= kOfferCpuEveryNs) {
      ::sched_yield();
      offered = real_clock().now_ns();
      if (offered - now > kCpuWasTakenNs || was_preempted()) {
        // Somebody else ran: the CPU is wanted, and waiting busily would only delay them. Try
        // again after a number of sleeps that grows as long as this goes on; after one, if it has
        // not happened for a while.
        spin_ns_ = 0;
        const bool again = offered - cpu_was_taken_ns_ < kCpuIsWantedNs;
        cpu_was_taken_ns_ = offered;
        spin_penalty_ = std::min(std::max(spin_penalty_ * 2, again ? 16u : 1u), kMaxSpinPenalty);
        spin_holdoff_ = spin_penalty_;
        return inbox_.has_entries() || back_end_->ready();
      }
    }
  }
}

// Whether the kernel took the CPU from this thread since the last call.
bool AioContext::was_preempted() noexcept {
  rusage usage{};
  ::getrusage(RUSAGE_THREAD, &usage);
  return std::exchange(preemptions_, usage.ru_nivcsw) != usage.ru_nivcsw;
}

bool AioContext::call_poll_hooks() {
  if (poll_hooks_ == 0) return false;
  std::vector<int> ready;
  for (auto& [fd, watch] : watches_) {
    if (watch->handler->poll && watch->handler->poll()) ready.push_back(fd);
  }
  // Each callback may remove or replace any handler, its own included, and poll: a watch is looked
  // up anew after each, and not touched any more once it has called one.
  for (int fd : ready) {
    auto found = watches_.find(fd);
    if (found == watches_.end()) continue;
    const auto handler = found->second->handler;
    if (handler->read) handler->read();
    found = watches_.find(fd);
    if (found == watches_.end() || found->second->handler != handler) continue;
    if (handler->write) handler->write();
  }
  return !ready.empty();
}

// After a sleep: would a longer busy wait have caught it?
void AioContext::adapt_spinning(std::int64_t waited_ns) noexcept {
  if (options_.poll_max_ns == 0) return;
  const std::int64_t before = spin_ns_;
  if (waited_ns > options_.poll_max_ns) {
    // Not even the longest. Halve, and forget small times, so that an idle context sleeps at once.
    spin_ns_ = spin_ns_ > kFirstSpinNs ? spin_ns_ / 2 : 0;
    if (before > 0) ROOST_PROBE(poll_shrink, this, before, spin_ns_);
    return;
  }
  if (spin_holdoff_ > 0) {
    --spin_holdoff_;
    return;
  }
  if (spin_penalty_ > 0) --spin_penalty_;
  spin_ns_ = std::min(std::max(spin_ns_ * 2, kFirstSpinNs), options_.poll_max_ns);
  if (spin_ns_ != before) ROOST_PROBE(poll_grow, this, before, spin_ns_);
}

// A nested poll goes on with those that are due.
void AioContext::run_idle() {
  while (QueueEntry* entry = idle_due_.pop()) {
    BottomHalf::Core::run_now(static_cast<BottomHalf::Core&>(static_cast<CallbackEntry&>(*entry)));
  }
}

}  // namespace roost
