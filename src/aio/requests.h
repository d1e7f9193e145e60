// SPDX-License-Identifier: MIT
// The requests of a back end that are in flight, and who keeps each.
//
// Threads: home thread.
// Lifetime: owned by the back end; shared with its file engines.
#pragma once

#include <cstdint>
#include <utility>

#include "roost/aio/io_request.h"

namespace roost {

/// Requests linked by `next`, first in first out.
class RequestList {
 public:
  bool empty() const noexcept { return !head_; }
  IoRequest* first() const noexcept { return head_; }

  void push(IoRequest& request) noexcept {
    request.next = nullptr;
    (tail_ ? tail_->next : head_) = &request;
    tail_ = &request;
  }

  /// Null: empty.
  IoRequest* pop() noexcept {
    IoRequest* const first = head_;
    if (!first) return nullptr;
    head_ = first->next;
    if (!head_) tail_ = nullptr;
    return first;
  }

  /// False: it is not in the list.
  bool remove(IoRequest& request) noexcept {
    IoRequest* before = nullptr;
    for (IoRequest* one = head_; one; before = std::exchange(one, one->next)) {
      if (one != &request) continue;
      (before ? before->next : head_) = one->next;
      if (tail_ == one) tail_ = before;
      return true;
    }
    return false;
  }

 private:
  IoRequest* head_ = nullptr;
  IoRequest* tail_ = nullptr;
};

/// Where a request in flight is: IoRequest::stage.
enum Stage : std::uint8_t {
  kNotTried = 1,  // epoll: tried when its turn comes in the next iteration
  kWaiting,       // epoll: for its descriptor to become ready
  kQueueFull,     // epoll: a connection to a unix socket, tried again after a while
  kHeld,          // io_uring: a busy wait tries it itself
  kInRing,        // io_uring has it
  kPolledInRing,  // io_uring watches its descriptor, and gets the operation after that
  kInPool,        // a job of the thread pool
  kInLinuxAio,    // Linux AIO has it, or is going to
  kHasEnded,      // the result is known; complete() is to be called
};

class Requests {
 public:
  unsigned in_flight() const noexcept { return in_flight_; }
  void started() noexcept { ++in_flight_; }

  /// Its result is set, and this is a place from where complete() may be called.
  void end(IoRequest& request) noexcept {
    --in_flight_;
    request.complete(request);
  }

  /// From anywhere: complete() is called by end_those_that_have().
  void end_later(IoRequest& request, std::int64_t result) noexcept {
    request.result = result;
    request.stage = kHasEnded;
    ended_.push(request);
    ++ended_count_;
  }

  bool some_have_ended() const noexcept { return ended_count_ > 0; }

  /// Only those that have now; a nested poll goes on with them.
  bool end_those_that_have() noexcept {
    bool progress = false;
    for (unsigned count = ended_count_; count > 0 && ended_count_ > 0; --count) {
      --ended_count_;
      end(*ended_.pop());
      progress = true;
    }
    return progress;
  }

 private:
  unsigned in_flight_ = 0;
  RequestList ended_;
  unsigned ended_count_ = 0;
};

}  // namespace roost
