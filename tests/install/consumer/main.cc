// SPDX-License-Identifier: MIT
// Runs a coroutine on two I/O threads and checks where it woke.
#include <cstdio>
#include <semaphore>

#include "roost/aio/iothread.h"
#include "roost/coro/task.h"

namespace {

roost::Task<void> hop(roost::AioContext& here, roost::AioContext& there, int& hops,
                      std::binary_semaphore& done) {
  co_await roost::move_to(there);
  hops += roost::AioContext::current() == &there;
  co_await roost::move_to(here);
  hops += roost::AioContext::current() == &here;
  done.release();
}

}  // namespace

int main() {
  roost::IOThread first;
  roost::IOThread second;
  int hops = 0;
  std::binary_semaphore done{0};
  roost::spawn(first.context(), hop(first.context(), second.context(), hops, done));
  done.acquire();
  std::puts(hops == 2 ? "hopped there and back" : "woke on the wrong loop");
  return hops == 2 ? 0 : 1;
}
