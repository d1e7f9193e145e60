// SPDX-License-Identifier: MIT
// TaskGroup: runs child coroutines that never outlive it. The first failure stops the rest.
//
//   Task<Result<void>> mirror(Disk& from, Disk& to, std::stop_token stop) {
//     TaskGroup group({.name = "mirror", .stop = stop, .max_running = 16});
//     for (std::uint64_t at = 0; at < from.size(); at += kChunk) {
//       if (!co_await group.room()) break;
//       group.spawn(copy_chunk(from, to, at, group.stop_token()));
//     }
//     co_return co_await group.join();
//   }
//
// A destructor cannot suspend, so a group cannot wait for its children by going out of scope: it is
// joined. A group that spawned and is destroyed without having been joined aborts, whether its
// children have ended by then or not, so that the mistake does not depend on luck. Where an
// exception may pass between the first spawn and the join, let the group run the part that spawns:
//
//   TaskGroup group({.name = "mirror", .stop = stop});
//   co_return co_await group.run(spawn_copies(group, from, to));
//
// run() joins however that task ends. Both take Task objects, no callables: a lambda with captures
// would have to outlive its coroutine, and GCC 12 destroys one that is made within a co_await
// expression twice.
//
// Threads: made, joined and destroyed by one coroutine. spawn(), stop_token() and request_stop()
// from it and from the children, on any context.
// Lifetime: when join() returns, each child has ended, its frame and arguments are gone, and
// nothing of it touches the group any more. The contexts of the children outlive them.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <stop_token>
#include <utility>

#include "roost/base/result.h"
#include "roost/coro/may_wait.h"
#include "roost/coro/task.h"
#include "roost/sync/child_set.h"
#include "roost/sync/stop_scope.h"

namespace roost {

/// How a group is made.
struct TaskGroupOptions {
  /// Also that of the children. Outlives the group (a literal).
  const char* name = "task group";
  /// Stops the group.
  std::stop_token stop = {};
  /// Children that run at the same time; what is spawned beyond waits for its turn, in order.
  std::uint32_t max_running = ~std::uint32_t{0};
};

/// Children, and the coroutine that joins them.
class TaskGroup : private detail::ChildSet {
 public:
  using Place = Coroutine::Place;

  explicit TaskGroup(TaskGroupOptions options = {}, Place place = Place::current());
  ~TaskGroup();

  /// Starts `task` as a child, on the current context, at its next turn. A child fails by an error
  /// or an exception. In a group that was stopped it is not started, and destroyed instead.
  template <class T>
  void spawn(Task<T> task, Place place = Place::current()) {
    spawn(current(place), std::move(task), place);
  }
  /// Likewise, on `context`.
  template <class T>
  void spawn(CoContext& context, Task<T> task, Place place = Place::current()) {
    static_assert(std::is_void_v<T> || std::is_same_v<T, Result<void>>,
                  "nobody would get the child's value: when_all() gives values");
    start_child(context, detail::run_child(*this, std::move(task), Take<T>{this}), place);
  }

  class [[nodiscard]] Room;

  /// Suspends until fewer than max_running children run: for a loop that would otherwise make all
  /// of its tasks in advance. One coroutine at a time. False: the group was stopped.
  Room room() noexcept;

  /// For the children.
  std::stop_token stop_token() const noexcept { return scope_.token(); }

  /// Asks the children to end, without this being a failure: that a child ended with ECANCELED is
  /// then not reported.
  void request_stop() noexcept { scope_.request_stop(); }

  /// To give the group a deadline; join() then fails with ETIMEDOUT.
  StopScope& scope() noexcept { return scope_; }

  /// Waits until all children have ended; to be called once. Returns the first error, rethrows the
  /// first exception, whichever was earlier, and fails with ECANCELED where a child was not started
  /// because the group was stopped from outside. Children may spawn further ones meanwhile.
  Task<Result<void>> join();

  /// Awaits `body`, stops the group if that fails, and joins. A failure of `body` is one of the
  /// group.
  template <class T>
  Task<Result<void>> run(Task<T> body);

  /// Children that have not ended, for messages and tests. Any thread.
  std::uint32_t children() const noexcept { return running(); }

 private:
  template <class Set, class T, class Take>
  friend Task<void> detail::run_child(Set&, Task<T>, Take);

  template <class T>
  struct Take {
    TaskGroup* group;
    void operator()(T result) const {
      if (!result) group->fail(std::move(result.error()));
    }
  };

  // A child that waits for its turn.
  struct Queued : FrameAllocated {
    CoContext* context;
    Coroutine* co = nullptr;
    Queued* next = nullptr;
    explicit Queued(CoContext& c) noexcept : context(&c) {}
  };

  bool bounded() const noexcept { return max_running_ != ~std::uint32_t{0}; }
  bool has_room() const noexcept { return !queue_head_ && started_ < max_running_; }
  bool room_or_stopped() noexcept;
  CoContext& current(Place place) const;
  void start_child(CoContext& context, Task<void> body, Place place);
  void not_started() noexcept;
  void give_turn_away() noexcept;

  // For run_child(); they hide those of ChildSet.
  using detail::ChildSet::fail;
  void fail(Error error) noexcept;
  void leave() noexcept;

  const std::uint32_t max_running_;
  const Place made_at_;
  StopScope scope_;
  std::atomic<bool> spawned_{false};  // set by whoever spawns first
  bool joined_ = false;               // owner

  std::mutex turns_mutex_;  // guards what follows, if bounded()
  std::uint32_t started_ = 0;
  Queued* queue_head_ = nullptr;  // empty unless max_running_ are started
  Queued* queue_tail_ = nullptr;
  Coroutine* room_waiter_ = nullptr;
};

template <>
struct TaskGroup::Take<void> {
  TaskGroup* group;
  void operator()() const noexcept {}
};

template <class T>
Task<Result<void>> TaskGroup::run(Task<T> body) {
  try {
    if constexpr (std::is_void_v<T>) {
      co_await std::move(body);
    } else {
      static_assert(std::is_same_v<T, Result<void>>, "nobody would get the value");
      Result<void> result = co_await std::move(body);
      if (!result) fail(std::move(result.error()));
    }
  } catch (...) {
    fail(std::current_exception());
  }
  co_return co_await join();
}

class TaskGroup::Room {
 public:
  explicit Room(TaskGroup& group) noexcept
      : group_(group), suspension_(suspend_waiting("room in a task group", Publish{&group})) {}

  bool await_ready() const noexcept { return group_.room_or_stopped(); }
  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) noexcept {
    detail::check_may_wait(*frame.promise().co, "room in a task group");
    suspension_.await_suspend(frame);
  }
  bool await_resume() const noexcept { return !group_.scope_.stopped(); }

 private:
  struct Publish {
    TaskGroup* group;
    void operator()(Coroutine& co) const noexcept;
  };

  TaskGroup& group_;
  SuspendAwaiter<Publish> suspension_;
};

inline TaskGroup::Room TaskGroup::room() noexcept { return Room(*this); }

}  // namespace roost
