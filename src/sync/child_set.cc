// SPDX-License-Identifier: MIT
#include "roost/sync/child_set.h"

#include "roost/base/check.h"

namespace roost::detail {

Coroutine* ChildSet::create(Task<void> body, Coroutine::Place place) {
  Gate::Pass pass = gate_.try_pass();
  ROOST_CHECK(pass, "a task spawned at {} in '{}', which has been joined", describe(place), name());
  Coroutine* const co = Coroutine::create(std::move(body), name(), place);
  pass.release();
  return co;
}

void ChildSet::fail(Error error) noexcept {
  {
    std::lock_guard lock(mutex_);
    if (error_ || exception_) return;
    error_ = std::move(error);
  }
  if (scope_) scope_->request_stop();
}

void ChildSet::fail(std::exception_ptr exception) noexcept {
  {
    std::lock_guard lock(mutex_);
    if (error_ || exception_) return;
    exception_ = std::move(exception);
  }
  if (scope_) scope_->request_stop();
}

Result<void> ChildSet::outcome() {
  if (exception_) std::rethrow_exception(std::exchange(exception_, nullptr));
  if (error_) return std::unexpected(std::move(*error_));
  return {};
}

}  // namespace roost::detail
