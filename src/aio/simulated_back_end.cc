// SPDX-License-Identifier: MIT
// How a simulated context waits, and how its requests come back.

#include <poll.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "aio/requests.h"
#include "aio/simulated_context.h"
#include "roost/base/check.h"

namespace roost {

namespace {

constexpr std::int64_t kMaxSignalDelayNs = 30'000;

}  // namespace

// ---- The context's other half

std::unique_ptr<BackEnd> SimulatedContext::make_back_end(AioContext& c) {
  ROOST_CHECK(std::this_thread::get_id() == simulation.thread_,
              "simulated context '{}' is polled by another thread than its simulation's", name);
  auto made = std::make_unique<SimulatedBackEnd>(*this, c);
  back_end = made.get();
  return made;
}

// The producer may be interrupted between its push, which has happened, and the signal.
void SimulatedContext::signal() noexcept {
  simulation.interrupt();
  const auto arrive = [this] {
    ROOST_CHECK(context, "a wake-up signal reaches context '{}' after it is gone", name);
    signalled = true;
    context->signalled(1);
    simulation.record("signal", name, 0, 0);
  };
  const std::int64_t delay = simulation.random_.between(0, kMaxSignalDelayNs);
  simulation.add_event(simulation.now_ns() + delay, "signal", arrive);
}

void SimulatedContext::wait_until(const char* what, const std::function<bool()>& done) {
  simulation.wait(what, done, kNever);
}

void SimulatedContext::context_gone() noexcept {
  simulation.record("gone", name, 0, 0);
  context = nullptr;
}

bool SimulatedContext::due() const {
  return signalled || !completed.empty() || (back_end && back_end->watch_ready());
}

void SimulatedContext::complete(IoRequest& request, std::int64_t result) {
  request.result = result;
  completed.push_back(&request);
  simulation.record("complete", name, static_cast<std::uint64_t>(request.op),
                    static_cast<std::uint64_t>(result));
}

// ---- The back end

SimulatedBackEnd::~SimulatedBackEnd() {
  ROOST_CHECK(requests_in_flight_ == 0,
              "simulated context '{}' gives up its back end with {} requests in flight{}",
              owner_.name, requests_in_flight_, who_waits_for_io(context_));
  owner_.back_end = nullptr;
}

bool SimulatedBackEnd::poll(std::int64_t timeout_ns) {
  Simulation& simulation = owner_.simulation;
  ROOST_CHECK(simulation.current_ == owner_.thread,
              "simulated context '{}' is polled by another than its own simulated thread",
              owner_.name);
  simulation.interrupt();
  if (timeout_ns != 0) {
    simulation.record("sleep", owner_.name, static_cast<std::uint64_t>(timeout_ns), 0);
    const std::function<bool()> due = [this] { return owner_.due(); };
    simulation.wait("something to do", due,
                    timeout_ns < 0 ? kNever : simulation.now_ns() + timeout_ns);
  }
  owner_.signalled = false;
  context_.wait_ended();
  return dispatch();
}

bool SimulatedBackEnd::try_now(IoRequest& request) {
  owner_.simulation.interrupt();
  SimulatedDevice& device = owner_.simulation.device(request.fd, "an I/O request");
  if (!device.try_now(request)) return false;
  owner_.simulation.record("at once", owner_.name, static_cast<std::uint64_t>(request.op),
                           static_cast<std::uint64_t>(request.result));
  return true;
}

void SimulatedBackEnd::start(IoRequest& request) {
  ++requests_in_flight_;
  owner_.simulation.device(request.fd, "an I/O request").start(owner_, request);
  // The request completes in a later poll of this context, which is on the stack.
  owner_.simulation.interrupt();
}

void SimulatedBackEnd::cancel(IoRequest& request) {
  owner_.simulation.device(request.fd, "an I/O request").cancel(request);
  owner_.simulation.interrupt();
}

void SimulatedBackEnd::watch_changed(FdWatch& watch) {
  if (!watch.removed) {
    owner_.simulation.device(watch.fd, "a handler");
    watches_[watch.fd] = &watch;
    return;
  }
  watches_.erase(watch.fd);
  if (!watch.in_callback) delete &watch;
}

std::uint32_t SimulatedBackEnd::ready_events(const FdWatch& watch) const {
  const std::uint32_t wanted = watch.wanted_events() | POLLERR | POLLHUP;
  return owner_.simulation.device(watch.fd, "a handler").ready_events() & wanted;
}

bool SimulatedBackEnd::watch_ready() const {
  for (const auto& [fd, watch] : watches_) {
    if (ready_events(*watch)) return true;
  }
  return false;
}

bool SimulatedBackEnd::dispatch() {
  bool progress = false;
  // Only those that are there now; a nested poll may take some of them.
  for (std::size_t count = owner_.completed.size(); count > 0 && !owner_.completed.empty();
       --count) {
    IoRequest& request = *owner_.completed.front();
    owner_.completed.pop_front();
    --requests_in_flight_;
    request.complete(request);
    progress = true;
  }
  std::vector<int> ready;
  for (const auto& [fd, watch] : watches_) {
    if (ready_events(*watch)) ready.push_back(fd);
  }
  // Each callback may change or remove any of them.
  for (int fd : ready) {
    const auto found = watches_.find(fd);
    if (found == watches_.end()) continue;
    FdWatch& watch = *found->second;
    const std::uint32_t events = ready_events(watch);
    if (!events) continue;
    const bool outer = std::exchange(watch.in_callback, true);
    watch.dispatch(events);
    watch.in_callback = outer;
    if (watch.removed && !outer) delete &watch;
    progress = true;
  }
  return progress;
}

// ---- Devices

void SimulatedDevice::refuse(const IoRequest& request) const {
  panicf("operation {} on descriptor {}: {} cannot do that", static_cast<int>(request.op),
         request.fd, kind());
}

std::size_t SimulatedDevice::maybe_short(std::size_t full, unsigned short_one_in) {
  if (full <= 1 || !random().one_in(short_one_in)) return full;
  return 1 + random().below(full - 1);
}

void SimulatedDevice::later(std::int64_t delay_ns, const char* what, std::function<void()> action) {
  simulation_.add_event(simulation_.now_ns() + delay_ns, what, std::move(action));
}

std::size_t total_length(const iovec* buffers, std::size_t count) {
  std::size_t total = 0;
  for (std::size_t i = 0; i < count; ++i) total += buffers[i].iov_len;
  return total;
}

namespace {

// Calls `copy(memory, position, length)` for each piece of the buffers' bytes from `done` on.
template <class Copy>
std::size_t walk(const iovec* buffers, std::size_t count, std::size_t done, std::size_t length,
                 Copy copy) {
  std::size_t position = 0;
  for (std::size_t i = 0; i < count && position < length; ++i) {
    const std::size_t skip = std::min(done, buffers[i].iov_len);
    done -= skip;
    const std::size_t piece = std::min(buffers[i].iov_len - skip, length - position);
    copy(static_cast<std::byte*>(buffers[i].iov_base) + skip, position, piece);
    position += piece;
  }
  return position;
}

}  // namespace

std::size_t scatter(const iovec* buffers, std::size_t count, std::size_t done,
                    std::span<const std::byte> bytes) {
  return walk(buffers, count, done, bytes.size(),
              [&](std::byte* memory, std::size_t position, std::size_t length) {
                std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(position), length, memory);
              });
}

std::size_t gather(const iovec* buffers, std::size_t count, std::size_t done,
                   std::span<std::byte> bytes) {
  return walk(buffers, count, done, bytes.size(),
              [&](std::byte* memory, std::size_t position, std::size_t length) {
                std::copy_n(memory, length, bytes.begin() + static_cast<std::ptrdiff_t>(position));
              });
}

}  // namespace roost
