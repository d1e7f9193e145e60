// SPDX-License-Identifier: MIT
// Uses contexts, coroutines and locks as a stranger would: hops between two I/O threads, and a
// group of children that count under a lock.
#include <cstdio>
#include <semaphore>

#include "roost/roost.h"

namespace {

using roost::Result;
using roost::Task;

struct Shared {
  roost::CoMutex mutex{"the count"};
  int count = 0;  // guarded by mutex
};

Task<Result<void>> count(Shared* shared, roost::AioContext* elsewhere) {
  co_await roost::move_to(*elsewhere);
  const auto guard = co_await shared->mutex.lock();
  ++shared->count;
  co_return Result<void>();
}

Task<void> hop(roost::AioContext* here, roost::AioContext* there, int* hops, Shared* shared,
               std::binary_semaphore* done) {
  co_await roost::move_to(*there);
  *hops += roost::AioContext::current() == there;
  co_await roost::move_to(*here);
  *hops += roost::AioContext::current() == here;

  roost::TaskGroup group({.name = "counters"});
  for (int i = 0; i < 10; ++i) group.spawn(count(shared, i % 2 == 0 ? here : there));
  const Result<void> result = co_await group.join();
  if (!result) std::printf("%s\n", result.error().message().c_str());
  done->release();
}

}  // namespace

int main() {
  Shared shared;
  int hops = 0;
  std::binary_semaphore done{0};
  roost::IOThread first;
  roost::IOThread second;
  roost::spawn(first.context(), hop(&first.context(), &second.context(), &hops, &shared, &done));
  done.acquire();
  std::printf("%d hops, counted to %d\n", hops, shared.count);
  return hops == 2 && shared.count == 10 ? 0 : 1;
}
