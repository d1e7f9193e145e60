// SPDX-License-Identifier: MIT
// Descriptor handlers and event notifiers, on both back ends.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "aio/test_loop.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/event_notifier.h"
#include "roost/aio/poll_budget.h"
#include "roost/aio/timer.h"
#include "roost/aio/unique_fd.h"

namespace roost {
namespace {

struct Pipe {
  Pipe() {
    std::array<int, 2> ends;
    EXPECT_EQ(::pipe2(ends.data(), O_NONBLOCK | O_CLOEXEC), 0);
    reader = UniqueFd(ends[0]);
    writer = UniqueFd(ends[1]);
  }
  void fill(char c = 'x') { EXPECT_EQ(::write(writer.get(), &c, 1), 1); }
  char drain() {
    char c = 0;
    EXPECT_EQ(::read(reader.get(), &c, 1), 1);
    return c;
  }
  int fd() const { return reader.get(); }
  UniqueFd reader, writer;
};

FdHandler on_read(std::function<void()> callback) {
  return {.read = std::move(callback), .write = nullptr, .poll = nullptr};
}

FdHandler on_write(std::function<void()> callback) {
  return {.read = nullptr, .write = std::move(callback), .poll = nullptr};
}

class FdHandlers : public LoopTest {};
class FdHandlersInStillTime : public StillLoopTest {};
ROOST_ON_EACH_LOOP(FdHandlersInStillTime);
ROOST_ON_EACH_LOOP(FdHandlers);

TEST_P(FdHandlers, AReadHandlerIsCalledWhenTheDescriptorIsReadable) {
  Pipe pipe;
  std::string got;
  context().set_fd_handler(pipe.fd(), on_read([&] { got += pipe.drain(); }));
  EXPECT_FALSE(poll_some());
  pipe.fill('a');
  poll_until([&] { return !got.empty(); });
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(got, "a");
  context().remove_fd_handler(pipe.fd());
}

TEST_P(FdHandlers, PollReportsProgressForADescriptorOnly) {
  Pipe pipe;
  bool called = false;
  context().set_fd_handler(pipe.fd(), on_read([&] {
                             called = true;
                             pipe.drain();
                           }));
  EXPECT_FALSE(context().poll(false));
  pipe.fill();
  while (!called) {
    const bool progress = context().poll(true);
    EXPECT_EQ(progress, called);
  }
  EXPECT_FALSE(context().poll(false));
  context().remove_fd_handler(pipe.fd());
}

TEST_P(FdHandlers, AHandlerIsCalledAgainWhileTheDescriptorStaysReadable) {
  Pipe pipe;
  int calls = 0;
  context().set_fd_handler(pipe.fd(), on_read([&] { ++calls; }));
  pipe.fill();
  poll_until([&] { return calls >= 5; });
  pipe.drain();
  poll_some();
  const int settled = calls;
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(calls, settled);
  context().remove_fd_handler(pipe.fd());
}

TEST_P(FdHandlers, AWriteHandlerIsCalledWhileThereIsRoom) {
  Pipe pipe;
  int calls = 0;
  context().set_fd_handler(pipe.writer.get(), on_write([&] { ++calls; }));
  poll_until([&] { return calls >= 3; });
  const std::vector<char> block(4096);
  while (::write(pipe.writer.get(), block.data(), block.size()) > 0) {
  }
  poll_some();
  const int full = calls;
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(calls, full);
  context().remove_fd_handler(pipe.writer.get());
}

TEST_P(FdHandlers, ReadAndWriteOfOneDescriptorAreBothServed) {
  std::array<int, 2> ends;
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends.data()), 0);
  const UniqueFd near(ends[0]);
  const UniqueFd far(ends[1]);
  int reads = 0;
  int writes = 0;
  context().set_fd_handler(near.get(),
                           {.read = [&] { ++reads; }, .write = [&] { ++writes; }, .poll = nullptr});
  poll_until([&] { return writes >= 2; });
  EXPECT_EQ(reads, 0);
  ASSERT_EQ(::write(far.get(), "x", 1), 1);
  const int before = writes;
  poll_until([&] { return reads >= 2 && writes > before; });
  context().remove_fd_handler(near.get());
}

TEST_P(FdHandlers, AHangUpCallsTheReadHandler) {
  Pipe pipe;
  bool end_of_file = false;
  context().set_fd_handler(pipe.fd(), on_read([&] {
                             char c;
                             end_of_file = ::read(pipe.fd(), &c, 1) == 0;
                             context().remove_fd_handler(pipe.fd());
                           }));
  poll_some(3);
  pipe.writer.reset();
  poll_until([&] { return end_of_file; });
}

TEST_P(FdHandlers, AHangUpCallsAWriteHandlerThatStandsAlone) {
  Pipe pipe;
  const std::vector<char> block(4096);
  while (::write(pipe.writer.get(), block.data(), block.size()) > 0) {
  }
  int error = 0;
  context().set_fd_handler(pipe.writer.get(), on_write([&] {
                             error = ::write(pipe.writer.get(), "x", 1) < 0 ? errno : 0;
                             context().remove_fd_handler(pipe.writer.get());
                           }));
  poll_some(3);
  ::signal(SIGPIPE, SIG_IGN);
  pipe.reader.reset();
  poll_until([&] { return error != 0; });
  EXPECT_EQ(error, EPIPE);
}

TEST_P(FdHandlers, AChangedHandlerReplacesTheOldOneAtOnce) {
  Pipe pipe;
  int old_calls = 0;
  int new_calls = 0;
  context().set_fd_handler(pipe.fd(), on_read([&] { ++old_calls; }));
  poll_some(3);
  pipe.fill();
  context().set_fd_handler(pipe.fd(), on_read([&] {
                             pipe.drain();
                             ++new_calls;
                           }));
  poll_until([&] { return new_calls == 1; });
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(old_calls, 0);
  context().remove_fd_handler(pipe.fd());
}

TEST_P(FdHandlers, AHandlerChangesFromReadToWriteAndBack) {
  std::array<int, 2> ends;
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends.data()), 0);
  const UniqueFd near(ends[0]);
  const UniqueFd far(ends[1]);
  int reads = 0;
  int writes = 0;
  context().set_fd_handler(near.get(), on_read([&] { ++reads; }));
  EXPECT_FALSE(poll_some(3));
  context().set_fd_handler(near.get(), on_write([&] { ++writes; }));
  poll_until([&] { return writes >= 2; });
  context().set_fd_handler(near.get(), on_read([&] { ++reads; }));
  const int last_write = writes;
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(writes, last_write);
  EXPECT_EQ(reads, 0);
  ASSERT_EQ(::write(far.get(), "x", 1), 1);
  poll_until([&] { return reads >= 2; });
  context().remove_fd_handler(near.get());
}

TEST_P(FdHandlers, AnyNumberOfChangesBeforeAnIterationLeaveTheLast) {
  Pipe pipe;
  pipe.fill();
  int calls = 0;
  for (int i = 0; i < 1000; ++i) {
    context().set_fd_handler(pipe.fd(), on_read([] { FAIL() << "an old handler was called"; }));
    if (i % 3 == 0) context().remove_fd_handler(pipe.fd());
    if (i % 3 == 1) context().set_fd_handler(pipe.fd(), on_write([] { FAIL(); }));
  }
  context().set_fd_handler(pipe.fd(), on_read([&] { ++calls; }));
  poll_until([&] { return calls >= 2; });
  context().remove_fd_handler(pipe.fd());
}

TEST_P(FdHandlers, ARemovedHandlerIsNotCalled) {
  Pipe pipe;
  int calls = 0;
  context().set_fd_handler(pipe.fd(), on_read([&] { ++calls; }));
  poll_some(3);
  pipe.fill();
  context().remove_fd_handler(pipe.fd());
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(calls, 0);
  context().remove_fd_handler(pipe.fd());  // of nothing: nothing
}

TEST_P(FdHandlers, ARemovalDestroysTheCallbackSoon) {
  Pipe pipe;
  auto token = std::make_shared<int>(0);
  const std::weak_ptr<int> watched = token;
  context().set_fd_handler(pipe.fd(), on_read([token = std::move(token)] {}));
  poll_some(3);
  context().remove_fd_handler(pipe.fd());
  poll_some(3);
  EXPECT_TRUE(watched.expired());
}

TEST_P(FdHandlers, AHandlerRemovesItself) {
  Pipe pipe;
  int calls = 0;
  auto kept_alive = std::make_shared<int>(42);
  const std::weak_ptr<int> watched = kept_alive;
  context().set_fd_handler(pipe.fd(), on_read([&, kept_alive = std::move(kept_alive)] {
                             ++calls;
                             context().remove_fd_handler(pipe.fd());
                             EXPECT_EQ(*kept_alive, 42);  // the running callback still exists
                           }));
  pipe.fill();
  poll_until([&] { return calls == 1; });
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(watched.expired());
}

TEST_P(FdHandlers, AHandlerReplacesItself) {
  Pipe pipe;
  int first = 0;
  int second = 0;
  context().set_fd_handler(pipe.fd(), on_read([&] {
                             ++first;
                             context().set_fd_handler(pipe.fd(), on_read([&] {
                                                        ++second;
                                                        pipe.drain();
                                                      }));
                           }));
  pipe.fill();
  poll_until([&] { return second == 1; });
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(first, 1);
  context().remove_fd_handler(pipe.fd());
}

TEST_P(FdHandlers, AReadCallbackThatRemovesTheHandlerKeepsWriteFromBeingCalled) {
  std::array<int, 2> ends;
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends.data()), 0);
  const UniqueFd near(ends[0]);
  const UniqueFd far(ends[1]);
  ASSERT_EQ(::write(far.get(), "x", 1), 1);
  int reads = 0;
  int writes = 0;
  context().set_fd_handler(near.get(), {.read =
                                            [&] {
                                              ++reads;
                                              context().remove_fd_handler(near.get());
                                            },
                                        .write = [&] { ++writes; },
                                        .poll = nullptr});
  poll_until([&] { return reads == 1; });
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(writes, 0);
}

TEST_P(FdHandlers, AHandlerThatRemovesItselfAndSetsItAgainIsCalledAgain) {
  Pipe pipe;
  int calls = 0;
  std::function<void()> again = [&] {
    context().remove_fd_handler(pipe.fd());
    if (++calls < 5) context().set_fd_handler(pipe.fd(), on_read(again));
  };
  context().set_fd_handler(pipe.fd(), on_read(again));
  pipe.fill();
  poll_until([&] { return calls == 5; });
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(calls, 5);
}

// All are ready in one batch; the first to be called takes the others away.
TEST_P(FdHandlers, AHandlerRemovesOthersOfTheSameBatch) {
  constexpr int kPipes = 8;
  std::array<Pipe, kPipes> pipes;
  int calls = 0;
  for (Pipe& pipe : pipes) {
    context().set_fd_handler(pipe.fd(), on_read([&] {
                               ++calls;
                               for (Pipe& p : pipes) context().remove_fd_handler(p.fd());
                             }));
  }
  poll_some(3);
  for (Pipe& pipe : pipes) pipe.fill();
  poll_until([&] { return calls > 0; });
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(calls, 1);
}

TEST_P(FdHandlers, AHandlerReplacesOthersOfTheSameBatch) {
  constexpr int kPipes = 8;
  std::array<Pipe, kPipes> pipes;
  int old_calls = 0;
  std::array<int, kPipes> new_calls{};
  for (Pipe& pipe : pipes) {
    context().set_fd_handler(pipe.fd(), on_read([&] {
                               ++old_calls;
                               for (int i = 0; i < kPipes; ++i) {
                                 context().set_fd_handler(pipes[i].fd(), on_read([&, i] {
                                                            ++new_calls[i];
                                                            pipes[i].drain();
                                                          }));
                               }
                             }));
  }
  poll_some(3);
  for (Pipe& pipe : pipes) pipe.fill();
  poll_until([&] { return new_calls == std::array<int, kPipes>{1, 1, 1, 1, 1, 1, 1, 1}; });
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(old_calls, 1);
  for (Pipe& pipe : pipes) context().remove_fd_handler(pipe.fd());
}

// The dangerous one: descriptor B is ready in the batch; A's callback closes B, and a new pipe gets
// B's number. What the batch still says of B must not reach the new handler.
TEST_P(FdHandlers, ANumberUsedAgainWithinTheBatchDoesNotInheritTheEvent) {
  constexpr int kPipes = 8;
  std::vector<std::unique_ptr<Pipe>> pipes;
  for (int i = 0; i < kPipes; ++i) pipes.push_back(std::make_unique<Pipe>());
  std::vector<std::unique_ptr<Pipe>> reborn;
  int calls = 0;
  int stray_calls = 0;
  int reused_numbers = 0;
  const auto first_callback = [&] {
    if (++calls > 1) return;
    std::vector<int> old_numbers;
    for (auto& pipe : pipes) {
      old_numbers.push_back(pipe->fd());
      context().remove_fd_handler(pipe->fd());
    }
    pipes.clear();
    for (int i = 0; i < kPipes; ++i) {
      reborn.push_back(std::make_unique<Pipe>());
      const int fd = reborn.back()->fd();
      reused_numbers += std::count(old_numbers.begin(), old_numbers.end(), fd);
      context().set_fd_handler(fd, on_read([&] { ++stray_calls; }));
    }
  };
  for (auto& pipe : pipes) context().set_fd_handler(pipe->fd(), on_read(first_callback));
  poll_some(3);
  for (auto& pipe : pipes) pipe->fill();
  poll_until([&] { return calls > 0; });
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(calls, 1);
  EXPECT_GE(reused_numbers, kPipes / 2);
  EXPECT_EQ(stray_calls, 0);
  reborn.front()->fill();
  poll_until([&] { return stray_calls > 0; });
  for (auto& pipe : reborn) context().remove_fd_handler(pipe->fd());
}

TEST_P(FdHandlers, ANumberUsedAgainAfterRemovalWorks) {
  for (int round = 0; round < 50; ++round) {
    Pipe pipe;
    int calls = 0;
    context().set_fd_handler(pipe.fd(), on_read([&] {
                               ++calls;
                               pipe.drain();
                             }));
    if (round % 2) poll_some(2);
    pipe.fill();
    if (round % 3) poll_until([&] { return calls == 1; });
    context().remove_fd_handler(pipe.fd());
    EXPECT_LE(calls, 1);
  }
  EXPECT_FALSE(poll_some());
}

// A removed handler's descriptor is really closed after an iteration: its peer sees the end.
TEST_P(FdHandlers, AClosedDescriptorIsNotKeptOpenByTheLoop) {
  Pipe pipe;
  context().set_fd_handler(pipe.writer.get(), on_write([] {}));
  context().set_fd_handler(pipe.fd(), on_read([] {}));
  poll_some(3);
  context().remove_fd_handler(pipe.writer.get());
  context().remove_fd_handler(pipe.fd());
  pipe.writer.reset();
  poll_some(3);
  char c;
  EXPECT_EQ(::read(pipe.fd(), &c, 1), 0);
}

TEST_P(FdHandlers, HandlersAreSetAndRemovedFromTimersAndBottomHalves) {
  Pipe pipe;
  pipe.fill();
  int calls = 0;
  Timer timer(context(), [&] {
    context().set_fd_handler(pipe.fd(), on_read([&] {
                               if (++calls == 3) {
                                 schedule_oneshot(context(), [&] {
                                   context().remove_fd_handler(pipe.fd());
                                   calls = 100;
                                 });
                               }
                             }));
  });
  timer.arm_after(0);
  poll_until([&] { return calls >= 100; });
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(calls, 100);
}

// With one ready descriptor of many, each gets its turn.
TEST_P(FdHandlers, HundredsOfReadyDescriptorsAreAllServed) {
  constexpr int kPipes = 400;  // more than one batch of either back end
  std::vector<Pipe> pipes(kPipes);
  std::vector<int> calls(kPipes);
  for (int i = 0; i < kPipes; ++i) {
    context().set_fd_handler(pipes[i].fd(), on_read([&, i] { ++calls[i]; }));
    pipes[i].fill();
  }
  poll_until([&] { return std::ranges::all_of(calls, [](int n) { return n >= 3; }); });
  for (Pipe& pipe : pipes) context().remove_fd_handler(pipe.fd());
  EXPECT_FALSE(poll_some());
}

// A chatty bottom half does not keep descriptors waiting for more than 64 entries.
TEST_P(FdHandlersInStillTime, ADescriptorIsServedAtLeastEverySixtyFourEntries) {
  Pipe pipe;
  int entries = 0;
  int entries_at_last_call = 0;
  int longest = 0;
  int calls = 0;
  context().set_fd_handler(pipe.fd(), on_read([&] {
                             ++calls;
                             longest = std::max(longest, entries - entries_at_last_call);
                             entries_at_last_call = entries;
                           }));
  poll_some(2);
  pipe.fill();
  std::function<void()> again = [&] {
    if (++entries < 10'000) schedule_oneshot(context(), again);
  };
  for (int i = 0; i < 10; ++i) schedule_oneshot(context(), again);
  while (entries < 10'000) context().poll(true);
  EXPECT_GE(calls, 10'000 / 64 / 2);
  EXPECT_LE(longest, 2 * 64);  // armed anew in one iteration, seen in the next
  context().remove_fd_handler(pipe.fd());
  poll_some();
}

TEST_P(FdHandlers, ANestedPollServesTheOtherDescriptorsOfTheBatch) {
  constexpr int kPipes = 6;
  std::array<Pipe, kPipes> pipes;
  int served = 0;
  int depth = 0;
  int deepest = 0;
  for (Pipe& pipe : pipes) {
    context().set_fd_handler(pipe.fd(), on_read([&] {
                               pipe.drain();
                               ++served;
                               deepest = std::max(deepest, ++depth);
                               if (depth == 1) {
                                 while (served < kPipes) context().poll(true);
                               }
                               --depth;
                             }));
  }
  poll_some(3);
  for (Pipe& pipe : pipes) pipe.fill();
  poll_until([&] { return served == kPipes; });
  EXPECT_EQ(deepest, 2);
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(served, kPipes);
  for (Pipe& pipe : pipes) context().remove_fd_handler(pipe.fd());
}

TEST_P(FdHandlers, AHandlerRemovedInANestedPollIsNotCalledByTheOuterOne) {
  constexpr int kPipes = 6;
  std::array<Pipe, kPipes> pipes;
  int calls = 0;
  for (Pipe& pipe : pipes) {
    context().set_fd_handler(pipe.fd(), on_read([&] {
                               if (++calls > 1) return;
                               schedule_oneshot(context(), [&] {
                                 for (Pipe& p : pipes) context().remove_fd_handler(p.fd());
                                 calls += 1000;
                               });
                               while (calls < 1000) context().poll(true);
                             }));
  }
  poll_some(3);
  for (Pipe& pipe : pipes) pipe.fill();
  poll_until([&] { return calls >= 1000; });
  const int settled = calls;
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(calls, settled);
}

// A handler's callback removes itself and then polls: the loop may not free what it stands on.
TEST_P(FdHandlers, AHandlerRemovesItselfAndPolls) {
  Pipe pipe;
  int calls = 0;
  context().set_fd_handler(pipe.fd(), {.read =
                                           [&] {
                                             ++calls;
                                             context().remove_fd_handler(pipe.fd());
                                             poll_some(5);
                                           },
                                       .write = [&] { FAIL(); },
                                       .poll = nullptr});
  pipe.fill();
  poll_until([&] { return calls == 1; });
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(calls, 1);
}

TEST_P(FdHandlers, HandlersSetBeforeAnotherThreadPollsAreServedThere) {
  Pipe pipe;
  auto other = AioContext::create(options("other"));
  std::thread::id served_by;
  {
    ContextScope scope(*other);
    other->set_fd_handler(pipe.fd(), on_read([&] {
                            pipe.drain();
                            served_by = std::this_thread::get_id();
                          }));
  }
  pipe.fill();
  std::thread thread([&] {
    while (served_by == std::thread::id{}) other->poll(true);
    ContextScope scope(*other);
    other->remove_fd_handler(pipe.fd());
    other->release_back_end();
  });
  const auto expected = thread.get_id();
  thread.join();
  EXPECT_EQ(served_by, expected);
}

TEST_P(FdHandlers, AContextThatGaveUpItsBackEndKeepsItsHandlersForTheNextThread) {
  Pipe pipe;
  int calls = 0;
  context().set_fd_handler(pipe.fd(), on_read([&] {
                             pipe.drain();
                             ++calls;
                           }));
  pipe.fill();
  poll_until([&] { return calls == 1; });
  context().release_back_end();
  scope_.reset();
  std::thread([&] {
    ContextScope scope(context());
    pipe.fill();
    poll_until([&] { return calls == 2; });
    context().release_back_end();
  }).join();
  scope_.emplace(context());
  pipe.fill();
  poll_until([&] { return calls == 3; });
  context().remove_fd_handler(pipe.fd());
}

// ---- Poll hooks

// While the context busy-waits it asks the hook, and no system call is needed to see the work. The
// context is taught to spin by sleeps that are short.
class PollHooks : public LoopTest {
 protected:
  AioContextOptions loop_options() override {
    auto o = options();
    o.poll_max_ns = 2'000'000;
    o.poll_budget = &budget_;
    return o;
  }

  void learn_to_spin() {
    Timer timer(context(), [] {});
    for (int i = 0; i < 2000 && context().statistics().spins_in_vain < 3; ++i) {
      timer.arm_after(100'000);
      poll_until([&] { return !timer.armed(); });
    }
    ASSERT_GE(context().statistics().spins_in_vain, 3u);
  }

  // A hook is asked only while the context spins, and that depends on how long it slept before.
  template <class Predicate>
  void poll_with_short_sleeps_until(Predicate done) {
    Timer tick(context(), [] {});
    while (!done()) {
      if (!tick.armed()) tick.arm_after(100'000);
      context().poll(true);
    }
  }

  PollBudget budget_{1000};  // other CPUs, whatever this machine has
};
ROOST_ON_EACH_LOOP(PollHooks);

TEST_P(PollHooks, AHookSeesWorkThatTheDescriptorDoesNotShow) {
  learn_to_spin();
  Pipe pipe;  // never readable
  int asked = 0;
  int calls = 0;
  bool work = true;
  context().set_fd_handler(pipe.fd(), {.read =
                                           [&] {
                                             ++calls;
                                             work = false;
                                           },
                                       .write = nullptr,
                                       .poll =
                                           [&] {
                                             ++asked;
                                             return work;
                                           }});
  poll_with_short_sleeps_until([&] { return calls > 0; });
  EXPECT_GE(asked, 1);
  EXPECT_EQ(calls, 1);
  context().remove_fd_handler(pipe.fd());
}

TEST_P(PollHooks, ACallbackThatAHookAskedForRemovesItsOwnHandler) {
  learn_to_spin();
  Pipe pipe;
  int calls = 0;
  context().set_fd_handler(pipe.fd(), {.read =
                                           [&] {
                                             ++calls;
                                             context().remove_fd_handler(pipe.fd());
                                             poll_some(5);  // frees the watch, if anything does
                                           },
                                       .write = [&] { ADD_FAILURE() << "removed already"; },
                                       .poll = [&] { return true; }});
  // Room to write would call `write` first; a read end never has it.
  poll_with_short_sleeps_until([&] { return calls > 0; });
  EXPECT_EQ(calls, 1);
  EXPECT_FALSE(poll_some());
}

TEST_P(PollHooks, ACallbackThatAHookAskedForRemovesOtherHooks) {
  learn_to_spin();
  std::array<Pipe, 6> pipes;
  int calls = 0;
  for (Pipe& pipe : pipes) {
    context().set_fd_handler(pipe.fd(), {.read =
                                             [&] {
                                               ++calls;
                                               for (Pipe& p : pipes) {
                                                 context().remove_fd_handler(p.fd());
                                               }
                                             },
                                         .write = nullptr,
                                         .poll = [&] { return true; }});
  }
  poll_with_short_sleeps_until([&] { return calls > 0; });
  EXPECT_EQ(calls, 1);
  EXPECT_FALSE(poll_some());
}

TEST_P(PollHooks, AHookWithNothingToReportDoesNotKeepTheContextAwake) {
  learn_to_spin();
  Pipe pipe;
  context().set_fd_handler(
      pipe.fd(), {.read = [] { FAIL(); }, .write = nullptr, .poll = [] { return false; }});
  const auto sleeps = context().statistics().sleeps;
  // Much longer than the longest spin, also where this thread does not get its CPU for a while.
  Timer timer(context(), [] {});
  timer.arm_after(100'000'000);
  poll_until([&] { return !timer.armed(); });
  EXPECT_GT(context().statistics().sleeps, sleeps);
  context().remove_fd_handler(pipe.fd());
}

// ---- Event notifiers

class EventNotifiers : public LoopTest {};
ROOST_ON_EACH_LOOP(EventNotifiers);

TEST(EventNotifier, TestAndClearReportsSettingOnce) {
  EventNotifier notifier;
  EXPECT_FALSE(notifier.test_and_clear());
  notifier.set();
  notifier.set();
  EXPECT_TRUE(notifier.test_and_clear());
  EXPECT_FALSE(notifier.test_and_clear());
}

TEST_P(EventNotifiers, TheCallbackRunsOncePerSettingAndFindsItCleared) {
  EventNotifier notifier;
  int calls = 0;
  context().set_event_notifier(notifier, [&] {
    ++calls;
    EXPECT_FALSE(notifier.test_and_clear());
  });
  EXPECT_FALSE(poll_some());
  notifier.set();
  notifier.set();
  poll_until([&] { return calls == 1; });
  EXPECT_FALSE(poll_some());
  notifier.set();
  poll_until([&] { return calls == 2; });
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(calls, 2);
  context().remove_event_notifier(notifier);
}

TEST_P(EventNotifiers, SetOnAnotherThreadWakesASleepingContext) {
  EventNotifier notifier;
  bool called = false;
  context().set_event_notifier(notifier, [&] { called = true; });
  std::thread thread([&] { notifier.set(); });
  poll_until([&] { return called; });
  thread.join();
  context().remove_event_notifier(notifier);
}

TEST_P(EventNotifiers, ASettingBeforeTheHandlerIsSeen) {
  EventNotifier notifier;
  notifier.set();
  bool called = false;
  context().set_event_notifier(notifier, [&] { called = true; });
  poll_until([&] { return called; });
  context().remove_event_notifier(notifier);
}

TEST_P(EventNotifiers, RemovedWhileSetItIsNotCalled) {
  EventNotifier notifier;
  context().set_event_notifier(notifier, [] { FAIL(); });
  poll_some(2);
  notifier.set();
  context().remove_event_notifier(notifier);
  EXPECT_FALSE(poll_some());
}

}  // namespace
}  // namespace roost
