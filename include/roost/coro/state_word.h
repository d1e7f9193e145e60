// SPDX-License-Identifier: MIT
// The 64-bit word that decides who may resume a coroutine.
//
// Threads: every operation may be called from any thread; each is one atomic transition (a
// compare-and-swap, or a store where nobody else can write). docs/lockfree/state-word.md draws the
// state machine and argues for its orders.
// Lifetime: part of the coroutine's control block, which lives until the coroutine has ended and
// no queue entry of it is outstanding; the word itself counts both.
//
// Layout, from the low end:
//
//   bits  0..2   state          idle, waiting, running, scheduled, listed, ended, inspected
//   bit   3      owned          the wake-up under way belongs to a primitive's wait
//   bit   4      embedded       the control block's own queue entry is in some queue
//   bits  5..19  entries        queue entries outstanding, stale ones included, and CoroutineRefs
//   bits 20..31  context        index of the context it runs on, ran on last, or is scheduled on
//   bits 32..63  generation     counts schedules, and coroutines that had the block before; an
//                               entry is live only with the current one
//
//   from        to          by                                      operation
//   idle        running     a direct entry                          claim_direct
//   idle        scheduled   whoever holds the coroutine             schedule (owned = 0)
//   idle        listed      the same, under its context's driver    list     (owned = 0)
//   waiting     scheduled   the primitive that owns the wait        schedule (owned = 1)
//   waiting     listed      the same                                list     (owned = 1)
//   idle        running     co_wake at home, no driver active       claim_suspended (owned = 0)
//   waiting     running     the primitive, at home                  claim_suspended (owned = 1)
//   scheduled   running     a direct entry (cancels the schedule)   claim_direct (owned = 0)
//   scheduled   running     the consumer of the live entry          claim_entry
//   listed      running     the driver that listed it               claim_listed
//   listed      scheduled   the same, for the rest of a long list   reschedule_listed
//   running     idle        the driver that runs it                 suspend
//   running     waiting     the same                                suspend
//   running     scheduled   the same, for a move                    suspend_scheduled
//   running     ended       the same                                end
//   ended       idle        whoever makes a coroutine in its block  begin
//   idle        inspected   a census on its home's thread           begin_inspection
//   inspected   idle        the same, a moment later                end_inspection
//
// In `idle` and `waiting` the frame belongs to whoever makes the next transition; in `running` to
// the driver; in `scheduled` to nobody until somebody claims it; in `inspected` to a reader that
// soon gives it back, which everybody else waits for.
#pragma once

#include <cstdint>

#include "roost/base/platform.h"

namespace roost {

enum class CoState : std::uint8_t {
  kIdle = 0,       // created, or suspended by yield: whoever holds it may enter or schedule it
  kWaiting = 1,    // suspended by a primitive, which alone may wake it
  kRunning = 2,    // a driver loop is executing it
  kScheduled = 3,  // an entry of the current generation is queued at `context`
  kListed = 4,     // on the wake list of a driver loop on its home
  kEnded = 5,      // its frame is gone; the block lives until entries is 0. Also: a free block
  kInspected = 6,  // idle, and being looked at
};

/// "idle", "waiting", ... for messages.
const char* to_string(CoState state) noexcept;

/// One value of the word, taken apart.
class CoStateValue {
 public:
  constexpr explicit CoStateValue(std::uint64_t bits) noexcept : bits_(bits) {}

  constexpr std::uint64_t bits() const noexcept { return bits_; }
  constexpr CoState state() const noexcept { return static_cast<CoState>(bits_ & kStateMask); }
  constexpr bool owned() const noexcept { return bits_ & kOwned; }
  constexpr bool embedded() const noexcept { return bits_ & kEmbedded; }
  constexpr std::uint32_t entries() const noexcept {
    return static_cast<std::uint32_t>((bits_ & kEntriesMask) >> kEntriesShift);
  }
  constexpr std::uint32_t context() const noexcept {
    return static_cast<std::uint32_t>((bits_ & kContextMask) >> kContextShift);
  }
  constexpr std::uint32_t generation() const noexcept {
    return static_cast<std::uint32_t>(bits_ >> kGenerationShift);
  }

  constexpr CoStateValue with(CoState state, bool owned) const noexcept {
    return CoStateValue((bits_ & ~(kStateMask | kOwned)) | static_cast<std::uint64_t>(state) |
                        (owned ? kOwned : 0));
  }
  constexpr CoStateValue with_context(std::uint32_t index) const noexcept {
    return CoStateValue((bits_ & ~kContextMask) | std::uint64_t{index} << kContextShift);
  }
  constexpr CoStateValue with_embedded(bool in_use) const noexcept {
    return CoStateValue(in_use ? bits_ | kEmbedded : bits_ & ~kEmbedded);
  }
  constexpr CoStateValue one_entry_more() const noexcept {
    return CoStateValue(bits_ + (std::uint64_t{1} << kEntriesShift));
  }
  constexpr CoStateValue one_entry_less() const noexcept {
    return CoStateValue(bits_ - (std::uint64_t{1} << kEntriesShift));
  }
  constexpr CoStateValue next_generation() const noexcept {
    return CoStateValue(bits_ + (std::uint64_t{1} << kGenerationShift));
  }

  static constexpr std::uint32_t kMaxEntries = (1u << 15) - 1;
  static constexpr std::uint32_t kMaxContexts = 1u << 12;

 private:
  static constexpr int kEntriesShift = 5;
  static constexpr int kContextShift = 20;
  static constexpr int kGenerationShift = 32;
  static constexpr std::uint64_t kStateMask = 7;
  static constexpr std::uint64_t kOwned = 1u << 3;
  static constexpr std::uint64_t kEmbedded = 1u << 4;
  static constexpr std::uint64_t kEntriesMask = std::uint64_t{kMaxEntries} << kEntriesShift;
  static constexpr std::uint64_t kContextMask = std::uint64_t{kMaxContexts - 1} << kContextShift;

  std::uint64_t bits_;
};

template <Platform P>
class StateWord {
 public:
  /// Ended, until begin().
  StateWord() noexcept : word_(static_cast<std::uint64_t>(CoState::kEnded)) {}
  explicit StateWord(std::uint32_t context) noexcept : StateWord() { begin(context); }

  /// ended, with nothing outstanding -> idle: a new coroutine, on `context`.
  void begin(std::uint32_t context) noexcept {
    // Relaxed: whoever got the block got it from the one that ended its last coroutine.
    const CoStateValue last(word_.load(std::memory_order_relaxed));
    // Release: a census that sees this state sees that the block was free (its name).
    word_.store(last.with(CoState::kIdle, false)
                    .with_context(context)
                    .with_embedded(false)
                    .next_generation()
                    .bits(),
                std::memory_order_release);
  }

  /// A snapshot; stale at once unless the caller owns the state.
  CoStateValue peek() const noexcept {
    // Acquire: a caller that sees idle or waiting may go on to read what suspend() published.
    return CoStateValue(word_.load(std::memory_order_acquire));
  }

  struct Claim {
    bool won;
    CoStateValue seen;  // what stood there when the claim was won or lost
  };

  /// idle or scheduled -> running on `context`; a schedule that was pending is thereby cancelled.
  Claim claim_direct(std::uint32_t context) noexcept {
    CoStateValue seen = peek();
    for (;;) {
      const bool may =
          seen.state() == CoState::kIdle || (seen.state() == CoState::kScheduled && !seen.owned());
      if (!may) {
        if (inspection_ended(seen)) continue;
        return {false, seen};
      }
      if (swap(seen, seen.with(CoState::kRunning, false).with_context(context)))
        return {true, seen};
    }
  }

  /// idle (or waiting, for the owner of the wait) -> running on `context`.
  Claim claim_suspended(std::uint32_t context, bool owner) noexcept {
    CoStateValue seen = peek();
    for (;;) {
      if (seen.state() != (owner ? CoState::kWaiting : CoState::kIdle)) {
        if (inspection_ended(seen)) continue;
        return {false, seen};
      }
      if (swap(seen, seen.with(CoState::kRunning, false).with_context(context)))
        return {true, seen};
    }
  }

  struct Schedule {
    bool won;
    CoStateValue seen;
    std::uint32_t generation;  // to be stored in the entry
    bool embedded;             // the caller has got the embedded entry; otherwise it brings its own
  };

  /// idle (or waiting, for the owner of the wait) -> scheduled on `context`. On success the caller
  /// must enqueue exactly one entry there; until that entry is dropped the block lives.
  Schedule schedule(std::uint32_t context, bool owner) noexcept {
    CoStateValue seen = peek();
    for (;;) {
      if (seen.state() != (owner ? CoState::kWaiting : CoState::kIdle) ||
          seen.entries() == CoStateValue::kMaxEntries) {
        if (inspection_ended(seen)) continue;
        return {false, seen, 0, false};
      }
      const CoStateValue next = seen.with(CoState::kScheduled, owner)
                                    .with_context(context)
                                    .with_embedded(true)
                                    .one_entry_more()
                                    .next_generation();
      if (swap(seen, next)) return {true, seen, next.generation(), !seen.embedded()};
    }
  }

  /// idle (or waiting, for the owner of the wait) -> listed.
  Claim list(bool owner) noexcept {
    CoStateValue seen = peek();
    for (;;) {
      if (seen.state() != (owner ? CoState::kWaiting : CoState::kIdle)) {
        if (inspection_ended(seen)) continue;
        return {false, seen};
      }
      if (swap(seen, seen.with(CoState::kListed, owner))) return {true, seen};
    }
  }

  /// listed -> running, by the driver that has it on its list. Cannot fail.
  void claim_listed(std::uint32_t context) noexcept {
    CoStateValue seen = peek();
    while (!swap(seen, seen.with(CoState::kRunning, false).with_context(context))) {
    }
  }

  /// listed -> scheduled: a driver hands the rest of a long wake list to its context's queue.
  Schedule reschedule_listed(std::uint32_t context) noexcept {
    CoStateValue seen = peek();
    for (;;) {
      if (seen.entries() == CoStateValue::kMaxEntries) return {false, seen, 0, false};
      const CoStateValue next = seen.with(CoState::kScheduled, seen.owned())
                                    .with_context(context)
                                    .with_embedded(true)
                                    .one_entry_more()
                                    .next_generation();
      if (swap(seen, next)) return {true, seen, next.generation(), !seen.embedded()};
    }
  }

  enum class EntryOutcome : std::uint8_t {
    kRun,       // the state is running now, and the caller runs it
    kStale,     // the schedule was cancelled; the entry is accounted for
    kFreeBlock  // as stale, and it was the last one of an ended coroutine: free the block
  };

  /// The turn of an entry has come at `context`. Accounts for the entry in every case; the caller
  /// must have read what it needs of it, since an embedded one may be used again at once.
  EntryOutcome claim_entry(std::uint32_t context, std::uint32_t generation,
                           bool embedded) noexcept {
    CoStateValue seen = peek();
    if (seen.entries() == 1 && is_live(seen, context, generation)) {
      // Nobody else counts: no other entry, and no CoroutineRef, without which a direct entry must
      // not race with this turn. A store suffices; release hands on what peek() acquired.
      CoStateValue next = seen.one_entry_less().with(CoState::kRunning, false);
      if (embedded) next = next.with_embedded(false);
      word_.store(next.bits(), std::memory_order_release);
      return EntryOutcome::kRun;
    }
    return claim_entry_by_swap(seen, context, generation, embedded);
  }

 private:
  static bool is_live(CoStateValue seen, std::uint32_t context, std::uint32_t generation) noexcept {
    return seen.state() == CoState::kScheduled && seen.context() == context &&
           seen.generation() == generation;
  }

  [[gnu::noinline]] EntryOutcome claim_entry_by_swap(CoStateValue seen, std::uint32_t context,
                                                     std::uint32_t generation,
                                                     bool embedded) noexcept {
    for (;;) {
      const bool live = is_live(seen, context, generation);
      CoStateValue next = seen.one_entry_less();
      if (embedded) next = next.with_embedded(false);
      if (live) {
        next = next.with(CoState::kRunning, false);
        if (next.entries() == 0) {
          // As above: the others have gone meanwhile.
          word_.store(next.bits(), std::memory_order_release);
          return EntryOutcome::kRun;
        }
      }
      if (!swap(seen, next)) continue;
      if (live) return EntryOutcome::kRun;
      return seen.state() == CoState::kEnded && next.entries() == 0 ? EntryOutcome::kFreeBlock
                                                                    : EntryOutcome::kStale;
    }
  }

 public:
  /// An entry that is known to be stale (or a reference) goes without a turn. True: free the block.
  bool drop_entry(bool embedded) noexcept {
    CoStateValue seen = peek();
    for (;;) {
      CoStateValue next = seen.one_entry_less();
      if (embedded) next = next.with_embedded(false);
      if (swap(seen, next)) return next.state() == CoState::kEnded && next.entries() == 0;
    }
  }

  /// Keeps the block alive beyond its end, like a queue entry. The caller knows it to be alive.
  /// False: too many are outstanding.
  bool add_ref() noexcept {
    CoStateValue seen = peek();
    for (;;) {
      if (seen.entries() == CoStateValue::kMaxEntries) return false;
      if (swap(seen, seen.one_entry_more())) return true;
    }
  }

  /// True: it was the last one of an ended coroutine, and the caller frees the block.
  bool drop_ref() noexcept { return drop_entry(false); }

  /// running -> idle or waiting. Publishes the frame to whoever claims it next.
  void suspend(bool waiting) noexcept {
    leave_running(waiting ? CoState::kWaiting : CoState::kIdle);
  }

  /// running -> scheduled on `context` in one step: suspends and schedules itself. As schedule().
  Schedule suspend_scheduled(std::uint32_t context) noexcept {
    CoStateValue seen = peek();
    for (;;) {
      if (seen.entries() == CoStateValue::kMaxEntries) return {false, seen, 0, false};
      const CoStateValue next = seen.with(CoState::kScheduled, false)
                                    .with_context(context)
                                    .with_embedded(true)
                                    .one_entry_more()
                                    .next_generation();
      if (seen.entries() == 0) {
        // A store suffices, as in leave_running().
        word_.store(next.bits(), std::memory_order_release);
        return {true, seen, next.generation(), true};
      }
      if (swap(seen, next)) return {true, seen, next.generation(), !seen.embedded()};
    }
  }

  /// running -> ended. Returns true if no entry is outstanding: the caller frees the block.
  bool end() noexcept { return leave_running(CoState::kEnded).entries() == 0; }

  /// idle -> inspected, if `seen` is what stands there: its frames stay until end_inspection().
  /// Everybody who wants the coroutine waits, so be quick.
  bool begin_inspection(CoStateValue seen) noexcept {
    return seen.state() == CoState::kIdle && swap(seen, seen.with(CoState::kInspected, false));
  }

  /// inspected -> idle.
  void end_inspection() noexcept {
    CoStateValue seen = peek();
    while (!swap(seen, seen.with(CoState::kIdle, false))) {
    }
  }

 private:
  // Whether what stood in the way of a claim was an inspection, which is over now.
  bool inspection_ended(CoStateValue& seen) noexcept {
    if (seen.state() != CoState::kInspected) [[likely]]
      return false;
    do {
      P::cpu_relax();
      seen = peek();
    } while (seen.state() == CoState::kInspected);
    return true;
  }

  bool swap(CoStateValue& seen, CoStateValue next) noexcept {
    std::uint64_t expected = seen.bits();
    // Acquire pairs with the release of the transition before: a claimer sees the frame as its last
    // driver left it, and the dropper of a last entry sees the end. Release orders the caller's
    // writes (the entry's fields, the place of the schedule) before the state that shows them.
    if (word_.compare_exchange_weak(expected, next.bits(), std::memory_order_acq_rel,
                                    std::memory_order_acquire)) {
      return true;
    }
    seen = CoStateValue(expected);
    return false;
  }

  CoStateValue leave_running(CoState state) noexcept {
    // While running only this thread changes the state. Acquire: when entries is 0 the block may be
    // freed, after everything that the droppers of entries did with it.
    CoStateValue seen = peek();
    if (seen.entries() == 0) {
      // Nobody holds an entry or a reference to count down, new references are made by the running
      // coroutine itself or from existing ones (CoroutineRef's contract), and every other operation
      // fails on `running` without writing: a store suffices. Release pairs with the acquire in
      // swap() and peek().
      seen = seen.with(state, false);
      word_.store(seen.bits(), std::memory_order_release);
      return seen;
    }
    for (;;) {
      const CoStateValue next = seen.with(state, false);
      if (swap(seen, next)) return next;
    }
  }

  typename P::template Atomic<std::uint64_t> word_;
};

}  // namespace roost
