// SPDX-License-Identifier: MIT
// The flags of a bottom half, with its entry travelling through an inbox: who enqueues, what is
// coalesced, and that the last turn frees it.
#include "model/checker.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/inbox.h"

namespace roost::model {
namespace {

using P = RelacyPlatform<Pause::kNothing>;
using Flags = BottomHalfFlags<P>;

Path coalesced{"a schedule was coalesced with a queued one"};
Path enqueued_twice{"the entry was enqueued again"};
Path ran_both{"one turn did what two threads had asked for"};
Path cancelled{"a turn found the schedule cancelled"};
Path deleted_with_schedule{"the deletion was coalesced with a schedule"};

struct Core {
  Flags flags;
  P::Shared<Core*> next;
};

struct World {
  Storage<Core> core;
  Inbox<P, Core> inbox;
  Mailbox<bool> posted;  // stands for the wake-up of the home thread
  P::Shared<std::uint64_t> work[3];
  bool queued = false;
  unsigned enqueued = 0;

  void request(std::uint64_t bits) {
    if (core->flags.request(bits) & Flags::kQueued) {
      coalesced.take();
      if (bits & Flags::kDeleted) deleted_with_schedule.take();
      return;
    }
    require(!queued, "the entry stands in one queue");
    queued = true;
    if (++enqueued > 1) enqueued_twice.take();
    require(inbox.push(core.get()) == Inbox<P, Core>::Push::kQueued, "the inbox is open");
    posted.post(true);
  }

  // The next turn of the entry at home: what is to be done.
  std::uint64_t turn() {
    posted.take();
    auto list = inbox.take();
    while (list.count == 0) {
      rl::yield(1, RL_INFO);  // the mailbox was quicker than the inbox
      list = inbox.take();
    }
    require(list.count == 1 && list.oldest == &core.get(), "the entry is there");
    queued = false;
    return core->flags.take();
  }
};

// Two threads schedule, as different things so that the turn can tell them apart.
struct Schedule : Suite<3>, World {
  void before() override { core.make(); }
  void thread(unsigned self) override {
    if (self != 0) {
      work[self].set(self);
      request(self == 1 ? Flags::kScheduled : Flags::kIdle);
      return;
    }
    std::uint64_t done = 0;
    while (done != (Flags::kScheduled | Flags::kIdle)) {
      const std::uint64_t bits = turn();
      require(bits & (Flags::kScheduled | Flags::kIdle), "a turn has something to do");
      if (bits & Flags::kScheduled) require(work[1].get() == 1, "what came before is seen");
      if (bits & Flags::kIdle) require(work[2].get() == 2, "what came before is seen");
      if ((bits & Flags::kScheduled) && (bits & Flags::kIdle)) ran_both.take();
      require((done & bits) == 0, "each schedule is done once");
      done |= bits & (Flags::kScheduled | Flags::kIdle);
    }
  }
  void after() override { core.destroy(); }
};

// One schedules, cancels, schedules otherwise and destroys it, while its turns come.
struct Destroy : Suite<2>, World {
  void before() override { core.make(); }
  void thread(unsigned self) override {
    if (self != 0) {
      work[1].set(1);
      request(Flags::kScheduled);
      core->flags.cancel();
      work[2].set(2);
      request(Flags::kIdle);
      request(Flags::kDeleted);
      return;
    }
    for (;;) {
      const std::uint64_t bits = turn();
      if (bits & Flags::kDeleted) {
        core.destroy();
        break;
      }
      if (!(bits & (Flags::kScheduled | Flags::kIdle))) cancelled.take();
      if (bits & Flags::kScheduled) require(work[1].get() == 1, "what came before is seen");
      if (bits & Flags::kIdle) require(work[2].get() == 2, "what came before is seen");
    }
  }
  void after() override { require(!core.alive(), "it is freed"); }
};

}  // namespace
}  // namespace roost::model

int main(int argc, char** argv) {
  using namespace roost::model;
  Cases cases(argc, argv);
  cases.exhaustive<Destroy>("destroy",
                            {&coalesced, &enqueued_twice, &cancelled, &deleted_with_schedule});
  cases.exhaustive<Schedule>("schedule", {&coalesced, &enqueued_twice, &ran_both});
  return cases.result();
}
