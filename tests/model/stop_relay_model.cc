// SPDX-License-Identifier: MIT
// StopRelay: an operation ends by itself or is stopped, from elsewhere or at home, and its frame
// goes as soon as it may; with the shipped inbox as the way home.
#include "model/checker.h"
#include "roost/aio/inbox.h"
#include "roost/aio/stop_relay_core.h"

namespace roost::model {
namespace {

using P = RelacyPlatform<Pause::kNothing>;

Path finished{"the operation ended, and there was no stop"};
Path stopped{"a stop from elsewhere ended it"};
Path stopped_at_home{"a stop at home ended it"};
Path met{"it ended while a stop was on its way home"};
Path ended_after_stop{"it ended some time after its stop had come"};
Path too_late{"a stop from elsewhere found it ended"};
Path requested_before{"the stop was requested before it began"};
Path awaited{"forgetting the stop waited for its callback"};

struct Entry {
  using Function = bool (*)(Entry&) noexcept;
  explicit Entry(Function function) : run(function) {}
  P::Shared<Entry*> next;
  const Function run;
};

struct Context {
  Inbox<P, Entry> inbox;
  EventFd eventfd;
};

constexpr unsigned kHome = 0;
bool posted = false;  // by the callback that was called last

bool at_home() { return rl::thread_index() == kHome; }

// What the standard promises of a stop source, its token and a callback, of which there is one at a
// time: registering and requesting are in one order; the callback is called once; its destructor
// returns after it, or at once where it is called by the callback itself.
class StopState {
 public:
  class Registration {
   public:
    virtual void call() noexcept = 0;
  };

  void request_stop() {
    mutex_.lock();
    const bool first = !std::exchange(requested_, true);
    if (first) {
      requester_ = rl::thread_index();
      running_ = std::exchange(registered_, nullptr);
    }
    Registration* const callback = first ? running_ : nullptr;
    mutex_.unlock();
    if (!callback) return;
    bool gone = false;
    gone_ = &gone;
    posted = false;
    callback->call();
    if (requester_ != kHome && !posted) too_late.take();
    if (gone) return;
    running_ = nullptr;
    returned_.set();
  }

  void add(Registration& callback) {
    mutex_.lock();
    const bool now = requested_;
    if (!now) registered_ = &callback;
    mutex_.unlock();
    if (now) callback.call();
  }

  void remove(Registration& callback) {
    mutex_.lock();
    if (registered_ == &callback) registered_ = nullptr;
    const bool under_way = running_ == &callback;
    mutex_.unlock();
    if (!under_way) return;
    if (requester_ == rl::thread_index()) {
      *gone_ = true;
      running_ = nullptr;
      return;
    }
    if (!returned_.is_set()) awaited.take();
    returned_.await();
  }

  // For the model's checks only: orders nothing.
  bool calls_from_elsewhere() const { return running_ && requester_ != kHome; }
  unsigned requester() const { return requester_; }

 private:
  P::Mutex mutex_;
  bool requested_ = false;
  unsigned requester_ = 0;
  Registration* registered_ = nullptr;
  Registration* running_ = nullptr;
  bool* gone_ = nullptr;
  Flag returned_;
};

struct StopToken {
  bool stop_possible() const { return true; }
  StopState* state;
};

template <class F>
class StopCallback : StopState::Registration {
 public:
  StopCallback(const StopToken& token, F function) : state_(*token.state), function_(function) {
    state_.add(*this);
  }
  ~StopCallback() { state_.remove(*this); }

 private:
  void call() noexcept override { function_(); }

  StopState& state_;
  F function_;
};

struct Parts {
  using Platform = P;
  using Context = model::Context;
  using Entry = model::Entry;
  using Token = StopToken;
  template <class F>
  using Callback = StopCallback<F>;

  static bool is_current(const Context&) { return at_home(); }

  static void post(Context& home, Entry& entry) {
    posted = true;
    switch (home.inbox.push(entry)) {
      case Inbox<P, Entry>::Push::kQueued:
        break;
      case Inbox<P, Entry>::Push::kWakeOwed:
        home.eventfd.signal();
        break;
      case Inbox<P, Entry>::Push::kClosed:
        require(false, "an operation does not outlive its context");
    }
  }
};

using Relay = StopRelayCore<Parts>;

// Whether the coroutine calls forget() before its frame goes.
enum class Frame : std::uint8_t { kForgets, kJustGoes };

struct World {
  static constexpr unsigned kMaxThreads = 3;

  Storage<Context> context;
  StopState state;
  P::Shared<std::uint64_t> reasons[kMaxThreads];  // what each wrote before it asked
  P::Shared<std::uint64_t> table;                 // what only the home thread may touch
  bool resumed = false;
  bool forgets = true;
  bool asks_late = false;  // the home thread, while the coroutine is woken and has not run yet

  virtual void destroy_frame() = 0;

  void request_stop() {
    const unsigned self = rl::thread_index();
    reasons[self].set(7);
    state.request_stop();
  }
};

// An operation and its coroutine's frame.
struct Operation : Relay {
  explicit Operation(World& w) : Relay(w.context.get(), &stop, &resume), world(w) {}

  World& world;
  bool started = false;
  bool over = false;
  bool stop_came = false;
  bool ends_later = false;  // not in the call that asks for it: as a request of a ring does

  void end() {
    over = true;
    world.table.set(3);
    const bool at_once = ended();
    if (at_once) {
      if (std::exchange(world.asks_late, false)) world.request_stop();
      go_on();
    } else {
      met.take();
    }
  }

  // The coroutine is woken, and ends: `this` is gone.
  void go_on() {
    World& w = world;
    require(over && !std::exchange(w.resumed, true), "it goes on once, when it has ended");
    if (w.forgets) forget();
    require(!w.forgets || !w.state.calls_from_elsewhere(),
            "who forgets the stop has waited for its callback");
    w.destroy_frame();
  }

  static void stop(Relay& relay) noexcept {
    auto& self = static_cast<Operation&>(relay);
    require(!self.over, "only what has not ended is stopped");
    require(!std::exchange(self.stop_came, true), "it is stopped once");
    World& w = self.world;
    w.table.set(2);
    require(w.reasons[w.state.requester()].get() == 7, "who asked is seen by who stops");
    if (!self.started) return;
    (w.state.requester() == kHome ? stopped_at_home : stopped).take();
    if (!self.ends_later) self.end();
  }

  static void resume(Relay& relay) noexcept { static_cast<Operation&>(relay).go_on(); }
};

// So many operations in the same memory, one after the other. The first thread is their home, the
// others ask for the stop; so may the first, if `home_asks`.
template <unsigned threads, unsigned operations, bool home_asks, Frame kind = Frame::kForgets>
struct Relays : Suite<threads>, World {
  Storage<Operation> frame;

  void destroy_frame() override { frame.destroy(); }

  void before() override {
    context.make();
    forgets = kind == Frame::kForgets;
  }

  void thread(unsigned self) override {
    if (self != kHome) {
      request_stop();
      return;
    }
    for (unsigned i = 0; i < operations; ++i) operate();
    require(context->inbox.close().count == 0, "nothing is on its way to what has ended");
    context.destroy();
  }

  void operate() {
    resumed = false;
    table.set(1);
    frame.make(*this);
    frame->watch(StopToken{&state});
    if (frame->stop_came) {
      requested_before.take();
      frame.destroy();
      return;
    }
    frame->started = true;
    frame->ends_later = rl::rand(2) == 0;
    // How many looks into the inbox it takes; the last is: until it is stopped.
    constexpr unsigned kNever = 2;
    const unsigned looks = rl::rand(kNever + 1);
    const unsigned asks = home_asks ? rl::rand(3) : 2;
    asks_late = asks == 0;
    for (unsigned i = 0; i < looks && i < kNever && !resumed; ++i) look();
    if (asks == 1 && !resumed && !frame->over) request_stop();
    if (looks < kNever && !resumed && !frame->over) {
      (frame->stop_came ? ended_after_stop : finished).take();
      frame->end();
    }
    while (!resumed) {
      if (look() || resumed || !context->inbox.try_sleep()) continue;
      context->eventfd.wait(false);
      context->inbox.wake_up();
      context->eventfd.read();
    }
  }

  bool look() {
    bool any = false;
    Entry* entry = context->inbox.take().oldest;
    while (entry) {
      any = true;
      Entry* const next = entry->next.get();
      entry->run(*entry);
      entry = next;
    }
    if (!resumed && frame->stop_came && !frame->over) {
      ended_after_stop.take();
      frame->end();
    }
    return any;
  }

  void after() override { require(!frame.alive() && !context.alive(), "everything is over"); }
};

}  // namespace
}  // namespace roost::model

int main(int argc, char** argv) {
  using namespace roost::model;
  Cases cases(argc, argv);
  cases.exhaustive<Relays<2, 1, false>>("elsewhere", {&finished, &stopped, &met, &ended_after_stop,
                                                      &too_late, &requested_before, &awaited});
  cases.exhaustive<Relays<2, 1, false, Frame::kJustGoes>>("just_goes", {&met, &too_late, &awaited});
  cases.exhaustive<Relays<2, 1, true>>("at_home", {&stopped, &stopped_at_home, &met, &too_late});
  cases.bounded<Relays<2, 2, false>>("one_after_another", 4,
                                     {&finished, &stopped, &met, &too_late, &requested_before});
  cases.random<Relays<3, 2, true>>(
      "three_threads", 200000,
      {&finished, &stopped, &stopped_at_home, &met, &too_late, &requested_before, &awaited});
  return cases.result();
}
