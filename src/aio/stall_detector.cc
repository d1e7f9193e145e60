// SPDX-License-Identifier: MIT
#include "roost/aio/stall_detector.h"

#include <execinfo.h>
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <string_view>

#include "roost/base/check.h"
#include "roost/coro/census.h"

namespace roost {

namespace {

constexpr int kSignal = SIGURG;
constexpr std::int64_t kLooksPerThreshold = 4;
constexpr std::int64_t kMinPeriodNs = 1'000'000;
constexpr std::size_t kMaxAwaits = 16;
constexpr int kMaxFrames = 64;

// The watch of the innermost poll on this thread's stack. Atomic for the signal handler, which
// runs between two instructions of its own thread.
[[gnu::tls_model("initial-exec")]] thread_local constinit std::atomic<StallWatch*> innermost{
    nullptr};

// Text in memory of its own: a signal handler must not allocate. What does not fit is cut off.
class Text {
 public:
  template <class... Args>
  void add(fmt::format_string<Args...> format, Args&&... args) noexcept {
    const auto room = sizeof data_ - size_;
    const auto result = fmt::format_to_n(data_ + size_, room, format, std::forward<Args>(args)...);
    size_ += std::min(result.size, room);
  }

  void add_place(const char* how, const Coroutine::Place& place) noexcept {
    if (place.line() == 0) return;
    add("  {} {}:{} ({})\n", how, place.file_name(), place.line(), place.function_name());
  }

  void write(int fd) const noexcept {
    for (std::size_t done = 0; done < size_;) {
      const ssize_t count = ::write(fd, data_ + done, size_ - done);
      if (count <= 0) return;
      done += static_cast<std::size_t>(count);
    }
  }

 private:
  char data_[8192];
  std::size_t size_ = 0;
};

}  // namespace

StallDetector::StallDetector(Options options)
    : options_(options),
      period_ns_(std::max(options.threshold_ns / kLooksPerThreshold, kMinPeriodNs)),
      last_look_ns_(options.clock->now_ns()) {
  ROOST_CHECK(options.threshold_ns > 0, "a stall of {} ns", options.threshold_ns);
  // The first call loads a library, and that allocates.
  void* frame = nullptr;
  ::backtrace(&frame, 1);

  struct sigaction action {};
  action.sa_handler = &StallWatch::handle_signal;
  action.sa_flags = SA_RESTART;
  ::sigfillset(&action.sa_mask);
  ROOST_CHECK(::sigaction(kSignal, &action, nullptr) == 0, "sigaction fails: errno {}", errno);

  if (!options.own_thread) return;
  // The program's signals are not for this thread.
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread([this] { run(); });
  } catch (...) {
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

StallDetector::~StallDetector() {
  {
    std::lock_guard lock(mutex_);
    ROOST_CHECK(watches_.empty(), "stall detector destroyed before context '{}'",
                watches_.front()->name_);
    stopping_ = true;
  }
  stop_requested_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void StallDetector::run() {
  ::pthread_setname_np(::pthread_self(), "roost-stalls");
  const auto period = std::chrono::nanoseconds(period_ns_);
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      if (stop_requested_.wait_for(lock, period, [this] { return stopping_; })) return;
    }
    look();
  }
}

void StallDetector::look() {
  std::lock_guard lock(mutex_);
  const std::int64_t now = options_.clock->now_ns();
  // Whatever kept this thread from looking, a debugger say, may have kept the others from working.
  const std::int64_t passed = std::min(now - last_look_ns_, 2 * period_ns_);
  last_look_ns_ = now;
  for (StallWatch* watch : watches_) watch->look(passed);
}

// ---- One context

StallWatch::StallWatch(StallDetector& detector, const std::string& name, const Activity& activity)
    : detector_(detector), name_(name), activity_(activity) {
  std::lock_guard lock(detector_.mutex_);
  detector_.watches_.push_back(this);
}

StallWatch::~StallWatch() {
  std::lock_guard lock(detector_.mutex_);
  std::erase(detector_.watches_, this);
}

void StallWatch::enter() {
  outer_ = innermost.load(std::memory_order_relaxed);
  innermost.store(this, std::memory_order_relaxed);
  std::lock_guard lock(detector_.mutex_);
  polled_by_ = ::pthread_self();
  entered_ = true;
}

void StallWatch::leave() noexcept {
  {
    std::lock_guard lock(detector_.mutex_);
    entered_ = false;
  }
  innermost.store(outer_, std::memory_order_relaxed);
}

void StallWatch::look(std::int64_t passed_ns) noexcept {
  const std::uint64_t word = activity_.word();
  if (word != seen_ || !entered_ || !Activity::works(word)) {
    seen_ = word;
    unchanged_ns_ = 0;
    asked_ = false;
    return;
  }
  unchanged_ns_ += passed_ns;
  if (asked_ || unchanged_ns_ < detector_.options_.threshold_ns) return;
  asked_ = true;
  report_ns_.store(unchanged_ns_, std::memory_order_relaxed);
  // Release pairs with the handler's acquire: with the word it sees the time.
  report_on_.store(word, std::memory_order_release);
  ::pthread_kill(polled_by_, kSignal);
}

// On the thread that stalls, between any two of its instructions.
void StallWatch::handle_signal(int) noexcept {
  const int saved_errno = errno;
  for (StallWatch* watch = innermost.load(std::memory_order_relaxed); watch;
       watch = watch->outer_) {
    const std::uint64_t word = watch->report_on_.exchange(0, std::memory_order_acquire);
    // It may have got on meanwhile: then the stack would show something else.
    if (word != 0 && word == watch->activity_.word()) watch->report();
  }
  errno = saved_errno;
}

void StallWatch::report() noexcept {
  Text text;
  text.add("roost: context '{}' has not got on for {} ms", name_,
           report_ns_.load(std::memory_order_relaxed) / 1'000'000);
  if (const Coroutine* const co = Coroutine::self()) {
    text.add(": coroutine '{}' ({}) runs\n", co->name(), fmt::ptr(co));
    text.add_place("created at", co->created_at());
    // The innermost task has come back from the await it is named with; the others are in theirs.
    Coroutine::Place awaits[kMaxAwaits];
    const std::size_t count = own_await_chain(awaits, kMaxAwaits);
    for (std::size_t i = 0; i < count; ++i) {
      text.add_place(i == 0 ? "last awaited at" : "awaits at", awaits[i]);
    }
  } else {
    text.add(": a callback runs\n");
  }
  text.add("  the stack, innermost first:\n");
  const int fd = detector_.options_.fd;
  text.write(fd);
  void* frames[kMaxFrames];
  const int count = ::backtrace(frames, kMaxFrames);
  ::backtrace_symbols_fd(frames, count, fd);
  detector_.reports_.fetch_add(1, std::memory_order_release);
}

}  // namespace roost
