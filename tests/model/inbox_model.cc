// SPDX-License-Identifier: MIT
// The inbox, with a consumer that sleeps, is woken, closes and goes, as AioContext does it.
#include "model/checker.h"
#include "roost/aio/inbox.h"

namespace roost::model {
namespace {

// The inbox waits for nobody, so its pauses need not be steps.
using P = RelacyPlatform<Pause::kNothing>;

struct Node {
  P::Shared<Node*> next;
  P::Shared<std::uint64_t> payload;
  unsigned producer = 0;
  unsigned number = 0;
};

struct Context {
  Inbox<P, Node> inbox;
  EventFd eventfd;
};

Path ended_sleep{"a producer ended a sleep"};
Path refused_sleep{"an entry came between looking and sleeping"};
Path other_wake{"something else ended a sleep"};
Path late_signal{"the context went only after waiting for a signal that was owed"};
Path refused_push{"a push found the inbox closed"};
Path closed_full{"closing returned entries"};
Path several_at_once{"one take returned several entries"};

// kUntilAll: the consumer goes on until it has every entry, and then frees the context while
// producers may still be on the way out of push(). kOneRound: it closes the inbox after one
// iteration; the context then lives until all pushes have returned, as its contract says.
enum class Close : std::uint8_t { kUntilAll, kOneRound };

// Something else may end the consumer's sleep up to `other_wakes` times.
template <unsigned producers, unsigned each, unsigned other_wakes, Close close>
struct InboxSuite : Suite<producers + 1> {
  static constexpr unsigned kTotal = producers * each;

  Storage<Context> context;
  Node nodes[producers][each];
  unsigned next_number[producers] = {};
  unsigned received = 0;
  unsigned refused = 0;

  void before() override { context.make(); }

  void thread(unsigned index) override {
    if (index == 0) {
      consume();
    } else {
      produce(index - 1);
    }
  }

  void produce(unsigned self) {
    for (unsigned i = 0; i < each; ++i) {
      Node& node = nodes[self][i];
      node.producer = self;
      node.number = i;
      node.payload.set(100 * self + i);
      switch (context->inbox.push(node)) {
        case Inbox<P, Node>::Push::kQueued:
          break;
        case Inbox<P, Node>::Push::kWakeOwed:
          ended_sleep.take();
          context->eventfd.signal();
          break;
        case Inbox<P, Node>::Push::kClosed:
          require(close == Close::kOneRound, "a push to an open inbox succeeds");
          node.payload.set(0);  // still the producer's
          refused_push.take();
          ++refused;
          break;
      }
    }
  }

  void consume() {
    unsigned woken_by_others = 0;
    std::uint64_t owed = 0;
    std::uint64_t signals = 0;
    for (unsigned round = 0; more_rounds(round); ++round) {
      if (handle(context->inbox.take()) > 0) continue;
      if (!context->inbox.try_sleep()) {
        refused_sleep.take();
        continue;
      }
      context->eventfd.wait(woken_by_others < other_wakes);
      if (context->inbox.wake_up()) {
        ++owed;
      } else {
        other_wake.take();
        ++woken_by_others;
      }
      signals += context->eventfd.read();
    }
    if (handle(context->inbox.close()) > 0) closed_full.take();
    if (signals < owed) late_signal.take();
    while (signals < owed) {
      context->eventfd.wait(false);
      signals += context->eventfd.read();
    }
    require(signals == owed, "one signal for each sleep that a producer ended");
    if (close == Close::kUntilAll) context.destroy();
  }

  bool more_rounds(unsigned round) const {
    return close == Close::kUntilAll ? received < kTotal : round < 1;
  }

  unsigned handle(typename Inbox<P, Node>::List list) {
    unsigned count = 0;
    Node* last = nullptr;
    for (Node* node = list.oldest; node; node = node->next.get()) {
      require(node->payload.get() == 100 * node->producer + node->number, "the payload arrived");
      node->payload.set(0);
      // A producer whose push was refused has no later ones accepted, so no number is left out.
      require(node->number == next_number[node->producer]++, "entries keep their producer's order");
      last = node;
      require(++count <= kTotal, "the list ends");
    }
    require(count == list.count && last == list.newest, "the list is described as it is");
    if (count > 1) several_at_once.take();
    received += count;
    return count;
  }

  void after() override {
    require(received + refused == kTotal, "every entry was received or refused");
    if (context.alive()) context.destroy();
  }
};

}  // namespace
}  // namespace roost::model

int main(int argc, char** argv) {
  using namespace roost::model;
  Cases cases(argc, argv);
  cases.exhaustive<InboxSuite<1, 2, 0, Close::kUntilAll>>(
      "sleep", {&ended_sleep, &refused_sleep, &several_at_once});
  cases.exhaustive<InboxSuite<1, 1, 2, Close::kUntilAll>>(
      "other_wakes", {&ended_sleep, &refused_sleep, &late_signal, &other_wake});
  cases.exhaustive<InboxSuite<1, 2, 1, Close::kOneRound>>(
      "close", {&ended_sleep, &refused_push, &closed_full, &late_signal, &other_wake});
  cases.bounded<InboxSuite<2, 1, 0, Close::kUntilAll>>(
      "two_producers", 4, {&ended_sleep, &refused_sleep, &several_at_once});
  cases.bounded<InboxSuite<2, 1, 1, Close::kOneRound>>(
      "close_on_two_producers", 3, {&ended_sleep, &refused_push, &closed_full, &late_signal});
  cases.random<InboxSuite<3, 2, 2, Close::kUntilAll>>(
      "three_producers", 300000,
      {&ended_sleep, &refused_sleep, &other_wake, &late_signal, &several_at_once});
  cases.random<InboxSuite<3, 2, 2, Close::kOneRound>>(
      "close_on_three_producers", 300000,
      {&ended_sleep, &refused_push, &closed_full, &late_signal, &other_wake});
  return cases.result();
}
