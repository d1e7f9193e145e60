// SPDX-License-Identifier: MIT
#include "roost/aio/context_binding.h"

#include <algorithm>
#include <cerrno>
#include <optional>
#include <string>
#include <utility>

#include "roost/aio/aio_context.h"
#include "roost/base/check.h"

namespace roost {

ContextBinding::~ContextBinding() {
  ROOST_CHECK(!moving_.load(std::memory_order_acquire),
              "a binding to context '{}' destroyed while it is moved", context().name());
  ROOST_CHECK(listeners_.empty(), "a binding to context '{}' destroyed before {} of its listeners",
              context().name(), listeners_.size());
}

void ContextBinding::check_on_home(const char* what) const {
  const AioContext& home = context();
  ROOST_CHECK(AioContext::current() == &home, "a listener of context '{}' {} outside of it",
              home.name(), what);
}

Task<Result<void>> ContextBinding::move_to(AioContext& to) {
  AioContext& caller = *AioContext::current();
  // Acquire pairs with the release below: this move sees what the last one did.
  if (moving_.exchange(true, std::memory_order_acquire)) {
    co_return fail(EBUSY, "moving to context '" + to.name() + "'");
  }
  // Nobody else changes it now.
  AioContext& from = context();
  Result<void> result;
  if (&from != &to) {
    if (&from != AioContext::current()) co_await roost::move_to(from);
    detach_all(from);
    under_way_ = true;
    // From here on listeners come and go over there. Release: see context().
    context_.store(&to, std::memory_order_release);
    co_await roost::move_to(to);
    result = attach_all(to, true);
    if (!result) {
      detach_all(to);
      under_way_ = true;
      context_.store(&from, std::memory_order_release);
      co_await roost::move_to(from);
      if (const auto back = attach_all(from, false); !back) {
        result = fail(result.error().code(), result.error().doing() + ", and back on context '" +
                                                 from.name() + "': " + back.error().message());
      }
    }
    if (&caller != AioContext::current()) co_await roost::move_to(caller);
  }
  moving_.store(false, std::memory_order_release);
  co_return result;
}

// Callbacks may add and remove any listener, so each step looks anew for the next one.

void ContextBinding::detach_all(AioContext& from) {
  for (;;) {
    const auto newest = std::find_if(listeners_.rbegin(), listeners_.rend(),
                                     [](const ContextListener* l) { return l->attached_; });
    if (newest == listeners_.rend()) return;
    ContextListener& listener = **newest;
    listener.attached_ = false;
    const auto callbacks = listener.callbacks_;
    callbacks->detach(from);
  }
}

// Returns the first error. Those that came while the object was under way are among those called.
Result<void> ContextBinding::attach_all(AioContext& to, bool stop_at_error) {
  for (ContextListener* listener : listeners_) listener->failed_ = false;
  under_way_ = false;
  std::optional<Error> first_error;
  for (;;) {
    const auto oldest =
        std::find_if(listeners_.begin(), listeners_.end(),
                     [](const ContextListener* l) { return !l->attached_ && !l->failed_; });
    if (oldest == listeners_.end()) break;
    ContextListener& listener = **oldest;
    bool gone = false;
    listener.attached_ = true;
    listener.gone_ = &gone;
    const auto callbacks = listener.callbacks_;
    Result<void> result = callbacks->attach(to);
    if (!gone) {
      listener.gone_ = nullptr;
      if (!result) {
        listener.attached_ = false;
        listener.failed_ = true;
      }
    }
    if (result) continue;
    if (!first_error) first_error = std::move(result.error());
    if (stop_at_error) break;
  }
  if (first_error) return std::unexpected(*std::move(first_error));
  return {};
}

ContextListener::ContextListener(ContextBinding& binding, Detach detach, Attach attach)
    : binding_(binding),
      callbacks_(std::make_shared<const Callbacks>(std::move(detach), std::move(attach))),
      attached_(!binding.under_way_) {
  binding_.check_on_home("was made");
  binding_.listeners_.push_back(this);
}

ContextListener::~ContextListener() {
  binding_.check_on_home("goes");
  if (gone_) *gone_ = true;
  std::erase(binding_.listeners_, this);
}

}  // namespace roost
