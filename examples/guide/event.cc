// SPDX-License-Identifier: MIT
// Coroutines of two threads wait for something that a third one brings about.
#include <cstdio>
#include <latch>

#include "roost/aio/iothread.h"
#include "roost/coro/task.h"
#include "roost/sync/co_event.h"

namespace {

struct Configuration {
  int workers = 0;
  roost::CoEvent ready{"the configuration"};
};

roost::Task<void> use(Configuration* configuration, int* seen, std::latch* done) {
  co_await configuration->ready.wait();
  *seen = configuration->workers;  // what was written before set() is visible
  done->count_down();
}

}  // namespace

int main() {
  Configuration configuration;
  int seen[2] = {};
  std::latch done(2);
  roost::IOThread first({.name = "first"}), second({.name = "second"});
  roost::spawn(first.context(), use(&configuration, &seen[0], &done), "first user");
  roost::spawn(second.context(), use(&configuration, &seen[1], &done), "second user");

  configuration.workers = 7;
  configuration.ready.set();  // any thread, in a coroutine or not
  done.wait();
  std::printf("seen: %d and %d\n", seen[0], seen[1]);
}

// Output:
// seen: 7 and 7
