// SPDX-License-Identifier: MIT
// Objects that are moved between I/O threads while they are busy.
//
// Invariant: an object's work runs on the context it is attached to and nowhere else, detach and
// attach alternate, and no move is forgotten. What belongs to the object is plain: a callback on
// the wrong thread is a data race that ThreadSanitizer reports.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "aio/test_loop.h"
#include "base/test_build.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/context_binding.h"
#include "roost/aio/iothread.h"

namespace roost {
namespace {

constexpr int kContexts = 3;
constexpr int kObjects = 4;
constexpr int kMovers = 3;

// Works in a bottom half that schedules itself for ever.
class Worker {
 public:
  explicit Worker(AioContext& context, unsigned seed)
      : binding(context),
        random_(seed),
        listener_(
            binding, [this](AioContext& from) { detach(from); },
            [this](AioContext& to) { return attach(to); }) {
    attach_to(context);
  }
  ~Worker() { detach(binding.context()); }

  ContextBinding binding;
  std::atomic<std::uint64_t> errors{0};
  std::uint64_t turns = 0;  // on the home thread, as is all below

 private:
  void work() {
    ++turns;
    if (AioContext::current() != at_) ++errors;
    bh_->schedule();
  }
  Result<void> attach(AioContext& to) {
    if (at_) ++errors;
    // Going back must succeed; so it fails only where it has come to.
    if (came_from_ && &to != came_from_ && random_.below(4) == 0) {
      return fail(EMFILE, "attaching a worker");
    }
    attach_to(to);
    return {};
  }
  void attach_to(AioContext& to) {
    at_ = &to;
    came_from_ = nullptr;
    bh_.emplace(to, [this] { work(); });
    bh_->schedule();
  }
  void detach(AioContext& from) {
    if (at_ != &from) ++errors;
    came_from_ = at_;
    at_ = nullptr;
    bh_.reset();
  }

  TestRandom random_;
  AioContext* at_ = nullptr;
  AioContext* came_from_ = nullptr;
  std::optional<BottomHalf> bh_;
  ContextListener listener_;
};

class MovingStress : public OnEachLoop {};
ROOST_ON_EACH_LOOP(MovingStress);

TEST_P(MovingStress, ObjectsAreMovedWhileTheyAreBusy) {
  std::vector<std::unique_ptr<IOThread>> threads;
  for (int i = 0; i < kContexts; ++i) {
    threads.push_back(std::make_unique<IOThread>(options("move " + std::to_string(i))));
  }
  std::array<std::unique_ptr<Worker>, kObjects> workers;
  for (int i = 0; i < kObjects; ++i) {
    AioContext& at = threads[i % kContexts]->context();
    at.run([&] { workers[i] = std::make_unique<Worker>(at, i); });
  }
  std::atomic<int> moved{0};
  std::atomic<int> rolled_back{0};
  std::atomic<int> refused{0};
  std::atomic<int> elsewhere{0};
  std::atomic<int> ended{0};
  const int enough = rounds(500);
  constexpr int kRarely = 20;
  const auto body = [&](int seed) -> Task<void> {
    TestRandom random(100 + seed);
    AioContext* const here = AioContext::current();
    for (int i = 0; i < enough || (i < 50 * enough && (refused < kRarely || rolled_back < kRarely));
         ++i) {
      Worker& worker = *workers[random.below(kObjects)];
      AioContext& to = threads[random.below(kContexts)]->context();
      const Result<void> result = co_await worker.binding.move_to(to);
      if (result) {
        ++moved;
      } else if (result.error().code() == EBUSY) {
        ++refused;
        co_await move_to(*here);
      } else {
        ++rolled_back;
      }
      elsewhere += AioContext::current() != here;
    }
    ++ended;
  };
  for (int m = 0; m < kMovers; ++m) spawn(threads[m % kContexts]->context(), body(m), "mover");
  while (ended < kMovers) std::this_thread::yield();
  std::uint64_t turns = 0;
  for (auto& worker : workers) {
    EXPECT_EQ(worker->errors, 0u);
    worker->binding.context().run([&] {
      turns += worker->turns;
      worker.reset();
    });
  }
  std::printf("%d moved, %d taken back, %d refused, %lu turns\n", moved.load(), rolled_back.load(),
              refused.load(), turns);
  EXPECT_EQ(elsewhere, 0);
  EXPECT_GT(moved, enough / 2);
  EXPECT_GE(rolled_back, kRarely);
  EXPECT_GE(refused, kRarely);
  EXPECT_GT(turns, 1000u);
}

}  // namespace
}  // namespace roost
