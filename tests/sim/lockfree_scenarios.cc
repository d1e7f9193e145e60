// SPDX-License-Identifier: MIT
// Lock-free parts of the runtime by themselves.

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "helpers.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/inbox.h"
#include "roost/aio/stop_relay.h"
#include "roost/coro/state_word.h"
#include "scenario.h"

namespace roost::sim {

namespace {

// ---- The inbox

struct Letter {
  RealPlatform::Shared<Letter*> next;
  std::size_t from = 0;
  int number = 0;
};

using LetterBox = Inbox<RealPlatform, Letter>;

// A push either is in what take() or close() returns, or is told that the inbox is closed.
void inbox(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  constexpr std::size_t kProducers = 3;
  constexpr int kEach = 8;
  Random& random = simulation.random();
  for (int round = 0; round < 4; ++round) {
    LetterBox box;
    int signals = 0;
    int expected_signals = 0;
    std::array<std::array<Letter, kEach>, kProducers> letters;
    std::array<int, kProducers> queued{};
    std::array<int, kProducers> next{};
    const auto read = [&](LetterBox::List list) {
      std::uint64_t count = 0;
      for (const Letter* letter = list.oldest; letter; letter = letter->next.get(), ++count) {
        ROOST_CHECK(letter->number == next[letter->from]++, "a letter is missing, or came twice");
      }
      simulation.note("read", count);
      return count;
    };
    for (std::size_t p = 0; p < kProducers; ++p) {
      machine.add_thread("producer", [&, p] {
        for (int i = 0; i < kEach; ++i) {
          Letter& letter = letters[p][static_cast<std::size_t>(i)];
          letter.from = p;
          letter.number = i;
          for (auto n = random.below(4); n > 0; --n) machine.relax();
          const auto outcome = box.push(letter);
          if (outcome == LetterBox::Push::kClosed) {
            counters.add("refused", 1);
            break;
          }
          ++queued[p];
          if (outcome == LetterBox::Push::kWakeOwed) {
            counters.add("owed", 1);
            machine.interrupt();
            ++signals;
          }
        }
      });
    }
    machine.add_thread("consumer", [&] {
      for (auto turns = random.below(16); turns > 0; --turns) {
        counters.add("taken", read(box.take()));
        if (box.try_sleep()) {
          for (auto n = random.below(8); n > 0; --n) machine.relax();
          expected_signals += box.wake_up();
        }
      }
      counters.add("found_at_close", read(box.close()));
      // As a context does: it goes only when it has got what it is owed.
      while (signals < expected_signals) machine.relax();
      ROOST_CHECK(!box.take().oldest, "a push to a closed inbox");
    });
    machine.join_threads();
    ROOST_CHECK(signals == expected_signals, "{} signals of {}", signals, expected_signals);
    ROOST_CHECK(next == queued, "a letter was lost");
  }
}

// ---- The state word

using Word = StateWord<RealPlatform>;
using Outcome = Word::EntryOutcome;

constexpr std::uint32_t kQueue = 1;
constexpr std::uint32_t kDirect = 2;

// The turn of an entry and a direct entry: one of them wins.
void turn_or_direct_entry(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  constexpr int kRounds = 20;
  Word word(kQueue);
  ROOST_CHECK(word.add_ref(), "no reference");
  int round = 0;
  int answered = 0;
  bool direct_won = false;
  machine.add_thread("direct", [&] {
    for (int r = 1; r <= kRounds; ++r) {
      while (round < r) machine.relax();
      for (auto n = simulation.random().below(3); n > 0; --n) machine.interrupt();
      direct_won = word.claim_direct(kDirect).won;
      answered = r;
    }
  });
  machine.add_thread("turn", [&] {
    for (int r = 1; r <= kRounds; ++r) {
      const auto schedule = word.schedule(kQueue, false);
      ROOST_CHECK(schedule.won && schedule.embedded, "an entry could not be scheduled");
      round = r;
      for (auto n = simulation.random().below(3); n > 0; --n) machine.interrupt();
      const bool turn = word.claim_entry(kQueue, schedule.generation, true) == Outcome::kRun;
      while (answered < r) machine.relax();
      const CoStateValue now = word.peek();
      ROOST_CHECK(turn != direct_won && now.state() == CoState::kRunning && now.entries() == 1 &&
                      now.context() == (turn ? kQueue : kDirect),
                  "{} coroutines run, {} entries", turn + direct_won, now.entries());
      counters.add(turn ? "won_by_turn" : "won_by_direct_entry", 1);
      simulation.note("won", turn);
      word.suspend(false);
    }
  });
  machine.join_threads();
}

// References come and go while the coroutine is scheduled, moves and suspends.
void references(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Word word(kQueue);
  ROOST_CHECK(word.add_ref(), "no reference");
  bool over = false;
  machine.add_thread("holder", [&] {
    while (!over) {
      const bool added = word.add_ref();
      ROOST_CHECK(added, "no reference to what exists");
      const bool last = word.drop_ref();
      ROOST_CHECK(!last, "the last reference, although there is another");
      counters.add("references", 1);
      machine.relax();
    }
  });
  machine.add_thread("mover", [&] {
    for (int r = 0; r < 20; ++r) {
      ROOST_CHECK(word.claim_direct(kDirect).won, "nobody else entered it");
      const auto move = word.suspend_scheduled(kQueue);
      ROOST_CHECK(move.won, "nobody else scheduled it");
      machine.interrupt();
      ROOST_CHECK(word.claim_entry(kQueue, move.generation, move.embedded) == Outcome::kRun,
                  "an entry lost its turn to nobody");
      word.suspend(false);
      simulation.note("moved");
    }
    over = true;
  });
  machine.join_threads();
  ROOST_CHECK(word.peek().entries() == 1, "{} entries are left", word.peek().entries());
}

// Who looks at an idle coroutine delays whoever takes it, and sees nothing of what that does.
void inspections(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Word word(kQueue);
  bool over = false;
  bool in_hands = false;  // the coroutine is somebody's, who changes it
  machine.add_thread("inspector", [&] {
    while (!over) {
      const CoStateValue seen = word.peek();
      if (seen.state() == CoState::kIdle) {
        if (word.begin_inspection(seen)) {
          ROOST_CHECK(!in_hands, "a coroutine was inspected that runs");
          machine.interrupt();
          ROOST_CHECK(!in_hands, "a coroutine was taken while it was inspected");
          word.end_inspection();
          counters.add("inspected", 1);
        } else {
          counters.add("overtaken", 1);
        }
      }
      machine.relax();
    }
  });
  machine.add_thread("holder", [&] {
    const auto run = [&] {
      in_hands = true;
      machine.interrupt();
      in_hands = false;
      word.suspend(false);
    };
    for (int r = 0; r < 20; ++r) {
      const auto schedule = word.schedule(kQueue, false);
      ROOST_CHECK(schedule.won, "nobody else scheduled it");
      ROOST_CHECK(word.claim_entry(kQueue, schedule.generation, schedule.embedded) == Outcome::kRun,
                  "an entry lost its turn to nobody");
      run();
      ROOST_CHECK(word.claim_direct(kDirect).won, "nobody else entered it");
      run();
      simulation.note("entered twice");
      if (simulation.random().one_in(2)) machine.relax();
    }
    over = true;
  });
  machine.join_threads();
}

void state_word(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  turn_or_direct_entry(simulation, machine, counters);
  references(simulation, machine, counters);
  inspections(simulation, machine, counters);
}

// ---- The relay

// Something that ends at home by a bottom half, or by its stop.
class RelayedWait : public StopRelay {
 public:
  explicit RelayedWait(AioContext& home)
      : StopRelay(
            home,
            [](StopRelay& relay) noexcept {
              auto& self = static_cast<RelayedWait&>(relay);
              self.stopped = true;
              self.end();
            },
            [](StopRelay& relay) noexcept { wake_waiter(*static_cast<RelayedWait&>(relay).co); }) {}

  void end() noexcept {
    if (over) return;
    over = true;
    if (ended()) {
      wake_waiter(*co);
    } else {
      waited_for_the_stop = true;
    }
  }

  Coroutine* co = nullptr;
  bool over = false;
  bool stopped = false;
  bool waited_for_the_stop = false;
};

// A stop is on its way home while the operation ends.
void relay(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  auto context = machine.add_context("home");
  Helpers helpers(simulation, machine);
  bool ended = false;
  const auto body = [&]() -> Task<void> {
    for (int i = 0; i < 20; ++i) {
      RelayedWait* waiting = nullptr;
      bool scheduled = false;
      BottomHalf end(*context, [&waiting] {
        if (waiting) waiting->end();
      });
      {
        const auto source = std::make_shared<std::stop_source>();
        RelayedWait wait(*context);
        wait.co = Coroutine::self();
        waiting = &wait;
        wait.watch(source->get_token());
        const auto begin = [&] {
          helpers.give_stop(source);
          helpers.give([&] {
            end.schedule();
            scheduled = true;
          });
        };
        co_await suspend_waiting("a race", [begin = &begin](Coroutine&) noexcept { (*begin)(); });
        wait.forget();
        waiting = nullptr;
        ROOST_CHECK(AioContext::current() == context.get(), "a relay led elsewhere");
        ROOST_CHECK(wait.over, "a wait was resumed that is not over");
        simulation.note("over", wait.stopped, wait.waited_for_the_stop);
        counters.add(wait.stopped ? "stopped" : "finished", 1);
        counters.add("met", wait.waited_for_the_stop);
      }
      while (!scheduled) co_await move_to(*context);
    }
    ended = true;
  };
  simulation.spawn(*context, body(), "waiting");
  machine.wait_until([&] { return ended; });
  helpers.finish(machine, counters);
}

constexpr Scenario kScenarios[] = {
    {"inbox", "pushes meet the end of an inbox", inbox, "taken found_at_close refused owed"},
    {"state_word", "entries, references and inspections meet", state_word,
     "won_by_turn won_by_direct_entry references inspected overtaken"},
    {"relay", "a stop is on its way while the operation ends", relay,
     "stopped finished met callbacks_awaited"},
};

}  // namespace

std::span<const Scenario> lockfree_scenarios() { return kScenarios; }

}  // namespace roost::sim
