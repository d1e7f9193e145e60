// SPDX-License-Identifier: MIT
// What a simulation keeps for each of its contexts, and the devices that their I/O goes to.
//
// Threads: the simulation's.
// Lifetime: a SimulatedContext outlives its AioContext: signals that come too late still find it,
// and abort. Devices outlive what is in flight on them.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "aio/fiber.h"
#include "roost/aio/back_end.h"
#include "roost/aio/simulation.h"

namespace roost {

class SimulatedBackEnd;

inline constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

class SimulatedContext final : public BackEndProvider {
 public:
  SimulatedContext(Simulation& in, std::string context_name)
      : simulation(in), name(std::move(context_name)) {}

  std::unique_ptr<BackEnd> make_back_end(AioContext& context) override;
  void signal() noexcept override;
  void wait_until(const char* what, const std::function<bool()>& done) override;
  void context_gone() noexcept override;

  /// Whether there is something that a wait would return for.
  bool due() const;

  /// The request's result is there; the next poll hands it over.
  void complete(IoRequest& request, std::int64_t result);

  Simulation& simulation;
  const std::string name;
  AioContext* context = nullptr;  // null once it is gone
  SimulatedThread* thread = nullptr;
  SimulatedBackEnd* back_end = nullptr;
  bool signalled = false;  // a signal has come that no wait has heeded
  std::deque<IoRequest*> completed;

  /// Ends its thread's loop.
  struct StopEntry : CallbackEntry {
    StopEntry() noexcept : CallbackEntry(&take_effect) {}
    static bool take_effect(CallbackEntry& entry) noexcept {
      return static_cast<StopEntry&>(entry).reached = true;
    }
    bool reached = false;
  };
  StopEntry stop;
};

/// A call stack and what it waits for.
struct SimulatedThread {
  SimulatedThread(Simulation& in, std::string thread_name, std::function<void()> body)
      : simulation(in), name(std::move(thread_name)), fiber(std::move(body)) {}

  Simulation& simulation;
  const std::string name;
  Fiber fiber;
  std::int64_t stalled_until_ns = 0;  // it has lost its CPU
  std::shared_ptr<void> lock_state;   // aio_context.cc's, for each thread
  // While it waits:
  const char* waits_for = nullptr;
  const std::function<bool()>* done = nullptr;
  std::int64_t wake_at_ns = kNever;
  // While it looks again and again for what another thread is to do:
  bool relaxing = false;
  std::uint64_t activity_seen = 0;
  unsigned idle_looks = 0;
};

/// Executes what a simulated context starts. Handlers of descriptors are level-triggered.
class SimulatedBackEnd final : public BackEnd {
 public:
  SimulatedBackEnd(SimulatedContext& owner, AioContext& context) noexcept
      : owner_(owner), context_(context) {}
  ~SimulatedBackEnd() override;

  const char* name() const noexcept override { return "simulated"; }
  bool poll(std::int64_t timeout_ns) override;
  void flush() override {}
  bool ready() noexcept override { return owner_.due(); }
  bool try_now(IoRequest& request) override;
  void start(IoRequest& request) override;
  void cancel(IoRequest& request) override;
  void watch_changed(FdWatch& watch) override;

  bool watch_ready() const;

 private:
  std::uint32_t ready_events(const FdWatch& watch) const;
  bool dispatch();

  SimulatedContext& owner_;
  AioContext& context_;
  std::map<int, FdWatch*> watches_;
  unsigned requests_in_flight_ = 0;
};

/// A descriptor's other side.
class SimulatedDevice {
 public:
  SimulatedDevice(Simulation& simulation, int fd) noexcept : simulation_(simulation), fd_(fd) {}
  virtual ~SimulatedDevice() = default;
  SimulatedDevice(const SimulatedDevice&) = delete;
  SimulatedDevice& operator=(const SimulatedDevice&) = delete;

  virtual const char* kind() const noexcept = 0;

  /// Executes the request if that takes no time; sets its result.
  virtual bool try_now(IoRequest& request) = 0;
  virtual void start(SimulatedContext& by, IoRequest& request) = 0;

  /// As BackEnd::cancel(). What cannot be called back ends as it would have.
  virtual void cancel(IoRequest&) {}

  /// POLLIN and so on, as poll(2) would report.
  virtual std::uint32_t ready_events() const = 0;

  /// The descriptor is being closed. REQUIRES: nothing in flight (checked).
  virtual void close() = 0;

  /// A line for the report, or nothing if nothing is in flight.
  virtual std::string in_flight() const = 0;

 protected:
  /// A request that started but has not been answered.
  struct Started {
    SimulatedContext* by = nullptr;
    IoRequest* request = nullptr;
    std::size_t done = 0;  // bytes moved so far
    explicit operator bool() const noexcept { return request; }
  };

  [[noreturn]] void refuse(const IoRequest& request) const;
  /// `full`, or now and then less, but at least 1 of it.
  std::size_t maybe_short(std::size_t full, unsigned short_one_in);
  Random& random() const noexcept { return simulation_.random_; }
  void later(std::int64_t delay_ns, const char* what, std::function<void()> action);

  Simulation& simulation_;
  const int fd_;
};

std::pair<std::unique_ptr<SimulatedDevice>, std::unique_ptr<SimulatedDevice>>
make_simulated_channel(Simulation& simulation, int fd, const SimulatedChannelOptions& options);

/// What Simulation does to the devices it made.
void shut_down_simulated_channel(SimulatedDevice& end);
void break_simulated_channel(SimulatedDevice& end);
std::unique_ptr<SimulatedDevice> make_simulated_disk(Simulation& simulation, int fd,
                                                     std::size_t size,
                                                     const SimulatedDiskOptions& options);
void crash_simulated_disk(SimulatedDevice& disk);
std::unique_ptr<SimulatedDevice> take_over_simulated_disk(Simulation& simulation, int fd,
                                                          SimulatedDevice& from, bool power_lost);
void fail_next_on_simulated_disk(SimulatedDevice& disk, IoRequest::Op op, int error);
std::span<const std::byte> simulated_disk_contents(const SimulatedDevice& disk);

/// Copies between memory of a request, from `done` bytes on, and `bytes`. Returns how many.
std::size_t scatter(const iovec* buffers, std::size_t count, std::size_t done,
                    std::span<const std::byte> bytes);
std::size_t gather(const iovec* buffers, std::size_t count, std::size_t done,
                   std::span<std::byte> bytes);
std::size_t total_length(const iovec* buffers, std::size_t count);

}  // namespace roost
