// SPDX-License-Identifier: MIT
// What follows a completion of io_uring, of kernels that are not at hand, too.
#include "aio/ring_end.h"

#include <gtest/gtest.h>
#include <poll.h>

namespace roost {
namespace {

using Next = RingEnd::Next;

IoRequest request(IoRequest::Op op, Stage stage = kInRing) {
  IoRequest one(op, 0);
  one.stage = stage;
  return one;
}

void expect_end(const IoRequest& one, int completion, int result) {
  const RingEnd end = after_completion(one, completion);
  EXPECT_EQ(end.next, Next::kEnd);
  EXPECT_EQ(end.result, result);
}

TEST(AfterCompletion, AnAcceptTakenAtItsWordIsPolledAndThenMadeAgain) {
  IoRequest accept = request(IoRequest::Op::kAccept);
  EXPECT_EQ(after_completion(accept, -EAGAIN).next, Next::kPoll);
  accept.stage = kPolledInRing;
  EXPECT_EQ(after_completion(accept, POLLIN).next, Next::kAgain);
  expect_end(accept, -ENOMEM, -ENOMEM);
  accept.stage = kInRing;
  expect_end(accept, 7, 7);
}

TEST(AfterCompletion, WhatAPollFoundIsNeverTheDescriptorOfACancelledAccept) {
  IoRequest accept = request(IoRequest::Op::kAccept, kPolledInRing);
  accept.cancelled = true;
  for (const int events : {0, POLLIN, POLLIN | POLLHUP}) expect_end(accept, events, -ECANCELED);
  expect_end(accept, -ECANCELED, -ECANCELED);
  // But what it had accepted before the cancellation is the result.
  accept.stage = kInRing;
  expect_end(accept, 7, 7);
}

TEST(AfterCompletion, ACancelledOneThatHadNothingYetIsCancelled) {
  for (const auto op : {IoRequest::Op::kRecv, IoRequest::Op::kAccept, IoRequest::Op::kWritev}) {
    IoRequest one = request(op);
    one.cancelled = true;
    expect_end(one, -EAGAIN, -ECANCELED);
    expect_end(one, -EINTR, -ECANCELED);
    expect_end(one, 5, 5);
    expect_end(one, -EIO, -EIO);
  }
}

TEST(AfterCompletion, AReceiveFromWhatCannotBePolledIsMadeWithoutPollingOnce) {
  for (const auto op : {IoRequest::Op::kRecv, IoRequest::Op::kRecvMsg}) {
    IoRequest one = request(op);
    EXPECT_EQ(after_completion(one, -EAGAIN).next, Next::kWithoutPoll);
    one.tried = true;
    expect_end(one, -EAGAIN, -EAGAIN);
    one.tried = false;
    one.flags = MSG_DONTWAIT;
    expect_end(one, -EAGAIN, -EAGAIN);
  }
}

}  // namespace
}  // namespace roost
