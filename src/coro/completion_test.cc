// SPDX-License-Identifier: MIT
#include "roost/coro/completion.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "coro/test_context.h"
#include "roost/coro/task.h"

namespace roost {
namespace {

// What one waiting coroutine saw.
struct Seen {
  int value = 0;
  int error = 0;
  std::string words;
  bool ended = false;
  CoContext* at = nullptr;
};

void note(Seen& seen, Result<int> result) {
  if (result) {
    seen.value = *result;
  } else {
    seen.error = result.error().code();
    seen.words = result.error().message();
  }
  seen.at = this_thread().context;
  seen.ended = true;
}

Task<void> wait_for(Completion<int>& done, Seen& seen) { note(seen, co_await done.wait()); }

Task<void> wait_for(Completion<int>& done, std::stop_token stop, Seen& seen) {
  note(seen, co_await done.wait(stop));
}

class Completions : public testing::Test {
 protected:
  void start(Task<void> task) {
    TestScope scope(home_);
    Coroutine::create(std::move(task), "waiter")->enter();
  }
  template <class Function>
  void on_foreign_thread(Function function) {
    std::thread(function).join();
  }
  TestContext home_{1, "home"};
  TestContext other_{2, "other"};
};
using CompletionDeathTest = Completions;

TEST_F(Completions, FiredBeforeTheWaitItDoesNotSuspend) {
  Completion<int> done("an answer");
  done.token().fire(7);
  EXPECT_TRUE(done.fired());
  Seen seen;
  start(wait_for(done, seen));
  EXPECT_TRUE(seen.ended);
  EXPECT_EQ(seen.value, 7);
}

TEST_F(Completions, FiredAfterTheSuspensionItResumesAtHome) {
  Completion<int> done("an answer");
  auto token = done.token();
  Seen seen;
  start(wait_for(done, seen));
  EXPECT_FALSE(seen.ended);
  on_foreign_thread([&] { token.fire(7); });
  EXPECT_FALSE(seen.ended);
  EXPECT_EQ(home_.run(), 1);
  EXPECT_EQ(seen.value, 7);
  EXPECT_EQ(seen.at, &home_);
}

TEST_F(Completions, FiredOnAnotherContextItResumesAtHome) {
  Completion<int> done("an answer");
  auto token = done.token();
  Seen seen;
  start(wait_for(done, seen));
  {
    TestScope scope(other_);
    token.fire(7);
  }
  EXPECT_EQ(other_.run(), 0);
  EXPECT_EQ(home_.run(), 1);
  EXPECT_EQ(seen.at, &home_);
}

// A library that answers from within the call that starts the operation, or from a thread of its
// own while the caller is still on its way to the suspension, or from its handler on the home
// thread with its lock held.
TEST_F(Completions, AForeignCallbackNeitherEntersBeforeTheYieldNorOnTheWrongContext) {
  struct Library {
    void start(void (*callback)(void*, int), void* opaque, bool at_once) {
      callback_ = callback;
      opaque_ = opaque;
      if (at_once) answer(1);
    }
    void answer(int value) { callback_(opaque_, value); }
    void (*callback_)(void*, int) = nullptr;
    void* opaque_ = nullptr;
  };
  struct Caller {
    static void on_answer(void* opaque, int value) {
      CompletionToken<int>::from_opaque(opaque).fire(value);
    }
    static Task<void> call(Library& library, bool at_once, Seen& seen, bool& in_call) {
      Completion<int> done("the library");
      in_call = true;
      library.start(&on_answer, done.token().release(), at_once);
      in_call = false;
      note(seen, co_await done.wait());
    }
  };
  Library library;
  bool in_call = false;

  Seen at_once;
  start(Caller::call(library, true, at_once, in_call));
  EXPECT_TRUE(at_once.ended);
  EXPECT_EQ(at_once.value, 1);

  Seen elsewhere;
  start(Caller::call(library, false, elsewhere, in_call));
  on_foreign_thread([&] { library.answer(2); });
  EXPECT_FALSE(elsewhere.ended) << "entered on the library's thread";
  EXPECT_EQ(home_.run(), 1);
  EXPECT_EQ(elsewhere.value, 2);
  EXPECT_EQ(elsewhere.at, &home_);

  Seen at_home;
  start(Caller::call(library, false, at_home, in_call));
  {
    TestScope scope(home_);
    library.answer(3);
    EXPECT_FALSE(at_home.ended) << "entered on the library's stack";
  }
  EXPECT_EQ(home_.run(), 1);
  EXPECT_EQ(at_home.value, 3);
}

TEST_F(Completions, FiredByTheCoroutineThatIsRunningItResumesOnceThatSuspends) {
  struct Firer {
    static Task<void> fire(CompletionToken<int> token, Seen& seen) {
      token.fire(7);
      EXPECT_FALSE(seen.ended);
      co_return;
    }
  };
  Completion<int> done("an answer");
  auto token = done.token();
  Seen seen;
  start(wait_for(done, seen));
  start(Firer::fire(std::move(token), seen));
  EXPECT_TRUE(seen.ended);
  EXPECT_EQ(home_.run(), 0);
}

TEST_F(Completions, AnErrorIsDelivered) {
  Completion<int> done("an answer");
  done.token().fail(Error(EIO, "reading"));
  Seen seen;
  start(wait_for(done, seen));
  EXPECT_EQ(seen.error, EIO);
}

TEST_F(Completions, DroppedUnfiredItCompletesWithCancelled) {
  Completion<int> done("an answer");
  Seen seen;
  {
    auto token = done.token();
    start(wait_for(done, seen));
    EXPECT_FALSE(seen.ended);
  }
  EXPECT_EQ(home_.run(), 1);
  EXPECT_EQ(seen.error, ECANCELED);
  EXPECT_NE(seen.words.find("an answer (dropped unanswered)"), std::string::npos) << seen.words;
}

TEST_F(Completions, DroppedBeforeTheWaitItCompletesWithCancelledToo) {
  Completion<int> done("an answer");
  { auto token = done.token(); }
  EXPECT_TRUE(done.fired());
  Seen seen;
  start(wait_for(done, seen));
  EXPECT_EQ(seen.error, ECANCELED);
}

TEST_F(Completions, ATokenThatWasMovedFromIsNotDropped) {
  Completion<int> done("an answer");
  auto first = done.token();
  Seen seen;
  start(wait_for(done, seen));
  auto second = std::move(first);
  { auto gone = std::move(first); }
  EXPECT_FALSE(done.fired());
  second.fire(1);
  home_.run();
  EXPECT_EQ(seen.value, 1);
}

TEST_F(Completions, ATokenThatIsAssignedToDropsItsOldOneAtOnce) {
  Completion<int> first("the first answer");
  Completion<int> second("the second answer");
  auto to = first.token();
  auto from = second.token();
  to = std::move(from);
  EXPECT_TRUE(first.fired());
  EXPECT_FALSE(second.fired());
  EXPECT_TRUE(to);
  EXPECT_FALSE(from);
  auto& itself = to;
  to = std::move(itself);
  EXPECT_FALSE(second.fired());
  to.fire(2);
  EXPECT_TRUE(second.fired());
}

TEST_F(Completions, OneThatIsAssignedToAbandonsItsOldOneAtOnce) {
  struct Witness {
    std::shared_ptr<int> held;
  };
  const auto held = std::make_shared<int>(1);
  Completion<Witness> to("the first answer");
  to.token().fire(Witness{held});
  EXPECT_EQ(held.use_count(), 2);
  Completion<Witness> from("the second answer");
  auto token = from.token();
  to = std::move(from);
  EXPECT_EQ(held.use_count(), 1);  // nobody takes that result any more
  token.fire(Witness{held});
  EXPECT_TRUE(to.fired());
}

TEST_F(Completions, AStoppedWaitEndsAtHomeAndALaterFireGoesNowhere) {
  auto done = std::make_unique<Completion<int>>("an answer");
  auto token = done->token();
  std::stop_source stop;
  Seen seen;
  start(wait_for(*done, stop.get_token(), seen));
  on_foreign_thread([&] { stop.request_stop(); });
  EXPECT_FALSE(seen.ended);
  EXPECT_EQ(home_.run(), 1);
  EXPECT_EQ(seen.error, ECANCELED);
  EXPECT_EQ(seen.at, &home_);
  done.reset();
  token.fire(7);
  EXPECT_EQ(home_.run(), 0);
}

TEST_F(Completions, AStopRequestedBeforeTheWaitEndsItAtOnce) {
  Completion<int> done("an answer");
  auto token = done.token();
  std::stop_source stop;
  stop.request_stop();
  Seen seen;
  start(wait_for(done, stop.get_token(), seen));
  EXPECT_TRUE(seen.ended);
  EXPECT_EQ(seen.error, ECANCELED);
}

TEST_F(Completions, AResultThatIsThereWinsOverAStop) {
  Completion<int> done("an answer");
  done.token().fire(7);
  std::stop_source stop;
  stop.request_stop();
  Seen seen;
  start(wait_for(done, stop.get_token(), seen));
  EXPECT_EQ(seen.value, 7);
}

TEST_F(Completions, AResultThatComesWhileTheStoppedCoroutineIsQueuedIsNotLost) {
  Completion<int> done("an answer");
  auto token = done.token();
  std::stop_source stop;
  Seen seen;
  start(wait_for(done, stop.get_token(), seen));
  stop.request_stop();
  token.fire(7);
  EXPECT_EQ(home_.run(), 1);
  EXPECT_EQ(seen.value, 7);
}

TEST_F(Completions, AStopThatComesAfterTheFireDoesNothing) {
  Completion<int> done("an answer");
  auto token = done.token();
  std::stop_source stop;
  Seen seen;
  start(wait_for(done, stop.get_token(), seen));
  token.fire(7);
  stop.request_stop();
  EXPECT_EQ(home_.run(), 1);
  EXPECT_EQ(seen.value, 7);
}

TEST_F(Completions, AfterAStoppedWaitOneMayWaitForTheEnd) {
  Completion<int> done("an answer");
  auto token = done.token();
  std::stop_source stop;
  Seen first;
  start(wait_for(done, stop.get_token(), first));
  stop.request_stop();
  home_.run();
  EXPECT_EQ(first.error, ECANCELED);
  Seen second;
  start(wait_for(done, second));
  EXPECT_FALSE(second.ended);
  token.fire(7);
  home_.run();
  EXPECT_EQ(second.value, 7);
}

TEST_F(Completions, AStopOnTheHomeThreadDoesNotRunTheCoroutineOnItsStack) {
  Completion<int> done("an answer");
  auto token = done.token();
  std::stop_source stop;
  Seen seen;
  start(wait_for(done, stop.get_token(), seen));
  TestScope scope(home_);
  stop.request_stop();
  EXPECT_FALSE(seen.ended);
  home_.run();
  EXPECT_EQ(seen.error, ECANCELED);
}

// Counts its copies, so that a leak or a double destruction shows.
struct Counted {
  explicit Counted(int& alive) : alive_(&alive) { ++*alive_; }
  Counted(Counted&& other) noexcept : alive_(other.alive_) { ++*alive_; }
  Counted& operator=(Counted&&) = delete;
  ~Counted() { --*alive_; }
  int* alive_;
};

TEST_F(Completions, AResultIsDestroyedOnceWhicheverSideGoesFirst) {
  int alive = 0;
  {
    auto done = std::make_unique<Completion<Counted>>("an answer");
    auto token = done->token();
    done.reset();
    token.fire(Counted(alive));
    EXPECT_EQ(alive, 0);
  }
  {
    Completion<Counted> done("an answer");
    done.token().fire(Counted(alive));
    EXPECT_EQ(alive, 1);
  }
  EXPECT_EQ(alive, 0);
  struct Taker {
    static Task<void> take(Completion<Counted>& done, int& seen, int& alive) {
      auto result = co_await done.wait();
      EXPECT_TRUE(result);
      seen = alive;
    }
  };
  {
    int seen = 0;
    Completion<Counted> done("an answer");
    done.token().fire(Counted(alive));
    start(Taker::take(done, seen, alive));
    EXPECT_EQ(seen, 2);  // the moved-from one in the completion, and the result
  }
  EXPECT_EQ(alive, 0);
}

TEST_F(Completions, ItMayHaveNoValueOrBeAResultItself) {
  struct Waiter {
    static Task<void> wait(Completion<>& plain, Completion<Result<int>>& wrapped, int& ended) {
      Result<void> nothing = co_await plain.wait();
      EXPECT_TRUE(nothing);
      Result<int> value = co_await wrapped.wait();
      EXPECT_EQ(value.error().code(), ENOSPC);
      ++ended;
    }
  };
  int ended = 0;
  Completion<> plain("no value");
  Completion<Result<int>> wrapped("a result");
  plain.token().fire();
  wrapped.token().fire(fail(ENOSPC, "writing"));
  start(Waiter::wait(plain, wrapped, ended));
  EXPECT_EQ(ended, 1);
}

TEST_F(Completions, ACompletionOfWhichNoTokenWasMadeMayGo) { Completion<int> done("an answer"); }

TEST_F(CompletionDeathTest, FiringTwiceAbortsAndNamesBothPlaces) {
  Completion<int> done("an answer");
  auto token = done.token();
  token.fire(1);
  EXPECT_DEATH(token.fire(2),
               "completion 'an answer' fired at coro/completion_test.cc:[0-9]+: "
               "it was fired before at coro/completion_test.cc:[0-9]+");
}

TEST_F(CompletionDeathTest, FiringTwiceThroughAPointerAbortsToo) {
  Completion<int> done("an answer");
  void* opaque = done.token().release();
  CompletionToken<int>::from_opaque(opaque).fire(1);
  EXPECT_DEATH(CompletionToken<int>::from_opaque(opaque).fire(2),
               "completion 'an answer', made at .*, fired at .*: it was fired before at ");
  EXPECT_DEATH(static_cast<void>(CompletionToken<int>::from_opaque(opaque)),
               "completion 'an answer' fired twice");
}

TEST_F(CompletionDeathTest, FiringATokenThatWasGivenAwayAborts) {
  Completion<int> done("an answer");
  auto token = done.token();
  void* opaque = token.release();
  EXPECT_DEATH(token.fire(1), "by a token that was given away");
  CompletionToken<int>::from_opaque(opaque).fire(1);
}

TEST_F(CompletionDeathTest, ASecondTokenAborts) {
  Completion<int> done("an answer");
  auto token = done.token();
  EXPECT_DEATH(static_cast<void>(done.token()),
               "second token of completion 'an answer' wanted at coro/completion_");
}

TEST_F(CompletionDeathTest, AWaitWithoutATokenAborts) {
  Completion<int> done("an answer");
  Seen seen;
  EXPECT_DEATH(start(wait_for(done, seen)), "completion 'an answer' waited for, but it has no");
}

TEST_F(CompletionDeathTest, ASecondWaiterAborts) {
  Completion<int> done("an answer");
  auto token = done.token();
  Seen seen;
  start(wait_for(done, seen));
  EXPECT_DEATH(start(wait_for(done, seen)),
               "completion 'an answer' waited for by coroutine 'waiter': another waits already");
  token.fire(1);
  home_.run();
}

TEST_F(CompletionDeathTest, AWaitAfterTheResultWasTakenAborts) {
  Completion<int> done("an answer");
  done.token().fire(1);
  Seen seen;
  start(wait_for(done, seen));
  EXPECT_DEATH(start(wait_for(done, seen)),
               "'an answer' waited for again after it gave its result");
}

TEST_F(CompletionDeathTest, DestroyingItWhileAnotherWaitsAborts) {
  auto done = std::make_unique<Completion<int>>("an answer");
  auto token = done->token();
  Seen seen;
  start(wait_for(*done, seen));
  EXPECT_DEATH(done.reset(), "'an answer' destroyed while a coroutine waits for it");
  token.fire(1);
  home_.run();
}

TEST_F(CompletionDeathTest, WakingTheWaiterByHandAbortsAndNamesTheWait) {
  Completion<int> done("an answer");
  auto token = done.token();
  Coroutine* co = nullptr;
  struct Waiter {
    static Task<void> wait(Completion<int>& done, Coroutine*& co) {
      co = Coroutine::self();
      co_await done.wait();
    }
  };
  start(Waiter::wait(done, co));
  EXPECT_DEATH(co_wake(*co), "co_wake of coroutine 'waiter' .* it is waiting for an answer");
  token.fire(1);
  home_.run();
}

}  // namespace
}  // namespace roost
