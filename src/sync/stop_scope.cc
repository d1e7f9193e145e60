// SPDX-License-Identifier: MIT
#include "roost/sync/stop_scope.h"

#include <mutex>
#include <utility>

#include "roost/aio/aio_context.h"
#include "roost/aio/timer.h"
#include "roost/base/check.h"
#include "roost/base/platform.h"
#include "roost/coro/frame_allocator.h"
#include "roost/coro/queue_entry.h"

namespace roost {

namespace {

// By value: what is stopped may end, and the scope with it, before all of its callbacks ran.
void ask(std::stop_source source) noexcept { source.request_stop(); }

}  // namespace

// The timer of a deadline. It lives, fires and goes on its home; who clears it elsewhere takes the
// scope away from it and posts it there.
class StopScope::Deadline : public FrameAllocated, private CallbackEntry {
 public:
  Deadline(AioContext& home, StopScope& scope, std::int64_t deadline_ns)
      : CallbackEntry(&arrive), home_(home), scope_(&scope), timer_(home, [this] { fire(); }) {
    timer_.arm_at(deadline_ns);
  }

  void clear() noexcept {
    if (AioContext::current() == &home_) {
      delete this;
      return;
    }
    {
      // From here on fire() has nothing to do with the scope, even if it is running.
      std::lock_guard guard(mutex_);
      scope_ = nullptr;
    }
    ROOST_CHECK(home_.post(*this), "a deadline outlived its context '{}'", home_.name());
  }

 private:
  static bool arrive(CallbackEntry& entry) noexcept {
    delete static_cast<Deadline*>(&entry);
    return false;
  }

  void fire() noexcept {
    std::stop_source source(std::nostopstate);
    {
      std::lock_guard guard(mutex_);
      if (!scope_ || !scope_->claim(Reason::kDeadline)) return;
      source = scope_->source_;
    }
    ask(std::move(source));
  }

  AioContext& home_;
  RealPlatform::Mutex mutex_;
  StopScope* scope_;  // guarded by mutex_; null: cleared
  Timer timer_;
};

void StopScope::set_deadline(std::int64_t deadline_ns) {
  AioContext* const context = AioContext::current();
  ROOST_CHECK(context, "a deadline set outside of any context");
  ROOST_CHECK(!deadline_, "a second deadline set on a StopScope of context '{}'", context->name());
  if (deadline_ns <= context->clock().now_ns()) {
    stop(Reason::kDeadline);
    return;
  }
  deadline_ = new Deadline(*context, *this, deadline_ns);
}

void StopScope::forget_deadline() noexcept { std::exchange(deadline_, nullptr)->clear(); }

bool StopScope::claim(Reason reason) noexcept {
  Reason expected = Reason::kNone;
  // Release pairs with the acquire in reason(). Whoever sees the token stopped sees the reason,
  // too, since the reason comes first.
  return reason_.compare_exchange_strong(expected, reason, std::memory_order_release,
                                         std::memory_order_relaxed);
}

void StopScope::stop(Reason reason) noexcept {
  if (claim(reason)) ask(source_);
}

}  // namespace roost
