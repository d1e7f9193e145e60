// SPDX-License-Identifier: MIT
// The word of a Completion: one fires it, one waits for it, and one may stop the wait, as
// Completion and CompletionToken do it.
#include "model/checker.h"
#include "roost/coro/completion_core.h"

namespace roost::model {
namespace {

using P = RelacyPlatform<Pause::kNothing>;

Path fired_before{"it was fired before the wait"};
Path fired_while{"it was fired while the waiter was on its way to wait()"};
Path fired_after{"the one who fired woke the waiter"};
Path stopped_after{"the one who stopped woke the waiter"};
Path stopped_then_fired{"the wait was stopped, and the next one got the result"};
Path fire_freed{"the one who fired freed the block"};
Path wait_freed{"the one who waited freed the block"};
Path left_unfired{"the waiting side went first"};

struct alignas(8) Waiter {
  P::Shared<std::uint64_t> frame;  // of the coroutine; whoever wakes it may use it
};
using Core = CompletionCore<P, Waiter>;

struct Block {
  Core core;
  P::Shared<std::uint64_t> result;  // written by the firing side
  P::Shared<std::uint64_t> taken;   // and this by the waiting side
};

struct World {
  Storage<Block> block;
  Waiter waiter;
  Mailbox<bool, Order::kHandsOver> wake;
  Flag stop_returned;
  bool got_result = false;

  void free_block() {
    // What both sides did with the block comes before.
    block->result.set(0);
    block->taken.set(0);
    block.destroy();
  }

  void fire() {
    block->result.set(42);
    const Core::Fired fired = block->core.fire();
    switch (fired.todo) {
      case Core::Fire::kNothing:
        break;
      case Core::Fire::kWake:
        fired_after.take();
        fired.waiter->frame.set(2);
        wake.post(true);
        break;
      case Core::Fire::kFree:
        fire_freed.take();
        free_block();
        break;
      case Core::Fire::kTwice:
        require(false, "it is fired once");
    }
  }

  void stop() {
    if (Waiter* const woken = block->core.stop()) {
      stopped_after.take();
      woken->frame.set(3);
      wake.post(true);
    }
    stop_returned.set();
  }

  // Whether the result is there now.
  bool wait(bool stoppable) {
    if (block->core.fired()) {
      fired_before.take();
    } else {
      waiter.frame.set(1);  // suspended
      switch (block->core.wait(waiter)) {
        case Core::Wait::kWaiting:
          wake.take();
          break;
        case Core::Wait::kNotNeeded:
          fired_while.take();
          break;
        case Core::Wait::kOccupied:
          require(false, "one waits");
      }
      require(waiter.frame.get() > 0, "the frame is the waiter's again");
    }
    if (stoppable) {
      stop_returned.await();
      return block->core.end_wait();
    }
    require(block->core.fired(), "it was woken because of the result");
    return true;
  }

  void take_result() {
    require(block->result.get() == 42, "the result is there");
    got_result = true;
  }

  void abandon() {
    block->taken.set(1);
    switch (block->core.abandon()) {
      case Core::Abandon::kNothing:
        left_unfired.take();
        break;
      case Core::Abandon::kFree:
        wait_freed.take();
        free_block();
        break;
      case Core::Abandon::kOccupied:
        require(false, "nobody waits");
    }
  }
};

struct FireAndWait : Suite<2>, World {
  void before() override { block.make(); }
  void thread(unsigned self) override {
    if (self == 1) return fire();
    require(wait(false), "the wait ends with the result");
    take_result();
    abandon();
  }
  void after() override {
    require(!block.alive() && got_result, "the result came, the block is freed");
  }
};

struct FireAndAbandon : Suite<2>, World {
  void before() override { block.make(); }
  void thread(unsigned self) override { self == 1 ? fire() : abandon(); }
  void after() override { require(!block.alive(), "the block is freed"); }
};

// The stop callback may come at any time from before the wait until its end, on its own thread.
struct Stop : Suite<3>, World {
  void before() override { block.make(); }
  void thread(unsigned self) override {
    if (self == 1) return fire();
    if (self == 2) return stop();
    // The callback is there before await_suspend(), but it may have been fired before
    // await_ready().
    if (wait(true)) {
      take_result();
    } else if (rl::rand(2) == 0) {
      require(wait(false), "the second wait ends with the result");
      take_result();
      stopped_then_fired.take();
    }
    abandon();
  }
  void after() override { require(!block.alive(), "the block is freed"); }
};

// Nobody fires it before the wait has been stopped.
struct StopOnly : Suite<2>, World {
  void before() override { block.make(); }
  void thread(unsigned self) override {
    if (self == 1) return stop();
    require(!wait(true), "the wait is stopped");
  }
  void after() override {
    fire();
    abandon();
    require(!block.alive(), "the block is freed");
  }
};

}  // namespace
}  // namespace roost::model

int main(int argc, char** argv) {
  using namespace roost::model;
  Cases cases(argc, argv);
  cases.exhaustive<FireAndWait>("fire_and_wait",
                                {&fired_before, &fired_while, &fired_after, &wait_freed});
  cases.exhaustive<FireAndAbandon>("fire_and_abandon", {&fire_freed, &wait_freed, &left_unfired});
  cases.exhaustive<StopOnly>("stop_only", {&stopped_after, &wait_freed});
  cases.bounded<Stop>("stop", 3,
                      {&fired_before, &fired_while, &fired_after, &stopped_after,
                       &stopped_then_fired, &fire_freed, &wait_freed, &left_unfired});
  cases.random<Stop>("stop_at_random", 300000,
                     {&fired_before, &fired_while, &fired_after, &stopped_after,
                      &stopped_then_fired, &fire_freed, &wait_freed, &left_unfired});
  return cases.result();
}
