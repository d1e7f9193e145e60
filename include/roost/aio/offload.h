// SPDX-License-Identifier: MIT
// What ThreadPool::run() returns: a callable is executed on a worker while the coroutine waits.
//
// Threads: awaited within a coroutine, which goes on at home. The callable runs on a worker: what
// it uses of the coroutine stands still meanwhile.
// Lifetime: the awaiter lives in the coroutine's frame until the await is over.
#pragma once

#include <cerrno>
#include <exception>
#include <memory>
#include <optional>
#include <stop_token>
#include <type_traits>
#include <utility>

#include "roost/aio/thread_pool.h"
#include "roost/base/result.h"
#include "roost/coro/coroutine.h"
#include "roost/coro/may_wait.h"
#include "roost/coro/task.h"

namespace roost {

namespace detail {

/// What a callable gave or threw.
template <class R>
class Outcome {
 public:
  static_assert(!std::is_reference_v<R>, "return a value, or a pointer");

  template <class F>
  void run(F& function) noexcept {
    try {
      value_.emplace(function());
    } catch (...) {
      exception_ = std::current_exception();
    }
  }
  bool exists() const noexcept { return value_ || exception_; }
  R take() {
    if (exception_) std::rethrow_exception(std::exchange(exception_, nullptr));
    return std::move(*value_);
  }

 private:
  std::optional<R> value_;
  std::exception_ptr exception_;
};

template <>
class Outcome<void> {
 public:
  template <class F>
  void run(F& function) noexcept {
    try {
      function();
    } catch (...) {
      exception_ = std::current_exception();
    }
    exists_ = true;
  }
  bool exists() const noexcept { return exists_; }
  void take() {
    if (exception_) std::rethrow_exception(std::exchange(exception_, nullptr));
  }

 private:
  bool exists_ = false;
  std::exception_ptr exception_;
};

/// The callable, where it was named; a copy of it, where it was a trivial temporary.
template <class F>
class Callable {
  static_assert(std::is_trivially_copyable_v<F> && std::is_trivially_destructible_v<F>,
                "give the callable a name first: GCC 12 destroys temporaries of a co_await "
                "expression twice");

 public:
  explicit Callable(F function) noexcept : function_(function) {}
  F& get() noexcept { return function_; }

 private:
  F function_;
};

template <class F>
class Callable<F&> {
 public:
  explicit Callable(F& function) noexcept : function_(&function) {}
  F& get() noexcept { return *function_; }

 private:
  F* function_;
};

template <class F>
class OffloadJob : public ThreadPool::Work {
 public:
  using R = std::invoke_result_t<std::remove_reference_t<F>&>;
  static_assert(!kIsTask<std::remove_cvref_t<R>>,
                "run() calls a function, and a call of a coroutine only makes a task: a worker has "
                "no context that it could run on");

  OffloadJob(ThreadPool& on, F&& f) noexcept : pool(on), function(std::forward<F>(f)) {
    run = [](ThreadPool::Work& work) noexcept {
      auto& job = static_cast<OffloadJob&>(work);
      job.outcome.run(job.function.get());
      // From here on the coroutine may run, and the job be gone.
      wake_waiter(*job.co);
    };
  }

  ThreadPool& pool;
  Callable<F> function;
  Outcome<R> outcome;
  Coroutine* co = nullptr;
};

}  // namespace detail

/// What ThreadPool::run(function) returns; F is an lvalue reference where the callable was named.
template <class F>
class [[nodiscard]] OffloadAwaiter {
  using Job = detail::OffloadJob<F>;

 public:
  OffloadAwaiter(ThreadPool& pool, F&& function) noexcept : job_(pool, std::forward<F>(function)) {}
  OffloadAwaiter(const OffloadAwaiter&) = delete;
  OffloadAwaiter& operator=(const OffloadAwaiter&) = delete;

  AwaitInPlace<OffloadAwaiter> operator co_await() && noexcept { return AwaitInPlace(*this); }

  bool await_ready() const noexcept { return false; }

  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) noexcept {
    job_.co = frame.promise().co;
    detail::check_may_wait(*job_.co, "a worker thread");
    submit_.await_suspend(frame);
  }

  typename Job::R await_resume() { return job_.outcome.take(); }

 private:
  struct Submit {
    Job* job;
    void operator()(Coroutine&) const noexcept { job->pool.submit(*job); }
  };

  Job job_;
  SuspendAwaiter<Submit> submit_ = suspend_waiting("a worker thread", Submit{&job_});
};

/// What ThreadPool::run(function, stop) returns. Awaited it gives a Result, which is the callable's
/// own where that gives one.
template <class F>
class [[nodiscard]] CancellableOffloadAwaiter {
  using Job = detail::OffloadJob<F>;
  using Given = typename Job::R;
  using R = std::conditional_t<kIsResult<Given>, Given, Result<Given>>;

 public:
  CancellableOffloadAwaiter(ThreadPool& pool, F&& function, std::stop_token stop) noexcept
      : job_(pool, std::forward<F>(function)), stop_(std::move(stop)) {}
  CancellableOffloadAwaiter(const CancellableOffloadAwaiter&) = delete;
  CancellableOffloadAwaiter& operator=(const CancellableOffloadAwaiter&) = delete;

  AwaitInPlace<CancellableOffloadAwaiter> operator co_await() && noexcept {
    return AwaitInPlace(*this);
  }

  bool await_ready() const noexcept { return stop_.stop_requested(); }

  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) noexcept {
    job_.co = frame.promise().co;
    detail::check_may_wait(*job_.co, "a worker thread");
    if (stop_.stop_possible()) callback_.emplace(stop_, OnStop{&job_});
    submit_.await_suspend(frame);
  }

  R await_resume() {
    callback_.reset();  // waits for it where it is running on another thread
    if (!job_.outcome.exists()) return fail(ECANCELED, "work for the thread pool");
    if constexpr (std::is_void_v<Given>) {
      job_.outcome.take();
      return {};
    } else {
      return job_.outcome.take();
    }
  }

 private:
  // The pool's mutex decides between this, a worker and the submission: whoever finds the work
  // queued takes it, and wakes the coroutine.
  struct OnStop {
    Job* job;
    void operator()() const noexcept {
      if (job->pool.withdraw(*job)) wake_waiter_later(*job->co);
    }
  };
  struct Submit {
    Job* job;
    void operator()(Coroutine& co) const noexcept {
      if (!job->pool.submit(*job)) wake_waiter(co);
    }
  };

  Job job_;
  const std::stop_token stop_;
  std::optional<std::stop_callback<OnStop>> callback_;
  SuspendAwaiter<Submit> submit_ = suspend_waiting("a worker thread", Submit{&job_});
};

template <class F>
auto ThreadPool::run(F&& function) {
  return OffloadAwaiter<F>(*this, std::forward<F>(function));
}

template <class F>
auto ThreadPool::run(F&& function, std::stop_token stop) {
  return CancellableOffloadAwaiter<F>(*this, std::forward<F>(function), std::move(stop));
}

}  // namespace roost
