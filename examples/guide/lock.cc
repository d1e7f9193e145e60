// SPDX-License-Identifier: MIT
// A bounded mailbox between two threads: a CoMutex and two CoQueues. Nobody blocks a thread.
#include <cstddef>
#include <cstdio>
#include <deque>
#include <latch>

#include "roost/aio/iothread.h"
#include "roost/coro/task.h"
#include "roost/sync/co_mutex.h"
#include "roost/sync/co_queue.h"

namespace {

using roost::Task;

constexpr int kLetters = 1000;

class Mailbox {
 public:
  Task<void> put(int letter) {
    auto guard = co_await mutex_.lock();
    while (letters_.size() == kRoom) co_await taken_.wait(guard);
    letters_.push_back(letter);
    filled_.wake_one();
  }

  Task<int> take() {
    auto guard = co_await mutex_.lock();
    while (letters_.empty()) co_await filled_.wait(guard);  // lets go of the lock meanwhile
    const int letter = letters_.front();
    letters_.pop_front();
    taken_.wake_one();
    co_return letter;
  }

 private:
  static constexpr std::size_t kRoom = 4;
  roost::CoMutex mutex_{"the mailbox"};
  roost::CoQueue filled_{"a letter"};
  roost::CoQueue taken_{"room in the mailbox"};
  std::deque<int> letters_;  // guarded by mutex_
};

Task<void> send(Mailbox* box, std::latch* done) {
  for (int letter = 1; letter <= kLetters; ++letter) co_await box->put(letter);
  done->count_down();
}

Task<void> receive(Mailbox* box, long* sum, std::latch* done) {
  for (int i = 0; i < kLetters; ++i) *sum += co_await box->take();
  done->count_down();
}

}  // namespace

int main() {
  // What the coroutines use is made before the threads, and so goes after them.
  Mailbox box;
  long sum = 0;
  std::latch done(2);
  roost::IOThread sender({.name = "sender"}), receiver({.name = "receiver"});
  roost::spawn(sender.context(), send(&box, &done), "send");
  roost::spawn(receiver.context(), receive(&box, &sum, &done), "receive");
  done.wait();
  std::printf("%d letters, sum %ld\n", kLetters, sum);
}

// Output:
// 1000 letters, sum 500500
