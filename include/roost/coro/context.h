// SPDX-License-Identifier: MIT
// An event loop as coroutines see it: a place with a name that takes queue entries.
//
// Threads: post() from any thread. index() and name() are constant.
// Lifetime: a context outlives every coroutine whose home it is.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "roost/coro/queue_entry.h"

namespace roost {

class Coroutine;
struct Driver;
struct SimulatedThread;
class TraceTrack;

/// The part of an event loop that coroutines need; AioContext is the one there is.
class CoContext {
 public:
  CoContext(const CoContext&) = delete;
  CoContext& operator=(const CoContext&) = delete;

  /// Queues `entry` for one of the next iterations; entries of one thread keep their order.
  /// False: the context is closed, and the entry still belongs to the caller. Any thread.
  [[nodiscard]] virtual bool post(QueueEntry& entry) noexcept = 0;

  /// As post(), on the thread that has this context current.
  void post_here(QueueEntry& entry) noexcept { added_.push(entry); }

  /// A number that no other living context has. Any thread.
  std::uint32_t index() const noexcept { return index_; }

  /// The loop's time when it last looked, in ticks of kTickNs; wraps around. Current thread's
  /// context only.
  std::uint32_t tick() const noexcept { return tick_; }
  static constexpr std::int64_t kTickNs = std::int64_t{1} << 20;

  /// What it was called when it was made. Any thread.
  const std::string& name() const noexcept { return name_; }

  /// Who is told what its coroutines do; null: nobody. Constant.
  TraceTrack* trace() const noexcept { return trace_; }

 protected:
  CoContext(std::uint32_t index, std::string name) : index_(index), name_(std::move(name)) {}
  ~CoContext() = default;

  static std::uint32_t tick_of(std::int64_t now_ns) noexcept {
    return static_cast<std::uint32_t>(now_ns / kTickNs);
  }

  EntryQueue added_;        // home thread: posted while dispatching, for the next iteration
  std::uint32_t tick_ = 0;  // home thread
  TraceTrack* trace_ = nullptr;

 private:
  std::uint32_t index_;  // below CoStateValue::kMaxContexts, unique among the living
  std::string name_;
};

/// What the runtime knows about the calling thread.
struct ThreadState {
  // Null on a real thread. A simulated one has more that is its own and not its thread's.
  SimulatedThread* simulated = nullptr;
  CoContext* context = nullptr;  // the context being polled, or scoped, by this thread
  Driver* driver = nullptr;      // the innermost driver loop on this thread's stack
  Coroutine* self = nullptr;     // what that loop is resuming now
  FetchAhead posted;             // the entries it posted to other contexts last
  unsigned thread_locks = 0;     // ThreadMutexes that it holds
};

/// Never inlined: a coroutine's body may go on on another thread, and must not keep the address of
/// a thread-local variable across a suspension.
[[gnu::noinline]] ThreadState& this_thread() noexcept;

}  // namespace roost
