// SPDX-License-Identifier: MIT
// The handlers of a context's descriptors.
#include <poll.h>

#include <memory>
#include <utility>

#include "roost/aio/aio_context.h"
#include "roost/base/check.h"

namespace roost {

void AioContext::set_fd_handler(int fd, FdHandler handler) {
  ROOST_CHECK(current() == this, "handler of descriptor {} changed outside of context '{}'", fd,
              name());
  const bool remove = !handler.read && !handler.write;
  auto found = watches_.find(fd);
  if (found == watches_.end()) {
    if (remove) return;
    found = watches_.emplace(fd, new FdWatch{.fd = fd, .handler = nullptr}).first;
  }
  FdWatch& watch = *found->second;
  if (watch.handler && watch.handler->poll) --poll_hooks_;
  if (remove) {
    watches_.erase(found);
    watch.handler = nullptr;
    watch.removed = true;
  } else {
    if (handler.poll) ++poll_hooks_;
    watch.handler = std::make_shared<const FdHandler>(std::move(handler));
  }
  // The thread that polls first makes the back end, and this may be another: it looks then.
  if (back_end_) {
    back_end_->watch_changed(watch);
  } else if (remove) {
    delete &watch;
  }
}

void AioContext::set_event_notifier(EventNotifier& notifier, std::function<void()> callback) {
  set_fd_handler(notifier.fd(), {.read =
                                     [&notifier, callback = std::move(callback)] {
                                       if (notifier.test_and_clear()) callback();
                                     },
                                 .write = nullptr,
                                 .poll = nullptr});
}

std::uint32_t FdWatch::wanted_events() const noexcept {
  if (!handler) return 0;
  return (handler->read ? POLLIN : 0u) | (handler->write ? POLLOUT : 0u);
}

void FdWatch::dispatch(std::uint32_t events) {
  // Held here: the callback may replace or remove itself. Each is looked up anew, since the first
  // may have taken the second away.
  constexpr std::uint32_t kBoth = POLLERR | POLLHUP | POLLNVAL;
  if (auto held = handler; held && held->read && (events & (POLLIN | kBoth))) held->read();
  if (auto held = handler; held && held->write && (events & (POLLOUT | kBoth))) held->write();
}

}  // namespace roost
