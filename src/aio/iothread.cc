// SPDX-License-Identifier: MIT
#include "roost/aio/iothread.h"

#include <pthread.h>

#include "roost/base/check.h"

namespace roost {

IOThread::IOThread(AioContextOptions options)
    : context_(AioContext::create(std::move(options))), thread_([this] { run(); }) {
  started_.acquire();
  if (start_failure_) {
    thread_.join();
    std::rethrow_exception(start_failure_);
  }
}

void IOThread::run() {
  // The kernel keeps 15 characters.
  ::pthread_setname_np(::pthread_self(), context_->name().substr(0, 15).c_str());
  ContextScope scope(*context_);
  try {
    context_->back_end();
  } catch (...) {
    start_failure_ = std::current_exception();
    started_.release();
    return;
  }
  started_.release();
  context_->poll_until(stop_entry_.reached);
  context_->release_back_end();
}

IOThread::~IOThread() {
  stop();
  join();
}

bool IOThread::StopEntry::take_effect(CallbackEntry& entry) noexcept {
  static_cast<StopEntry&>(entry).reached = true;
  return true;
}

void IOThread::stop() noexcept {
  if (stop_requested_.exchange(true)) return;
  [[maybe_unused]] const bool open = context_->post(stop_entry_);
}

void IOThread::join() {
  if (Coroutine* co = Coroutine::self()) {
    panicf("join of thread '{}' would block inside coroutine '{}'", context_->name(), co->name());
  }
  if (!thread_.joinable()) return;
  ROOST_CHECK(!context_->acquired_here(),
              "join of thread '{}' by the thread that has acquired its context would wait for ever",
              context_->name());
  thread_.join();
}

}  // namespace roost
