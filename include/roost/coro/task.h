// SPDX-License-Identifier: MIT
// Task<T>: a lazily started piece of a coroutine.
//
// Calling a coroutine function that returns Task<T> only makes its frame; co_await starts it,
// within the same Coroutine, and gives its result or rethrows its exception. A Task<void> becomes a
// root by Coroutine::create() or spawn(); an exception that leaves a root aborts and names it.
//
// Threads: a task runs wherever its Coroutine runs.
// Lifetime: the Task object owns the frame. Arguments taken by reference, and a lambda's captures,
// must outlive the frame; a parameter taken by value lives in it.
#pragma once

#include <coroutine>
#include <exception>
#include <optional>
#include <utility>

#include "roost/coro/coroutine.h"

namespace roost {

template <class T>
class Task;

namespace detail {

template <class T>
inline constexpr bool kIsTask = false;
template <class T>
inline constexpr bool kIsTask<Task<T>> = true;

struct FinalAwaiter {
  bool await_ready() const noexcept { return false; }
  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) const noexcept {
    PromiseBase& promise = frame.promise();
    PromiseBase::set_next(*promise.co, promise.continuation);
  }
  void await_resume() const noexcept {}
};

// A PromiseBase is found from the address of its frame, whatever the type of the task.
inline constexpr std::size_t kMaxTaskAlignment = __STDCPP_DEFAULT_NEW_ALIGNMENT__;

/// There is no frame to go on with: aborts, and names the coroutine and the place.
[[noreturn, gnu::cold]] void await_of_no_task(const PromiseBase& parent);

struct TaskPromiseBase : PromiseBase {
  std::suspend_always initial_suspend() const noexcept { return {}; }
  FinalAwaiter final_suspend() const noexcept { return {}; }
  void unhandled_exception() noexcept { exception = std::current_exception(); }

  std::exception_ptr exception;
};

template <class T>
struct TaskPromise : TaskPromiseBase {
  static_assert(alignof(T) <= kMaxTaskAlignment,
                "a task's result has no stricter alignment than "
                "operator new gives");

  Task<T> get_return_object() noexcept;

  template <class U>
  requires std::convertible_to<U&&, T>
  void return_value(U&& value) { result.emplace(std::forward<U>(value)); }

  T take() {
    if (exception) [[unlikely]]
      std::rethrow_exception(std::exchange(exception, nullptr));
    return std::move(*result);
  }

  std::optional<T> result;
};

template <>
struct TaskPromise<void> : TaskPromiseBase {
  Task<void> get_return_object() noexcept;
  void return_void() const noexcept {}
  void take() {
    if (exception) [[unlikely]]
      std::rethrow_exception(std::exchange(exception, nullptr));
  }
};

}  // namespace detail

/// A piece of a coroutine that gives a T. Move-only. One that is destroyed before it was awaited
/// never runs, and its arguments are destroyed.
template <class T = void>
class [[nodiscard]] Task {
 public:
  using promise_type = detail::TaskPromise<T>;
  using Handle = std::coroutine_handle<promise_type>;

  Task() noexcept = default;
  explicit Task(Handle frame) noexcept : frame_(frame) {}
  Task(Task&& other) noexcept : frame_(std::exchange(other.frame_, nullptr)) {}
  Task& operator=(Task&& other) noexcept {
    Task moved(std::move(other));  // leaves with the old one
    std::swap(frame_, moved.frame_);
    return *this;
  }
  ~Task() {
    if (frame_) frame_.destroy();
  }

  class Awaiter;

  /// Runs the task to its end within the awaiting coroutine, and gives its result or rethrows its
  /// exception. A task can be awaited once; one that was moved from, or awaited, aborts.
  Awaiter operator co_await() && noexcept;

  /// Gives the frame away. For Coroutine.
  Handle release() noexcept { return std::exchange(frame_, nullptr); }

 private:
  Handle frame_;
};

template <class T>
class Task<T>::Awaiter {
 public:
  explicit Awaiter(Task child) noexcept : child_(std::move(child)) {}

  bool await_ready() const noexcept { return false; }

  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> parent) noexcept {
    static_assert(std::is_base_of_v<PromiseBase, Promise>, "await a Task inside a roost::Task");
    if (!child_.frame_) [[unlikely]]
      detail::await_of_no_task(parent.promise());
    Coroutine* co = parent.promise().co;
    child_.frame_.promise().co = co;
    child_.frame_.promise().continuation = parent;
    PromiseBase::set_next(*co, child_.frame_);
  }

  T await_resume() { return child_.frame_.promise().take(); }

 private:
  Task child_;  // its frame goes with the await expression
};

template <class T>
auto Task<T>::operator co_await() && noexcept -> Awaiter {
  return Awaiter(std::move(*this));
}

namespace detail {

template <class T>
Task<T> TaskPromise<T>::get_return_object() noexcept {
  return Task<T>(std::coroutine_handle<TaskPromise<T>>::from_promise(*this));
}

inline Task<void> TaskPromise<void>::get_return_object() noexcept {
  return Task<void>(std::coroutine_handle<TaskPromise<void>>::from_promise(*this));
}

}  // namespace detail

/// Creates a coroutine that runs `task`, and schedules it on `context`, where it begins in one of
/// the next iterations. Any thread. Throws std::bad_alloc; aborts if the context is closed. The
/// pointer is valid until the coroutine has ended, which may be before this returns.
inline Coroutine* spawn(CoContext& context, Task<void> task, const char* name = "coroutine",
                        Coroutine::Place place = Coroutine::Place::current()) {
  Coroutine* co = Coroutine::create(std::move(task), name, place);
  co_schedule(context, *co, place);
  return co;
}

}  // namespace roost
