// SPDX-License-Identifier: MIT
// AioContext: one event loop. Descriptor handlers, bottom halves, timers, coroutines, file and
// socket I/O, served by whoever polls it.
//
// Threads: polled by one thread, its home thread. post(), notify(), run(), BottomHalf and
// co_schedule() work from any thread and are the only doors from outside; everything else is for
// the home thread, or, before it is polled for the first time, for a thread that has made it
// current (ContextScope). A control thread may hold off all dispatching with acquire().
// Lifetime: reference-counted (std::shared_ptr). It is destroyed on the thread that polled it, or
// anywhere after that thread has called release_back_end() (an IOThread does). Nothing live may be
// scheduled then, no handler set, no I/O in flight: each aborts and says which.
//
// An iteration: what other threads posted is taken from the inbox; entries run, at most 64 or for
// 50 microseconds before descriptors get their turn; then one system call hands over started I/O,
// waits if there is nothing to do, and brings back completions. What is added meanwhile runs in the
// next iteration. All that was taken lives in the context, so that a nested poll goes on with it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "roost/aio/activity.h"
#include "roost/aio/back_end.h"
#include "roost/aio/context_lock.h"
#include "roost/aio/event_notifier.h"
#include "roost/aio/inbox.h"
#include "roost/aio/timer.h"
#include "roost/base/clock.h"
#include "roost/coro/coroutine.h"

namespace roost {

class PollBudget;
class StallDetector;
class StallWatch;
class ThreadPool;
class Tracer;
namespace detail {
class RemoteCall;
}

/// What a context waits with.
enum class EventLoop : std::uint8_t {
  kAuto,     // io_uring where the kernel allows it, else epoll
  kIoUring,  // io_uring, or an error
  kEpoll,
};

struct AioContextOptions {
  /// For messages, and the name of an IOThread's thread.
  std::string name = "context";
  EventLoop event_loop = EventLoop::kAuto;
  /// The longest busy wait before sleeping; 0: never.
  std::int64_t poll_max_ns = 100'000;
  /// Outlives the context.
  const Clock* clock = &real_clock();
  /// Outlives the context; null: the process's.
  PollBudget* poll_budget = nullptr;
  /// What executes the operations on files.
  FileIo file_io = FileIo::kAuto;
  /// For operations on files; null: one of its own, made when needed.
  std::shared_ptr<ThreadPool> thread_pool = nullptr;
  /// Outlives the context; null: the kernel. A Simulation gives its contexts one of its own.
  BackEndProvider* provider = nullptr;
  /// Outlives the context; null: nothing is recorded.
  Tracer* tracer = nullptr;
  /// Outlives the context; null: nobody watches whether it gets on. Not in a simulation.
  StallDetector* stall_detector = nullptr;
};

/// Number of a context, for as long as it lives. A base, so that it comes first and goes last.
struct AioContextIndex {
  AioContextIndex();
  ~AioContextIndex();
  std::uint32_t value;
};

/// An event loop. The file's head says which thread may do what.
class AioContext final : private AioContextIndex, public CoContext {
 public:
  /// Throws std::system_error: descriptors exhausted, or io_uring demanded and refused.
  static std::shared_ptr<AioContext> create(AioContextOptions options = {});

  ~AioContext();

  /// The context that the calling thread polls or has scoped; null if none.
  static AioContext* current() noexcept { return static_cast<AioContext*>(this_thread().context); }

  /// One iteration. With `blocking` it waits until there is something to do. Returns whether
  /// progress was made: a callback or coroutine ran (idle bottom halves and notify() are none).
  /// May be called from a callback. A blocking poll aborts inside a coroutine.
  bool poll(bool blocking);

  /// Blocking polls until `stop`, which a callback or coroutine sets. The context must be current;
  /// as of poll(true), aborts inside a coroutine.
  void poll_until(const bool& stop);

  /// Makes a blocking poll return, or the next one not block. Any thread.
  void notify() noexcept;

  /// See CoContext::post().
  bool post(QueueEntry& entry) noexcept override;

  /// Calls `function()` on the home thread and returns its result or throws what it threw; at once
  /// where this context is current. Blocks: aborts inside a coroutine. Somebody must be polling.
  /// Not for coroutine functions: their task would not begin.
  template <class Function>
  auto run(Function&& function) -> std::invoke_result_t<Function&>;

  /// Keeps the context from dispatching: from here to release() no callback and no coroutine runs
  /// in a poll of it. For control threads, which may then touch what its callbacks touch; it does
  /// not become current, what is queued stays queued, and I/O under way goes on. Waits for the end
  /// of the iteration that is running (a blocking poll nested in a callback included) and for those
  /// who came before; does not wait for, nor wake, a context that sleeps.
  ///
  /// Recursive; each acquire() needs a release() by the same thread. A callback of this context has
  /// it already, and may acquire it again until it returns. What a thread acquired before it polls,
  /// it keeps while that poll waits. Who acquires two contexts takes care of the order.
  ///
  /// Aborts inside a coroutine and in a callback of another context. Meanwhile run() and
  /// IOThread::join() abort on this thread, since they would wait for ever.
  void acquire();
  /// Aborts unless this thread, and this callback, has acquired it. The context outlives the call.
  void release();
  /// Whether this thread keeps the context from dispatching on another: it has acquired it, or is
  /// dispatching it.
  bool acquired_here() const noexcept;

  /// As a one-shot bottom half, but no reason for the context to be polled: it is dropped if the
  /// context goes first. For diagnostics. Any thread.
  void inspect(std::function<void()> function);

  /// Calls `visit` with every living context, which stays meanwhile: `visit` must neither wait for
  /// one nor make or destroy one. Any thread.
  static void for_each(const std::function<void(AioContext&)>& visit);

  /// Sets, replaces or (all members empty) removes the handler of `fd`. After a removal nothing of
  /// the handler is called any more, and `fd` may be closed. Home thread; callbacks run there,
  /// outside of any coroutine, and must not throw.
  void set_fd_handler(int fd, FdHandler handler);
  void remove_fd_handler(int fd) { set_fd_handler(fd, FdHandler{}); }

  /// Calls `callback` when `notifier` was set, and clears it before. Home thread; the notifier
  /// stays until it is removed.
  void set_event_notifier(EventNotifier& notifier, std::function<void()> callback);
  void remove_event_notifier(EventNotifier& notifier) { remove_fd_handler(notifier.fd()); }

  /// Whether the thread of this context, which is awake, may wait busily for a few microseconds:
  /// it does so itself before it sleeps, and no more threads are awake than there are CPUs.
  bool may_wait_busily() const noexcept;

  /// Whether it is going to, when there is nothing else to do: busy waits have paid lately. Home
  /// thread.
  bool waits_busily() const noexcept { return spin_ns_ > 0 && may_wait_busily(); }

  /// Any thread.
  const Clock& clock() const noexcept { return *options_.clock; }
  /// For Timer. Home thread.
  TimerQueue& timers() noexcept { return timers_; }

  /// "io_uring", "epoll" or "simulated". Any thread; before the first poll, what it is going to
  /// try.
  const char* back_end_name() const noexcept {
    // Relaxed: it points at a literal.
    return back_end_name_.load(std::memory_order_relaxed);
  }

  /// The back end, made at the first use on the home thread.
  BackEnd& back_end() {
    if (!back_end_) [[unlikely]]
      make_back_end();
    return *back_end_;
  }

  /// Gives up what the back end holds for this thread. Call it on the home thread before that ends,
  /// if the context lives on; another thread may then poll it. No I/O may be in flight.
  void release_back_end();

  /// For the back end: the eventfd was read and held `count` signals.
  void signalled(std::uint64_t count) noexcept { signals_received_ += count; }

  /// For the back end: the system call that waits has returned. Called before anything that came
  /// of it is dispatched, so that callbacks find the context awake, and may wait themselves.
  void wait_ended() noexcept {
    if (asleep_) wake_up();
  }

  /// Iterations that went to sleep, and busy waits that ended with work; for tests and statistics.
  struct Statistics {
    std::uint64_t sleeps = 0;
    std::uint64_t spins_paid = 0;
    std::uint64_t spins_in_vain = 0;
    /// The home passed the context lock to somebody who waited for it, and queued behind: between
    /// iterations or in a busy wait.
    std::uint64_t lock_passed_busy = 0;
    /// The same at the end of a poll or before a sleep.
    std::uint64_t lock_passed_idle = 0;
    /// The lock was taken when the home wanted it back, after a sleep or at the start of a poll.
    std::uint64_t lock_waits = 0;
  };
  /// Home thread.
  const Statistics& statistics() const noexcept { return statistics_; }

 private:
  friend class BottomHalf;
  friend class ContextScope;
  friend class detail::RemoteCall;
  friend void schedule_oneshot(AioContext&, std::function<void()>);

  explicit AioContext(AioContextOptions options);

  class PollScope;

  void make_back_end();
  bool iterate(ThreadState& thread, bool blocking);
  void take_inbox() noexcept;
  void take_stream() noexcept;
  bool dispatch_entries(ThreadState& thread);
  void fetch_ahead(const QueueEntry& ahead) noexcept;
  void look_at_clock() noexcept;
  void run_idle();
  bool serve_io(bool may_block);
  bool wait(std::int64_t timeout_ns);
  bool spin(std::int64_t limit_ns);
  bool was_preempted() noexcept;
  bool call_poll_hooks();
  void wake_up() noexcept;
  void adapt_spinning(std::int64_t waited_ns) noexcept;
  std::int64_t wait_limit_ns() const noexcept;
  void close() noexcept;
  void blocking_call_check(const char* what) const;
  void begin_iteration(bool blocking);
  void take_lock() noexcept;
  bool give_up_lock() noexcept;
  void check_callbacks_released() const noexcept;
  bool poll_now();
  void let_others_have_lock() noexcept;

  static bool run_bottom_half(CallbackEntry& entry) noexcept;
  static bool end_of_notify(CallbackEntry& entry) noexcept;
  static bool run_inspections(CallbackEntry& entry) noexcept;
  void report_inhabitants() const;

  // Constant.
  const AioContextOptions options_;
  PollBudget& poll_budget_;
  UniqueFd wake_fd_;
  const bool use_io_uring_;

  // Any thread.
  Inbox<RealPlatform, QueueEntry> inbox_;
  struct NotifyEntry : CallbackEntry {
    explicit NotifyEntry(AioContext& ctx) noexcept : CallbackEntry(&end_of_notify), context(ctx) {}
    AioContext& context;
    std::atomic<bool> queued{false};  // true: somebody owns the entry and has posted it
  };
  NotifyEntry notify_entry_{*this};
  struct InspectEntry : CallbackEntry {
    InspectEntry() noexcept : CallbackEntry(&run_inspections) {}
    std::mutex mutex;  // guards the rest
    std::vector<std::function<void()>> functions;
    bool queued = false;
  };
  InspectEntry inspect_entry_;
  std::atomic<int> bottom_halves_{0};  // alive
  std::atomic<const char*> back_end_name_;
  ContextLock<RealPlatform, FutexPark> lock_;
  Activity activity_;

  // Home thread.
  EntryQueue batch_;     // taken, to be run in this iteration
  EntryQueue idle_;      // idle bottom halves whose time has not come
  EntryQueue idle_due_;  // those whose time has come: all of idle_ after a wait
  TimerQueue timers_;
  std::unordered_map<int, FdWatch*> watches_;
  int poll_hooks_ = 0;  // watches that have one
  std::unique_ptr<BackEnd> back_end_;
  unsigned entries_since_io_ = 0;
  unsigned taken_last_ = 0;        // entries that the last look into the inbox found
  bool streaming_ = false;         // so did the one before
  unsigned entries_to_clock_ = 0;  // until the clock is looked at again
  std::int64_t last_io_ns_ = 0;
  bool notified_ = false;               // a notify() took effect that no blocking poll has heeded
  bool asleep_ = false;                 // the inbox says sleeping, or a producer has replaced that
  std::int64_t wait_began_ns_ = 0;      // while asleep_
  std::int64_t spin_ns_ = 0;            // how long to busy-wait now, at most poll_max_ns
  unsigned spin_holdoff_ = 0;           // paying sleeps to see before spinning is tried again
  std::int64_t cpu_was_taken_ns_ = 0;   // when a busy wait last lost it
  unsigned spin_penalty_ = 0;           // what the holdoff will be next time
  long preemptions_ = 0;                // involuntary context switches of the thread so far
  std::uint64_t signals_owed_ = 0;      // pushes that found this context sleeping
  std::uint64_t signals_received_ = 0;  // eventfd counts read
  Statistics statistics_;
  unsigned polls_ = 0;               // on the stack
  unsigned callbacks_acquired_ = 0;  // acquires within dispatching, not released yet
  enum class Lock : std::uint8_t {
    kNo,        // not held: asleep, or nothing dispatched yet
    kHeld,      // by the outermost poll, which gives it up
    kAcquired,  // by this thread before it polled, which keeps it
  };
  Lock holds_ = Lock::kNo;
  std::unique_ptr<StallWatch> stall_watch_;  // null: nobody watches
};

/// acquire() for a scope. Not for coroutines: it may not cross a suspension.
class [[nodiscard]] ContextGuard {
 public:
  explicit ContextGuard(AioContext& context) : context_(context) { context_.acquire(); }
  ~ContextGuard() { context_.release(); }
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;

 private:
  AioContext& context_;
};

/// Makes a context current on this thread for as long as the scope lives. Scopes nest.
class ContextScope {
 public:
  explicit ContextScope(AioContext& context) noexcept;
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  CoContext* const outer_;
};

namespace detail {

/// A call that another thread waits for.
class RemoteCall : public CallbackEntry {
 public:
  explicit RemoteCall(std::function<void()> function);
  void post_and_wait(AioContext& context);

 private:
  static bool execute(CallbackEntry& entry) noexcept;

  std::function<void()> function_;
  std::exception_ptr exception_;
  std::mutex mutex_;
  std::condition_variable done_changed_;
  bool done_ = false;  // guarded by mutex_
};

}  // namespace detail

template <class Function>
auto AioContext::run(Function&& function) -> std::invoke_result_t<Function&> {
  using R = std::invoke_result_t<Function&>;
  static_assert(!detail::kIsTask<std::remove_cvref_t<R>>,
                "run() calls a function, and a call of a coroutine only makes a task: spawn() that "
                "on the context, or co_await move_to(context) and then the task");
  if (current() == this) return function();
  blocking_call_check("run()");
  if constexpr (std::is_reference_v<R>) {
    std::remove_reference_t<R>* result = nullptr;
    detail::RemoteCall call([&function, &result] {
      R&& got = function();
      result = std::addressof(got);
    });
    call.post_and_wait(*this);
    return static_cast<R>(*result);
  } else if constexpr (std::is_void_v<R>) {
    detail::RemoteCall call([&function] { function(); });
    call.post_and_wait(*this);
  } else {
    std::optional<R> result;
    detail::RemoteCall call([&function, &result] { result.emplace(function()); });
    call.post_and_wait(*this);
    return std::move(*result);
  }
}

}  // namespace roost
