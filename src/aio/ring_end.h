// SPDX-License-Identifier: MIT
// What follows when io_uring has completed a request, or the poll that came before it. Kernels
// differ: see after_completion().
//
// Threads: none of its own. Lifetime: values.
#pragma once

#include <sys/socket.h>

#include <cerrno>
#include <cstdint>

#include "aio/requests.h"
#include "roost/aio/io_request.h"

namespace roost {

struct RingEnd {
  enum class Next : std::uint8_t {
    kEnd,          // it has ended, with `result`
    kAgain,        // the operation, now that its descriptor is ready
    kWithoutPoll,  // the operation, without waiting for its descriptor beforehand
    kPoll,         // its descriptor is to be waited for, and then kAgain
  };
  Next next;
  int result = 0;
};

/// `result` is that of the completion: a negative errno, or what the operation gives; in the stage
/// kPolledInRing, a negative errno or the poll's events.
inline RingEnd after_completion(const IoRequest& request, int result) noexcept {
  using Next = RingEnd::Next;
  const bool polled = request.stage == kPolledInRing;
  if (request.cancelled) {
    // Had nothing yet, or was interrupted by the cancellation. (Events are nothing: what became
    // ready stays where it is.)
    const bool nothing = result == -EAGAIN || result == -EINTR || (polled && result >= 0);
    return {Next::kEnd, nothing ? -ECANCELED : result};
  }
  if (polled && result >= 0) return {Next::kAgain};
  if (result == -EAGAIN) {
    // Not a descriptor that can be polled: let the call itself say what is wrong with it.
    const bool receives =
        request.op == IoRequest::Op::kRecv || request.op == IoRequest::Op::kRecvMsg;
    if (receives && !request.tried && !(request.flags & MSG_DONTWAIT)) return {Next::kWithoutPoll};
    // Some kernels take a non-blocking socket at its word.
    if (request.op == IoRequest::Op::kAccept) return {Next::kPoll};
  }
  return {Next::kEnd, result};
}

}  // namespace roost
