// SPDX-License-Identifier: MIT
// How a context begins and ends, and the list of those that live.
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <mutex>
#include <system_error>
#include <vector>

#include "aio/bottom_half_core.h"
#include "roost/aio/aio_context.h"
#include "roost/aio/poll_budget.h"
#include "roost/aio/stall_detector.h"
#include "roost/aio/thread_pool.h"
#include "roost/aio/tracer.h"
#include "roost/base/check.h"
#include "roost/coro/census.h"

namespace roost {

namespace {

// The living contexts, and small numbers for the state words of coroutines, unique among them.
class ContextIndices {
 public:
  std::uint32_t take() {
    std::lock_guard lock(mutex_);
    for (std::uint32_t i = 0; i < used_.size(); ++i) {
      if (!used_[i]) {
        used_[i] = true;
        return i;
      }
    }
    if (used_.size() == CoStateValue::kMaxContexts) {
      throw std::system_error(EMFILE, std::generic_category(), "too many contexts");
    }
    used_.push_back(true);
    return static_cast<std::uint32_t>(used_.size() - 1);
  }

  void give_back(std::uint32_t index) noexcept {
    std::lock_guard lock(mutex_);
    used_[index] = false;
  }

  void add(AioContext& context) {
    std::lock_guard lock(mutex_);
    living_.push_back(&context);
  }

  void remove(AioContext& context) noexcept {
    std::lock_guard lock(mutex_);
    std::erase(living_, &context);
  }

  void for_each(const std::function<void(AioContext&)>& visit) {
    std::lock_guard lock(mutex_);
    for (AioContext* context : living_) visit(*context);
  }

 private:
  std::mutex mutex_;
  std::vector<bool> used_;
  std::vector<AioContext*> living_;  // open ones
};

ContextIndices& context_indices() {
  static ContextIndices indices;
  return indices;
}

// For a debugger, which finds it without running code (scripts/gdb/roost-gdb.py).
[[gnu::used]] const ContextIndices* const every_context = &context_indices();

bool choose_io_uring(EventLoop loop, FileIo file_io) {
  if (file_io == FileIo::kLinuxAio && !linux_aio_available()) {
    throw std::system_error(ENOSYS, std::generic_category(), "Linux AIO");
  }
  if (file_io == FileIo::kIoUring) {
    if (loop == EventLoop::kEpoll) {
      throw std::system_error(EINVAL, std::generic_category(),
                              "files through io_uring need the io_uring event loop");
    }
    loop = EventLoop::kIoUring;
  }
  if (loop == EventLoop::kEpoll) return false;
  const bool available = io_uring_available();
  if (loop == EventLoop::kIoUring && !available) {
    throw std::system_error(ENOSYS, std::generic_category(), "io_uring");
  }
  return available;
}

int make_wake_fd() {
  const int fd = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  return fd;
}

}  // namespace

std::shared_ptr<AioContext> AioContext::create(AioContextOptions options) {
  return std::shared_ptr<AioContext>(new AioContext(std::move(options)));
}

AioContextIndex::AioContextIndex() : value(context_indices().take()) {}
AioContextIndex::~AioContextIndex() { context_indices().give_back(value); }

AioContext::AioContext(AioContextOptions options)
    : CoContext(AioContextIndex::value, options.name),
      options_(std::move(options)),
      poll_budget_(options_.poll_budget ? *options_.poll_budget : PollBudget::of_process()),
      wake_fd_(options_.provider ? -1 : make_wake_fd()),
      use_io_uring_(!options_.provider && choose_io_uring(options_.event_loop, options_.file_io)),
      back_end_name_(options_.provider ? "simulated"
                     : use_io_uring_   ? "io_uring"
                                       : "epoll") {
  if (options_.tracer) trace_ = &options_.tracer->add_track(name());
  if (options_.stall_detector && !options_.provider) {
    stall_watch_ = std::make_unique<StallWatch>(*options_.stall_detector, name(), activity_);
  }
  poll_budget_.woke();
  context_indices().add(*this);
}

AioContext::~AioContext() {
  context_indices().remove(*this);
  report_inhabitants();
  close();
  poll_budget_.sleeps();
}

void AioContext::close() noexcept {
  ROOST_CHECK(polls_ == 0, "context '{}' destroyed while it is polled", name());
  ROOST_CHECK(lock_.is_free(), "context '{}' destroyed while its lock is held", name());
  // Nobody gets in from here on; what was queued is judged below.
  const auto last = inbox_.close();
  added_.append(last.oldest, last.newest);
  batch_.append(added_);
  batch_.append(idle_due_);
  batch_.append(idle_);
  while (QueueEntry* entry = batch_.pop()) {
    if (entry->kind == QueueEntry::Kind::kCoroutine) {
      auto& co_entry = static_cast<CoroutineEntry&>(*entry);
      const char* co_name = co_entry.coroutine().name();
      ROOST_CHECK(!drop_entry(co_entry), "context '{}' destroyed while coroutine '{}' is scheduled",
                  name(), co_name);
    } else if (entry != &notify_entry_ && entry != &inspect_entry_) {
      auto* core = static_cast<BottomHalf::Core*>(static_cast<CallbackEntry*>(entry));
      ROOST_CHECK(core->run == &run_bottom_half,
                  "context '{}' destroyed while a call to it is waiting", name());
      const bool deleted = core->flags.peek() & BottomHalfFlags<RealPlatform>::kDeleted;
      const bool scheduled = core->flags.peek() & BottomHalfFlags<RealPlatform>::kScheduled;
      ROOST_CHECK(deleted || !scheduled, "context '{}' destroyed while a bottom half is scheduled",
                  name());
      if (deleted) delete core;
    }
  }
  ROOST_CHECK(bottom_halves_.load() == 0, "context '{}' destroyed before {} of its bottom halves",
              name(), bottom_halves_.load());
  ROOST_CHECK(timers_.empty(), "context '{}' destroyed while a timer is armed", name());
  ROOST_CHECK(watches_.empty(), "context '{}' destroyed while descriptor {} has a handler", name(),
              watches_.begin()->first);
  back_end_.reset();
  // A producer that found the context sleeping may still be about to write to the eventfd: the
  // descriptor, and the number behind it, stay until it has.
  if (options_.provider) {
    options_.provider->wait_until("the signals a context is owed",
                                  [this] { return signals_received_ >= signals_owed_; });
    options_.provider->context_gone();
    return;
  }
  while (signals_received_ < signals_owed_) {
    pollfd pfd{wake_fd_.get(), POLLIN, 0};
    ::poll(&pfd, 1, -1);
    std::uint64_t count = 0;
    if (::read(wake_fd_.get(), &count, sizeof count) == sizeof count) signals_received_ += count;
  }
  if (signals_owed_ > 0) {
    // A read through the ring orders nothing that ThreadSanitizer could see. Reading once here,
    // from a counter that every producer has written to, shows it that they are done with the
    // context.
    std::uint64_t count = 1;
    [[maybe_unused]] ssize_t done = ::write(wake_fd_.get(), &count, sizeof count);
    done = ::read(wake_fd_.get(), &count, sizeof count);
  }
}

void AioContext::make_back_end() {
  ROOST_CHECK(current() == this, "descriptors and I/O of context '{}' used outside of it", name());
  if (options_.provider) {
    back_end_ = options_.provider->make_back_end(*this);
  } else if (use_io_uring_) {
    try {
      back_end_ =
          make_io_uring_back_end(*this, wake_fd_.get(), options_.file_io, options_.thread_pool);
    } catch (const std::system_error&) {
      // The trial ring could be had, this one not (locked memory used up, say).
      if (options_.event_loop == EventLoop::kIoUring || options_.file_io == FileIo::kIoUring) throw;
    }
  }
  if (!back_end_) {
    back_end_ = make_epoll_back_end(*this, wake_fd_.get(), options_.file_io, options_.thread_pool);
  }
  back_end_name_.store(back_end_->name(), std::memory_order_relaxed);
  for (auto& [fd, watch] : watches_) back_end_->watch_changed(*watch);
}

void AioContext::release_back_end() {
  back_end_.reset();
  for (auto& [fd, watch] : watches_) watch->armed_events = 0;
}

void AioContext::for_each(const std::function<void(AioContext&)>& visit) {
  context_indices().for_each(visit);
}

// Says which coroutines will never be woken at home any more. Not an error of its own: their
// holders may still destroy them, or schedule them elsewhere.
void AioContext::report_inhabitants() const {
  constexpr std::size_t kAtMost = 10;
  std::size_t count = 0;
  for (const CoroutineInfo& info : list_coroutines()) {
    if (info.context != index() || info.awaits_at.line() == 0) continue;
    if (++count > kAtMost) continue;
    fmt::print(stderr, "roost: context '{}' goes while coroutine '{}', created at {}, is {}{}{}\n",
               name(), info.name, describe(info.created_at), to_string(info.state),
               info.waits_for ? " for " : "", info.waits_for ? info.waits_for : "");
  }
  if (count > kAtMost) {
    fmt::print(stderr, "roost: context '{}' goes while {} more coroutines live there\n", name(),
               count - kAtMost);
  }
}

}  // namespace roost
