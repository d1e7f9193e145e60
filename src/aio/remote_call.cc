// SPDX-License-Identifier: MIT
// Calls that other threads make in a context.
#include <exception>
#include <mutex>
#include <utility>
#include <vector>

#include "roost/aio/aio_context.h"
#include "roost/base/check.h"

namespace roost {

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
