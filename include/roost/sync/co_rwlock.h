// SPDX-License-Identifier: MIT
// CoRwlock: a lock that many readers or one writer hold, and that coroutines wait for.
//
//   auto guard = co_await lock.read();      // or write()
//
// Fair: waiters are admitted in their order, readers that stand next to each other together; a
// reader that comes while a writer waits stands behind it. So a coroutine must not ask for it again
// while it holds it: as a reader it would wait for itself, with write() always (upgrade() is there
// for that), with read() as soon as a writer comes in between.
//
// Threads: in coroutines, on any context; a stop may be requested on any thread. A waiter resumes
// at home. Lifetime: outlives its guards and waiters. The destructor aborts if it is held or waited
// for.
//
// Aborts, with the name of the coroutine: asking for it while holding it for writing, waiting for
// it while being its only reader, letting go of it by another coroutine than the one that holds the
// guard, ending while holding it, waiting while the thread holds a ThreadMutex. (Its only reader is
// known when it asks, and when the others go while it is the first in line; not when they go while
// it stands behind somebody.)
#pragma once

#include <cerrno>
#include <cstdint>
#include <stop_token>
#include <utility>

#include "roost/base/result.h"
#include "roost/sync/admission_queue.h"

namespace roost {

/// A lock for readers and writers; the file's head says what aborts.
class CoRwlock {
  // What is asked for, in the low bits of the address of the coroutine that asks.
  static constexpr std::uint64_t kRead = 0;
  static constexpr std::uint64_t kWrite = 1;
  static constexpr std::uint64_t kUpgrade = 2;  // from a reader that stays one until it is admitted
  static constexpr std::uint64_t kKinds = 3;

  static std::uint64_t address_of(const Coroutine& co) noexcept {
    static_assert(alignof(Coroutine) > kKinds);
    return reinterpret_cast<std::uintptr_t>(&co);
  }

  struct State {
    bool admit(std::uint64_t what) noexcept {
      const std::uint64_t kind = what & kKinds;
      if (kind == kRead) {
        if (writing) return false;
        ++readers;
        reader_sum += what - kind;
        return true;
      }
      if (writing || readers != (kind == kUpgrade ? 1 : 0)) return false;
      readers = 0;
      reader_sum = 0;
      writing = true;
      return true;
    }
    /// Was not admitted, and is to wait, or is the first of those that do.
    void refused(std::uint64_t what, const char* name) const noexcept {
      const std::uint64_t kind = what & kKinds;
      if (readers == 1 && kind != kUpgrade && what - kind == reader_sum) [[unlikely]] {
        waits_for_itself(reader_sum, name);
      }
    }
    std::uint64_t readers = 0;
    std::uint64_t reader_sum = 0;  // of their addresses; of the last one, once the others have gone
    bool writing = false;
    bool upgrading = false;       // a reader waits to become the writer
    Coroutine* writer = nullptr;  // once it runs; for the check that it does not ask again
  };
  using Queue = detail::AdmissionQueue<State>;

 public:
  class Guard;
  template <bool kCancellable>
  class LockAwaiter;
  template <bool kCancellable>
  class UpgradeAwaiter;

  // Stop is std::stop_token, or nothing.
  template <class... Stop>
  using Lock = detail::Wait<LockAwaiter<(sizeof...(Stop) > 0)>, CoRwlock&, std::uint64_t, Stop...>;
  template <class... Stop>
  using Upgrade = detail::Wait<UpgradeAwaiter<(sizeof...(Stop) > 0)>, Guard&, CoRwlock&, Stop...>;

  /// `name`, a literal, is what a waiting coroutine is said to wait for.
  explicit CoRwlock(const char* name = "a read-write lock") noexcept : queue_(name, State{}) {}
  ~CoRwlock();

  /// co_await gives a Guard.
  auto read() noexcept { return Lock<>(*this, kRead); }
  auto write() noexcept { return Lock<>(*this, kWrite); }
  /// co_await gives a Result<Guard>. ECANCELED: the lock is not held and never was.
  auto read(std::stop_token stop) noexcept {
    return Lock<std::stop_token>(*this, kRead, std::move(stop));
  }
  auto write(std::stop_token stop) noexcept {
    return Lock<std::stop_token>(*this, kWrite, std::move(stop));
  }

  /// An empty guard if it cannot be had at once, as where somebody waits, or outside of any
  /// coroutine.
  [[nodiscard]] Guard try_read();
  [[nodiscard]] Guard try_write();

  const char* name() const noexcept { return queue_.name(); }

 private:
  Guard try_lock(std::uint64_t kind);
  bool begin_upgrade() noexcept;
  void check_not_writer(const Coroutine& co) const;
  [[noreturn, gnu::cold]] static void waits_for_itself(std::uint64_t address, const char* name);

  Queue queue_;
};

/// Holds a CoRwlock, for reading or writing, for as long as it lives. May be moved within the
/// coroutine.
class [[nodiscard]] CoRwlock::Guard {
 public:
  Guard() noexcept = default;
  Guard(Guard&& other) noexcept
      : lock_(std::exchange(other.lock_, nullptr)), co_(other.co_), writing_(other.writing_) {}
  Guard& operator=(Guard&& other) {
    Guard old(std::move(*this));
    lock_ = std::exchange(other.lock_, nullptr);
    co_ = other.co_;
    writing_ = other.writing_;
    return *this;
  }
  ~Guard() { unlock(); }

  explicit operator bool() const noexcept { return lock_; }
  bool writing() const noexcept { return lock_ && writing_; }

  /// Unlocks before it goes; nothing if it is empty.
  void unlock();

  /// From reading to writing, before everybody who waits, once the other readers are gone; nobody
  /// writes in between. co_await gives true; or false, without waiting, where another reader is
  /// upgrading already, since each would wait for the other: then this one still reads, and has to
  /// let go for the other to go on.
  /// REQUIRES: it holds the lock for reading.
  Upgrade<> upgrade() {
    check_holder("upgraded");
    return {*this, *lock_};
  }
  /// co_await gives a Result<bool>. ECANCELED: it still reads.
  Upgrade<std::stop_token> upgrade(std::stop_token stop) {
    check_holder("upgraded");
    return {*this, *lock_, std::move(stop)};
  }

  /// From writing to reading, and lets the readers in that wait next.
  /// REQUIRES: it holds the lock for writing.
  void downgrade();

 private:
  friend class CoRwlock;
  Guard(CoRwlock& lock, Coroutine& co, bool writing) noexcept;
  void check_holder(const char* what) const;

  CoRwlock* lock_ = nullptr;
  Coroutine* co_ = nullptr;
  bool writing_ = false;
};

template <bool kCancellable>
class CoRwlock::LockAwaiter : public detail::AdmissionAwaiter<State, kCancellable> {
  using Base = detail::AdmissionAwaiter<State, kCancellable>;

 public:
  template <class... Stop>
  LockAwaiter(CoRwlock& lock, std::uint64_t kind, Stop... stop) noexcept
      : LockAwaiter(lock, *Coroutine::self(), kind, std::move(stop)...) {}

  bool await_ready() noexcept {
    lock_.check_not_writer(co_);
    return Base::await_ready();
  }

  auto await_resume() {
    const bool admitted = this->end_of_wait();
    if constexpr (kCancellable) {
      if (!admitted) return Result<Guard>(fail(ECANCELED, this->waits_for()));
      return Result<Guard>(Guard(lock_, co_, writing_));
    } else {
      return Guard(lock_, co_, writing_);
    }
  }

 private:
  template <class... Stop>
  LockAwaiter(CoRwlock& lock, Coroutine& co, std::uint64_t kind, Stop... stop) noexcept
      : Base(lock.queue_, address_of(co) | kind, std::move(stop)...),
        lock_(lock),
        co_(co),
        writing_(kind == kWrite) {}

  CoRwlock& lock_;
  Coroutine& co_;
  const bool writing_;
};

template <bool kCancellable>
class CoRwlock::UpgradeAwaiter : public detail::AdmissionAwaiter<State, kCancellable> {
  using Base = detail::AdmissionAwaiter<State, kCancellable>;

 public:
  template <class... Stop>
  UpgradeAwaiter(Guard& guard, CoRwlock& lock, Stop... stop) noexcept
      : Base(lock.queue_, kUpgrade, std::move(stop)..., true), guard_(guard), lock_(lock) {}

  bool await_ready() noexcept {
    if (this->stop_requested()) return true;
    upgrading_ = lock_.begin_upgrade();
    return !upgrading_;
  }

  auto await_resume() {
    const bool admitted = this->end_of_wait();
    const bool stopped = !admitted && (upgrading_ || this->stop_requested());
    if (upgrading_) {
      lock_.queue_.change([&](State& state) {
        state.upgrading = false;
        if (admitted) state.writer = guard_.co_;
      });
      guard_.writing_ = admitted;
    }
    if constexpr (kCancellable) {
      return stopped ? Result<bool>(fail(ECANCELED, this->waits_for())) : Result<bool>(admitted);
    } else {
      return admitted;
    }
  }

 private:
  Guard& guard_;
  CoRwlock& lock_;
  bool upgrading_ = false;
};

}  // namespace roost
