// SPDX-License-Identifier: MIT
// Coroutine: one thread of control with a home.
//
// A Coroutine runs a root Task and every child task awaited below it. It runs on the context of
// whoever enters it; the context it ran on last is its home, and co_wake() brings it back there
// from wherever it is called.
//
// Threads: enter() and yield() on the thread of the current context; co_schedule(), co_wake() and
// CoroutineRef from any thread, with or without a context, but neither from a signal handler nor
// while a thread lock is held (co_wake may enter).
// Lifetime: create() makes it; it destroys itself when its root task ends. Whoever holds the
// pointer of a suspended coroutine owns its next wake-up. The control block (not the frame) stays
// until every queue entry and CoroutineRef is gone.
//
// A driver loop on the stack of enter() resumes one frame after the other, so neither awaiting nor
// being woken makes the stack grow. docs/ARCHITECTURE.md tells the life of a wake-up.
#pragma once

#include <atomic>
#include <coroutine>
#include <cstddef>
#include <cstdint>
#include <new>
#include <source_location>
#include <type_traits>
#include <utility>

#include "roost/coro/context.h"
#include "roost/coro/frame_allocator.h"
#include "roost/coro/queue_entry.h"
#include "roost/coro/state_word.h"

namespace roost {

template <class T>
class Task;

/// The control block: the file's head says which thread may do what with it.
class Coroutine final {
 public:
  using Place = std::source_location;

  /// A coroutine that will run `task` once it is entered or scheduled. Its home, until it runs, is
  /// the current context, if any. `name` must outlive it (a literal). Any thread. Throws
  /// std::bad_alloc.
  static Coroutine* create(Task<void> task, const char* name = "coroutine",
                           Place place = Place::current());

  /// Ends a coroutine that is idle (created or yielded) without running it on: its frames and what
  /// lives in them are destroyed. Aborts in any other state.
  static void destroy(Coroutine* co, Place place = Place::current());

  Coroutine(const Coroutine&) = delete;
  Coroutine& operator=(const Coroutine&) = delete;

  /// Runs the coroutine on the current context until it suspends or ends, and after it those it
  /// woke. A pending co_schedule of it is cancelled.
  /// REQUIRES: a current context; the coroutine is idle or scheduled by somebody who knows. Where
  /// it is scheduled on another thread's context, its turn may come at the same time: then use a
  /// CoroutineRef and try_enter().
  void enter(Place place = Place::current());

  /// The coroutine whose body is executing on this thread; null outside of any, and within the
  /// publish step of a suspension.
  [[gnu::noinline, gnu::pure]] static Coroutine* self() noexcept;

  /// The context on which it ran last; null if it never ran and was made outside of any.
  /// Stable only while the caller holds the coroutine suspended, or is the coroutine.
  CoContext* home() const noexcept { return home_.load(std::memory_order_acquire); }

  /// The literal it was created with. While the control block is sure to be there.
  const char* name() const noexcept { return name_.load(std::memory_order_relaxed); }

  Place created_at() const noexcept { return created_at_.load(std::memory_order_relaxed); }
  /// Who scheduled, woke or entered it last; line 0: nobody yet.
  Place placed_at() const noexcept { return placed_at_.load(std::memory_order_relaxed); }

  /// What a coroutine in the wait of a primitive waits for; null in every other state. As home().
  const char* waits_for() const noexcept {
    return state() == CoState::kWaiting ? waits_for_.load(std::memory_order_relaxed) : nullptr;
  }

  /// A snapshot for messages and tests.
  CoState state() const noexcept { return state_.peek().state(); }

  /// For coroutine locks: this coroutine, which is running, owns one more, or one less. One that
  /// ends with a lock aborts.
  void lock_taken() noexcept { locks_.store(locks() + 1, std::memory_order_relaxed); }
  void lock_released() noexcept { locks_.store(locks() - 1, std::memory_order_relaxed); }
  std::uint32_t locks() const noexcept { return locks_.load(std::memory_order_relaxed); }

 private:
  friend struct Driver;
  friend struct CoroutineEntry;
  friend struct CensusAccess;
  friend class CoroutineRef;
  friend struct PromiseBase;
  template <class T>
  friend class Task;
  template <class F>
  friend class SuspendAwaiter;
  friend class MoveAwaiter;
  friend void co_schedule(CoContext&, Coroutine&, Place);
  friend void co_wake(Coroutine&, Place);
  friend void wake_waiter(Coroutine&, Place);
  friend void wake_waiter_later(Coroutine&, Place);
  friend bool run_entry(ThreadState&, CoContext&, CoroutineEntry&) noexcept;
  friend void prefetch_entry(const CoroutineEntry&) noexcept;
  friend bool drop_entry(CoroutineEntry&) noexcept;

  // Finishes a suspension from the driver: copies the publish step off the frame, settles the
  // state, and only then runs the step.
  using Publish = void (*)(Coroutine&, ThreadState&, const void* closure) noexcept;

  Coroutine() noexcept : entry_(true) {}
  ~Coroutine() = default;
  bool runs_on_this_thread() const noexcept;
  // A block is constructed once, and then used for one coroutine after the other.
  static void construct_block(void* block) noexcept;
  [[gnu::noinline]] static void release_block(Coroutine& co) noexcept;

  void suspend_at(std::coroutine_handle<> frame, Place place, Publish publish,
                  const void* closure) noexcept {
    next_ = nullptr;
    suspended_at_ = frame;
    awaits_at_.store(place, std::memory_order_relaxed);
    publish_ = publish;
    closure_ = closure;
  }
  // The tick before the state: from then on it may change hands.
  void stamp(const ThreadState& thread) noexcept {
    since_.store(thread.context->tick(), std::memory_order_relaxed);
  }
  void settle(const ThreadState& thread, bool waiting) noexcept {
    stamp(thread);
    state_.suspend(waiting);
  }
  static void finish_move(Coroutine& co, ThreadState& thread, const void* awaiter) noexcept;
  void post_schedule(CoContext& context, ThreadState& thread,
                     const StateWord<RealPlatform>::Schedule& schedule, Place place) noexcept;
  [[gnu::noinline]] CoroutineEntry& make_spare_entry() noexcept;
  [[gnu::noinline]] void post_elsewhere(CoContext& context, CoroutineEntry& entry) noexcept;
  static void wake(Coroutine& co, bool owner, Place place);
  [[noreturn, gnu::cold]] void misuse(const char* what, Place place, CoStateValue seen) const;

  // Two cache lines; what scheduling touches is in the first. What the census reads, on any thread
  // and at any time, is atomic, and none of it is the first word, which a free block has its link
  // in.

  std::coroutine_handle<> root_;
  // Anybody, by the state word's rules.
  StateWord<RealPlatform> state_;
  CoroutineEntry entry_;                   // the producer that got `embedded`, then its queue
  std::atomic<Place> placed_at_;           // who scheduled, woke or entered it last, for messages
  std::atomic<CoContext*> home_{nullptr};  // written by the driver while running; read by wakers
  std::atomic<Place> created_at_;          // set once in its life

  // The driver while running; otherwise whoever claims the coroutine next. (All of what a
  // suspension stores is in this line: compilers join neighbouring stores, and across two lines
  // that is slow.)
  std::coroutine_handle<> suspended_at_;  // where a suspended coroutine goes on
  std::coroutine_handle<> next_;          // what to resume next; null: suspended or ended
  Publish publish_ = nullptr;             // set by a suspension, with its closure
  union {
    const void* closure_ = nullptr;
    Coroutine* link_;  // the driver's wake list while listed, when the closure is long done with
  };
  std::atomic<const char*> waits_for_{nullptr};  // the name of the wait while waiting
  std::atomic<Place> awaits_at_;                 // the co_await that suspended it last

  // Set once in its life. Null: the block is free, or being made ready.
  std::atomic<const char*> name_{nullptr};

  std::atomic<std::uint32_t> since_{0};  // its context's tick when it was made or last suspended
  std::atomic<std::uint32_t> locks_{0};  // coroutine locks that it owns
};
static_assert(sizeof(Coroutine) == kControlBlockBytes);

inline Coroutine& CoroutineEntry::coroutine() const noexcept {
  if (!embedded) return static_cast<const SpareEntry*>(this)->co;
    // The inverse of &co.entry_. Both compilers give offsetof of any class without virtual bases.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Winvalid-offsetof"
  constexpr std::size_t kOffset = offsetof(Coroutine, entry_);
#pragma GCC diagnostic pop
  return *reinterpret_cast<Coroutine*>(reinterpret_cast<std::uintptr_t>(this) - kOffset);
}

/// Enters `co` from `context`'s loop. Moves a suspended coroutine to another home.
/// Aborts, with both places, if it is running, scheduled already or in the wait of a primitive, and
/// if the context is closed. Any thread.
void co_schedule(CoContext& context, Coroutine& co,
                 Coroutine::Place place = Coroutine::Place::current());

/// Enters `co` at home: through the queue of its home from another context; once the current
/// coroutine suspends, when called under a driver loop of the same context; at once otherwise.
/// Aborts like co_schedule. Any thread, without a thread lock held that the coroutine may want.
void co_wake(Coroutine& co, Coroutine::Place place = Coroutine::Place::current());

/// co_wake for the primitive that suspended `co` with suspend_waiting(). Any thread, as co_wake().
void wake_waiter(Coroutine& co, Coroutine::Place place = Coroutine::Place::current());

/// As wake_waiter(), but never enters `co` on the caller's stack: where wake_waiter() would, it
/// takes its turn in its home's queue. For wake-ups that come from code which does not expect it: a
/// foreign library's callback, a stop callback, a destructor.
void wake_waiter_later(Coroutine& co, Coroutine::Place place = Coroutine::Place::current());

/// A reference that keeps a coroutine's control block, so that it can be asked and entered although
/// it may run or end elsewhere at the same time.
/// Threads: each reference belongs to one thread at a time; make it while the coroutine is known to
/// be suspended or is oneself, or by copying another.
class CoroutineRef {
 public:
  CoroutineRef() noexcept = default;
  explicit CoroutineRef(Coroutine& co);
  CoroutineRef(const CoroutineRef& other);
  CoroutineRef(CoroutineRef&& other) noexcept : co_(std::exchange(other.co_, nullptr)) {}
  CoroutineRef& operator=(CoroutineRef other) noexcept {
    std::swap(co_, other.co_);
    return *this;
  }
  ~CoroutineRef();

  /// As enter(), but reports that it lost (the coroutine is running, ended, about to be woken or in
  /// a primitive's wait) instead of aborting.
  [[nodiscard]] bool try_enter(Coroutine::Place place = Coroutine::Place::current());

  /// Whether it has ended; where not, it may a moment later. REQUIRES: not empty.
  bool ended() const noexcept;
  /// Null: empty.
  Coroutine* get() const noexcept { return co_; }

 private:
  Coroutine* co_ = nullptr;
};

/// The turn of a coroutine's entry has come at `context`, which is current: runs the coroutine if
/// the entry is live, drops it otherwise. Returns whether it ran. For contexts.
bool run_entry(ThreadState& thread, CoContext& context, CoroutineEntry& entry) noexcept;

/// The turn of `entry` comes soon: fetches what its coroutine will touch. For contexts.
void prefetch_entry(const CoroutineEntry& entry) noexcept;

/// Drops an entry that will get no turn, because its context is closing. True if it was live: its
/// coroutine is lost. For contexts.
bool drop_entry(CoroutineEntry& entry) noexcept;

/// Base of every promise in a coroutine's await chain.
struct PromiseBase {
  using Place = std::source_location;

  Coroutine* co = nullptr;               // set when the task starts
  std::coroutine_handle<> continuation;  // the awaiting parent; null in a root task
  Place awaits_at;                       // the co_await that it executed last

  static void* operator new(std::size_t size) { return allocate_frame(size); }
  static void operator delete(void* frame, std::size_t size) noexcept { free_frame(frame, size); }

  /// Notes the place and gives the awaiter. Small ones by value: to a temporary that is passed by
  /// reference GCC gives a place in the frame, and copies it to a second one to await it.
  template <class Awaiter>
  requires std::is_trivially_copyable_v<Awaiter> Awaiter
  await_transform(Awaiter awaiter, Place place = Place::current())
  noexcept {
    awaits_at = place;
    return awaiter;
  }

  template <class T>
  auto await_transform(Task<T> task, Place place = Place::current()) noexcept {
    awaits_at = place;
    return std::move(task).operator co_await();
  }

  template <class Awaitable>
  requires(!std::is_trivially_copyable_v<std::remove_cvref_t<Awaitable>>) decltype(auto)
      await_transform(Awaitable&& awaitable, Place place = Place::current()) noexcept {
    awaits_at = place;
    if constexpr (requires { static_cast<Awaitable&&>(awaitable).operator co_await(); }) {
      return static_cast<Awaitable&&>(awaitable).operator co_await();
    } else {
      // Never an rvalue reference: what that names would be moved.
      return static_cast<std::remove_reference_t<Awaitable>&>(awaitable);
    }
  }

  /// Tells the driver what to resume next.
  static void set_next(Coroutine& co, std::coroutine_handle<> next) noexcept { co.next_ = next; }
};

/// For awaiters that cannot be moved, since something points into them: they return it from
/// `operator co_await() &&`. GCC 12 would move a temporary that comes out of await_transform() into
/// the frame; this way it moves the pointer, and the temporary stays until the await is over.
template <class Awaiter>
class AwaitInPlace {
 public:
  explicit AwaitInPlace(Awaiter& awaiter) noexcept : awaiter_(&awaiter) {}

  bool await_ready() { return awaiter_->await_ready(); }
  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) noexcept {
    awaiter_->await_suspend(frame);
  }
  decltype(auto) await_resume() { return awaiter_->await_resume(); }

 private:
  Awaiter* awaiter_;
};

/// What suspend() and suspend_waiting() return.
template <class F>
class [[nodiscard]] SuspendAwaiter {
  static_assert(std::is_trivially_copyable_v<F> && std::is_trivially_destructible_v<F>,
                "a publish step captures pointers and numbers only: the driver copies it, and GCC "
                "12 destroys temporaries of a co_await expression twice");
  static_assert(std::is_nothrow_invocable_v<F&, Coroutine&>,
                "a publish step is noexcept: there is nobody left to catch");

 public:
  SuspendAwaiter(const char* waits_for, F publish) noexcept
      : waits_for_(waits_for), publish_(publish) {}

  bool await_ready() const noexcept { return false; }

  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) noexcept {
    static_assert(std::is_base_of_v<PromiseBase, Promise>, "await this inside a roost::Task");
    PromiseBase& promise = frame.promise();
    Coroutine& co = *promise.co;
    co.waits_for_.store(waits_for_, std::memory_order_relaxed);
    co.suspend_at(frame, promise.awaits_at, waits_for_ ? &finish<true> : &finish<false>, &publish_);
  }

  void await_resume() const noexcept {}

 private:
  template <bool kWaiting>
  static void finish(Coroutine& co, ThreadState& thread, const void* closure) noexcept {
    F publish = *static_cast<const F*>(closure);
    co.settle(thread, kWaiting);
    // From here on another thread may be running, or have ended, the coroutine.
    publish(co);
  }

  const char* waits_for_;
  F publish_;
};

/// Suspends the current coroutine; then, from the driver loop, calls `publish(coroutine)`, which
/// may show it to other threads. Whoever gets to hold it may enter, schedule or wake it.
template <class F>
SuspendAwaiter<F> suspend(F publish) noexcept {
  return SuspendAwaiter<F>(nullptr, publish);
}

/// As suspend(), for primitives: only wake_waiter() ends it, anything else aborts and names the
/// wait. `waits_for` is a literal.
template <class F>
SuspendAwaiter<F> suspend_waiting(const char* waits_for, F publish) noexcept {
  return SuspendAwaiter<F>(waits_for, publish);
}

/// What move_to() returns: suspends the coroutine and schedules it, in one transition.
class [[nodiscard]] MoveAwaiter {
 public:
  MoveAwaiter(CoContext& to, Coroutine::Place place) noexcept : to_(&to), place_(place) {}

  bool await_ready() const noexcept { return false; }

  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) noexcept {
    static_assert(std::is_base_of_v<PromiseBase, Promise>, "await this inside a roost::Task");
    PromiseBase& promise = frame.promise();
    promise.co->suspend_at(frame, promise.awaits_at, &Coroutine::finish_move, this);
  }

  void await_resume() const noexcept {}

 private:
  friend class Coroutine;
  CoContext* to_;
  Coroutine::Place place_;
};

/// `co_await move_to(context)`: goes to the end of the queue of `context`: moves there or, where it
/// is the own one, lets others run. Aborts if the context is closed.
inline MoveAwaiter move_to(CoContext& context,
                           Coroutine::Place place = Coroutine::Place::current()) noexcept {
  return MoveAwaiter(context, place);
}

/// What yield() publishes.
struct PublishNothing {
  void operator()(Coroutine&) const noexcept {}
};

/// Suspends the current coroutine until whoever holds it enters, schedules or wakes it.
inline SuspendAwaiter<PublishNothing> yield() noexcept { return suspend(PublishNothing{}); }

}  // namespace roost
