// SPDX-License-Identifier: MIT
#include "roost/aio/aio_context.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/resource.h>

#include <algorithm>
#include <system_error>

#include "aio/bottom_half_core.h"
#include "aio/simulated_context.h"
#include "roost/aio/poll_budget.h"
#include "roost/aio/stall_detector.h"
#include "roost/aio/thread_pool.h"
#include "roost/aio/tracer.h"
#include "roost/base/check.h"
#include "roost/base/probe.h"
#include "roost/coro/census.h"
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

// ---- Life

namespace {

// The living contexts, and small numbers for the state words of coroutines, unique among them.
class ContextIndices {
 public:
  std::uint32_t take() {
    std::lock_guard lock(mutex_);
    for (std::uint32_t i = 0; i < used_.size(); ++i) {
      if (!used_[i]) {
        used_[i] = true;
        return i;
      }
    }
    if (used_.size() == CoStateValue::kMaxContexts) {
      throw std::system_error(EMFILE, std::generic_category(), "too many contexts");
    }
    used_.push_back(true);
    return static_cast<std::uint32_t>(used_.size() - 1);
  }

  void give_back(std::uint32_t index) noexcept {
    std::lock_guard lock(mutex_);
    used_[index] = false;
  }

  void add(AioContext& context) {
    std::lock_guard lock(mutex_);
    living_.push_back(&context);
  }

  void remove(AioContext& context) noexcept {
    std::lock_guard lock(mutex_);
    std::erase(living_, &context);
  }

  void for_each(const std::function<void(AioContext&)>& visit) {
    std::lock_guard lock(mutex_);
    for (AioContext* context : living_) visit(*context);
  }

 private:
  std::mutex mutex_;
  std::vector<bool> used_;
  std::vector<AioContext*> living_;  // open ones
};

ContextIndices& context_indices() {
  static ContextIndices indices;
  return indices;
}

// For a debugger, which finds it without running code (scripts/gdb/roost-gdb.py).
[[gnu::used]] const ContextIndices* const every_context = &context_indices();

bool choose_io_uring(EventLoop loop, FileIo file_io) {
  if (file_io == FileIo::kLinuxAio && !linux_aio_available()) {
    throw std::system_error(ENOSYS, std::generic_category(), "Linux AIO");
  }
  if (file_io == FileIo::kIoUring) {
    if (loop == EventLoop::kEpoll) {
      throw std::system_error(EINVAL, std::generic_category(),
                              "files through io_uring need the io_uring event loop");
    }
    loop = EventLoop::kIoUring;
  }
  if (loop == EventLoop::kEpoll) return false;
  const bool available = io_uring_available();
  if (loop == EventLoop::kIoUring && !available) {
    throw std::system_error(ENOSYS, std::generic_category(), "io_uring");
  }
  return available;
}

int make_wake_fd() {
  const int fd = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  return fd;
}

}  // namespace

std::shared_ptr<AioContext> AioContext::create(AioContextOptions options) {
  return std::shared_ptr<AioContext>(new AioContext(std::move(options)));
}

AioContextIndex::AioContextIndex() : value(context_indices().take()) {}
AioContextIndex::~AioContextIndex() { context_indices().give_back(value); }

AioContext::AioContext(AioContextOptions options)
    : CoContext(AioContextIndex::value, options.name),
      options_(std::move(options)),
      poll_budget_(options_.poll_budget ? *options_.poll_budget : PollBudget::of_process()),
      wake_fd_(options_.provider ? -1 : make_wake_fd()),
      use_io_uring_(!options_.provider && choose_io_uring(options_.event_loop, options_.file_io)),
      back_end_name_(options_.provider ? "simulated"
                     : use_io_uring_   ? "io_uring"
                                       : "epoll") {
  if (options_.tracer) trace_ = &options_.tracer->add_track(name());
  if (options_.stall_detector && !options_.provider) {
    stall_watch_ = std::make_unique<StallWatch>(*options_.stall_detector, name(), activity_);
  }
  poll_budget_.woke();
  context_indices().add(*this);
}

AioContext::~AioContext() {
  context_indices().remove(*this);
  report_inhabitants();
  close();
  poll_budget_.sleeps();
}

void AioContext::close() noexcept {
  ROOST_CHECK(polls_ == 0, "context '{}' destroyed while it is polled", name());
  ROOST_CHECK(lock_.is_free(), "context '{}' destroyed while its lock is held", name());
  // Nobody gets in from here on; what was queued is judged below.
  const auto last = inbox_.close();
  added_.append(last.oldest, last.newest);
  batch_.append(added_);
  batch_.append(idle_due_);
  batch_.append(idle_);
  while (QueueEntry* entry = batch_.pop()) {
    if (entry->kind == QueueEntry::Kind::kCoroutine) {
      auto& co_entry = static_cast<CoroutineEntry&>(*entry);
      const char* co_name = co_entry.coroutine().name();
      ROOST_CHECK(!drop_entry(co_entry), "context '{}' destroyed while coroutine '{}' is scheduled",
                  name(), co_name);
    } else if (entry != &notify_entry_ && entry != &inspect_entry_) {
      auto* core = static_cast<BottomHalf::Core*>(static_cast<CallbackEntry*>(entry));
      ROOST_CHECK(core->run == &run_bottom_half,
                  "context '{}' destroyed while a call to it is waiting", name());
      const bool deleted = core->flags.peek() & BottomHalfFlags<RealPlatform>::kDeleted;
      const bool scheduled = core->flags.peek() & BottomHalfFlags<RealPlatform>::kScheduled;
      ROOST_CHECK(deleted || !scheduled, "context '{}' destroyed while a bottom half is scheduled",
                  name());
      if (deleted) delete core;
    }
  }
  ROOST_CHECK(bottom_halves_.load() == 0, "context '{}' destroyed before {} of its bottom halves",
              name(), bottom_halves_.load());
  ROOST_CHECK(timers_.empty(), "context '{}' destroyed while a timer is armed", name());
  ROOST_CHECK(watches_.empty(), "context '{}' destroyed while descriptor {} has a handler", name(),
              watches_.begin()->first);
  back_end_.reset();
  // A producer that found the context sleeping may still be about to write to the eventfd: the
  // descriptor, and the number behind it, stay until it has.
  if (options_.provider) {
    options_.provider->wait_until("the signals a context is owed",
                                  [this] { return signals_received_ >= signals_owed_; });
    options_.provider->context_gone();
    return;
  }
  while (signals_received_ < signals_owed_) {
    pollfd pfd{wake_fd_.get(), POLLIN, 0};
    ::poll(&pfd, 1, -1);
    std::uint64_t count = 0;
    if (::read(wake_fd_.get(), &count, sizeof count) == sizeof count) signals_received_ += count;
  }
  if (signals_owed_ > 0) {
    // A read through the ring orders nothing that ThreadSanitizer could see. Reading once here,
    // from a counter that every producer has written to, shows it that they are done with the
    // context.
    std::uint64_t count = 1;
    [[maybe_unused]] ssize_t done = ::write(wake_fd_.get(), &count, sizeof count);
    done = ::read(wake_fd_.get(), &count, sizeof count);
  }
}

void AioContext::make_back_end() {
  ROOST_CHECK(current() == this, "descriptors and I/O of context '{}' used outside of it", name());
  if (options_.provider) {
    back_end_ = options_.provider->make_back_end(*this);
  } else if (use_io_uring_) {
    try {
      back_end_ =
          make_io_uring_back_end(*this, wake_fd_.get(), options_.file_io, options_.thread_pool);
    } catch (const std::system_error&) {
      // The trial ring could be had, this one not (locked memory used up, say).
      if (options_.event_loop == EventLoop::kIoUring || options_.file_io == FileIo::kIoUring) throw;
    }
  }
  if (!back_end_) {
    back_end_ = make_epoll_back_end(*this, wake_fd_.get(), options_.file_io, options_.thread_pool);
  }
  back_end_name_.store(back_end_->name(), std::memory_order_relaxed);
  for (auto& [fd, watch] : watches_) back_end_->watch_changed(*watch);
}

void AioContext::release_back_end() {
  back_end_.reset();
  for (auto& [fd, watch] : watches_) watch->armed_events = 0;
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

void AioContext::inspect(std::function<void()> function) {
  {
    std::lock_guard lock(inspect_entry_.mutex);
    inspect_entry_.functions.push_back(std::move(function));
    if (std::exchange(inspect_entry_.queued, true)) return;
  }
  [[maybe_unused]] const bool open = post(inspect_entry_);
}

bool AioContext::run_inspections(CallbackEntry& entry) noexcept {
  auto& inspect = static_cast<InspectEntry&>(entry);
  std::vector<std::function<void()>> functions;
  {
    std::lock_guard lock(inspect.mutex);
    functions.swap(inspect.functions);
    inspect.queued = false;
  }
  for (const auto& function : functions) function();
  return false;
}

void AioContext::for_each(const std::function<void(AioContext&)>& visit) {
  context_indices().for_each(visit);
}

// Says which coroutines will never be woken at home any more. Not an error of its own: their
// holders may still destroy them, or schedule them elsewhere.
void AioContext::report_inhabitants() const {
  constexpr std::size_t kAtMost = 10;
  std::size_t count = 0;
  for (const CoroutineInfo& info : list_coroutines()) {
    if (info.context != index() || info.awaits_at.line() == 0) continue;
    if (++count > kAtMost) continue;
    fmt::print(stderr, "roost: context '{}' goes while coroutine '{}', created at {}, is {}{}{}\n",
               name(), info.name, describe(info.created_at), to_string(info.state),
               info.waits_for ? " for " : "", info.waits_for ? info.waits_for : "");
  }
  if (count > kAtMost) {
    fmt::print(stderr, "roost: context '{}' goes while {} more coroutines live there\n", name(),
               count - kAtMost);
  }
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
  if (batch_.empty()) take_stream();
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

// ---- Descriptors

void AioContext::set_fd_handler(int fd, FdHandler handler) {
  ROOST_CHECK(current() == this, "handler of descriptor {} changed outside of context '{}'", fd,
              name());
  const bool remove = !handler.read && !handler.write;
  auto found = watches_.find(fd);
  if (found == watches_.end()) {
    if (remove) return;
    found = watches_.emplace(fd, new FdWatch{.fd = fd, .handler = nullptr}).first;
  }
  FdWatch& watch = *found->second;
  if (watch.handler && watch.handler->poll) --poll_hooks_;
  if (remove) {
    watches_.erase(found);
    watch.handler = nullptr;
    watch.removed = true;
  } else {
    if (handler.poll) ++poll_hooks_;
    watch.handler = std::make_shared<const FdHandler>(std::move(handler));
  }
  // The thread that polls first makes the back end, and this may be another: it looks then.
  if (back_end_) {
    back_end_->watch_changed(watch);
  } else if (remove) {
    delete &watch;
  }
}

void AioContext::set_event_notifier(EventNotifier& notifier, std::function<void()> callback) {
  set_fd_handler(notifier.fd(), {.read =
                                     [&notifier, callback = std::move(callback)] {
                                       if (notifier.test_and_clear()) callback();
                                     },
                                 .write = nullptr,
                                 .poll = nullptr});
}

std::uint32_t FdWatch::wanted_events() const noexcept {
  if (!handler) return 0;
  return (handler->read ? POLLIN : 0u) | (handler->write ? POLLOUT : 0u);
}

void FdWatch::dispatch(std::uint32_t events) {
  // Held here: the callback may replace or remove itself. Each is looked up anew, since the first
  // may have taken the second away.
  constexpr std::uint32_t kBoth = POLLERR | POLLHUP | POLLNVAL;
  if (auto held = handler; held && held->read && (events & (POLLIN | kBoth))) held->read();
  if (auto held = handler; held && held->write && (events & (POLLOUT | kBoth))) held->write();
}

// ---- Calls from other threads

namespace detail {

RemoteCall::RemoteCall(std::function<void()> function)
    : CallbackEntry(&execute), function_(std::move(function)) {}

void RemoteCall::post_and_wait(AioContext& context) {
  ROOST_CHECK(!context.acquired_here(),
              "a call to context '{}' by the thread that has acquired it would wait for ever",
              context.name());
  ROOST_CHECK(context.post(*this), "call to the closed context '{}'", context.name());
  if (BackEndProvider* const provider = context.options_.provider) {
    provider->wait_until("a call to another context", [this] { return done_; });
    if (exception_) std::rethrow_exception(exception_);
    return;
  }
  std::unique_lock lock(mutex_);
  done_changed_.wait(lock, [this] { return done_; });
  if (exception_) std::rethrow_exception(exception_);
}

bool RemoteCall::execute(CallbackEntry& entry) noexcept {
  auto& call = static_cast<RemoteCall&>(entry);
  try {
    call.function_();
  } catch (...) {
    call.exception_ = std::current_exception();
  }
  // Notified under the lock: once the waiter can take it, the call may be gone.
  std::lock_guard lock(call.mutex_);
  call.done_ = true;
  call.done_changed_.notify_one();
  return true;
}

}  // namespace detail

}  // namespace roost
