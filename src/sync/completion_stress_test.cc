// SPDX-License-Identifier: MIT
// A thread that no context knows fires completions, another one requests stops, while coroutines on
// two contexts are before, in and after the suspension.
//
// Invariant: each wait ends exactly once, at home, with what was fired, or with ECANCELED only
// where a stop was requested; and what was fired after a stopped wait is still there for the next.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <memory>
#include <optional>
#include <stop_token>
#include <thread>

#include "aio/test_loop.h"
#include "base/test_build.h"
#include "roost/aio/iothread.h"
#include "roost/coro/completion.h"
#include "roost/coro/task.h"

namespace roost {
namespace {

constexpr int kHomes = 2;
const int kRounds = rounds(20'000);

struct Counts {
  int before = 0;   // fired before the wait began
  int during = 0;   // fired when the wait had begun, but the coroutine not suspended
  int after = 0;    // fired, as far as was seen, when the coroutine was suspended
  int stopped = 0;  // ECANCELED
  int fired_while_stopping =
      0;                       // suspended, a stop was requested, and the result came all the same
  int waited_again = 0;        // after a stopped wait
  int fired_into_nothing = 0;  // the completion was dropped after a stopped wait
  int errors = 0;
};

void pause_for(unsigned steps) {
  for (unsigned i = 0; i < steps; ++i) RealPlatform::cpu_relax();
}

// One wait, which looks on at itself.
template <class Inner>
struct Probe {
  Inner inner;
  Completion<int>* done;
  unsigned pause;
  bool until_fired;  // keeps the coroutine between the start of the wait and the suspension
  bool suspended = false;
  bool during = false;

  bool await_ready() const { return inner.await_ready(); }
  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) {
    suspended = true;
    pause_for(pause);
    while (until_fired && !done->fired()) std::this_thread::yield();
    during = done->fired();
    inner.await_suspend(frame);
  }
  auto await_resume() { return inner.await_resume(); }
};
template <class Inner, class... Rest>
Probe(Inner&&, Rest...) -> Probe<Inner>;

// What is awaited: it may be copied, unlike what the probe is made of.
template <class Inner>
class Look {
 public:
  explicit Look(Probe<Inner>& probe) : probe_(&probe) {}
  bool await_ready() const { return probe_->await_ready(); }
  template <class Promise>
  void await_suspend(std::coroutine_handle<Promise> frame) {
    probe_->await_suspend(frame);
  }
  auto await_resume() { return probe_->await_resume(); }

 private:
  Probe<Inner>* probe_;
};

// Takes one thing at a time from a coroutine to a thread.
template <class T>
struct alignas(128) Mailbox {
  std::atomic<T*> slot{nullptr};  // null: empty; set by the coroutine, taken by the thread
  void put(T* what) {
    while (slot.load(std::memory_order_relaxed)) std::this_thread::yield();
    slot.store(what, std::memory_order_release);
  }
  T* take() { return slot.exchange(nullptr, std::memory_order_acquire); }
};

struct World {
  std::array<Mailbox<void>, kHomes> tokens;
  std::array<Mailbox<std::stop_source>, kHomes> stops;
  std::array<Counts, kHomes> counts;  // of the coroutine there
  std::atomic<int> ended{0};

  void fire() {
    TestRandom random(1);
    while (ended.load() < kHomes || pending(tokens)) {
      bool found = false;
      for (auto& mailbox : tokens) {
        if (void* opaque = mailbox.take()) {
          found = true;
          pause_for(random.below(200));
          CompletionToken<int>::from_opaque(opaque).fire(7);
        }
      }
      if (!found) std::this_thread::yield();
    }
  }
  void stop() {
    TestRandom random(2);
    while (ended.load() < kHomes || pending(stops)) {
      bool found = false;
      for (auto& mailbox : stops) {
        if (const std::unique_ptr<std::stop_source> source{mailbox.take()}) {
          found = true;
          pause_for(random.below(200));
          source->request_stop();
        }
      }
      if (!found) std::this_thread::yield();
    }
  }
  template <class Mailboxes>
  static bool pending(Mailboxes& mailboxes) {
    for (auto& mailbox : mailboxes) {
      if (mailbox.slot.load()) return true;
    }
    return false;
  }
};

Task<void> wait_for_ever_new_ones(World& world, int index) {
  CoContext* const home = this_thread().context;
  Counts& counts = world.counts[index];
  TestRandom random(index + 10);
  for (int round = 0; round < kRounds; ++round) {
    std::optional<Completion<int>> done(std::in_place, "a foreign answer");
    const unsigned mode = random.below(6);
    world.tokens[index].put(done->token().release());
    if (mode < 4) {
      while (mode == 0 && !done->fired()) std::this_thread::yield();
      Probe probe{done->wait(), &*done, random.below(100), mode == 1};
      const Result<int> result = co_await Look(probe);
      ++(!probe.suspended ? counts.before : probe.during ? counts.during : counts.after);
      counts.errors += !result || *result != 7;
    } else {
      std::stop_source source;
      world.stops[index].put(new std::stop_source(source));
      Probe probe{done->wait(source.get_token()).operator co_await(), &*done, random.below(100),
                  false};
      const Result<int> result = co_await Look(probe);
      if (result) {
        counts.fired_while_stopping += probe.suspended && source.stop_requested();
        counts.errors += *result != 7;
      } else {
        ++counts.stopped;
        counts.errors += !source.stop_requested() || result.error().code() != ECANCELED;
        if (mode == 4) {
          const Result<int> late = co_await done->wait();
          counts.errors += !late || *late != 7;
          ++counts.waited_again;
        } else {
          counts.fired_into_nothing += !done->fired();
          done.reset();
        }
      }
    }
    counts.errors += this_thread().context != home;
  }
  world.ended.fetch_add(1);
}

class CompletionStress : public OnEachLoop {};
ROOST_ON_EACH_LOOP(CompletionStress);

TEST_P(CompletionStress, FiredByForeignThreadsItResumesOnceAtHomeWithWhatWasFired) {
  World world;
  {
    std::array<std::unique_ptr<IOThread>, kHomes> homes;
    for (int i = 0; i < kHomes; ++i) {
      homes[i] = std::make_unique<IOThread>(options("home " + std::to_string(i)));
      spawn(homes[i]->context(), wait_for_ever_new_ones(world, i), "waiter");
    }
    std::thread firer([&] { world.fire(); });
    std::thread stopper([&] { world.stop(); });
    firer.join();
    stopper.join();
  }
  Counts sum;
  for (const Counts& counts : world.counts) {
    sum.before += counts.before;
    sum.during += counts.during;
    sum.after += counts.after;
    sum.stopped += counts.stopped;
    sum.fired_while_stopping += counts.fired_while_stopping;
    sum.waited_again += counts.waited_again;
    sum.fired_into_nothing += counts.fired_into_nothing;
    sum.errors += counts.errors;
  }
  std::printf(
      "fired before %d, during %d, after %d; stopped %d, fired while stopping %d, waited again %d, "
      "fired into nothing %d\n",
      sum.before, sum.during, sum.after, sum.stopped, sum.fired_while_stopping, sum.waited_again,
      sum.fired_into_nothing);
  EXPECT_EQ(sum.errors, 0);
  EXPECT_GT(sum.before, 0);
  EXPECT_GT(sum.during, 0);
  EXPECT_GT(sum.after, 0);
  EXPECT_GT(sum.stopped, 0);
  EXPECT_GT(sum.fired_while_stopping, 0);
  EXPECT_GT(sum.waited_again, 0);
  EXPECT_GT(sum.fired_into_nothing, 0);
}

}  // namespace
}  // namespace roost
