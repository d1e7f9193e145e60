// SPDX-License-Identifier: MIT
// The state word of a coroutine: direct entries that cancel schedules, stale entries, references,
// moves, wake-ups and the end, as Coroutine does them.
//
// Entries travel through mailboxes that order no memory, so that the word alone has to hand the
// frame from one thread to the next.
#include "model/checker.h"
#include "roost/coro/state_word.h"

namespace roost::model {
namespace {

using P = RelacyPlatform<Pause::kNothing>;
using Word = StateWord<P>;

Path entry_ran{"an entry's turn ran the coroutine"};
Path entry_was_stale{"an entry was stale"};
Path entry_freed{"the last entry freed the block"};
Path direct_won{"a direct entry won"};
Path direct_lost{"a direct entry lost"};
Path end_freed{"the end freed the block"};
Path ref_freed{"the last reference freed the block"};
Path ran_with_stale{"an entry was queued while a stale one was, too"};
Path rescheduled{"a listed coroutine was handed to the queue"};
Path ran_listed{"a listed coroutine ran"};

struct Entry {
  bool stop = false;
  bool embedded = false;
  std::uint32_t generation = 0;
  unsigned schedule = 0;  // which schedule of the coroutine it stands for
};

struct Block {
  Block() : word(0) {}
  Word word;
  P::Shared<std::uint64_t> frame;
  P::Shared<std::uint64_t> notes[3];  // what each thread does with the block before it lets go
};

// What the cases have in common.
struct World {
  Storage<Block> block;
  Mailbox<Entry> mailboxes[3];
  unsigned schedules = 0;
  unsigned entries_queued = 0;
  unsigned runs = 0;
  bool embedded_queued = false;
  bool running = false;

  void free_block() {
    // Everybody's last use of the block comes before.
    block->frame.set(0);
    for (auto& note : block->notes) note.set(0);
    block.destroy();
  }

  void post(std::uint32_t context, const Word::Schedule& schedule) {
    require(schedule.won, "the schedule is won");
    if (schedule.embedded) {
      require(!embedded_queued, "the embedded entry stands in one queue");
      embedded_queued = true;
    }
    ++schedules;
    if (++entries_queued > 1) ran_with_stale.take();
    mailboxes[context].post({.stop = false,
                             .embedded = schedule.embedded,
                             .generation = schedule.generation,
                             .schedule = schedules});
  }

  // One turn of the coroutine, without what ends it.
  void run_frame() {
    require(!running, "one thread runs it");
    running = true;
    block->frame.set(block->frame.get() + 1);
    ++runs;
    schedule_point();
    running = false;
  }

  void run_to_end() {
    run_frame();
    if (block->word.end()) {
      end_freed.take();
      free_block();
    }
  }

  // The turn of `entry` at `context`. True: the coroutine is the caller's to run.
  bool claim(std::uint32_t context, const Entry& entry) {
    --entries_queued;
    if (entry.embedded) embedded_queued = false;
    switch (block->word.claim_entry(context, entry.generation, entry.embedded)) {
      case Word::EntryOutcome::kRun:
        require(entry.schedule == schedules, "the newest schedule's entry runs it");
        entry_ran.take();
        return true;
      case Word::EntryOutcome::kStale:
        entry_was_stale.take();
        return false;
      case Word::EntryOutcome::kFreeBlock:
        entry_freed.take();
        free_block();
        return false;
    }
    return false;
  }

  // Until the word says so: whoever sees a coroutine suspended may use its frame.
  void await(CoState state) {
    while (block->word.peek().state() != state) rl::yield(1, RL_INFO);
  }

  bool enter(std::uint32_t context) {
    const bool won = block->word.claim_direct(context).won;
    (won ? direct_won : direct_lost).take();
    return won;
  }

  void drop_ref(unsigned self) {
    block->notes[self].set(1);
    if (block->word.drop_ref()) {
      ref_freed.take();
      free_block();
    }
  }

  void check(unsigned expected_runs) {
    require(runs == expected_runs, "each schedule runs it once");
    require(!block.alive(), "the block is freed");
  }
};

// A direct entry against the turn of the entry that it cancels.
struct DirectEntry : Suite<2>, World {
  void before() override {
    block.make();
    require(block->word.add_ref(), "a reference more");
  }
  void thread(unsigned self) override {
    if (self == 0) {
      post(1, block->word.schedule(1, false));
      if (enter(0)) run_to_end();
      drop_ref(0);
    } else if (claim(1, mailboxes[1].take())) {
      run_to_end();
    }
  }
  void after() override { check(1); }
};

// As above; whoever entered directly lets it be scheduled again, on the same or another context,
// or moves it, while the stale entry is queued.
struct AgainAndMove : Suite<3>, World {
  unsigned expected = 1;

  void before() override {
    block.make();
    require(block->word.add_ref(), "a reference more");
  }
  void thread(unsigned self) override {
    if (self != 0) {
      for (Entry entry = mailboxes[self].take(); !entry.stop; entry = mailboxes[self].take()) {
        if (claim(self, entry)) run_to_end();
      }
      return;
    }
    post(1, block->word.schedule(1, false));
    if (enter(0)) {
      expected = 2;
      run_frame();
      switch (rl::rand(3)) {
        case 0:
          block->word.suspend(false);
          post(1, block->word.schedule(1, false));
          break;
        case 1:
          block->word.suspend(false);
          post(2, block->word.schedule(2, false));
          break;
        default:
          post(2, block->word.suspend_scheduled(2));
          break;
      }
      if (enter(0)) run_to_end();
    }
    drop_ref(0);
    mailboxes[1].post({.stop = true});
    mailboxes[2].post({.stop = true});
  }
  void after() override { check(expected); }
};

// A coroutine moves to another context and back; nobody holds a reference.
struct Move : Suite<2>, World {
  void before() override {
    block.make();
    require(block->word.claim_direct(0).won, "it is idle");
  }
  void thread(unsigned self) override {
    if (self == 0) {
      run_frame();
      post(1, block->word.suspend_scheduled(1));
      require(claim(0, mailboxes[0].take()), "the move back arrives");
      run_to_end();
    } else {
      require(claim(1, mailboxes[1].take()), "the move arrives");
      run_frame();
      post(0, block->word.suspend_scheduled(0));
    }
  }
  void after() override { check(3); }
};

// A primitive's wait, with the wake-up from elsewhere, while a third thread tries to enter.
struct Wait : Suite<3>, World {
  void before() override {
    block.make();
    require(block->word.claim_direct(0).won, "it is idle");
    require(block->word.add_ref(), "a reference more");
  }
  void thread(unsigned self) override {
    if (self == 0) {
      run_frame();
      block->word.suspend(true);
      if (claim(0, mailboxes[0].take())) run_to_end();
    } else if (self == 1) {
      await(CoState::kWaiting);
      block->frame.set(7);  // the result of the wait
      post(0, block->word.schedule(0, true));
    } else {
      require(!enter(2), "only its owner ends a wait");
      drop_ref(2);
    }
  }
  void after() override { check(2); }
};

// A wake-up at home: on the driver's list, and from there into running or to the queue.
struct Listed : Suite<2>, World {
  void before() override {
    block.make();
    require(block->word.claim_direct(0).won, "it is idle");
    require(block->word.add_ref(), "a reference more");
    block->word.suspend(true);
  }
  void thread(unsigned self) override {
    if (self == 1) {
      require(!enter(1), "only its driver runs what is listed");
      drop_ref(1);
      return;
    }
    require(block->word.list(true).won, "it is waiting");
    if (rl::rand(2) == 0) {
      block->word.claim_listed(0);
      ran_listed.take();
      run_to_end();
    } else {
      post(0, block->word.reschedule_listed(0));
      rescheduled.take();
      if (claim(0, mailboxes[0].take())) run_to_end();
    }
  }
  void after() override { check(1); }
};

// Two let go of their references while it ends.
struct References : Suite<3>, World {
  void before() override {
    block.make();
    require(block->word.claim_direct(0).won, "it is idle");
    require(block->word.add_ref() && block->word.add_ref(), "references more");
  }
  void thread(unsigned self) override {
    if (self == 0) {
      block->notes[0].set(1);
      run_to_end();
    } else {
      drop_ref(self);
    }
  }
  void after() override { check(1); }
};

// Suspended by one thread, entered by another.
struct Handed : Suite<2>, World {
  void before() override {
    block.make();
    require(block->word.claim_direct(0).won, "it is idle");
  }
  void thread(unsigned self) override {
    if (self == 0) {
      run_frame();
      block->word.suspend(false);
    } else {
      await(CoState::kIdle);
      require(enter(1), "nobody else enters it");
      run_to_end();
    }
  }
  void after() override { check(2); }
};

// Two with references enter it where they find it idle, one of them twice. The word may stand as
// before although the other has run it in between.
struct TwoDirectEntries : Suite<2>, World {
  unsigned entered = 0;

  void before() override {
    block.make();
    require(block->word.add_ref() && block->word.add_ref(), "references more");
  }
  void thread(unsigned self) override {
    for (unsigned i = 0; i <= self; ++i) {
      if (!enter(self)) continue;
      ++entered;
      run_frame();
      block->word.suspend(false);
    }
    block->notes[self].set(1);
    require(!block->word.drop_ref(), "it has not ended");
  }
  void after() override {
    require(entered >= 1, "whoever finds it idle enters it");
    require(enter(0), "it is idle");
    run_to_end();
    check(entered + 1);
  }
};

}  // namespace
}  // namespace roost::model

int main(int argc, char** argv) {
  using namespace roost::model;
  Cases cases(argc, argv);
  cases.exhaustive<Handed>("handed", {&direct_won, &end_freed});
  cases.exhaustive<TwoDirectEntries>("two_direct_entries", {&direct_won, &direct_lost});
  cases.exhaustive<Move>("move", {&entry_ran, &end_freed});
  cases.exhaustive<DirectEntry>("direct_entry", {&direct_won, &direct_lost, &entry_ran,
                                                 &entry_was_stale, &entry_freed, &ref_freed});
  cases.exhaustive<Listed>("listed", {&ran_listed, &rescheduled, &end_freed, &ref_freed});
  cases.exhaustive<References>("references", {&end_freed, &ref_freed});
  cases.bounded<Wait>("wait", 4, {&entry_ran, &direct_lost, &end_freed, &ref_freed});
  cases.bounded<AgainAndMove>("again_and_move", 2,
                              {&direct_won, &direct_lost, &entry_ran, &entry_was_stale,
                               &ran_with_stale, &entry_freed, &ref_freed});
  cases.random<AgainAndMove>("again_and_move_at_random", 200000,
                             {&direct_won, &direct_lost, &entry_ran, &entry_was_stale,
                              &ran_with_stale, &entry_freed, &ref_freed, &end_freed});
  return cases.result();
}
