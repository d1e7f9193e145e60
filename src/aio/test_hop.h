// SPDX-License-Identifier: MIT
// A scenario for TestMachine: contexts pass coroutines around as fast as they can.
//
// Invariant: each co_schedule() resumes its coroutine exactly once, on the context it names; and
// the coroutines that one thread schedules on one context resume in the order it did so.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "aio/test_machine.h"
#include "base/test_build.h"

namespace roost {

struct Hopper {
  Coroutine* co = nullptr;
  // Written by whoever holds the hopper, before it schedules it.
  int sent_to = -1;
  int sent_by = -1;
  std::uint64_t number = 0;  // of sent_by's schedules to sent_to
  // Set by the schedule, cleared by the resumption it causes.
  std::atomic<bool> pending{false};
};

struct HopCounts {
  std::uint64_t elsewhere = 0;
  std::uint64_t here = 0;
  std::uint64_t retried = 0;    // the slot was empty
  std::uint64_t displaced = 0;  // the own slot was taken by another, who goes on instead
  std::uint64_t stolen = 0;     // taken from another context's slot
  std::uint64_t resumed = 0;
};

class HopWorld {
 public:
  static constexpr int kMaxContexts = 5;
  static constexpr int kMaxHoppers = 8;

  HopWorld(TestMachine& machine, int contexts, int hoppers, std::uint64_t seed)
      : machine_(machine), count_(contexts), hopper_count_(hoppers) {
    for (int i = 0; i < contexts; ++i) {
      places_[i].random = TestRandom(seed + static_cast<std::uint64_t>(i));
      // Some sleep at once, others spin before.
      contexts_.push_back(machine.add_context("hop " + std::to_string(i), i % 2 == 0));
    }
  }

  void start() {
    for (int i = 0; i < hopper_count_; ++i) {
      Hopper& hopper = hoppers_[i];
      hopper.co = Coroutine::create(hop(hopper), "hopper");
      const int to = i % count_;
      contexts_[to]->run([&] { send(hopper, to, to); });
    }
  }

  /// After this the hoppers are gone.
  void finish() {
    stop_ = true;
    machine_.wait_until([this] { return ended_.load() == hopper_count_; });
    contexts_.clear();
  }

  int errors() const { return errors_; }

  /// Exact after finish().
  HopCounts counts() const {
    HopCounts sum;
    for (const Place& place : places_) {
      sum.elsewhere += place.counts.elsewhere;
      sum.here += place.counts.here;
      sum.retried += place.counts.retried;
      sum.displaced += place.counts.displaced;
      sum.stolen += place.counts.stolen;
      sum.resumed += place.counts.resumed;
    }
    return sum;
  }

 private:
  // What one context's thread owns.
  struct alignas(128) Place {
    Place() : random(0) {}
    TestRandom random;
    HopCounts counts;
    std::array<std::uint64_t, kMaxContexts> numbers_sent{};
    std::array<std::uint64_t, kMaxContexts> last_number_from{};
  };

  int here() const {
    for (int i = 0; i < count_; ++i) {
      if (AioContext::current() == contexts_[i].get()) return i;
    }
    return -1;
  }

  int any_place(int at) { return static_cast<int>(places_[at].random.below(count_)); }

  void send(Hopper& hopper, int from, int to) noexcept {
    Place& place = places_[from];
    ++(from == to ? place.counts.here : place.counts.elsewhere);
    hopper.sent_by = from;
    hopper.sent_to = to;
    hopper.number = ++place.numbers_sent[to];
    if (hopper.pending.exchange(true)) ++errors_;
    under_way_.fetch_add(1);
    co_schedule(*contexts_[to], *hopper.co);
    // The hopper may be running, parked again or gone by now.
  }

  // Moves the hopper of a slot on, if there is one.
  bool send_from(int slot, int at) noexcept {
    Place& place = places_[at];
    machine_.interrupt();
    Hopper* hopper = slots_[slot].exchange(nullptr);
    if (!hopper) {
      ++place.counts.retried;
      return false;
    }
    place.counts.stolen += slot != at;
    send(*hopper, at, any_place(at));
    return true;
  }

  bool send_from_any(int at) noexcept {
    for (int slot = 0; slot < count_; ++slot) {
      if (send_from(slot, at)) return true;
    }
    return false;
  }

  // The publish step: shows the hopper to everybody, and moves others on: the one that stood in
  // the slot, and that of a random slot. If there is none, that is for those who are under way to
  // do later, unless they are few; the last to park sees that there are none.
  void park(Hopper& hopper, int at) noexcept {
    Place& place = places_[at];
    Hopper* other = slots_[at].exchange(&hopper);
    const int others_under_way = under_way_.fetch_sub(1) - 1;
    machine_.interrupt();
    if (other) {
      ++place.counts.displaced;
      send(*other, at, any_place(at));
    }
    const bool sent = send_from(any_place(at), at) || other;
    if (!sent && others_under_way < count_) send_from_any(at);
    // Whoever has seen the stop moves everybody on, and may have looked here before this one came.
    if (stop_.load()) send_from_any(at);
  }

  void check(Hopper& hopper, int at) {
    Place& place = places_[at];
    ++place.counts.resumed;
    if (at != hopper.sent_to) ++errors_;
    if (Coroutine::self() != hopper.co) ++errors_;
    if (!hopper.pending.exchange(false)) ++errors_;
    std::uint64_t& last = place.last_number_from[hopper.sent_by];
    if (hopper.number <= last) ++errors_;
    last = hopper.number;
    machine_.note("hop", static_cast<std::uint64_t>(&hopper - hoppers_.data()), hopper.number);
  }

  Task<void> hop(Hopper& hopper) {
    for (;;) {
      const int at = here();
      check(hopper, at);
      if (stop_.load()) {
        while (send_from_any(at)) {
        }
        ended_.fetch_add(1);
        co_return;
      }
      co_await suspend([this, h = &hopper, at](Coroutine&) noexcept { park(*h, at); });
    }
  }

  TestMachine& machine_;
  const int count_;
  const int hopper_count_;
  std::vector<std::shared_ptr<AioContext>> contexts_;
  std::array<Place, kMaxContexts> places_;
  std::array<std::atomic<Hopper*>, kMaxContexts> slots_{};
  std::array<Hopper, kMaxHoppers> hoppers_;
  std::atomic<int> under_way_{0};  // at least: not parked
  std::atomic<bool> stop_{false};
  std::atomic<int> ended_{0};
  std::atomic<int> errors_{0};
};

}  // namespace roost
