// SPDX-License-Identifier: MIT
// Simulation: contexts, foreign threads, channels, disks and a thread pool, all on one thread and
// on virtual time, in an order drawn from a seed.
//
// The contexts are real ones and run the real runtime; what is simulated is what they wait with and
// what they run on. Each context, and each thread that belongs to none, has a call stack of its
// own, and the simulation chooses by the seed whose turn it is. It switches where a thread waits,
// and now and then where the runtime reads the clock, starts I/O or signals a context, as the
// kernel may take the CPU at any moment. It delays signals, completions and data, and lets time
// pass where nobody has anything to do, and by a little for each turn. The same seed gives the same
// run, in any process and on any machine: hash() says so. A run in which nothing can happen any
// more, although it was to, aborts with a list of who waits for what.
//
// Threads: all on one. IOThreads and real descriptors are refused; AioContext::run() and blocking
// polls wait as in life.
// Lifetime: outlives its contexts. Its descriptors are numbers that no system call knows.
// docs/simulation.md teaches it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "roost/aio/aio_context.h"
#include "roost/aio/thread_pool.h"
#include "roost/base/clock.h"
#include "roost/base/random.h"
#include "roost/coro/task.h"

namespace roost {

class SimulatedContext;
class SimulatedDevice;
struct SimulatedThread;

struct SimulationOptions {
  /// What the order of everything is drawn from.
  std::uint64_t seed = 1;
  /// One in so many of the calls that may be interrupted is; 0: none.
  unsigned interrupt_one_in = 8;
  /// What the simulation calls a hang: run_until() gives up after so many turns.
  std::uint64_t max_turns = 5'000'000;
  /// Called with a line for each event. Tracing changes nothing of the run.
  std::function<void(std::string_view)> trace = nullptr;
};

/// How a channel behaves. Delays are drawn from their range for each piece of data.
struct SimulatedChannelOptions {
  std::int64_t min_delay_ns = 500;
  std::int64_t max_delay_ns = 50'000;
  std::size_t capacity = 16 << 10;  // sent and not yet received, each way
  unsigned short_one_in = 4;        // transfers that move less than they could; 0: none
};

/// How a disk behaves. Delays are drawn from their range for each operation.
struct SimulatedDiskOptions {
  std::int64_t min_delay_ns = 5'000;
  std::int64_t max_delay_ns = 200'000;
  unsigned short_one_in = 8;  // reads, writes and such that do less than they could; 0: none
  unsigned error_one_in = 0;  // operations that fail with EIO; 0: none
};

/// One run. docs/simulation.md teaches it; the file's head says what is simulated.
class Simulation {
 public:
  explicit Simulation(SimulationOptions options = {});
  ~Simulation();
  Simulation(const Simulation&) = delete;
  Simulation& operator=(const Simulation&) = delete;

  /// The seed it was made with, the virtual time since it was made, the same as a clock, and random
  /// numbers that belong to the run.
  std::uint64_t seed() const noexcept { return options_.seed; }
  std::int64_t now_ns() const noexcept { return now_ns_; }
  const Clock& clock() const noexcept { return clock_; }
  Random& random() noexcept { return random_; }

  // ---- Who runs

  /// A context and its thread, which polls it as an IOThread would. When the last reference goes,
  /// the thread is stopped and joined.
  std::shared_ptr<AioContext> make_context(std::string name);

  /// A thread that is not a context's. In loops that wait for others it calls relax().
  void add_thread(std::string name, std::function<void()> body);

  /// spawn(), remembered for the report of a deadlock. `name` is a literal.
  Coroutine* spawn(AioContext& context, Task<void> task, const char* name);

  /// Calls `action` at or soon after that time, outside of any context: a fault, a request.
  void at(std::int64_t time_ns, std::function<void()> action);
  void after(std::int64_t delay_ns, std::function<void()> action) {
    at(now_ns_ + delay_ns, std::move(action));
  }

  /// Work of a thread pool: run later, outside of any context.
  void submit(ThreadPool::Work& work);

  // ---- Running

  /// One turn of some thread, chosen by the seed; before it, time passes if nobody could do
  /// anything now. False: nothing is left that could ever happen. Not from a simulated thread.
  bool turn();

  /// Turns until `done()`. Aborts with a report if that cannot come any more.
  void run_until(const std::function<bool()>& done);

  /// Turns until nothing is left that could happen.
  void run();

  /// Gives others their turn: for loops of simulated threads that wait for another thread.
  void relax();

  /// Blocks the calling simulated thread until `done()`, for primitives that would block a real
  /// one; `what` is what the report says of it. From outside of the simulation it drives it.
  void block(const char* what, const std::function<bool()>& done);

  /// Others get their turn now, if the seed says so. For code under test that is to be interrupted.
  void interrupt();

  /// While it lives, nobody else gets a turn, and waiting aborts. For code that tells threads apart
  /// by what all simulated ones share: std::stop_source::request_stop() takes a thread with the id
  /// of the one in its callbacks for that one.
  class Undisturbed {
   public:
    explicit Undisturbed(Simulation& simulation) noexcept : simulation_(simulation) {
      ++simulation_.undisturbed_;
    }
    ~Undisturbed() { --simulation_.undisturbed_; }
    Undisturbed(const Undisturbed&) = delete;
    Undisturbed& operator=(const Undisturbed&) = delete;

   private:
    Simulation& simulation_;
  };

  // ---- Events

  /// Adds to the hash, and to the trace, something that the code under test did. No addresses, and
  /// nothing else that changes from one process to the next.
  void note(std::string_view what, std::uint64_t a = 0, std::uint64_t b = 0);

  /// Of all events so far: who was polled and when, what completed and how, what was noted.
  std::uint64_t hash() const noexcept { return hash_; }
  std::uint64_t events() const noexcept { return events_; }

  /// Time, contexts, threads, and the coroutines that spawn() made and that live, each with what it
  /// waits for.
  std::string report() const;

  // ---- Devices, used through roost/aio/io.h and AioContext::set_fd_handler()

  /// Both ends of a stream.
  std::pair<int, int> make_channel(const SimulatedChannelOptions& options = {});

  /// A file of `size` bytes, all zero, with a volatile write cache.
  int make_disk(std::size_t size, const SimulatedDiskOptions& options = {});

  /// As close(2): nothing may be in flight on `fd`. The other end of a channel still receives what
  /// was sent, then the end of the stream.
  void close(int fd);

  /// As shutdown(2) of both directions: operations under way return, the other end sees the end.
  void shut_down(int fd);

  /// The peer is lost: what is under way is lost, both ends fail with ECONNRESET or EPIPE.
  void break_channel(int fd);

  /// What a descriptor's handler may do: as recv(2) with MSG_DONTWAIT.
  std::int64_t receive_now(int fd, std::span<std::byte> buffer);

  /// Power loss: of what was written and not synced, any part may be gone, in units of 512 bytes.
  /// What is in flight fails with EIO.
  void crash_disk(int fd);

  /// The process that had the disk at `fd` is gone, or its whole machine (`power_lost`: as
  /// crash_disk()). What it had in flight may have been carried out; from now on all it tries there
  /// fails with EIO. Returns a new descriptor, at which the next one has the disk.
  int take_disk_over(int fd, bool power_lost);

  /// The next operation of that kind on the disk fails with this errno.
  void fail_next(int fd, IoRequest::Op op, int error);

  /// What a disk holds now, unsynced data included.
  std::span<const std::byte> disk_contents(int fd) const;

 private:
  friend class SimulatedContext;
  friend class SimulatedBackEnd;
  friend class SimulatedDevice;

  class VirtualClock final : public Clock {
   public:
    explicit VirtualClock(Simulation& simulation) noexcept : simulation_(simulation) {}
    std::int64_t now_ns() const noexcept override;

   private:
    Simulation& simulation_;
  };

  struct Event {
    const char* what;
    std::function<void()> action;
  };
  // By time; of the same time, in an order drawn from the seed.
  using EventKey = std::pair<std::int64_t, std::uint64_t>;

  void add_event(std::int64_t time_ns, const char* what, std::function<void()> action);
  void run_due_events();
  SimulatedThread* choose();
  bool pass_time();
  bool take_turn();
  void give_turn(SimulatedThread& thread);
  void wait(const char* what, const std::function<bool()>& done, std::int64_t until_ns);
  void serve(SimulatedContext& context);
  void retire(SimulatedContext& context, std::shared_ptr<AioContext> last);
  SimulatedThread& start_thread(std::string name, std::function<void()> body);
  void record(std::string_view what, std::string_view who, std::uint64_t a, std::uint64_t b);
  SimulatedDevice& device(int fd, const char* what) const;
  Task<void> remember(Task<void> body, std::size_t number);
  [[noreturn]] void give_up(std::string_view why) const;

  const SimulationOptions options_;
  VirtualClock clock_{*this};
  Random random_;
  std::int64_t now_ns_ = 0;
  std::uint64_t hash_ = 0;
  std::uint64_t events_ = 0;
  std::uint64_t turns_ = 0;
  std::uint64_t activity_ = 0;          // counts what may end another thread's loop
  unsigned stay_one_in_ = 0;            // drawn from the seed: how often the last one goes on
  unsigned stall_one_in_ = 0;           // drawn from the seed: how often one loses its CPU for long
  int undisturbed_ = 0;                 // nested Undisturbed
  unsigned looks_allowed_ = 3;          // of a loop that waits, with nothing happening
  SimulatedThread* current_ = nullptr;  // whose turn it is
  SimulatedThread* last_ = nullptr;     // who had the last turn
  const std::thread::id thread_ = std::this_thread::get_id();

  std::vector<std::unique_ptr<SimulatedContext>> contexts_;  // of all there ever were
  std::vector<std::unique_ptr<SimulatedThread>> threads_;    // likewise
  std::map<EventKey, Event> events_to_come_;
  std::map<std::size_t, Coroutine*> spawned_;
  std::size_t next_spawned_ = 0;
  std::map<int, std::unique_ptr<SimulatedDevice>> devices_;
  int next_fd_;
};

}  // namespace roost
