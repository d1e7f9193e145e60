// SPDX-License-Identifier: MIT
// Locks and queues on several threads, with stops requested at any moment.
//
// Invariants: a lock excludes; nobody waits for ever (each test ends); who was cancelled owns
// nothing; no unit, item or turn is lost. Each test goes on until stops have ended waits and have
// come too late for them, to one that was granted and on its way to resume.
#include <gtest/gtest.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "base/test_build.h"
#include "roost/aio/iothread.h"
#include "roost/sync/co_event.h"
#include "roost/sync/co_mutex.h"
#include "roost/sync/co_queue.h"
#include "roost/sync/co_rwlock.h"
#include "roost/sync/co_semaphore.h"
#include "sync/test_stops.h"

namespace roost {
namespace {

bool several_cpus() {
  cpu_set_t allowed;
  return ::sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) > 1;
}

class SyncStress : public StopsAtAnyMoment {};

TEST_F(SyncStress, AMutexExcludesAndNobodyIsLost) {
  CoMutex mutex;
  std::uint64_t value = 0;  // plain: ThreadSanitizer checks the order too
  bool inside = false;
  std::atomic<std::uint64_t> locked{0};
  std::atomic<std::uint64_t> cancelled{0};
  std::atomic<int> errors{0};
  const auto body = [&](int i) -> Task<> {
    TestRandom random(i);
    AioContext& home = *contexts_[i];
    while (!stop_) {
      CoMutex::Guard guard;
      if (random.below(2)) {
        Result<CoMutex::Guard> result = co_await mutex.lock(slots_[i].renew());
        if (!result) {
          cancelled.fetch_add(1, std::memory_order_relaxed);
          continue;
        }
        guard = std::move(*result);
      } else {
        guard = co_await mutex.lock();
      }
      if (AioContext::current() != &home || std::exchange(inside, true)) ++errors;
      ++value;
      // Held across a turn of the loop now and then, so that others come to wait.
      if (random.below(64) == 0) co_await move_to(home);
      inside = false;
      guard.unlock();
      locked.fetch_add(1, std::memory_order_relaxed);
      if (random.below(32) == 0) co_await move_to(home);
    }
  };
  run(body, [&] {
    const auto s = mutex.statistics();
    return cancelled > 100 && s.defeats > 0 && s.handoffs > 0 && s.cancelled_late > 0 &&
           (s.spins_paid > 0 || !several_cpus()) && (s.spins_in_vain > 0 || !several_cpus());
  });
  const auto s = mutex.statistics();
  std::printf(
      "%lu locked, %lu cancelled, %lu of them on the way, %lu lost again, %lu handed on, "
      "%lu busy waits paid, %lu did not\n",
      locked.load(), cancelled.load(), s.cancelled_late, s.defeats, s.handoffs, s.spins_paid,
      s.spins_in_vain);
  EXPECT_EQ(errors, 0);
  EXPECT_EQ(value, locked);
}

// Producers and consumers of a short list.
TEST_F(SyncStress, AQueueLosesNoWakeUp) {
  CoMutex mutex;
  CoQueue not_empty;
  CoQueue not_full;
  std::deque<int> items;
  std::uint64_t woken = 0;
  std::uint64_t put = 0;
  std::uint64_t got = 0;
  WaitCounts waits;
  // False: cancelled.
  const auto wait = [&](CoQueue& queue, CoMutex::Guard& guard, int i) -> Task<bool> {
    const std::stop_token stop = slots_[i].renew();
    Seen seen;
    Watched wait_for_change(queue.wait(guard, stop), stop, seen);
    const Result<void> result = co_await std::move(wait_for_change);
    waits.count(seen, result.has_value());
    co_return result.has_value();
  };
  const auto body = [&](int i) -> Task<> {
    TestRandom random(i);
    while (!stop_) {
      auto guard = co_await mutex.lock();
      if (i % 2) {
        bool ok = true;
        while (items.size() >= 4 && ok) ok = co_await wait(not_full, guard, i);
        if (items.size() < 4) {
          items.push_back(i);
          ++put;
          if (random.below(16)) {
            woken += not_empty.wake_one();
          } else {
            woken += not_empty.wake_all();
          }
        }
      } else {
        bool ok = true;
        while (items.empty() && ok) ok = co_await wait(not_empty, guard, i);
        if (!items.empty()) {
          items.pop_front();
          ++got;
          woken += not_full.wake_one();
        }
      }
      guard.unlock();
      if (random.below(16) == 0) co_await move_to(*contexts_[i]);
    }
  };
  run(body, [&] { return waits.both_ways() && waits.waited > 1000; });
  std::printf("%lu put, %lu got\n", put, got);
  waits.print("all");
  EXPECT_EQ(put, got + items.size());
  EXPECT_EQ(waits.waited - waits.cancelled, woken);  // who was cancelled used up none
  EXPECT_TRUE(not_empty.empty());
}

TEST_F(SyncStress, AQueueWithAThreadMutexLosesNoWakeUp) {
  ThreadMutex mutex;
  CoQueue changed;
  int tokens = 2;
  std::uint64_t woken = 0;
  std::atomic<std::uint64_t> taken{0};
  WaitCounts waits;
  std::atomic<int> errors{0};
  const auto body = [&](int i) -> Task<> {
    TestRandom random(i);
    while (!stop_) {
      {
        std::unique_lock lock(mutex);
        bool ok = true;
        while (tokens == 0 && ok) {
          const std::stop_token stop = slots_[i].renew();
          Seen seen;
          Watched wait(changed.wait(lock, stop), stop, seen);
          const Result<void> result = co_await std::move(wait);
          ok = result.has_value();
          waits.count(seen, ok);
          if (AioContext::current() != contexts_[i]) ++errors;
        }
        if (tokens == 0) continue;
        --tokens;
      }
      taken.fetch_add(1, std::memory_order_relaxed);
      if (random.below(8) == 0) co_await move_to(*contexts_[i]);
      std::lock_guard lock(mutex);
      ++tokens;
      woken += changed.wake_one();
    }
  };
  run(body, [&] { return waits.both_ways() && taken > 1000; });
  std::printf("%lu taken\n", taken.load());
  waits.print("all");
  EXPECT_EQ(errors, 0);
  EXPECT_EQ(tokens, 2);
  EXPECT_EQ(waits.waited - waits.cancelled, woken);
}

TEST_F(SyncStress, ASemaphoreLosesNoUnit) {
  CoSemaphore semaphore(4);
  std::atomic<int> in_use{0};
  std::atomic<int> errors{0};
  std::atomic<std::uint64_t> acquired{0};
  WaitCounts waits;
  const auto body = [&](int i) -> Task<> {
    TestRandom random(i);
    while (!stop_) {
      const int units = 1 + static_cast<int>(random.below(4));
      const std::stop_token stop = slots_[i].renew();
      Seen seen;
      Watched wait(semaphore.acquire(units, stop), stop, seen);
      const Result<void> got = co_await std::move(wait);
      waits.count(seen, got.has_value());
      if (!got) continue;
      if (in_use.fetch_add(units) + units > 4) ++errors;
      acquired.fetch_add(1, std::memory_order_relaxed);
      if (random.below(4) == 0) co_await move_to(*contexts_[i]);
      in_use.fetch_sub(units);
      semaphore.release(units);
    }
  };
  run(body, [&] { return waits.both_ways() && acquired > 1000; });
  std::printf("%lu acquired\n", acquired.load());
  waits.print("all");
  EXPECT_EQ(errors, 0);
  EXPECT_EQ(semaphore.available(), 4u);
}

TEST_F(SyncStress, ARwlockExcludesWritersAndUpgradesInPlace) {
  CoRwlock lock;
  std::uint64_t value = 0;  // plain
  std::atomic<int> readers{0};
  std::atomic<int> writers{0};
  std::atomic<int> errors{0};
  std::atomic<std::uint64_t> upgraded{0};
  std::atomic<std::uint64_t> refused{0};
  WaitCounts writes;
  WaitCounts upgrades;
  const auto check_write = [&] {
    if (writers.fetch_add(1) != 0 || readers != 0) ++errors;
    ++value;
    writers.fetch_sub(1);
  };
  const auto body = [&](int i) -> Task<> {
    TestRandom random(i);
    while (!stop_) {
      if (random.below(4) == 0) {
        const std::stop_token stop = slots_[i].renew();
        Seen seen;
        Watched wait(lock.write(stop), stop, seen);
        Result<CoRwlock::Guard> guard = co_await std::move(wait);
        writes.count(seen, guard.has_value());
        if (!guard) continue;
        check_write();
        if (random.below(2)) guard->downgrade();
        if (random.below(4) == 0) co_await move_to(*contexts_[i]);
        continue;
      }
      auto guard = co_await lock.read();
      readers.fetch_add(1);
      if (writers != 0) ++errors;
      const std::uint64_t before = value;
      if (random.below(4) == 0) co_await move_to(*contexts_[i]);
      if (before != value) ++errors;
      readers.fetch_sub(1);
      if (random.below(8) == 0) {
        const std::stop_token stop = slots_[i].renew();
        Seen seen;
        Watched wait(guard.upgrade(stop), stop, seen);
        const Result<bool> result = co_await std::move(wait);
        upgrades.count(seen, result.has_value());
        if (result.value_or(false)) {
          if (value != before) ++errors;  // nobody wrote in between
          check_write();
          upgraded.fetch_add(1, std::memory_order_relaxed);
        } else if (result) {
          refused.fetch_add(1, std::memory_order_relaxed);
        }
      }
    }
  };
  run(body,
      [&] { return upgraded > 100 && refused > 0 && writes.both_ways() && upgrades.both_ways(5); });
  std::printf("%lu upgraded, %lu refused\n", upgraded.load(), refused.load());
  writes.print("to write");
  upgrades.print("to upgrade");
  EXPECT_EQ(errors, 0);
}

TEST_F(SyncStress, AnEventWakesEverybodyWhoWaits) {
  CoEvent event;
  WaitCounts waits;
  const auto body = [&](int i) -> Task<> {
    while (!stop_) {
      if (i == 0) {
        event.set();
        event.reset();
        co_await move_to(*contexts_[i]);
        continue;
      }
      const std::stop_token stop = slots_[i].renew();
      Seen seen;
      Watched wait(event.wait(stop), stop, seen);
      const Result<void> result = co_await std::move(wait);
      waits.count(seen, result.has_value());
    }
  };
  run(body, [&] { return waits.both_ways() && waits.waited > 1000; });
  waits.print("all");
}

// Four coroutines a context lock, increment and unlock for ever.
void expect_nobody_starves(int contexts) {
  const int coroutines = 4 * contexts;
  CoMutex mutex;
  std::uint64_t value = 0;
  std::atomic<bool> stop{false};
  std::atomic<int> ended{0};
  std::vector<std::uint64_t> turns(coroutines * 8);  // each on a cache line of its own
  std::vector<std::unique_ptr<IOThread>> threads;
  const auto body = [&](int i) -> Task<> {
    AioContext& home = threads[i % contexts]->context();
    for (std::uint64_t& mine = turns[i * 8]; !stop.load(std::memory_order_relaxed);) {
      {
        const auto guard = co_await mutex.lock();
        ++value;
      }
      if (++mine % 64 == 0) co_await move_to(home);
    }
    ended.fetch_add(1);
  };
  for (int i = 0; i < contexts; ++i) threads.push_back(std::make_unique<IOThread>());
  for (int i = 0; i < coroutines; ++i) spawn(threads[i % contexts]->context(), body(i));
#ifdef NDEBUG
  std::this_thread::sleep_for(std::chrono::seconds(5));
#else
  std::this_thread::sleep_for(std::chrono::seconds(1));
#endif
  stop = true;
  while (ended < coroutines) std::this_thread::yield();
  threads.clear();
  std::vector<std::uint64_t> sorted;
  for (int i = 0; i < coroutines; ++i) sorted.push_back(turns[i * 8]);
  std::ranges::sort(sorted);
  const std::uint64_t median = sorted[sorted.size() / 2];
  std::printf("%lu turns; the slowest coroutine had %lu, the median %lu\n", value, sorted.front(),
              median);
#ifdef NDEBUG
  EXPECT_GE(sorted.front() * 2, median);
#else
  EXPECT_GE(sorted.front() * 10, median);  // short, and slow: a hint only
#endif
}

TEST(SyncFairness, NobodyStarvesAtALockOfTwoContexts) { expect_nobody_starves(2); }
TEST(SyncFairness, NobodyStarvesAtALockOfFiveContexts) { expect_nobody_starves(5); }

}  // namespace
}  // namespace roost
