// SPDX-License-Identifier: MIT
// Five contexts pass coroutines around as fast as they can.
//
// Invariant: each co_schedule() resumes its coroutine exactly once, on the context it names; and
// the coroutines that one thread schedules on one context resume in the order it did so.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "aio/test_loop.h"
#include "base/test_build.h"
#include "roost/aio/iothread.h"

namespace roost {
namespace {

constexpr int kContexts = 5;
constexpr int kHoppers = 8;
constexpr int kSeed = 20'240;

struct Hopper {
  Coroutine* co = nullptr;
  // Written by whoever holds the hopper, before it schedules it.
  int sent_to = -1;
  int sent_by = -1;
  std::uint64_t number = 0;  // of sent_by's schedules to sent_to
  // Set by the schedule, cleared by the resumption it causes.
  std::atomic<bool> pending{false};
};

struct Counts {
  std::uint64_t elsewhere = 0;
  std::uint64_t here = 0;
  std::uint64_t retried = 0;    // the slot was empty
  std::uint64_t displaced = 0;  // the own slot was taken by another, who goes on instead
  std::uint64_t stolen = 0;     // taken from another context's slot
  std::uint64_t resumed = 0;
};

struct World;

// What one context's thread owns.
struct alignas(128) Place {
  Place() : random(0) {}
  TestRandom random;
  Counts counts;
  std::array<std::uint64_t, kContexts> numbers_sent{};
  std::array<std::uint64_t, kContexts> last_number_from{};
};

struct World {
  std::vector<std::unique_ptr<IOThread>> threads;
  std::array<Place, kContexts> places;
  std::array<std::atomic<Hopper*>, kContexts> slots{};
  std::array<Hopper, kHoppers> hoppers;
  std::atomic<int> under_way{0};  // at least: not parked
  std::atomic<bool> stop{false};
  std::atomic<int> ended{0};
  std::atomic<int> errors{0};

  int here() const {
    for (int i = 0; i < kContexts; ++i) {
      if (AioContext::current() == &threads[i]->context()) return i;
    }
    return -1;
  }

  void send(Hopper& hopper, int from, int to) noexcept {
    Place& place = places[from];
    ++(from == to ? place.counts.here : place.counts.elsewhere);
    hopper.sent_by = from;
    hopper.sent_to = to;
    hopper.number = ++place.numbers_sent[to];
    if (hopper.pending.exchange(true)) ++errors;
    under_way.fetch_add(1);
    co_schedule(threads[to]->context(), *hopper.co);
    // The hopper may be running, parked again or gone by now.
  }

  // Moves the hopper of a slot on, if there is one.
  bool send_from(int slot, int at) noexcept {
    Place& place = places[at];
    Hopper* hopper = slots[slot].exchange(nullptr);
    if (!hopper) {
      ++place.counts.retried;
      return false;
    }
    place.counts.stolen += slot != at;
    send(*hopper, at, static_cast<int>(place.random.below(kContexts)));
    return true;
  }

  bool send_from_any(int at) noexcept {
    for (int slot = 0; slot < kContexts; ++slot) {
      if (send_from(slot, at)) return true;
    }
    return false;
  }

  // The publish step: shows the hopper to everybody, and moves others on: the one that stood in
  // the slot, and that of a random slot. If there is none, that is for those who are under way to
  // do later, unless they are few; the last to park sees that there are none.
  void park(Hopper& hopper, int at) noexcept {
    Place& place = places[at];
    Hopper* other = slots[at].exchange(&hopper);
    const int others_under_way = under_way.fetch_sub(1) - 1;
    if (other) {
      ++place.counts.displaced;
      send(*other, at, static_cast<int>(place.random.below(kContexts)));
    }
    const bool sent = send_from(static_cast<int>(place.random.below(kContexts)), at) || other;
    if (!sent && others_under_way < kContexts) send_from_any(at);
    // Whoever has seen the stop moves everybody on, and may have looked here before this one came.
    if (stop.load()) send_from_any(at);
  }

  void check(Hopper& hopper, int at) {
    Place& place = places[at];
    ++place.counts.resumed;
    if (at != hopper.sent_to) ++errors;
    if (Coroutine::self() != hopper.co) ++errors;
    if (!hopper.pending.exchange(false)) ++errors;
    std::uint64_t& last = place.last_number_from[hopper.sent_by];
    if (hopper.number <= last) ++errors;
    last = hopper.number;
  }
};

Task<void> hop(World& world, Hopper& hopper) {
  for (;;) {
    const int at = world.here();
    world.check(hopper, at);
    if (world.stop.load()) {
      while (world.send_from_any(at)) {
      }
      world.ended.fetch_add(1);
      co_return;
    }
    co_await suspend([w = &world, h = &hopper, at](Coroutine&) noexcept { w->park(*h, at); });
  }
}

class MultiContextStress : public OnEachLoop {};
ROOST_ON_EACH_LOOP(MultiContextStress);

TEST_P(MultiContextStress, EachScheduleResumesOnceOnItsContextAndInOrder) {
  World world;
  for (int i = 0; i < kContexts; ++i) {
    world.places[i].random = TestRandom(kSeed + i);
    auto o = options("hop " + std::to_string(i));
    if (i % 2) o.poll_max_ns = 0;  // some sleep at once, others spin before
    world.threads.push_back(std::make_unique<IOThread>(o));
  }
  for (int i = 0; i < kHoppers; ++i) {
    Hopper& hopper = world.hoppers[i];
    hopper.co = Coroutine::create(hop(world, hopper), "hopper");
    const int to = i % kContexts;
    world.threads[to]->context().run([&] { world.send(hopper, to, to); });
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  world.stop = true;
  while (world.ended.load() < kHoppers) std::this_thread::yield();
  for (auto& thread : world.threads) {
    thread->stop();
    thread->join();
  }
  Counts sum;
  for (const Place& place : world.places) {
    sum.elsewhere += place.counts.elsewhere;
    sum.here += place.counts.here;
    sum.retried += place.counts.retried;
    sum.displaced += place.counts.displaced;
    sum.stolen += place.counts.stolen;
    sum.resumed += place.counts.resumed;
  }
  std::printf(
      "seed %d: scheduled elsewhere %lu, scheduled here %lu, retried %lu, displaced %lu, "
      "taken from another context %lu\n",
      kSeed, sum.elsewhere, sum.here, sum.retried, sum.displaced, sum.stolen);
  EXPECT_EQ(world.errors, 0);
  EXPECT_EQ(sum.resumed, sum.elsewhere + sum.here);
  EXPECT_GT(sum.elsewhere, 1000u);
  EXPECT_GT(sum.here, 100u);
  EXPECT_GT(sum.retried, 100u);
  EXPECT_GT(sum.displaced, 100u);
  EXPECT_GT(sum.stolen, 100u);
}

}  // namespace
}  // namespace roost
