// SPDX-License-Identifier: MIT
#include "roost/sync/stop_scope.h"

#include "roost/aio/aio_context.h"
#include "roost/base/check.h"

namespace roost {

void StopScope::set_deadline(std::int64_t deadline_ns) {
  AioContext* const context = AioContext::current();
  ROOST_CHECK(context, "a deadline set outside of any context");
  ROOST_CHECK(!timer_, "a second deadline set on a StopScope of context '{}'", context->name());
  if (deadline_ns <= context->clock().now_ns()) {
    stop(Reason::kDeadline);
    return;
  }
  timer_.emplace(*context, [this] { stop(Reason::kDeadline); });
  timer_->arm_at(deadline_ns);
}

void StopScope::stop(Reason reason) noexcept {
  Reason expected = Reason::kNone;
  // Release pairs with the acquire in reason(). Whoever sees the token stopped sees the reason,
  // too, since the reason comes first.
  if (!reason_.compare_exchange_strong(expected, reason, std::memory_order_release,
                                       std::memory_order_relaxed)) {
    return;
  }
  // A copy: what is stopped may end, and this scope with it, before all of its callbacks ran.
  std::stop_source source = source_;
  source.request_stop();
}

}  // namespace roost
