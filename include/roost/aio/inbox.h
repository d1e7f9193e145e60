// SPDX-License-Identifier: MIT
// The inbox: a lock-free queue of many producers and one consumer, which also decides who has to
// wake the consumer.
//
// Threads: push() from any thread; everything else from the consumer's.
// Lifetime: a producer may touch the inbox until its push() returned. Where that was kWakeOwed it
// owes the context one signal, and the context waits for owed signals before it goes; any other
// producer touches nothing of the context after its compare-and-swap.
// docs/lockfree/inbox.md draws the hand-shake and argues for the orders.
//
// The one atomic, head_, holds:
//
//   value      meaning                              who may change it
//   empty      nothing queued, the consumer awake   producer -> node, consumer -> sleeping, closed
//   sleeping   nothing queued, the consumer blocks  producer -> node (and owes a wake-up),
//              or is about to                       consumer -> empty
//   closed     no pushes any more                   nobody
//   node       the newest of a list linked by next, producer -> node, consumer -> empty, closed
//              owned by the inbox
//
//        producer                                     consumer
//        --------                                     --------
//        node.next = seen list, or null               found nothing to do
//        CAS head: empty|node -> node    |  or        CAS head: empty -> sleeping
//        CAS head: sleeping -> node      |            failed: there is a node: take it
//          won from sleeping: write the eventfd       won: block on the eventfd and the rest
//
// Whichever of the two compare-and-swaps on `empty` comes second sees the first: a push between
// "found nothing" and "sleeping" makes the consumer's fail; a push after it sees `sleeping`.
#pragma once

#include <cstdint>

#include "roost/base/platform.h"
#include "roost/base/prefetch.h"
#include "roost/coro/queue_entry.h"

namespace roost {

/// Node has a member `next` of type P::Shared<Node*>, and may have one `ahead` of type
/// P::Shared<const Node*>: set by the producer, if at all, to a node that it pushed some pushes
/// earlier, and prefetched here, where the walk goes back in time; then set anew for the walk
/// forward.
template <Platform P, class Node>
class Inbox {
 public:
  enum class Push : std::uint8_t {
    kQueued,    // the consumer is awake and will find it
    kWakeOwed,  // queued, and the caller must signal the consumer now
    kClosed,    // not queued
  };

  Push push(Node& node) noexcept {
    // Relaxed: only a hint for the compare-and-swap, which reads again.
    std::uint64_t seen = head_.load(std::memory_order_relaxed);
    for (;;) {
      if (seen == kClosed) return Push::kClosed;
      node.next.set(is_list(seen) ? to_node(seen) : nullptr);
      // Release publishes the node, its link and what the producer did before, to the acquire of
      // take(). Nodes below were published by their own pushes; the release sequence carries them.
      if (head_.compare_exchange_weak(seen, to_word(node), std::memory_order_release,
                                      std::memory_order_relaxed)) {
        return seen == kSleeping ? Push::kWakeOwed : Push::kQueued;
      }
      if (is_list(seen)) {
        // Another producer was quicker. Whoever has the cache line gets a few dozen pushes done
        // while the others look away for a microsecond, instead of one a transfer of the line.
        for (unsigned i = 0; i < kContendedPauses; ++i) P::cpu_relax();
        seen = head_.load(std::memory_order_relaxed);
      }
    }
  }

  /// A list linked by next, oldest first; both null if it is empty.
  struct List {
    Node* oldest = nullptr;
    Node* newest = nullptr;
    unsigned count = 0;
  };

  /// Everything queued.
  List take() noexcept {
    // Relaxed: a push that is not seen yet will be seen later, at the latest by try_sleep().
    if (!is_list(head_.load(std::memory_order_relaxed))) return {};
    // Acquire pairs with the release of every push in the list.
    return reversed(to_node(head_.exchange(kEmpty, std::memory_order_acquire)));
  }

  /// A hint for busy waiting.
  bool has_entries() const noexcept { return is_list(head_.load(std::memory_order_relaxed)); }

  /// empty -> sleeping. False: something was queued; take it instead of blocking.
  bool try_sleep() noexcept {
    std::uint64_t expected = kEmpty;
    // Relaxed: nothing is published by it (a producer that replaces `sleeping` only releases, and
    // knows the eventfd from having been given the context), and on failure take() acquires.
    return head_.compare_exchange_strong(expected, kSleeping, std::memory_order_relaxed,
                                         std::memory_order_relaxed);
  }

  /// After try_sleep() was true and the blocking wait is over. True: a producer replaced
  /// `sleeping`, and its signal has come or is still to come.
  bool wake_up() noexcept {
    std::uint64_t expected = kSleeping;
    return !head_.compare_exchange_strong(expected, kEmpty, std::memory_order_relaxed,
                                          std::memory_order_relaxed);
  }

  /// Lets nobody in any more, and returns what was still queued, as take() does.
  /// REQUIRES: not sleeping.
  List close() noexcept {
    const std::uint64_t seen = head_.exchange(kClosed, std::memory_order_acquire);
    return is_list(seen) ? reversed(to_node(seen)) : List{};
  }

 private:
  static constexpr unsigned kContendedPauses = 64;

  // Nodes are aligned, so no node has these addresses.
  static constexpr std::uint64_t kEmpty = 0;
  static constexpr std::uint64_t kSleeping = 1;
  static constexpr std::uint64_t kClosed = 2;

  static bool is_list(std::uint64_t word) noexcept { return word > kClosed; }
  static Node* to_node(std::uint64_t word) noexcept { return reinterpret_cast<Node*>(word); }
  static std::uint64_t to_word(Node& node) noexcept {
    return reinterpret_cast<std::uint64_t>(&node);
  }

  static List reversed(Node* newest) noexcept {
    List list{.oldest = nullptr, .newest = newest, .count = 0};
    FetchAhead walked;
    while (newest) {
      prefetch_for_write(newest);
      Node* older = newest->next.get();
      if constexpr (requires { newest->ahead; }) {
        __builtin_prefetch(newest->ahead.get());
        newest->ahead.set(walked.exchange(newest));
      }
      newest->next.set(list.oldest);
      list.oldest = newest;
      ++list.count;
      newest = older;
    }
    return list;
  }

  typename P::template Atomic<std::uint64_t> head_{kEmpty};
};

}  // namespace roost
