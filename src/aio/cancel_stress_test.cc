// SPDX-License-Identifier: MIT
// Stops that meet the end of the operation: another thread requests the stop and makes the
// operation ready, at about the same moment, while the home context polls.
//
// Invariants: an operation ends once, with what it did or with ECANCELED; in the latter case what
// it waited for (a byte, a connection) is still there. Either outcome must have been reached many
// times, and a stop must have been under way home while its operation ended.
#include <poll.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <optional>
#include <stop_token>
#include <thread>

#include "aio/test_io.h"
#include "aio/test_loop.h"
#include "base/test_build.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/io.h"
#include "roost/aio/iothread.h"
#include "roost/aio/stop_relay.h"
#include "roost/aio/thread_pool.h"
#include "roost/aio/timer.h"

namespace roost {
namespace {

constexpr int kCancelSeed = 5;
constexpr int kEnough = 20;  // of each outcome
constexpr std::int64_t kNotYet = 1'000'000;

// A thread that does two things for each round, in either order, at varying distance.
class Racer {
 public:
  Racer() : thread_([this] { serve(); }) {}
  ~Racer() {
    round_ = -1;
    thread_.join();
  }

  /// `stop` and `other` are called once each, soon.
  void race(std::function<void()> stop, std::function<void()> other) {
    stop_ = std::move(stop);
    other_ = std::move(other);
    done_ = false;
    ++round_;
  }
  bool done() const noexcept { return done_; }

 private:
  void serve() {
    TestRandom random(kCancelSeed);
    for (int seen = 0;;) {
      const int round = round_.load();
      if (round < 0) return;
      if (round == seen) {
        std::this_thread::yield();
        continue;
      }
      seen = round;
      pause(random.below(2000));
      if (random.below(2)) {
        stop_();
        pause(random.below(200));
        other_();
      } else {
        other_();
        pause(random.below(2) ? random.below(20) : random.below(4000));
        stop_();
      }
      done_ = true;
    }
  }
  static void pause(unsigned steps) noexcept {
    for (; steps > 0; --steps) RealPlatform::cpu_relax();
  }

  std::function<void()> stop_;
  std::function<void()> other_;
  std::atomic<int> round_{0};
  std::atomic<bool> done_{true};
  std::thread thread_;
};

class CancelStress : public LoopTest {
 protected:
  using Operation = std::function<Task<std::int64_t>(std::stop_token)>;

  Task<void> keep_result(Operation operation, std::stop_token stop, std::int64_t& result) {
    result = co_await operation(std::move(stop));
  }

  std::int64_t finish(const Operation& operation, std::stop_token stop) {
    std::int64_t result = kNotYet;
    Coroutine::create(keep_result(operation, std::move(stop), result), "raced")->enter();
    while (result == kNotYet) context().poll(true);
    return result;
  }

  // `make_ready` lets the operation finish; `settle` checks what the outcome left, and cleans up.
  void race(const char* name, const Operation& operation, const std::function<void()>& make_ready,
            const std::function<void(std::int64_t)>& settle) {
    Racer racer;
    int cancelled = 0;
    int finished = 0;
    const int at_least = rounds(1'000);
    const int at_most = 200'000;
    int round = 0;
    for (; round < at_most; ++round) {
      if (round >= at_least && cancelled >= kEnough && finished >= kEnough) break;
      std::stop_source source;
      std::int64_t result = kNotYet;
      Coroutine::create(keep_result(operation, source.get_token(), result), "raced")->enter();
      racer.race([&source] { source.request_stop(); }, make_ready);
      while (result == kNotYet) context().poll(round % 2 == 0);
      while (!racer.done()) std::this_thread::yield();
      ++(result == -ECANCELED ? cancelled : finished);
      settle(result);
      if (HasFailure()) return;
    }
    std::printf("%s: %d rounds, %d cancelled, %d finished\n", name, round, cancelled, finished);
    EXPECT_GE(cancelled, kEnough);
    EXPECT_GE(finished, kEnough);
  }
};
ROOST_ON_EACH_LOOP(CancelStress);

TEST_P(CancelStress, AReceive) {
  const SocketPair c = socket_pair();
  std::array<std::byte, 8> buffer{};
  std::uint8_t next = 0;
  race(
      "receive",
      [&](std::stop_token stop) -> Task<std::int64_t> {
        co_return co_await io_recv(c.near.get(), buffer, 0, std::move(stop));
      },
      [&] { ASSERT_EQ(::send(c.far.get(), &next, 1, 0), 1); },
      [&](std::int64_t result) {
        if (result == -ECANCELED) {
          ASSERT_EQ(::recv(c.near.get(), buffer.data(), buffer.size(), MSG_DONTWAIT), 1);
        } else {
          ASSERT_EQ(result, 1);
        }
        ASSERT_EQ(buffer[0], std::byte{next++});
      });
}

TEST_P(CancelStress, ASend) {
  const SocketPair c = socket_pair();
  char byte = 'x';
  iovec part{&byte, 1};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  std::size_t there = fill(c.near.get());
  std::atomic<std::size_t> taken{0};
  race(
      "send",
      [&](std::stop_token stop) -> Task<std::int64_t> {
        co_return co_await io_sendmsg(c.near.get(), message, 0, std::move(stop));
      },
      [&] { taken = drain(c.far.get()); },
      [&](std::int64_t result) {
        ASSERT_TRUE(result == 1 || result == -ECANCELED) << result;
        ASSERT_EQ(taken + drain(c.far.get()), there + (result == 1));
        there = fill(c.near.get());
      });
}

TEST_P(CancelStress, AnAccept) {
  Listener listener(64);
  UniqueFd client;
  race(
      "accept",
      [&](std::stop_token stop) -> Task<std::int64_t> {
        co_return co_await io_accept(listener.fd.get(), 0, std::move(stop));
      },
      [&] { client = listener.begin_connect(); },
      [&](std::int64_t result) {
        const int fd = result == -ECANCELED ? ::accept(listener.fd.get(), nullptr, nullptr)
                                            : static_cast<int>(result);
        ASSERT_GE(fd, 0);
        // No TIME_WAIT: there are only so many ports.
        const linger at_once{1, 0};
        ::setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
        ::close(fd);
        client.reset();
      });
}

// io_uring takes it through several of its places, and epoll tries it again and again.
TEST_P(CancelStress, AConnectToAUnixSocketWhoseQueueIsFull) {
  FullQueue listener;
  int rounds = 0;
  race(
      "unix connect",
      [&](std::stop_token stop) -> Task<std::int64_t> {
        const UniqueFd client(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        co_return co_await io_connect(client.get(), listener.generic(), listener.length,
                                      std::move(stop));
      },
      [&] {
        ASSERT_TRUE(listener.accept());
        // Every other time it is seen to come in, where nothing has stopped it.
        pollfd there{.fd = listener.fd.get(), .events = POLLIN, .revents = 0};
        if (++rounds % 2 == 0) ::poll(&there, 1, 20);
      },
      [&](std::int64_t result) {
        ASSERT_TRUE(result == 0 || result == -ECANCELED) << result;
        // A cancelled one may be there all the same.
        const bool there = listener.accept();
        ASSERT_TRUE(there || result == -ECANCELED);
        ASSERT_FALSE(listener.accept());
        listener.fill();
      });
}

TEST_P(CancelStress, APoll) {
  const SocketPair c = socket_pair();
  race(
      "poll",
      [&](std::stop_token stop) -> Task<std::int64_t> {
        co_return co_await io_poll(c.near.get(), POLLIN, std::move(stop));
      },
      [&] { ASSERT_EQ(::send(c.far.get(), "x", 1, 0), 1); },
      [&](std::int64_t result) {
        ASSERT_TRUE(result == POLLIN || result == -ECANCELED) << result;
        ASSERT_EQ(drain(c.near.get()), 1u);
      });
}

TEST_P(CancelStress, ASleep) {
  // As long as the other thread takes, which only a run can tell: each round that comes to one end
  // makes the other likelier.
  std::int64_t delay_ns = 15'000;
  race(
      "sleep",
      [&](std::stop_token stop) -> Task<std::int64_t> {
        const auto slept = co_await sleep_for(delay_ns, std::move(stop));
        co_return slept ? 0 : -slept.error().code();
      },
      [] {},
      [&](std::int64_t result) {
        ASSERT_TRUE(result == 0 || result == -ECANCELED);
        ASSERT_TRUE(context().timers().empty());
        delay_ns += (result == 0 ? delay_ns : -delay_ns) / 16;
        delay_ns = std::clamp<std::int64_t>(delay_ns, 1'000, 20'000'000);
      });
}

// Keeps the only worker of a pool busy until it is let go, so that what is queued behind it can be
// reached by a stop wherever the threads run.
class BusyWorker {
 public:
  void begin(ThreadPool& pool) {
    held_.emplace();
    pool.submit(*held_);
  }
  // Every other time the worker is seen to go on: on one CPU it would hardly be before a stop.
  void let_go() noexcept {
    held_->state = Held::kLetGo;
    if (++times_ % 2 == 0) wait();
  }
  void wait() const noexcept {
    while (held_->state != Held::kOver) std::this_thread::yield();
  }

 private:
  struct Held : ThreadPool::Work {
    enum State { kBegun, kLetGo, kOver };
    Held() {
      run = [](ThreadPool::Work& work) noexcept {
        auto& self = static_cast<Held&>(work);
        while (self.state == kBegun) std::this_thread::yield();
        self.state = kOver;
      };
    }
    std::atomic<State> state{kBegun};
  };

  std::optional<Held> held_;
  int times_ = 0;
};

TEST_P(CancelStress, WorkOfTheThreadPool) {
  ThreadPool pool(1);
  BusyWorker worker;
  std::atomic<int> ran{0};
  int ran_before = 0;
  race(
      "pool",
      [&](std::stop_token stop) -> Task<std::int64_t> {
        worker.begin(pool);
        const auto work = [&] { return static_cast<std::int64_t>(++ran); };
        const Result<std::int64_t> result = co_await pool.run(work, std::move(stop));
        co_return result ? *result : -result.error().code();
      },
      [&] { worker.let_go(); },
      [&](std::int64_t result) {
        worker.wait();
        ASSERT_EQ(ran, ran_before + (result != -ECANCELED));
        ran_before = ran;
      });
}

class CancelFileStress : public CancelStress {
 protected:
  AioContextOptions loop_options() override {
    auto o = options();
    o.file_io = FileIo::kPool;
    o.thread_pool = pool_;
    return o;
  }

  std::shared_ptr<ThreadPool> pool_ = std::make_shared<ThreadPool>(1);
};
ROOST_ON_EACH_LOOP(CancelFileStress);

TEST_P(CancelFileStress, AnAllocation) {
  const UniqueFd file(::open("/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  ASSERT_TRUE(file);
  BusyWorker worker;
  race(
      "allocate",
      [&](std::stop_token stop) -> Task<std::int64_t> {
        worker.begin(*pool_);
        co_return co_await io_allocate(file.get(), 0, 0, 4096, std::move(stop));
      },
      [&] { worker.let_go(); },
      [&](std::int64_t result) {
        worker.wait();
        ASSERT_TRUE(result == 0 || result == -ECANCELED) << result;
        ASSERT_EQ(::lseek(file.get(), 0, SEEK_END), result == 0 ? 4096 : 0);
        ASSERT_EQ(::ftruncate(file.get(), 0), 0);
      });
}

// ---- The relay by itself: how often the stop was on its way home when the operation ended

class RelayStress : public LoopTest {};
ROOST_ON_EACH_LOOP(RelayStress);

// Something that ends at home by a bottom half, or by its stop.
class Wait : public StopRelay {
 public:
  explicit Wait(AioContext& home)
      : StopRelay(
            home,
            [](StopRelay& relay) noexcept {
              auto& self = static_cast<Wait&>(relay);
              self.stopped = true;
              self.end();
            },
            [](StopRelay& relay) noexcept { wake_waiter(*static_cast<Wait&>(relay).co); }) {}

  void end() noexcept {
    if (over) return;
    over = true;
    if (ended()) {
      wake_waiter(*co);
    } else {
      waited_for_the_stop = true;
    }
  }

  Coroutine* co = nullptr;
  bool over = false;
  bool stopped = false;
  bool waited_for_the_stop = false;
};

TEST_P(RelayStress, AStopThatIsOnItsWayHomeWhileTheOperationEnds) {
  Racer racer;
  int finished = 0;
  int stopped = 0;
  int met = 0;
  int round = 0;
  for (; round < 500'000; ++round) {
    if (round >= rounds(4'000) && finished >= kEnough && stopped >= kEnough && met >= kEnough) {
      break;
    }
    std::stop_source source;
    bool over = false;
    Wait* waiting = nullptr;
    BottomHalf end(context(), [&waiting] {
      if (waiting) waiting->end();
    });
    const auto body = [&]() -> Task<void> {
      Wait wait(context());
      wait.co = Coroutine::self();
      waiting = &wait;
      wait.watch(source.get_token());
      co_await suspend_waiting("a race", PublishNothing{});
      wait.forget();
      waiting = nullptr;
      EXPECT_TRUE(wait.over);
      ++(wait.stopped ? stopped : finished);
      met += wait.waited_for_the_stop;
      over = true;
    };
    Coroutine::create(body())->enter();
    racer.race([&source] { source.request_stop(); }, [&end] { end.schedule(); });
    while (!over) context().poll(round % 2 == 0);
    while (!racer.done()) std::this_thread::yield();
    context().poll(false);  // a bottom half that came too late
  }
  std::printf("relay: %d rounds, %d finished, %d stopped, %d met\n", round, finished, stopped, met);
  EXPECT_GE(finished, kEnough);
  EXPECT_GE(stopped, kEnough);
  EXPECT_GE(met, kEnough);
}

// ---- The pool

// Coroutines of several contexts offload work and change their minds, while the pool grows and
// shrinks under them.
TEST(ThreadPoolStress, GrowsAndShrinksWhileWorkComesAndIsWithdrawn) {
  constexpr int kCoroutines = 12;
  const int kTurns = rounds(3'000);
  ThreadPool pool({.min_threads = 1, .max_threads = 6, .idle_timeout_ns = 20'000});
  std::atomic<int> ran{0};
  std::atomic<int> cancelled{0};
  std::atomic<int> left{kCoroutines};
  int shrunk = 0;
  {
    IOThread a;
    IOThread b;
    const auto body = [&](int index) -> Task<void> {
      TestRandom random(static_cast<std::uint64_t>(index) + kCancelSeed);
      for (int i = 0; i < kTurns; ++i) {
        std::stop_source source;
        const auto work = [&ran, steps = random.below(2000)] {
          for (unsigned s = 0; s < steps; ++s) RealPlatform::cpu_relax();
          ++ran;
        };
        // The stop comes from a worker, too: whichever of the two is first.
        const auto stopper = [&source] { source.request_stop(); };
        bool stopped = false;
        const auto stop_and_tell = [&]() -> Task<void> {
          co_await pool.run(stopper);
          stopped = true;
        };
        if (random.below(2)) {
          Coroutine::create(stop_and_tell())->enter();
        } else {
          stopped = true;
        }
        const Result<void> result = co_await pool.run(work, source.get_token());
        if (!result) {
          EXPECT_EQ(result.error().code(), ECANCELED);
          ++cancelled;
        }
        while (!stopped) co_await move_to(*AioContext::current());
        if (random.below(50) == 0) co_await sleep_for(200'000);
      }
      --left;
    };
    for (int i = 0; i < kCoroutines; ++i) spawn(i % 2 ? a.context() : b.context(), body(i));
    unsigned before = 0;
    while (left > 0) {
      const unsigned now = pool.statistics().threads;
      shrunk += now < before;
      before = now;
      std::this_thread::yield();
    }
  }
  const auto statistics = pool.statistics();
  std::printf("pool: %d ran, %d cancelled, at most %u threads, seen shrinking %d times\n",
              ran.load(), cancelled.load(), statistics.peak_threads, shrunk);
  EXPECT_EQ(ran + cancelled, kCoroutines * kTurns);
  EXPECT_LE(statistics.peak_threads, 6u);
  EXPECT_GT(statistics.peak_threads, 1u);
  EXPECT_GT(cancelled, 0);
  EXPECT_GT(ran, 0);
  EXPECT_GT(shrunk, 0);
}

}  // namespace
}  // namespace roost
