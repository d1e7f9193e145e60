// SPDX-License-Identifier: MIT
// File and socket I/O awaited by coroutines, on both back ends.
#include "roost/aio/io.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "aio/test_loop.h"
#include "base/test_build.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/poll_budget.h"
#include "roost/aio/timer.h"
#include "roost/aio/unique_fd.h"

namespace roost {
namespace {

std::vector<std::byte> pattern(std::size_t size, unsigned seed = 1) {
  std::vector<std::byte> bytes(size);
  TestRandom random(seed);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random.next());
  return bytes;
}

std::span<const std::byte> bytes_of(const char* text) {
  return std::as_bytes(std::span(text, std::strlen(text)));
}

iovec to_iovec(std::span<const std::byte> bytes) {
  return {const_cast<std::byte*>(bytes.data()), bytes.size()};
}

UniqueFd temporary_file() {
  char name[] = "/tmp/roost-io-test-XXXXXX";
  UniqueFd fd(::mkostemp(name, O_CLOEXEC));
  EXPECT_TRUE(fd);
  ::unlink(name);
  return fd;
}

struct Connection {
  UniqueFd near, far;
};

Connection unix_pair(int flags = 0) {
  std::array<int, 2> ends{};
  EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | flags, 0, ends.data()), 0);
  return {UniqueFd(ends[0]), UniqueFd(ends[1])};
}

Connection tcp_pair() {
  const UniqueFd listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  auto* generic = reinterpret_cast<sockaddr*>(&address);
  EXPECT_EQ(::bind(listener.get(), generic, length), 0);
  EXPECT_EQ(::listen(listener.get(), 1), 0);
  EXPECT_EQ(::getsockname(listener.get(), generic, &length), 0);
  UniqueFd near(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  EXPECT_EQ(::connect(near.get(), generic, length), 0);
  UniqueFd far(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  EXPECT_TRUE(far);
  return {std::move(near), std::move(far)};
}

class Io : public LoopTest {
 protected:
  /// Runs `body` as a coroutine to its end.
  template <class Body>
  void run(Body& body) {
    bool ended = false;
    const auto outer = [&]() -> Task<void> {
      co_await body();
      ended = true;
    };
    Coroutine::create(outer(), "test")->enter();
    poll_until([&] { return ended; });
  }
};
ROOST_ON_EACH_LOOP(Io);

// Operations that never block are bounded an iteration; the one after the last must not leave the
// loop waiting while its inbox says that it is awake.
TEST_P(Io, AnOperationPutOffDoesNotPutTheLoopToSleepAwake) {
  auto [near, far] = unix_pair(SOCK_NONBLOCK);
  for (int bytes : {63, 64, 65, 128, 200}) {
    const std::string data(static_cast<std::size_t>(bytes), 'x');
    ASSERT_EQ(::send(far.get(), data.data(), data.size(), 0), bytes);
    int left = bytes + 1;
    bool ended = false;
    const auto body = [&]() -> Task<void> {
      std::byte one[1];
      for (; left > 0; --left) EXPECT_EQ(co_await io_recv(near.get(), one), 1);
      ended = true;
    };
    Coroutine::create(body())->enter();
    while (left > 1) context_->poll(true);
    // Nothing more comes by itself. What another thread posts now has to be run.
    bool ran = false;
    std::thread poster([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      schedule_oneshot(*context_, [&ran] { ran = true; });
    });
    while (!ran) context_->poll(true);
    poster.join();
    ASSERT_EQ(::send(far.get(), "x", 1, 0), 1);
    poll_until([&] { return ended; });
  }
}

// ---- Files

TEST(UniqueFds, OneThatIsAssignedToClosesItsOldOneAtOnce) {
  int pipe[2];
  ASSERT_EQ(::pipe2(pipe, O_CLOEXEC), 0);
  UniqueFd to(pipe[0]);
  UniqueFd from(pipe[1]);
  to = std::move(from);
  EXPECT_EQ(to.get(), pipe[1]);
  EXPECT_FALSE(from);
  EXPECT_EQ(::fcntl(pipe[0], F_GETFD), -1);
  UniqueFd& itself = to;
  to = std::move(itself);
  EXPECT_EQ(to.get(), pipe[1]);
}

TEST_P(Io, WhatWasWrittenIsReadBack) {
  const UniqueFd file = temporary_file();
  const auto out = pattern(100'000);
  std::vector<std::byte> in(out.size());
  const auto body = [&]() -> Task<void> {
    const iovec parts[2] = {to_iovec(std::span(out).first(30'000)),
                            to_iovec(std::span(out).subspan(30'000))};
    EXPECT_EQ(co_await io_writev(file.get(), parts, 4096), 100'000);
    EXPECT_EQ(co_await io_data_sync(file.get()), 0);
    std::int64_t done = 0;
    while (done < 100'000) {
      const std::int64_t n = co_await io_read(file.get(), std::span(in).subspan(done), 4096 + done);
      if (n <= 0) {
        ADD_FAILURE() << n;
        break;
      }
      done += n;
    }
  };
  run(body);
  EXPECT_EQ(in, out);
}

TEST_P(Io, ShortReadsAtTheEndOfAFile) {
  const UniqueFd file = temporary_file();
  ASSERT_EQ(::pwrite(file.get(), "0123456789", 10, 0), 10);
  std::array<std::byte, 100> buffer{};
  const auto body = [&]() -> Task<void> {
    EXPECT_EQ(co_await io_read(file.get(), buffer, 4), 6);
    EXPECT_EQ(std::memcmp(buffer.data(), "456789", 6), 0);
    EXPECT_EQ(co_await io_read(file.get(), buffer, 10), 0);
    EXPECT_EQ(co_await io_read(file.get(), buffer, 1'000'000), 0);
  };
  run(body);
}

TEST_P(Io, ErrorsAreNegativeErrnos) {
  std::array<std::byte, 16> buffer{};
  const UniqueFd read_only(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  const UniqueFd directory(::open("/tmp", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  const Connection sockets = unix_pair();
  const auto body = [&]() -> Task<void> {
    EXPECT_EQ(co_await io_read(-1, buffer, 0), -EBADF);
    EXPECT_EQ(co_await io_read(directory.get(), buffer, 0), -EISDIR);
    const iovec part = to_iovec(buffer);
    const std::span<const iovec> parts(&part, 1);
    EXPECT_EQ(co_await io_writev(read_only.get(), parts, 0), -EBADF);
    EXPECT_EQ(co_await io_data_sync(sockets.near.get()), -EINVAL);
    EXPECT_EQ(co_await io_recv(read_only.get(), buffer), -ENOTSOCK);
    const msghdr message{};
    EXPECT_EQ(co_await io_sendmsg(read_only.get(), message), -ENOTSOCK);
    EXPECT_EQ(co_await io_allocate(read_only.get(), 0, 0, 10), -EBADF);
  };
  run(body);
}

TEST_P(Io, AWriteMayAskToBeDurable) {
  const UniqueFd file = temporary_file();
  const auto out = pattern(4096);
  const auto body = [&]() -> Task<void> {
    const iovec part = to_iovec(out);
    const std::span<const iovec> parts(&part, 1);
    EXPECT_EQ(co_await io_writev(file.get(), parts, 0, RWF_DSYNC), 4096);
  };
  run(body);
}

TEST_P(Io, AllocateZeroesAndPunchesHoles) {
  const UniqueFd file = temporary_file();
  const auto out = pattern(64 * 1024);
  ASSERT_EQ(::pwrite(file.get(), out.data(), out.size(), 0), 64 * 1024);
  std::array<std::byte, 4096> in{};
  std::int64_t punched = 0;
  const auto body = [&]() -> Task<void> {
    punched = co_await io_allocate(file.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 8192,
                                   16 * 1024);
    EXPECT_EQ(co_await io_read(file.get(), in, 12 * 1024), 4096);
  };
  run(body);
  if (punched == -EOPNOTSUPP) GTEST_SKIP() << "the file system cannot punch holes";
  EXPECT_EQ(punched, 0);
  EXPECT_TRUE(std::ranges::all_of(in, [](std::byte b) { return b == std::byte{}; }));
}

TEST_P(Io, AnEmptyReadGivesNothing) {
  const UniqueFd file = temporary_file();
  ASSERT_EQ(::pwrite(file.get(), "x", 1, 0), 1);
  const auto body = [&]() -> Task<void> {
    EXPECT_EQ(co_await io_read(file.get(), std::span<std::byte>(), 0), 0);
  };
  run(body);
}

// More requests than the submission ring or the thread pool hold, all in flight at once.
TEST_P(Io, ThousandsOfReadsAtOnce) {
  constexpr int kReads = 3000;
  constexpr int kSize = 512;
  const UniqueFd file = temporary_file();
  const auto out = pattern(kReads * kSize);
  ASSERT_EQ(::pwrite(file.get(), out.data(), out.size(), 0), kReads * kSize);
  ::fdatasync(file.get());
  ::posix_fadvise(file.get(), 0, 0, POSIX_FADV_DONTNEED);  // so that some have to wait
  std::vector<std::byte> in(out.size());
  int done = 0;
  const auto body = [&](int i) -> Task<void> {
    const auto buffer = std::span(in).subspan(i * kSize, kSize);
    EXPECT_EQ(co_await io_read(file.get(), buffer, i * kSize), kSize);
    ++done;
  };
  for (int i = 0; i < kReads; ++i) Coroutine::create(body(i))->enter();
  poll_until([&] { return done == kReads; });
  EXPECT_EQ(in, out);
}

TEST_P(Io, SyncsAndWritesOfManyCoroutinesAtOnce) {
  constexpr int kWriters = 100;
  const UniqueFd file = temporary_file();
  const auto out = pattern(kWriters * 1000);
  int done = 0;
  const auto body = [&](int i) -> Task<void> {
    const iovec part = to_iovec(std::span(out).subspan(i * 1000, 1000));
    const std::span<const iovec> parts(&part, 1);
    EXPECT_EQ(co_await io_writev(file.get(), parts, i * 1000), 1000);
    if (i % 10 == 0) {
      EXPECT_EQ(co_await io_data_sync(file.get()), 0);
    }
    ++done;
  };
  for (int i = 0; i < kWriters; ++i) Coroutine::create(body(i))->enter();
  poll_until([&] { return done == kWriters; });
  std::vector<std::byte> in(out.size());
  ASSERT_EQ(::pread(file.get(), in.data(), in.size(), 0), static_cast<ssize_t>(in.size()));
  EXPECT_EQ(in, out);
}

// A coroutine whose I/O never has to wait must not keep the loop to itself, nor pile up frames on
// the stack: each read is followed by the next.
TEST_P(Io, ACompletionThatSubmitsTheNextDoesNotGrowTheStackNorStarveOthers) {
  const int kReads = rounds(100'000);
  const UniqueFd file = temporary_file();
  const auto out = pattern(4096);
  ASSERT_EQ(::pwrite(file.get(), out.data(), out.size(), 0), 4096);
  std::array<std::byte, 4096> buffer{};
  bool done = false;
  std::uintptr_t lowest = UINTPTR_MAX;
  std::uintptr_t highest = 0;
  int reads = 0;
  int reads_at_last_turn = 0;
  int longest = 0;
  const auto reader = [&]() -> Task<void> {
    for (; reads < kReads; ++reads) {
      if (co_await io_read(file.get(), buffer, 0) != 4096) ADD_FAILURE();
      const auto here = reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0));
      lowest = std::min(lowest, here);
      highest = std::max(highest, here);
    }
    done = true;
  };
  const auto other = [&]() -> Task<void> {
    while (!done) {
      longest = std::max(longest, reads - reads_at_last_turn);
      reads_at_last_turn = reads;
      co_await move_to(context());
    }
  };
  Coroutine::create(reader())->enter();
  Coroutine::create(other())->enter();
  poll_until([&] { return done; });
  poll_some();
  EXPECT_LT(highest - lowest, 16u * 1024);
  EXPECT_LE(longest, 1000);
}

// ---- Sockets

class IoOnSockets : public Io {
 protected:
  // Sends `out` from one end and receives it at the other, in whatever pieces.
  Task<void> send_all(int fd, std::span<const std::byte> out, bool& done) {
    while (!out.empty()) {
      iovec part = to_iovec(out);
      msghdr message{};
      message.msg_iov = &part;
      message.msg_iovlen = 1;
      const std::int64_t n = co_await io_sendmsg(fd, message);
      if (n <= 0) {
        ADD_FAILURE() << "send: " << n;
        break;
      }
      out = out.subspan(n);
    }
    done = true;
  }

  Task<void> recv_all(int fd, std::span<std::byte> in, bool& done) {
    while (!in.empty()) {
      const std::int64_t n = co_await io_recv(fd, in);
      if (n <= 0) {
        ADD_FAILURE() << "recv: " << n;
        break;
      }
      in = in.subspan(n);
    }
    done = true;
  }

  // Both ends send and receive at once: a receive and a send wait on each descriptor.
  void exchange(const Connection& c) {
    const auto to_far = pattern(3'000'000, 1);
    const auto to_near = pattern(3'000'000, 2);
    std::vector<std::byte> at_far(to_far.size());
    std::vector<std::byte> at_near(to_near.size());
    std::array<bool, 4> done{};
    Coroutine::create(recv_all(c.near.get(), at_near, done[0]))->enter();
    Coroutine::create(send_all(c.near.get(), to_far, done[1]))->enter();
    Coroutine::create(send_all(c.far.get(), to_near, done[2]))->enter();
    poll_some(3);
    Coroutine::create(recv_all(c.far.get(), at_far, done[3]))->enter();
    poll_until([&] { return std::ranges::all_of(done, std::identity{}); });
    EXPECT_EQ(at_far, to_far);
    EXPECT_EQ(at_near, to_near);
  }
};
ROOST_ON_EACH_LOOP(IoOnSockets);

TEST_P(IoOnSockets, AReceiveWaitsForData) {
  const Connection c = unix_pair();
  std::array<std::byte, 100> buffer{};
  std::int64_t got = -1;
  const auto body = [&]() -> Task<void> { got = co_await io_recv(c.near.get(), buffer); };
  Coroutine::create(body())->enter();
  EXPECT_FALSE(poll_some());
  EXPECT_EQ(got, -1);
  ASSERT_EQ(::send(c.far.get(), "hello", 5, 0), 5);
  poll_until([&] { return got != -1; });
  EXPECT_EQ(got, 5);
  EXPECT_EQ(std::memcmp(buffer.data(), "hello", 5), 0);
}

TEST_P(IoOnSockets, AReceiveGivesZeroAtTheEndOfTheStream) {
  Connection c = unix_pair();
  std::array<std::byte, 100> buffer{};
  std::vector<std::int64_t> got;
  const auto body = [&]() -> Task<void> {
    got.push_back(co_await io_recv(c.near.get(), buffer));
    got.push_back(co_await io_recv(c.near.get(), buffer));
  };
  ASSERT_EQ(::send(c.far.get(), "bye", 3, 0), 3);
  Coroutine::create(body())->enter();
  poll_some();
  c.far.reset();
  poll_until([&] { return got.size() == 2; });
  EXPECT_EQ(got, (std::vector<std::int64_t>{3, 0}));
}

TEST_P(IoOnSockets, ShutdownEndsAWaitingReceive) {
  const Connection c = unix_pair();
  std::array<std::byte, 100> buffer{};
  std::int64_t got = -1;
  const auto body = [&]() -> Task<void> { got = co_await io_recv(c.near.get(), buffer); };
  Coroutine::create(body())->enter();
  poll_some();
  ::shutdown(c.near.get(), SHUT_RDWR);
  poll_until([&] { return got != -1; });
  EXPECT_EQ(got, 0);
}

TEST_P(IoOnSockets, ASendToAClosedPeerIsAnErrorAndNoSignal) {
  Connection c = unix_pair();
  c.far.reset();
  std::int64_t result = 0;
  const auto body = [&]() -> Task<void> {
    iovec part = to_iovec(bytes_of("x"));
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    result = co_await io_sendmsg(c.near.get(), message);
  };
  run(body);
  EXPECT_EQ(result, -EPIPE);
}

TEST_P(IoOnSockets, ReceiveAndSendOnTheSameDescriptorAtOnceUnix) { exchange(unix_pair()); }

TEST_P(IoOnSockets, ReceiveAndSendOnTheSameDescriptorAtOnceTcp) { exchange(tcp_pair()); }

TEST_P(IoOnSockets, NonBlockingSocketsAreWaitedForAsWell) { exchange(unix_pair(SOCK_NONBLOCK)); }

// A context that has just found busy waiting to pay: a receive is then tried by the busy wait
// itself.
class IoWhileBusilyWaiting : public IoOnSockets {
 protected:
  AioContextOptions loop_options() override {
    AioContextOptions o = IoOnSockets::loop_options();
    o.poll_max_ns = 1'000'000'000;  // whatever the peer takes, it pays
    o.poll_budget = &budget_;
    return o;
  }

  void SetUp() override {
    IoOnSockets::SetUp();
    if (!IsSkipped()) make_busy_waiting_pay();
  }

  Connection connection_ = unix_pair();

 private:
  // Messages to and fro with a thread that answers each.
  void make_busy_waiting_pay() {
    const Connection c = unix_pair();
    std::thread peer([&] {
      char byte = 0;
      while (::recv(c.far.get(), &byte, 1, 0) == 1) ::send(c.far.get(), &byte, 1, 0);
    });
    const auto ask = [&]() -> Task<void> {
      std::array<std::byte, 10> answer{};
      for (int i = 0; i < 1000 && !(i > 20 && context().waits_busily()); ++i) {
        EXPECT_EQ(::send(c.near.get(), "?", 1, 0), 1);
        EXPECT_EQ(co_await io_recv(c.near.get(), answer), 1);
      }
    };
    run(ask);
    ::shutdown(c.near.get(), SHUT_RDWR);
    peer.join();
    ASSERT_TRUE(context().waits_busily());
  }

  PollBudget budget_{1000};
};
ROOST_ON_EACH_LOOP(IoWhileBusilyWaiting);

TEST_P(IoWhileBusilyWaiting, AReceiveThatIsStoppedTakesNothing) {
  std::array<std::byte, 10> buffer{};
  std::stop_source stop;
  std::int64_t got = 0;
  const auto body = [&]() -> Task<void> {
    got = co_await io_recv(connection_.near.get(), buffer, 0, stop.get_token());
  };
  Coroutine::create(body())->enter();
  stop.request_stop();
  poll_until([&] { return got != 0; });
  EXPECT_EQ(got, -ECANCELED);
  ASSERT_EQ(::send(connection_.far.get(), "here", 4, 0), 4);
  const auto again = [&]() -> Task<void> {
    got = co_await io_recv(connection_.near.get(), buffer);
  };
  run(again);
  EXPECT_EQ(got, 4);
}

TEST_P(IoWhileBusilyWaiting, SeveralReceivesWaitAtOnce) {
  const Connection second = unix_pair();
  const Connection third = unix_pair();
  std::array<std::array<std::byte, 10>, 3> buffers{};
  std::array<std::int64_t, 3> got{};
  const std::array fds{connection_.near.get(), second.near.get(), third.near.get()};
  const auto body = [&](std::size_t i) -> Task<void> {
    got[i] = co_await io_recv(fds[i], buffers[i]);
  };
  for (std::size_t i = 0; i < fds.size(); ++i) Coroutine::create(body(i))->enter();
  for (const Connection* one : {&third, &second, static_cast<const Connection*>(&connection_)}) {
    const auto before = std::ranges::count(got, 0);
    ASSERT_EQ(::send(one->far.get(), "!", 1, 0), 1);
    poll_until([&] { return std::ranges::count(got, 0) < before; });
    EXPECT_EQ(std::ranges::count(got, 0), before - 1);
  }
}

// Who never waits, busily or not, is told all the same.
TEST_P(IoWhileBusilyWaiting, AReceiveEndsThoughTheLoopOnlyPolls) {
  std::array<std::byte, 10> buffer{};
  std::int64_t got = 0;
  const auto body = [&]() -> Task<void> { got = co_await io_recv(connection_.near.get(), buffer); };
  Coroutine::create(body())->enter();
  ASSERT_EQ(::send(connection_.far.get(), "!", 1, 0), 1);
  for (int i = 0; i < 1000 && got == 0; ++i) context().poll(false);
  EXPECT_EQ(got, 1);
}

// And it goes to sleep with the context.
TEST_P(IoWhileBusilyWaiting, AReceiveEndsTheSleepThatComesAfterTheBusyWait) {
  std::array<std::byte, 10> buffer{};
  std::int64_t got = 0;
  const auto body = [&]() -> Task<void> { got = co_await io_recv(connection_.near.get(), buffer); };
  Coroutine::create(body())->enter();
  // Later than what a busy wait has most often grown to.
  std::atomic<bool> later = false;
  std::thread peer([&] {
    later.wait(false);
    EXPECT_EQ(::send(connection_.far.get(), "!", 1, 0), 1);
  });
  Timer timer(context(), [&] {
    later = true;
    later.notify_one();
  });
  timer.arm_after(50'000'000);
  poll_until([&] { return got != 0; });
  peer.join();
  EXPECT_EQ(got, 1);
}

TEST_P(IoOnSockets, HundredsOfConnectionsAtOnce) {
  constexpr int kConnections = 200;
  std::vector<Connection> connections;
  for (int i = 0; i < kConnections; ++i) connections.push_back(unix_pair());
  int rounds_done = 0;
  const auto echo = [&](int fd) -> Task<void> {
    std::array<std::byte, 64> buffer;
    for (;;) {
      const std::int64_t n = co_await io_recv(fd, buffer);
      if (n <= 0) co_return;
      iovec part{buffer.data(), static_cast<std::size_t>(n)};
      msghdr message{};
      message.msg_iov = &part;
      message.msg_iovlen = 1;
      EXPECT_EQ(co_await io_sendmsg(fd, message), n);
    }
  };
  const auto client = [&](UniqueFd& fd) -> Task<void> {
    for (int i = 0; i < 20; ++i) {
      std::array<std::byte, 64> buffer{std::byte(i)};
      iovec part{buffer.data(), buffer.size()};
      msghdr message{};
      message.msg_iov = &part;
      message.msg_iovlen = 1;
      EXPECT_EQ(co_await io_sendmsg(fd.get(), message), 64);
      EXPECT_EQ(co_await io_recv(fd.get(), buffer, MSG_WAITALL), 64);
      EXPECT_EQ(buffer[0], std::byte(i));
      ++rounds_done;
    }
    fd.reset();
  };
  for (Connection& c : connections) {
    Coroutine::create(echo(c.far.get()))->enter();
    Coroutine::create(client(c.near))->enter();
  }
  poll_until([&] { return rounds_done == kConnections * 20; });
  while (poll_some()) {
  }
}

// The number of a closed socket comes back while the loop may still know the old one.
TEST_P(IoOnSockets, ANumberUsedAgainByAnotherSocketWorks) {
  for (int i = 0; i < 100; ++i) {
    const Connection c = unix_pair();
    std::array<std::byte, 8> buffer{};
    std::int64_t got = -1;
    const auto body = [&]() -> Task<void> { got = co_await io_recv(c.near.get(), buffer); };
    Coroutine::create(body())->enter();
    if (i % 2) poll_some(2);
    ASSERT_EQ(::send(c.far.get(), "abc", 3, 0), 3);
    poll_until([&] { return got != -1; });
    ASSERT_EQ(got, 3);
  }
}

// A submission queued but its loop not notified: started from a bottom half that another thread
// scheduled, right before the loop goes to sleep.
TEST_P(IoOnSockets, ASubmissionQueuedButItsLoopNotNotified) {
  const Connection c = unix_pair();
  std::array<std::byte, 8> buffer{};
  std::int64_t got = -1;
  const auto body = [&]() -> Task<void> {
    iovec part = to_iovec(bytes_of("ping"));
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    EXPECT_EQ(co_await io_sendmsg(c.far.get(), message), 4);
    got = co_await io_recv(c.near.get(), buffer);
  };
  Coroutine::create(body())->enter();
  while (got == -1) context().poll(true);  // nobody else wakes it
  EXPECT_EQ(got, 4);
}

}  // namespace
}  // namespace roost
