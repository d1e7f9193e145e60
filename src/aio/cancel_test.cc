// SPDX-License-Identifier: MIT
// Operations that a stop token ends early: what each does when the stop comes before, while and
// after it waits, from home and from another thread; and what it leaves behind.
#include <poll.h>
#include <sys/stat.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stop_token>
#include <string>
#include <thread>
#include <vector>

#include "aio/test_io.h"
#include "aio/test_loop.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/io.h"
#include "roost/aio/thread_pool.h"
#include "roost/aio/timer.h"

namespace roost {
namespace {

constexpr std::int64_t kNotYet = 1'000'000;

// Work that keeps a worker until it is let go.
class Blocker : public ThreadPool::Work {
 public:
  explicit Blocker(ThreadPool& pool) {
    run = [](ThreadPool::Work& work) noexcept {
      auto& self = static_cast<Blocker&>(work);
      self.state_ = kRunning;
      self.released_.wait(false);
      self.state_ = kGone;  // the last thing that touches it
    };
    pool.submit(*this);
    while (state_ != kRunning) std::this_thread::yield();
  }
  ~Blocker() {
    released_ = true;
    released_.notify_all();
    while (state_ != kGone) std::this_thread::yield();
  }

 private:
  enum State { kQueued, kRunning, kGone };
  std::atomic<State> state_{kQueued};
  std::atomic<bool> released_{false};
};

class Cancel : public LoopTest {
 protected:
  using Operation = std::function<Task<std::int64_t>(std::stop_token)>;

  // The operation is kept in the frame: its captures are used until it ends.
  Task<void> keep_result(Operation operation, std::stop_token stop, std::int64_t& result) {
    result = co_await operation(std::move(stop));
  }

  void start(Operation operation, std::stop_token stop, std::int64_t& result) {
    result = kNotYet;
    Coroutine::create(keep_result(std::move(operation), std::move(stop), result), "cancelled")
        ->enter();
  }

  std::int64_t finish(const std::int64_t& result) {
    poll_until([&] { return result != kNotYet; });
    return result;
  }

  // What holds for everything that can wait.
  void check_all_moments(const Operation& operation) {
    std::int64_t result = 0;
    {
      SCOPED_TRACE("requested beforehand");
      std::stop_source source;
      source.request_stop();
      start(operation, source.get_token(), result);
      EXPECT_EQ(result, -ECANCELED);
    }
    {
      SCOPED_TRACE("requested at home, outside of any coroutine");
      std::stop_source source;
      start(operation, source.get_token(), result);
      poll_some();
      ASSERT_EQ(result, kNotYet);
      source.request_stop();
      EXPECT_EQ(result, kNotYet) << "it went on on the stack of who requested the stop";
      EXPECT_EQ(finish(result), -ECANCELED);
    }
    {
      SCOPED_TRACE("requested at home before it was handed to the kernel");
      std::stop_source source;
      start(operation, source.get_token(), result);
      source.request_stop();
      EXPECT_EQ(finish(result), -ECANCELED);
    }
    {
      SCOPED_TRACE("requested by a coroutine of the same context");
      std::stop_source source;
      start(operation, source.get_token(), result);
      poll_some();
      const auto stopper = [&source]() -> Task<void> {
        source.request_stop();
        co_return;
      };
      Coroutine::create(stopper())->enter();
      EXPECT_EQ(finish(result), -ECANCELED);
    }
    {
      SCOPED_TRACE("requested by another thread, while the context sleeps");
      std::stop_source source;
      start(operation, source.get_token(), result);
      poll_some();
      std::thread other([&source] { source.request_stop(); });
      EXPECT_EQ(finish(result), -ECANCELED);
      other.join();
    }
    {
      SCOPED_TRACE("requested by another context of the same thread");
      std::stop_source source;
      start(operation, source.get_token(), result);
      poll_some();
      const auto elsewhere = AioContext::create(options("elsewhere"));
      schedule_oneshot(*elsewhere, [&source] { source.request_stop(); });
      elsewhere->poll(true);
      EXPECT_EQ(finish(result), -ECANCELED);
    }
    EXPECT_FALSE(poll_some());
  }
};
ROOST_ON_EACH_LOOP(Cancel);

TEST_P(Cancel, AReceive) {
  const SocketPair c = socket_pair();
  std::array<std::byte, 16> buffer{};
  check_all_moments([&](std::stop_token stop) -> Task<std::int64_t> {
    co_return co_await io_recv(c.near.get(), buffer, 0, std::move(stop));
  });
}

TEST_P(Cancel, ASend) {
  const SocketPair c = socket_pair();
  const std::size_t before = fill(c.near.get());
  char byte = 'x';
  iovec part{&byte, 1};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  check_all_moments([&](std::stop_token stop) -> Task<std::int64_t> {
    co_return co_await io_sendmsg(c.near.get(), message, 0, std::move(stop));
  });
  EXPECT_EQ(drain(c.far.get()), before) << "a cancelled send has sent";
}

TEST_P(Cancel, AnAccept) {
  Listener listener;
  check_all_moments([&](std::stop_token stop) -> Task<std::int64_t> {
    co_return co_await io_accept(listener.fd.get(), 0, std::move(stop));
  });
  // It took no connection with it.
  const UniqueFd client = listener.begin_connect();
  std::int64_t accepted = kNotYet;
  start(
      [&](std::stop_token stop) -> Task<std::int64_t> {
        co_return co_await io_accept(listener.fd.get(), 0, std::move(stop));
      },
      {}, accepted);
  EXPECT_GE(finish(accepted), 0);
  ::close(static_cast<int>(accepted));
}

TEST_P(Cancel, AConnect) {
  // The backlog is full, so the kernel drops what comes.
  Listener listener(0);
  std::vector<UniqueFd> clients;
  for (int i = 0; i < 4; ++i) clients.push_back(listener.begin_connect());
  check_all_moments([&](std::stop_token stop) -> Task<std::int64_t> {
    const UniqueFd client(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    co_return co_await io_connect(client.get(), listener.generic(), sizeof listener.address,
                                  std::move(stop));
  });
}

TEST_P(Cancel, AConnectToAUnixSocketWhoseQueueIsFull) {
  FullQueue listener;
  const Operation connect = [&](std::stop_token stop) -> Task<std::int64_t> {
    const UniqueFd client(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    co_return co_await io_connect(client.get(), listener.generic(), listener.length,
                                  std::move(stop));
  };
  check_all_moments(connect);
  // Several wait for room, and each gets it; one is stopped meanwhile.
  std::array<std::int64_t, 3> results{};
  std::stop_source source;
  for (std::int64_t& result : results) {
    start(connect, &result == &results[1] ? source.get_token() : std::stop_token(), result);
  }
  poll_some();
  source.request_stop();
  EXPECT_EQ(finish(results[1]), -ECANCELED);
  EXPECT_EQ(results[0], kNotYet);
  EXPECT_EQ(results[2], kNotYet);
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(listener.accept());
    if (i == 0) poll_until([&] { return results[0] != kNotYet || results[2] != kNotYet; });
    if (i == 1) poll_until([&] { return results[0] != kNotYet && results[2] != kNotYet; });
  }
  EXPECT_EQ(results[0], 0);
  EXPECT_EQ(results[2], 0);
}

TEST_P(Cancel, TwoAcceptsOnOneListener) {
  Listener listener;
  const Operation accept = [&](std::stop_token stop) -> Task<std::int64_t> {
    co_return co_await io_accept(listener.fd.get(), 0, std::move(stop));
  };
  std::array<std::int64_t, 3> results{};
  std::stop_source source;
  for (std::int64_t& result : results) {
    start(accept, &result == &results[0] ? source.get_token() : std::stop_token(), result);
  }
  poll_some();
  source.request_stop();
  EXPECT_EQ(finish(results[0]), -ECANCELED);
  const UniqueFd one = listener.begin_connect();
  poll_until([&] { return results[1] != kNotYet || results[2] != kNotYet; });
  const UniqueFd two = listener.begin_connect();
  poll_until([&] { return results[1] != kNotYet && results[2] != kNotYet; });
  for (int i = 1; i < 3; ++i) {
    EXPECT_GE(results[i], 0);
    ::close(static_cast<int>(results[i]));
  }
}

TEST_P(Cancel, APollForInput) {
  const SocketPair c = socket_pair();
  check_all_moments([&](std::stop_token stop) -> Task<std::int64_t> {
    co_return co_await io_poll(c.near.get(), POLLIN, std::move(stop));
  });
}

TEST_P(Cancel, APollForBothDirections) {
  const SocketPair c = socket_pair();
  fill(c.near.get());
  check_all_moments([&](std::stop_token stop) -> Task<std::int64_t> {
    co_return co_await io_poll(c.near.get(), POLLIN | POLLOUT, std::move(stop));
  });
}

TEST_P(Cancel, ASleep) {
  check_all_moments([](std::stop_token stop) -> Task<std::int64_t> {
    const auto slept = co_await sleep_for(3'600'000'000'000, std::move(stop));
    co_return slept ? 0 : -slept.error().code();
  });
  EXPECT_TRUE(context().timers().empty());
}

TEST_P(Cancel, ASleepWithoutEnd) {
  check_all_moments([](std::stop_token stop) -> Task<std::int64_t> {
    const auto slept = co_await sleep_for(INT64_MAX, std::move(stop));
    co_return slept ? 0 : -slept.error().code();
  });
}

// ---- Nothing is lost

TEST_P(Cancel, ACancelledReceiveLeavesItsBytes) {
  const SocketPair c = socket_pair();
  std::array<std::byte, 16> buffer{};
  const Operation receive = [&](std::stop_token stop) -> Task<std::int64_t> {
    co_return co_await io_recv(c.near.get(), buffer, 0, std::move(stop));
  };
  std::int64_t result = 0;
  std::stop_source source;
  start(receive, source.get_token(), result);
  poll_some();
  source.request_stop();
  EXPECT_EQ(finish(result), -ECANCELED);
  ASSERT_EQ(::send(c.far.get(), "later", 5, 0), 5);
  // Requested before: it does not even look.
  start(receive, source.get_token(), result);
  EXPECT_EQ(result, -ECANCELED);
  start(receive, {}, result);
  EXPECT_EQ(finish(result), 5);
  EXPECT_EQ(std::memcmp(buffer.data(), "later", 5), 0);
}

TEST_P(Cancel, DataThatCameBeforeTheStopIsTheResultOrStays) {
  const SocketPair c = socket_pair();
  std::array<std::byte, 16> buffer{};
  const Operation receive = [&](std::stop_token stop) -> Task<std::int64_t> {
    co_return co_await io_recv(c.near.get(), buffer, 0, std::move(stop));
  };
  for (int i = 0; i < 50; ++i) {
    std::stop_source source;
    std::int64_t result = 0;
    start(receive, source.get_token(), result);
    poll_some(3);
    ASSERT_EQ(::send(c.far.get(), "data", 4, 0), 4);
    if (i % 2) poll_some(1);
    source.request_stop();
    if (finish(result) == -ECANCELED) {
      start(receive, {}, result);
      finish(result);
    }
    ASSERT_EQ(result, 4);
  }
}

TEST_P(Cancel, WhatAReceiveOfEverythingHadGotIsItsResult) {
  const SocketPair c = socket_pair();
  std::array<std::byte, 16> buffer{};
  std::int64_t result = 0;
  std::stop_source source;
  start(
      [&](std::stop_token stop) -> Task<std::int64_t> {
        co_return co_await io_recv(c.near.get(), buffer, MSG_WAITALL, std::move(stop));
      },
      source.get_token(), result);
  poll_some();
  ASSERT_EQ(::send(c.far.get(), "part", 4, 0), 4);
  poll_some();
  source.request_stop();
  EXPECT_EQ(finish(result), 4);
  EXPECT_EQ(std::memcmp(buffer.data(), "part", 4), 0);
}

TEST_P(Cancel, AfterTheOperationHasEndedAStopDoesNothing) {
  const SocketPair c = socket_pair();
  std::array<std::byte, 16> buffer{};
  std::stop_source source;
  std::int64_t result = 0;
  start(
      [&](std::stop_token stop) -> Task<std::int64_t> {
        co_return co_await io_recv(c.near.get(), buffer, 0, std::move(stop));
      },
      source.get_token(), result);
  ASSERT_EQ(::send(c.far.get(), "x", 1, 0), 1);
  EXPECT_EQ(finish(result), 1);
  source.request_stop();
  EXPECT_FALSE(poll_some());
}

TEST_P(Cancel, OneDirectionOfADescriptorLeavesTheOther) {
  const SocketPair c = socket_pair();
  fill(c.near.get());
  std::array<std::byte, 16> buffer{};
  char byte = 'x';
  iovec part{&byte, 1};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  std::stop_source source;
  std::int64_t received = 0;
  std::int64_t sent = 0;
  start(
      [&](std::stop_token stop) -> Task<std::int64_t> {
        co_return co_await io_recv(c.near.get(), buffer, 0, std::move(stop));
      },
      source.get_token(), received);
  start(
      [&](std::stop_token stop) -> Task<std::int64_t> {
        co_return co_await io_sendmsg(c.near.get(), message, 0, std::move(stop));
      },
      {}, sent);
  poll_some();
  source.request_stop();
  EXPECT_EQ(finish(received), -ECANCELED);
  poll_some();
  EXPECT_EQ(sent, kNotYet);
  drain(c.far.get());
  EXPECT_EQ(finish(sent), 1);
}

// The operation after the last that an iteration of the epoll loop tries at once.
TEST_P(Cancel, AnOperationThatIsNotEvenTriedYet) {
  const SocketPair c = socket_pair();
  const std::string data(64, 'x');
  ASSERT_EQ(::send(c.far.get(), data.data(), data.size(), 0), 64);
  std::stop_source source;
  std::int64_t result = kNotYet;
  const auto body = [&]() -> Task<void> {
    std::array<std::byte, 1> one;
    for (int i = 0; i < 64; ++i) EXPECT_EQ(co_await io_recv(c.near.get(), one), 1);
    ::send(c.far.get(), "y", 1, 0);
    const auto stopper = [&source]() -> Task<void> {
      source.request_stop();
      co_return;
    };
    Coroutine* const other = Coroutine::create(stopper());
    co_wake(*other);  // its turn comes as soon as this one waits
    result = co_await io_recv(c.near.get(), one, 0, source.get_token());
  };
  Coroutine::create(body())->enter();
  finish(result);
  EXPECT_EQ(drain(c.near.get()), result == 1 ? 0u : 1u);
}

// ---- Many

TEST_P(Cancel, OneStopEndsThousandsOfWaits) {
  constexpr int kWaits = 3000;
  constexpr int kPairs = 300;  // two waits each, more than the submission ring's 256 entries
  std::vector<SocketPair> pairs;
  for (int i = 0; i < kPairs; ++i) pairs.push_back(socket_pair());
  // From home all at once, which the ring cannot hold; from elsewhere as they come home.
  for (const bool from_home : {true, false}) {
    std::stop_source source;
    int ended = 0;
    const auto body = [&](int i) -> Task<void> {
      std::array<std::byte, 1> one;
      if (i < kPairs) {
        EXPECT_EQ(co_await io_recv(pairs[i].near.get(), one, 0, source.get_token()), -ECANCELED);
      } else if (i < 2 * kPairs) {
        const int fd = pairs[i - kPairs].far.get();
        EXPECT_EQ(co_await io_poll(fd, POLLIN, source.get_token()), -ECANCELED);
      } else {
        EXPECT_FALSE(co_await sleep_for(3'600'000'000'000, source.get_token()));
      }
      ++ended;
    };
    for (int i = 0; i < kWaits; ++i) Coroutine::create(body(i))->enter();
    poll_some();
    std::thread other;
    if (from_home) {
      source.request_stop();
    } else {
      other = std::thread([&] { source.request_stop(); });
    }
    poll_until([&] { return ended == kWaits; });
    if (other.joinable()) other.join();
  }
}

TEST_P(Cancel, ACoroutineThatIsStoppedMayDestroyTheSourceOnceTheRequestHasReturned) {
  const SocketPair c = socket_pair();
  auto source = std::make_unique<std::stop_source>();
  bool ended = false;
  const auto body = [&]() -> Task<void> {
    EXPECT_FALSE(co_await sleep_for(3'600'000'000'000, source->get_token()));
    source.reset();
    ended = true;
  };
  Coroutine::create(body())->enter();
  source->request_stop();
  EXPECT_TRUE(source);
  EXPECT_FALSE(ended);
  poll_until([&] { return ended; });
}

// ---- Files

class CancelFile : public Cancel {
 protected:
  // One worker, so that it can be kept busy.
  AioContextOptions loop_options() override {
    auto o = options();
    o.file_io = FileIo::kPool;
    o.thread_pool = pool_ = std::make_shared<ThreadPool>(1);
    return o;
  }

  void TearDown() override {
    Cancel::TearDown();
    pool_.reset();
  }

  UniqueFd temporary_file() {
    UniqueFd fd(::open("/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
    EXPECT_TRUE(fd);
    return fd;
  }

  std::shared_ptr<ThreadPool> pool_;
};
ROOST_ON_EACH_LOOP(CancelFile);

TEST_P(CancelFile, ASyncThatNoWorkerHasStarted) {
  const UniqueFd file = temporary_file();
  Blocker blocker(*pool_);
  check_all_moments([&](std::stop_token stop) -> Task<std::int64_t> {
    co_return co_await io_data_sync(file.get(), std::move(stop));
  });
  EXPECT_EQ(pool_->statistics().queued, 0u);
}

TEST_P(CancelFile, AnAllocationThatNoWorkerHasStarted) {
  const UniqueFd file = temporary_file();
  Blocker blocker(*pool_);
  check_all_moments([&](std::stop_token stop) -> Task<std::int64_t> {
    co_return co_await io_allocate(file.get(), 0, 0, 4096, std::move(stop));
  });
  struct stat info;
  ASSERT_EQ(::fstat(file.get(), &info), 0);
  EXPECT_EQ(info.st_size, 0) << "a cancelled operation has run";
}

TEST_P(CancelFile, ATruncationThatNoWorkerHasStarted) {
  const UniqueFd file = temporary_file();
  ASSERT_EQ(::ftruncate(file.get(), 100), 0);
  Blocker blocker(*pool_);
  check_all_moments([&](std::stop_token stop) -> Task<std::int64_t> {
    co_return co_await io_truncate(file.get(), 0, std::move(stop));
  });
  EXPECT_EQ(::lseek(file.get(), 0, SEEK_END), 100) << "a cancelled operation has run";
}

TEST_P(CancelFile, AReadAheadThatNoWorkerHasStarted) {
  const UniqueFd file = temporary_file();
  Blocker blocker(*pool_);
  check_all_moments([&](std::stop_token stop) -> Task<std::int64_t> {
    co_return co_await io_read_ahead(file.get(), 0, 4096, std::move(stop));
  });
  EXPECT_EQ(pool_->statistics().queued, 0u);
}

TEST_P(CancelFile, ASearchForExtentsThatNoWorkerHasStarted) {
  const UniqueFd file = temporary_file();
  ASSERT_EQ(::ftruncate(file.get(), 100), 0);
  std::array<FileExtent, 4> found{};
  Blocker blocker(*pool_);
  check_all_moments([&](std::stop_token stop) -> Task<std::int64_t> {
    co_return co_await io_find_extents(file.get(), found, 0, 100, std::move(stop));
  });
  EXPECT_EQ(found[0].length, 0u) << "a cancelled operation has run";
}

TEST_P(CancelFile, AReadAndAWriteThatNoWorkerHasStarted) {
  const UniqueFd file = temporary_file();
  Blocker blocker(*pool_);
  std::array<std::byte, 16> buffer{};
  const iovec part{buffer.data(), buffer.size()};
  std::stop_source source;
  std::int64_t read = 0;
  std::int64_t written = 0;
  start(
      [&](std::stop_token stop) -> Task<std::int64_t> {
        const std::span<const iovec> parts(&part, 1);
        co_return co_await io_writev(file.get(), parts, 0, RWF_DSYNC, std::move(stop));
      },
      source.get_token(), written);
  start(
      [&](std::stop_token stop) -> Task<std::int64_t> {
        co_return co_await io_read(file.get(), buffer, 0, std::move(stop));
      },
      source.get_token(), read);
  source.request_stop();
  EXPECT_EQ(finish(written), -ECANCELED);
  // An empty file may be read at once.
  EXPECT_TRUE(finish(read) == -ECANCELED || read == 0) << read;
}

// Writes to one file go to a worker together, and one of them can still be taken back.
TEST_P(CancelFile, AWriteOfManyThatShareAJob) {
  constexpr int kWrites = 40;  // more than one job takes
  const UniqueFd file = temporary_file();
  std::array<char, kWrites> bytes;
  bytes.fill('x');
  std::array<iovec, kWrites> parts;
  std::array<std::stop_source, kWrites> sources;
  std::array<std::int64_t, kWrites> results{};
  std::uint64_t executed = 0;
  bool pooled = false;
  {
    Blocker blocker(*pool_);
    for (int i = 0; i < kWrites; ++i) {
      parts[i] = {&bytes[i], 1};
      start(
          [&, i](std::stop_token stop) -> Task<std::int64_t> {
            const std::span<const iovec> one(&parts[i], 1);
            co_return co_await io_writev(file.get(), one, i, 0, std::move(stop));
          },
          sources[i].get_token(), results[i]);
    }
    // A job is full. (Some file systems let the epoll loop write without waiting.)
    if (pool_->statistics().queued > 0) pooled = true;
    sources[0].request_stop();   // first of a job that waits
    sources[20].request_stop();  // amid it
    sources[39].request_stop();  // not even handed over, unless this loop has polled
    executed = pool_->statistics().executed;
  }
  for (int i = 0; i < kWrites; ++i) finish(results[i]);
  std::array<char, kWrites> found{};
  ASSERT_GT(::pread(file.get(), found.data(), found.size(), 0), 0);
  for (int i = 0; i < kWrites; ++i) {
    const bool cancelled = results[i] == -ECANCELED;
    EXPECT_TRUE(cancelled || results[i] == 1) << i << ": " << results[i];
    EXPECT_EQ(found[i], cancelled ? 0 : 'x') << i;
    EXPECT_TRUE(!cancelled || i == 0 || i == 20 || i == 39) << i;
  }
  if (!pooled) GTEST_SKIP() << "the file system takes writes in place";
  EXPECT_EQ(results[0], -ECANCELED);
  EXPECT_EQ(results[20], -ECANCELED);
  EXPECT_LE(pool_->statistics().executed - executed, 2u);
}

TEST_P(CancelFile, WithATokenThatIsNotStoppedTheyDoWhatTheyDoWithout) {
  const UniqueFd file = temporary_file();
  std::array<FileExtent, 4> found{};
  const auto run = [&](const Operation& operation) {
    std::stop_source source;
    std::int64_t result = kNotYet;
    start(operation, source.get_token(), result);
    return finish(result);
  };
  EXPECT_EQ(run([&](std::stop_token stop) -> Task<std::int64_t> {
              co_return co_await io_truncate(file.get(), 8192, std::move(stop));
            }),
            0);
  EXPECT_EQ(::lseek(file.get(), 0, SEEK_END), 8192);
  EXPECT_EQ(run([&](std::stop_token stop) -> Task<std::int64_t> {
              co_return co_await io_find_extents(file.get(), found, 4096, 4096, std::move(stop));
            }),
            1);
  EXPECT_TRUE(found[0].hole);
  EXPECT_EQ(found[0].length, 4096u);
  EXPECT_EQ(run([&](std::stop_token stop) -> Task<std::int64_t> {
              co_return co_await io_read_ahead(file.get(), 0, 8192, std::move(stop));
            }),
            0);
}

TEST_P(CancelFile, WhatAWorkerHasStartedIsFinished) {
  const UniqueFd file = temporary_file();
  std::stop_source source;
  std::int64_t result = 0;
  start(
      [&](std::stop_token stop) -> Task<std::int64_t> {
        co_return co_await io_allocate(file.get(), 0, 0, 4096, std::move(stop));
      },
      source.get_token(), result);
  while (pool_->statistics().executed == 0) std::this_thread::yield();
  source.request_stop();
  EXPECT_EQ(finish(result), 0);
  struct stat info;
  ASSERT_EQ(::fstat(file.get(), &info), 0);
  EXPECT_EQ(info.st_size, 4096);
}

// ---- The operations that came with cancellation

class NewIo : public Cancel {};
ROOST_ON_EACH_LOOP(NewIo);

TEST_P(NewIo, AConnectionIsMadeAndAccepted) {
  Listener listener;
  for (const bool accept_first : {false, true}) {
    const UniqueFd client(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    std::int64_t connected = kNotYet;
    std::int64_t accepted = kNotYet;
    const Operation accept = [&](std::stop_token stop) -> Task<std::int64_t> {
      co_return co_await io_accept(listener.fd.get(), 0, std::move(stop));
    };
    if (accept_first) {
      start(accept, {}, accepted);
      poll_some();
    }
    start(
        [&](std::stop_token stop) -> Task<std::int64_t> {
          co_return co_await io_connect(client.get(), listener.generic(), sizeof listener.address,
                                        std::move(stop));
        },
        {}, connected);
    EXPECT_EQ(finish(connected), 0);
    if (!accept_first) start(accept, {}, accepted);
    ASSERT_GE(finish(accepted), 0);
    const UniqueFd server(static_cast<int>(accepted));
    EXPECT_TRUE(::fcntl(server.get(), F_GETFD) & FD_CLOEXEC);
    EXPECT_EQ(::send(server.get(), "x", 1, 0), 1);
    std::array<std::byte, 1> one;
    std::int64_t received = kNotYet;
    start(
        [&](std::stop_token stop) -> Task<std::int64_t> {
          co_return co_await io_recv(client.get(), one, 0, std::move(stop));
        },
        {}, received);
    EXPECT_EQ(finish(received), 1);
  }
}

TEST_P(NewIo, AnAcceptWaitsOnANonBlockingSocketAsWell) {
  Listener listener;
  ::fcntl(listener.fd.get(), F_SETFL, O_NONBLOCK);
  std::int64_t accepted = kNotYet;
  start(
      [&](std::stop_token stop) -> Task<std::int64_t> {
        co_return co_await io_accept(listener.fd.get(), SOCK_NONBLOCK, std::move(stop));
      },
      {}, accepted);
  poll_some();
  ASSERT_EQ(accepted, kNotYet);
  const UniqueFd client = listener.begin_connect();
  ASSERT_GE(finish(accepted), 0);
  const UniqueFd server(static_cast<int>(accepted));
  EXPECT_TRUE(::fcntl(server.get(), F_GETFL) & O_NONBLOCK);
}

TEST_P(NewIo, ARefusedConnectionIsAnError) {
  Listener listener;
  listener.fd.reset();
  for (const int flags : {0, SOCK_NONBLOCK + 0}) {
    const UniqueFd client(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0));
    std::int64_t connected = kNotYet;
    start(
        [&](std::stop_token stop) -> Task<std::int64_t> {
          co_return co_await io_connect(client.get(), listener.generic(), sizeof listener.address,
                                        std::move(stop));
        },
        {}, connected);
    EXPECT_EQ(finish(connected), -ECONNREFUSED);
  }
}

TEST_P(NewIo, AnAcceptOfWhatDoesNotListenIsAnError) {
  const SocketPair c = socket_pair();
  std::int64_t accepted = kNotYet;
  start(
      [&](std::stop_token stop) -> Task<std::int64_t> {
        co_return co_await io_accept(c.near.get(), 0, std::move(stop));
      },
      {}, accepted);
  EXPECT_EQ(finish(accepted), -EINVAL);
}

TEST_P(NewIo, APollGivesWhatTheDescriptorIsReadyFor) {
  SocketPair c = socket_pair();
  std::int64_t events = kNotYet;
  const auto poll_for = [&](short wanted) -> Operation {
    return [&c, wanted](std::stop_token stop) -> Task<std::int64_t> {
      co_return co_await io_poll(c.near.get(), wanted, std::move(stop));
    };
  };
  const Operation writable = poll_for(POLLIN | POLLOUT);
  start(writable, {}, events);
  EXPECT_EQ(finish(events), POLLOUT);
  const Operation readable = poll_for(POLLIN);
  start(readable, {}, events);
  poll_some();
  EXPECT_EQ(events, kNotYet);
  ASSERT_EQ(::send(c.far.get(), "x", 1, 0), 1);
  EXPECT_EQ(finish(events), POLLIN);
  start(writable, {}, events);
  EXPECT_EQ(finish(events), POLLIN | POLLOUT);
  c.far.reset();
  start(readable, {}, events);
  EXPECT_EQ(finish(events) & (POLLIN | POLLHUP), POLLIN | POLLHUP);
}

TEST_P(NewIo, AHandlerMayBeSetWhereRequestsHaveWaited) {
  const SocketPair c = socket_pair();
  std::stop_source source;
  std::int64_t result = 0;
  const Operation poll_for_input = [&](std::stop_token stop) -> Task<std::int64_t> {
    co_return co_await io_poll(c.near.get(), POLLIN, std::move(stop));
  };
  start(poll_for_input, source.get_token(), result);
  poll_some();
  source.request_stop();
  EXPECT_EQ(finish(result), -ECANCELED);
  int calls = 0;
  context().set_fd_handler(c.near.get(), {.read =
                                              [&] {
                                                ++calls;
                                                drain(c.near.get());
                                              },
                                          .write = nullptr,
                                          .poll = nullptr});
  ASSERT_EQ(::send(c.far.get(), "x", 1, 0), 1);
  poll_until([&] { return calls > 0; });
  context().remove_fd_handler(c.near.get());
}

}  // namespace
}  // namespace roost
