// SPDX-License-Identifier: MIT
// A store that many read and few change, that computes no more than two values at a time, and that
// is closed when nothing of it is under way any more: CoRwlock, CoSemaphore, and Gate.
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <latch>
#include <map>

#include "roost/aio/iothread.h"
#include "roost/aio/timer.h"
#include "roost/base/result.h"
#include "roost/coro/gate.h"
#include "roost/coro/task.h"
#include "roost/sync/co_rwlock.h"
#include "roost/sync/co_semaphore.h"

namespace {

using roost::Result;
using roost::Task;

class Store {
 public:
  Task<Result<int>> square(int number) {
    const roost::Gate::Pass pass = in_flight_.try_pass();
    if (!pass) co_return roost::fail(ESHUTDOWN, "the store is closed");
    {
      const auto guard = co_await lock_.read();  // with other readers
      const auto found = squares_.find(number);
      if (found != squares_.end()) co_return found->second;
    }
    const auto place = co_await places_.hold();  // waits while two others compute
    const int value = co_await compute(number);
    const auto guard = co_await lock_.write();  // alone
    squares_[number] = value;
    ++computed_;
    co_return value;
  }

  // Lets nobody in any more, and waits for those who are.
  Task<void> close() {
    in_flight_.close();
    co_await in_flight_.idle();
  }

  int computed() const { return computed_; }

 private:
  static Task<int> compute(int number) {
    const int square = number * number;
    co_await roost::sleep_for(1'000'000);
    co_return square;
  }

  roost::Gate in_flight_{"the store's requests"};
  roost::CoRwlock lock_{"the squares"};
  roost::CoSemaphore places_{2, "a place to compute in"};
  std::map<int, int> squares_;  // guarded by lock_
  int computed_ = 0;            // likewise
};

constexpr int kNumbers = 10;

Task<void> ask(Store* store, int from, long* sum, std::latch* done) {
  for (int number = from; number < from + kNumbers; ++number) {
    const Result<int> square = co_await store->square(number);
    *sum += square ? *square : 0;
  }
  done->count_down();
}

Task<void> close(Store* store, std::latch* done) {
  co_await store->close();
  const Result<int> late = co_await store->square(1);
  std::printf("late: %s\n", late.error().message().c_str());
  done->count_down();
}

}  // namespace

int main() {
  Store store;
  long sums[2] = {};
  std::latch asked(2), closed(1);
  roost::IOThread first({.name = "first"}), second({.name = "second"});
  roost::spawn(first.context(), ask(&store, 0, &sums[0], &asked), "first asker");
  roost::spawn(second.context(), ask(&store, kNumbers, &sums[1], &asked), "second asker");
  asked.wait();
  roost::spawn(first.context(), close(&store, &closed), "closing");
  closed.wait();
  std::printf("%d computed, sums %ld and %ld\n", store.computed(), sums[0], sums[1]);
}

// Output:
// late: the store is closed: Cannot send after transport endpoint shutdown
// 20 computed, sums 285 and 2185
