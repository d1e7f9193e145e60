// SPDX-License-Identifier: MIT
// Moving an object that others hold something for: order, threads, failures, and listeners that
// come and go meanwhile.
#include "roost/aio/context_binding.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "aio/test_loop.h"
#include "roost/aio/event_notifier.h"
#include "roost/aio/iothread.h"
#include "roost/aio/timer.h"

namespace roost {
namespace {

// Three contexts, all polled by the test.
class Bindings : public LoopTest {
 protected:
  void SetUp() override {
    LoopTest::SetUp();
    if (IsSkipped()) return;
    other_ = AioContext::create(options("other"));
    third_ = AioContext::create(options("third"));
    binding_.emplace(context());
  }
  void TearDown() override {
    binding_.reset();
    third_.reset();
    other_.reset();
    LoopTest::TearDown();
  }

  AioContext& other() { return *other_; }

  void poll_all() {
    context().poll(false);
    other_->poll(false);
    third_->poll(false);
  }

  // Moves from a coroutine of `by`.
  Result<void> move(AioContext& to, AioContext* by = nullptr) {
    std::optional<Result<void>> result;
    AioContext* returned_on = nullptr;
    const auto body = [&]() -> Task<void> {
      result = co_await binding_->move_to(to);
      returned_on = AioContext::current();
    };
    AioContext& mover = by ? *by : context();
    spawn(mover, body(), "mover");
    while (!returned_on) poll_all();
    EXPECT_EQ(returned_on, &mover);
    return *result;
  }

  // A listener that writes down what it is told and where it runs; it fails to attach to a context
  // as often as `fails` says.
  std::unique_ptr<ContextListener> listener(char name, AioContext* not_to = nullptr,
                                            int fails = 1) {
    const auto told = [this, name](char what, AioContext& at) {
      EXPECT_EQ(AioContext::current(), &at);
      log_ += what;
      log_ += name;
    };
    return std::make_unique<ContextListener>(
        *binding_, [told](AioContext& from) { told('-', from); },
        [told, not_to, fails](AioContext& to) mutable -> Result<void> {
          told('+', to);
          if (&to == not_to && fails-- > 0) return fail(EMFILE, "attaching");
          return {};
        });
  }

  void drop_on(AioContext& at, std::unique_ptr<ContextListener>& dropped) {
    ContextScope scope(at);
    dropped.reset();
  }

  std::shared_ptr<AioContext> other_;
  std::shared_ptr<AioContext> third_;
  std::optional<ContextBinding> binding_;
  std::string log_;
};
ROOST_ON_EACH_LOOP(Bindings);

TEST_P(Bindings, DetachGoesNewestFirstOnTheOldContextAndAttachOldestFirstOnTheNewOne) {
  auto a = listener('a');
  auto b = listener('b');
  auto c = listener('c');
  EXPECT_TRUE(move(other()));
  EXPECT_EQ(log_, "-c-b-a+a+b+c");
  EXPECT_EQ(&binding_->context(), &other());
  for (auto* l : {&a, &b, &c}) drop_on(other(), *l);
}

TEST_P(Bindings, TheMoverMayComeFromAnyContextAndReturnsThere) {
  auto a = listener('a');
  EXPECT_TRUE(move(other(), third_.get()));
  EXPECT_TRUE(move(*third_, &other()));
  EXPECT_TRUE(move(context(), third_.get()));
  EXPECT_EQ(log_, "-a+a-a+a-a+a");
  EXPECT_EQ(&binding_->context(), &context());
}

TEST_P(Bindings, MovingToWhereItIsTellsNobody) {
  auto a = listener('a');
  EXPECT_TRUE(move(context()));
  EXPECT_TRUE(move(context(), &other()));
  EXPECT_EQ(log_, "");
}

TEST_P(Bindings, AFailedAttachTakesEverybodyBack) {
  auto a = listener('a');
  auto b = listener('b', &other());
  auto c = listener('c');
  const auto result = move(other(), third_.get());
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code(), EMFILE);
  EXPECT_EQ(result.error().doing(), "attaching");
  // c was not attached over there, nor is it detached there.
  EXPECT_EQ(log_, "-c-b-a+a+b-a+a+b+c");
  EXPECT_EQ(&binding_->context(), &context());
  log_.clear();
  EXPECT_TRUE(move(other()));
  EXPECT_EQ(log_, "-c-b-a+a+b+c");
  for (auto* l : {&a, &b, &c}) drop_on(other(), *l);
}

TEST_P(Bindings, AListenerThatCannotComeBackStaysDetachedUntilALaterMove) {
  auto a = listener('a', &context());
  auto b = listener('b', &other());
  const auto result = move(other());
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().doing(), "attaching, and back on context 'loop': " +
                                        fail(EMFILE, "attaching").error().message());
  EXPECT_EQ(log_, "-b-a+a+b-a+a+b");
  log_.clear();
  EXPECT_TRUE(move(other()));
  EXPECT_EQ(log_, "-b+a+b");
  for (auto* l : {&a, &b}) drop_on(other(), *l);
}

TEST_P(Bindings, AnotherMoveMeanwhileIsRefused) {
  auto a = listener('a');
  std::optional<Result<void>> first;
  std::optional<Result<void>> second;
  const auto body = [&](std::optional<Result<void>>& result, AioContext& to) -> Task<void> {
    result = co_await binding_->move_to(to);
  };
  spawn(context(), body(first, other()));
  spawn(context(), body(second, *third_));
  while (!first || !second) poll_all();
  EXPECT_TRUE(*first);
  ASSERT_FALSE(*second);
  EXPECT_EQ(second->error().code(), EBUSY);
  EXPECT_EQ(&binding_->context(), &other());
  drop_on(other(), a);
}

TEST_P(Bindings, AListenerMayGoFromWithinItsOwnCallback) {
  for (const bool in_attach : {false, true}) {
    log_.clear();
    std::unique_ptr<ContextListener> leaving;
    const auto leave = [&, keep = std::make_shared<int>(1)](char what) {
      leaving.reset();
      log_ += what;
      EXPECT_EQ(*keep, 1);  // what the callback holds is there until it returns
    };
    auto a = listener('a');
    leaving = std::make_unique<ContextListener>(
        *binding_,
        [=](AioContext&) {
          if (!in_attach) leave('!');
        },
        [=](AioContext&) -> Result<void> {
          leave('?');
          return {};
        });
    auto b = listener('b');
    EXPECT_TRUE(move(other()));
    EXPECT_EQ(log_, in_attach ? "-b-a+a?+b" : "-b!-a+a+b");
    EXPECT_TRUE(move(context()));
  }
}

TEST_P(Bindings, AListenerMayLeaveAndFailAtOnce) {
  std::unique_ptr<ContextListener> leaving;
  auto a = listener('a');
  leaving = std::make_unique<ContextListener>(
      *binding_, [](AioContext&) {},
      [&](AioContext&) -> Result<void> {
        leaving.reset();
        return fail(ENOSPC, "leaving");
      });
  const auto result = move(other());
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code(), ENOSPC);
  EXPECT_EQ(log_, "-a+a-a+a");
}

TEST_P(Bindings, AListenerMayTakeOthersAwayAndBringOthers) {
  auto victim = listener('a');
  std::unique_ptr<ContextListener> newcomer;
  ContextListener busy(
      *binding_, [&](AioContext&) { victim.reset(); },
      [&](AioContext&) -> Result<void> {
        newcomer = listener('n');
        return {};
      });
  auto v = listener('v');
  auto b = listener('b');
  EXPECT_TRUE(move(other()));
  EXPECT_EQ(log_, "-b-v+v+b");
  log_.clear();
  // What came during the attaching had attached by itself, and takes part from now on.
  EXPECT_TRUE(move(*third_));
  EXPECT_EQ(log_, "-n-b-v+v+b");
  EXPECT_TRUE(move(context()));
}

// Between the contexts, listeners come and go where the object goes.
TEST_P(Bindings, AListenerThatComesWhileTheObjectIsUnderWayIsAttached) {
  auto a = listener('a');
  bool done = false;
  const auto body = [&]() -> Task<void> {
    const Result<void> result = co_await binding_->move_to(other());
    EXPECT_TRUE(result);
    done = true;
  };
  spawn(context(), body());
  context().poll(false);
  EXPECT_EQ(log_, "-a");
  EXPECT_EQ(&binding_->context(), &other());
  std::unique_ptr<ContextListener> b;
  {
    ContextScope scope(other());
    b = listener('b');
    a.reset();
  }
  while (!done) poll_all();
  EXPECT_EQ(log_, "-a+b");
  drop_on(other(), b);
}

// What it is for: a timer and a descriptor's handler that move with their owner.
class Ticker {
 public:
  explicit Ticker(AioContext& context)
      : binding(context),
        listener_(
            binding, [this](AioContext& from) { detach(from); },
            [this](AioContext& to) { return attach(to); }) {
    EXPECT_TRUE(attach(context));
  }
  // On the home thread.
  ~Ticker() { detach(binding.context()); }

  ContextBinding binding;
  EventNotifier notifier;
  std::atomic<int> ticks{0};
  std::atomic<int> signals{0};
  std::atomic<int> elsewhere{0};

 private:
  Result<void> attach(AioContext& to) {
    timer_.emplace(to, [this] {
      ++ticks;
      elsewhere += AioContext::current() != &binding.context();
      timer_->arm_after(100'000);
    });
    timer_->arm_after(100'000);
    to.set_event_notifier(notifier, [this] {
      ++signals;
      elsewhere += AioContext::current() != &binding.context();
    });
    return {};
  }
  void detach(AioContext& from) {
    timer_.reset();
    from.remove_event_notifier(notifier);
  }

  std::optional<Timer> timer_;
  ContextListener listener_;
};

TEST_P(Bindings, ATimerAndAHandlerMoveBetweenIOThreads) {
  std::vector<std::unique_ptr<IOThread>> threads;
  for (int i = 0; i < 2; ++i) threads.push_back(std::make_unique<IOThread>(options("worker")));
  std::unique_ptr<Ticker> ticker;
  threads[0]->context().run([&] { ticker = std::make_unique<Ticker>(threads[0]->context()); });
  for (int i = 1; i <= 20; ++i) {
    std::optional<Result<void>> result;
    const auto body = [&]() -> Task<void> {
      result = co_await ticker->binding.move_to(threads[i % 2]->context());
    };
    spawn(context(), body());
    poll_until([&] { return result.has_value(); });
    EXPECT_TRUE(*result);
    const int ticks = ticker->ticks;
    const int signals = ticker->signals;
    ticker->notifier.set();
    while (ticker->ticks == ticks || ticker->signals == signals) std::this_thread::yield();
  }
  EXPECT_EQ(ticker->elsewhere, 0);
  threads[0]->context().run([&] { ticker.reset(); });
}

class BindingMisuseDeathTest : public Bindings {};
ROOST_ON_EACH_LOOP(BindingMisuseDeathTest);

TEST_P(BindingMisuseDeathTest, AListenerMadeOrDroppedOutsideOfTheContext) {
  const auto make = [&] {
    ContextScope scope(other());
    listener('a');
  };
  EXPECT_DEATH(make(), "a listener of context 'loop' was made outside of it");
  const auto drop = [&] {
    auto a = listener('a');
    drop_on(other(), a);
  };
  EXPECT_DEATH(drop(), "a listener of context 'loop' goes outside of it");
}

TEST_P(BindingMisuseDeathTest, ABindingThatGoesTooSoon) {
  const auto with_listeners = [&] {
    auto a = listener('a');
    binding_.reset();
  };
  EXPECT_DEATH(with_listeners(), "binding to context 'loop' destroyed before 1 of its listeners");
  const auto while_moved = [&] {
    const auto body = [&]() -> Task<void> { co_await binding_->move_to(other()); };
    spawn(context(), body());
    context().poll(false);
    binding_.reset();
  };
  EXPECT_DEATH(while_moved(), "binding to context 'other' destroyed while it is moved");
}

}  // namespace
}  // namespace roost
