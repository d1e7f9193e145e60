// SPDX-License-Identifier: MIT
#include "roost/sync/task_group.h"

#include <memory>

#include "roost/base/check.h"

namespace roost {

TaskGroup::TaskGroup(TaskGroupOptions options, Place place)
    : ChildSet(options.name, &scope_),
      max_running_(options.max_running),
      made_at_(place),
      scope_(std::move(options.stop)) {
  ROOST_CHECK(max_running_ > 0, "task group '{}' that may run nothing", name());
}

TaskGroup::~TaskGroup() {
  // Relaxed: whoever spawned had the group from its owner, or was joined.
  ROOST_CHECK(joined_ || !spawned_.load(std::memory_order_relaxed),
              "task group '{}', made at {}, destroyed without join(), with {} children running",
              name(), describe(made_at_), running());
}

CoContext& TaskGroup::current(Place place) const {
  CoContext* const context = this_thread().context;
  ROOST_CHECK(context, "a task spawned at {} in task group '{}' outside of any context",
              describe(place), name());
  return *context;
}

void TaskGroup::start_child(CoContext& context, Task<void> body, Place place) {
  spawned_.store(true, std::memory_order_relaxed);
  if (scope_.stopped()) {
    not_started();
    return;
  }
  if (!bounded()) {
    start(context, std::move(body), place);
    return;
  }
  auto queued = std::make_unique<Queued>(context);
  queued->co = create(std::move(body), place);
  {
    std::lock_guard lock(turns_mutex_);
    if (started_ == max_running_) {
      Queued* const last = queued.release();
      (queue_head_ ? queue_tail_->next : queue_head_) = last;
      queue_tail_ = last;
      return;
    }
    ++started_;
  }
  co_schedule(context, *queued->co, place);
}

void TaskGroup::not_started() noexcept {
  fail(Error(ECANCELED, fmt::format("{} (a task was not started)", name())));
}

void TaskGroup::fail(Error error) noexcept {
  // That is what was asked for. A failure before the request has been noted before it, too.
  if (error.code() == ECANCELED && scope_.reason() == StopScope::Reason::kRequested) return;
  ChildSet::fail(std::move(error));
}

void TaskGroup::leave() noexcept {
  if (bounded()) give_turn_away();
  ChildSet::leave();
}

// A child has ended but still counts, so the group stands.
void TaskGroup::give_turn_away() noexcept {
  Queued* next = nullptr;
  Queued* dropped = nullptr;
  Coroutine* waiter = nullptr;
  {
    std::lock_guard lock(turns_mutex_);
    if (scope_.stopped()) dropped = std::exchange(queue_head_, nullptr);
    if (queue_head_) {
      next = std::exchange(queue_head_, queue_head_->next);
    } else {
      --started_;
      waiter = std::exchange(room_waiter_, nullptr);
    }
  }
  if (next) {
    co_schedule(*next->context, *next->co);
    delete next;
  }
  while (dropped) {
    const std::unique_ptr<Queued> gone(std::exchange(dropped, dropped->next));
    Coroutine::destroy(gone->co);
    not_started();
    ChildSet::leave();
  }
  if (waiter) wake_waiter_later(*waiter);
}

bool TaskGroup::room_or_stopped() noexcept {
  if (!bounded() || scope_.stopped()) return true;
  std::lock_guard lock(turns_mutex_);
  return has_room();
}

void TaskGroup::Room::Publish::operator()(Coroutine& co) const noexcept {
  {
    std::lock_guard lock(group->turns_mutex_);
    ROOST_CHECK(!group->room_waiter_, "two coroutines wait for room in task group '{}'",
                group->name());
    // Where it was stopped, the children end, and the next one that does wakes who waits.
    if (!group->has_room()) {
      group->room_waiter_ = &co;
      return;
    }
  }
  wake_waiter(co);
}

Task<Result<void>> TaskGroup::join() {
  ROOST_CHECK(!joined_, "task group '{}' joined twice", name());
  co_await idle();
  close();
  joined_ = true;
  Result<void> result = outcome();
  if (!result && result.error().code() == ECANCELED &&
      scope_.reason() == StopScope::Reason::kDeadline) {
    co_return roost::fail(ETIMEDOUT, result.error().doing());
  }
  co_return result;
}

}  // namespace roost
