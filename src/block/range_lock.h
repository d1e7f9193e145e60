// SPDX-License-Identifier: MIT
// RangeLock: byte ranges of a disk that coroutines hold, shared or exclusively.
//
// Whoever has to read a block, change a part of it and write it back holds it exclusively; every
// other write holds what it touches shared. Overlapping ranges get their turn in the order in which
// they came, so neither kind starves.
//
// Threads: any number of coroutines on any contexts.
// Lifetime: a Range stays where it is from acquire() until its release(); the lock outlives it.
#pragma once

#include <cstdint>
#include <mutex>

#include "roost/coro/coroutine.h"

namespace roost {

class RangeLock {
 public:
  class Range {
   public:
    Range(std::uint64_t begin, std::uint64_t end, bool exclusive) noexcept
        : begin_(begin), end_(end), exclusive_(exclusive) {}
    Range(const Range&) = delete;
    Range& operator=(const Range&) = delete;
    ~Range() {
      if (lock_) lock_->release(*this);
    }

   private:
    friend class RangeLock;
    bool conflicts_with(const Range& other) const noexcept {
      return (exclusive_ || other.exclusive_) && begin_ < other.end_ && other.begin_ < end_;
    }

    const std::uint64_t begin_;
    const std::uint64_t end_;
    const bool exclusive_;
    RangeLock* lock_ = nullptr;  // from acquire() on
    // Guarded by the lock's mutex:
    Range* earlier_ = nullptr;
    Range* later_ = nullptr;
    bool granted_ = false;
    Coroutine* waiter_ = nullptr;  // who is to be woken; null while it has not suspended yet
    Range* next_to_wake_ = nullptr;
  };

  RangeLock() = default;
  ~RangeLock();
  RangeLock(const RangeLock&) = delete;
  RangeLock& operator=(const RangeLock&) = delete;

  class [[nodiscard]] Awaiter {
   public:
    Awaiter(RangeLock& lock, Range& range) noexcept : lock_(lock), range_(range) {}

    bool await_ready() noexcept { return lock_.enter(range_); }
    template <class Promise>
    void await_suspend(std::coroutine_handle<Promise> frame) noexcept {
      wait_.await_suspend(frame);
    }
    void await_resume() const noexcept {}

   private:
    struct Wait {
      RangeLock* lock;
      Range* range;
      void operator()(Coroutine& co) const noexcept { lock->wait(*range, co); }
    };

    RangeLock& lock_;
    Range& range_;
    SuspendAwaiter<Wait> wait_ = suspend_waiting("a range of a disk", Wait{&lock_, &range_});
  };

  /// `co_await lock.acquire(range);` until the range is released or destroyed.
  Awaiter acquire(Range& range) noexcept { return Awaiter(*this, range); }

  void release(Range& range) noexcept;

 private:
  bool enter(Range& range) noexcept;
  void wait(Range& range, Coroutine& co) noexcept;
  static bool may_be_granted(const Range& range) noexcept;

  std::mutex mutex_;        // guards everything below
  Range* first_ = nullptr;  // in the order of arrival
  Range* last_ = nullptr;
  unsigned exclusive_ = 0;  // of them
  unsigned waiting_ = 0;    // not granted
};

}  // namespace roost
