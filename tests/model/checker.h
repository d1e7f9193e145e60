// SPDX-License-Identifier: MIT
// How a model is run: exhaustively, with a bounded number of preemptions, or at random; and the
// parts of the world that models need around the code they check.
#pragma once

#include <cstddef>

#include "model/relacy_platform.h"

namespace roost::model {

/// A path that a model is there for. One that is never taken makes the run fail: the model would
/// say nothing about it.
struct Path {
  const char* what;
  std::uint64_t taken = 0;
  void take() { ++taken; }
};

/// One case of a model: what its threads do, and what holds before and after. Made anew for each
/// execution.
class SuiteBase {
 public:
  virtual ~SuiteBase() = default;
  virtual void before() {}
  virtual void thread(unsigned index) = 0;
  virtual void after() {}
};

template <unsigned threads>
class Suite : public SuiteBase {
 public:
  static constexpr unsigned kThreads = threads;
};

/// Runs the cases of one model: all of them, or those named on the command line. Exits with 0 if
/// every execution was right, 1 if the checker found one that was not (its steps are printed,
/// unless the first argument is --brief), 2 if a path was never taken or a name is unknown.
class Cases {
 public:
  Cases(int argc, char** argv);

  /// Every execution there is.
  template <class S>
  void exhaustive(const char* name, std::vector<Path*> paths) {
    add<S>(name, {rl::sched_full, 0}, std::move(paths));
  }
  /// Every execution in which a thread that could go on is held up at most so many times.
  template <class S>
  void bounded(const char* name, unsigned preemptions, std::vector<Path*> paths) {
    add<S>(name, {rl::sched_bound, preemptions}, std::move(paths));
  }
  /// So many executions at random, always the same ones.
  template <class S>
  void random(const char* name, std::uint64_t executions, std::vector<Path*> paths) {
    add<S>(name, {rl::sched_random, executions}, std::move(paths));
  }

  int result() const;

 private:
  friend class SuiteHolder;
  struct Search {
    rl::scheduler_type_e kind;
    std::uint64_t amount;
  };
  using Make = SuiteBase* (*)(void* where);
  static constexpr std::size_t kMaxSuiteSize = 4096;

  template <class S>
  void add(const char* name, Search search, std::vector<Path*> paths) {
    static_assert(sizeof(S) <= kMaxSuiteSize && alignof(S) <= alignof(std::max_align_t));
    const Make make = [](void* where) -> SuiteBase* { return ::new (where) S; };
    run(name, search, S::kThreads, make, paths);
  }

  // Not a template: what Relacy makes of it takes long to compile, and is so compiled once.
  void run(const char* name, Search search, unsigned threads, Make make,
           const std::vector<Path*>& paths);

  std::vector<const char*> wanted_;
  bool brief_ = false;
  int result_ = 0;
  unsigned cases_run_ = 0;
};

/// Stands for memory that is freed during an execution: Relacy reports accesses that come later.
/// (A heap of its own would add a choice to each free, and so double the executions.)
template <class T>
class Storage {
 public:
  template <class... Args>
  void make(Args&&... args) {
    ::new (static_cast<void*>(bytes_)) T(std::forward<Args>(args)...);
    alive_ = true;
  }
  void destroy() {
    require(alive_, "freed once");
    alive_ = false;
    get().~T();
  }
  T& get() { return *reinterpret_cast<T*>(bytes_); }
  T* operator->() { return &get(); }
  bool alive() const { return alive_; }

 private:
  alignas(T) unsigned char bytes_[sizeof(T)];
  bool alive_ = false;
};

// The two below are part of the kernel, or of something else that is not to be checked. They block,
// so that a lost wake-up is a deadlock, and they order no memory: what orders it is the code that
// is checked. They are plain variables, since only one fiber runs at a time.

/// An eventfd with one reader.
class EventFd {
 public:
  ~EventFd() { require(waiter_ < 0, "nobody waits for an eventfd that is closed"); }

  void signal(std::source_location at = std::source_location::current()) {
    schedule_point();
    alive_.check(here(at));
    ++count_;
    if (waiter_ >= 0) {
      rl::ctx().unpark_thread(std::exchange(waiter_, -1), false, here(at));
    }
  }

  /// Until signalled, or, if `spurious`, perhaps for less: another descriptor was ready.
  void wait(bool spurious, std::source_location at = std::source_location::current()) {
    schedule_point();
    alive_.check(here(at));
    if (count_ > 0) return;
    waiter_ = static_cast<int>(rl::thread_index());
    rl::ctx().park_current_thread(false, spurious, false, here(at));
    waiter_ = -1;
  }

  std::uint64_t read() {
    schedule_point();
    return std::exchange(count_, 0);
  }

 private:
  std::uint64_t count_ = 0;
  int waiter_ = -1;
  rl::signature<0x6576666eu> alive_;
};

enum class Order : std::uint8_t {
  kNone,       // as an eventfd
  kHandsOver,  // as a wake-up through an inbox: what came before post() is seen after take()
};

/// A queue with one reader.
template <class T, Order order = Order::kNone, unsigned capacity = 8>
class Mailbox {
 public:
  void post(T item, std::source_location at = std::source_location::current()) {
    schedule_point();
    if (order == Order::kHandsOver) turn_.fetch_add(1, rl::mo_acq_rel, here(at));
    require(size_ < capacity, "the mailbox has room");
    items_[(first_ + size_++) % capacity] = item;
    if (waiter_ >= 0) {
      rl::ctx().unpark_thread(std::exchange(waiter_, -1), false, here(at));
    }
  }

  T take(std::source_location at = std::source_location::current()) {
    schedule_point();
    while (size_ == 0) {
      waiter_ = static_cast<int>(rl::thread_index());
      rl::ctx().park_current_thread(false, false, false, here(at));
    }
    --size_;
    const T item = items_[first_++ % capacity];
    if (order == Order::kHandsOver) turn_.fetch_add(1, rl::mo_acq_rel, here(at));
    return item;
  }

 private:
  T items_[capacity] = {};
  unsigned first_ = 0;
  unsigned size_ = 0;
  int waiter_ = -1;
  rl::atomic<std::uint64_t> turn_{std::uint64_t{0}};
};

/// Something that happens once and that another thread can wait for; hands over what came before.
class Flag {
 public:
  void set() { set_.store(1, rl::mo_release, RL_INFO); }
  bool is_set() { return set_.load(rl::mo_acquire, RL_INFO) == 1; }
  void await() {
    while (!is_set()) rl::yield(1, RL_INFO);
  }

 private:
  rl::atomic<std::uint64_t> set_{std::uint64_t{0}};
};

}  // namespace roost::model
