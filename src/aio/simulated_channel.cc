// SPDX-License-Identifier: MIT
// A stream between two simulated descriptors: delays, short transfers, a bounded buffer, and peers
// that close, shut down or get lost.
//
// Threads: the simulation's.
// Lifetime: bytes under way keep the direction they travel in; ends may go before them.

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <vector>

#include "aio/simulated_context.h"
#include "roost/base/check.h"

namespace roost {

namespace {

class Channel;

// One direction.
struct Direction {
  std::deque<std::byte> arrived;
  std::size_t under_way = 0;
  std::int64_t last_arrival_ns = 0;  // what was sent later does not overtake
  bool ended = false;                // the end of the stream has arrived
  bool send_closed = false;          // by its sender
  bool receive_closed = false;       // its receiver takes no more
  bool broken = false;
  Channel* receiver = nullptr;
  Channel* sender = nullptr;
};

class Channel final : public SimulatedDevice {
 public:
  Channel(Simulation& simulation, int fd, const SimulatedChannelOptions& options,
          std::shared_ptr<Direction> in, std::shared_ptr<Direction> out)
      : SimulatedDevice(simulation, fd),
        options_(options),
        in_(std::move(in)),
        out_(std::move(out)) {
    in_->receiver = this;
    out_->sender = this;
  }

  ~Channel() override {
    in_->receiver = nullptr;
    out_->sender = nullptr;
  }

  const char* kind() const noexcept override { return "channel"; }

  bool try_now(IoRequest& request) override {
    const bool dont_wait = request.flags & MSG_DONTWAIT;
    // Whether there is something at once is a matter of luck, as far as it can be. What wants all
    // might get a part.
    if (!dont_wait && ((request.flags & MSG_WAITALL) || random().one_in(2))) return false;
    Started attempt{.by = nullptr, .request = &request, .done = 0};
    auto result = move(attempt);
    if (!result && dont_wait) result = -EAGAIN;
    if (result) request.result = *result;
    return result.has_value();
  }

  void start(SimulatedContext& by, IoRequest& request) override {
    Started& started = slot(request);
    ROOST_CHECK(!started, "two coroutines wait on one direction of descriptor {}", fd_);
    started = {.by = &by, .request = &request, .done = 0};
    look(started);
  }

  // A while later, so that what it waits for may still come first. Bytes that moved count.
  void cancel(IoRequest& request) override {
    Started& started = slot(request);
    if (started.request != &request) return;  // answered already
    const auto end = [&started, wanted = &request] {
      if (started.request != wanted) return;
      const Started answered = std::exchange(started, {});
      const auto moved = static_cast<std::int64_t>(answered.done);
      answered.by->complete(*answered.request, moved > 0 ? moved : -ECANCELED);
    };
    later(random().between(0, options_.min_delay_ns), "cancel", guarded(end));
  }

  std::uint32_t ready_events() const override {
    std::uint32_t events = 0;
    if (!in_->arrived.empty() || in_->ended || in_->receive_closed) events |= POLLIN;
    if (space() > 0 || out_->send_closed || out_->receive_closed) events |= POLLOUT;
    if (in_->broken) events |= POLLIN | POLLOUT | POLLERR | POLLHUP;
    return events;
  }

  void close() override {
    ROOST_CHECK(!receiving_ && !sending_, "descriptor {} is closed with I/O in flight", fd_);
    end_sending();
    in_->receive_closed = true;
    in_->arrived.clear();
    wake(in_->sender);
  }

  void shut_down() {
    end_sending();
    in_->receive_closed = true;
    wake(this);
    wake(in_->sender);
  }

  void break_off() {
    for (Direction* direction : {in_.get(), out_.get()}) {
      direction->broken = true;
      direction->arrived.clear();
    }
    wake(this);
    wake(in_->sender);
  }

  std::string in_flight() const override {
    std::string text;
    if (receiving_) text += fmt::format("receiving for '{}' ", receiving_.by->name);
    if (sending_) text += fmt::format("sending for '{}' ", sending_.by->name);
    return text;
  }

 private:
  static bool receives(const IoRequest& request) noexcept {
    return request.op == IoRequest::Op::kRecv || request.op == IoRequest::Op::kRecvMsg;
  }

  // Where it puts what arrives.
  static std::span<const iovec> pieces(const IoRequest& request, iovec& only) noexcept {
    if (request.op == IoRequest::Op::kRecv) {
      only = {request.address, request.length};
      return std::span(&only, 1);
    }
    const auto& message = *static_cast<const msghdr*>(request.address);
    return std::span(message.msg_iov, message.msg_iovlen);
  }

  Started& slot(const IoRequest& request) {
    if (receives(request)) return receiving_;
    if (request.op == IoRequest::Op::kSendMsg) return sending_;
    refuse(request);
  }

  std::size_t space() const {
    const std::size_t used = out_->arrived.size() + out_->under_way;
    return used < options_.capacity ? options_.capacity - used : 0;
  }

  // The request's result, once it has one.
  std::optional<std::int64_t> move(Started& started) {
    const bool receive = receives(*started.request);
    if (!receive && started.request->op != IoRequest::Op::kSendMsg) refuse(*started.request);
    return receive ? receive_some(started) : send_some(started);
  }

  std::optional<std::int64_t> receive_some(Started& started) {
    IoRequest& request = *started.request;
    const auto so_far = static_cast<std::int64_t>(started.done);
    if (in_->broken) return so_far > 0 ? so_far : -ECONNRESET;
    iovec only;
    const std::span<const iovec> to = pieces(request, only);
    const std::size_t wanted = total_length(to.data(), to.size());
    if (in_->arrived.empty() || wanted == 0) {
      if (in_->ended || in_->receive_closed || wanted == 0) return so_far;
      return std::nullopt;
    }
    const bool all = request.flags & MSG_WAITALL;
    std::size_t count = std::min<std::size_t>(wanted - started.done, in_->arrived.size());
    if (!all) count = maybe_short(count, options_.short_one_in);
    const auto end = in_->arrived.begin() + static_cast<std::ptrdiff_t>(count);
    std::vector<std::byte> bytes(in_->arrived.begin(), end);
    scatter(to.data(), to.size(), started.done, bytes);
    if (!(request.flags & MSG_PEEK)) {
      in_->arrived.erase(in_->arrived.begin(), end);
      wake(in_->sender);
    }
    started.done += count;
    if (all && started.done < wanted && !(request.flags & MSG_DONTWAIT)) {
      return in_->ended ? std::optional(static_cast<std::int64_t>(started.done)) : std::nullopt;
    }
    return static_cast<std::int64_t>(started.done);
  }

  std::optional<std::int64_t> send_some(Started& started) {
    IoRequest& request = *started.request;
    const auto so_far = static_cast<std::int64_t>(started.done);
    if (out_->broken) return so_far > 0 ? so_far : -ECONNRESET;
    if (out_->send_closed || out_->receive_closed) return so_far > 0 ? so_far : -EPIPE;
    const auto& message = *static_cast<const msghdr*>(request.address);
    const std::size_t total = total_length(message.msg_iov, message.msg_iovlen);
    if (started.done == total) return so_far;
    if (space() == 0) return std::nullopt;
    const bool all = request.flags & MSG_WAITALL;
    std::size_t count = std::min(total - started.done, space());
    if (!all) count = maybe_short(count, options_.short_one_in);
    std::vector<std::byte> bytes(count);
    gather(message.msg_iov, message.msg_iovlen, started.done, bytes);
    send(std::move(bytes));
    started.done += count;
    if (all && started.done < total && !(request.flags & MSG_DONTWAIT)) return std::nullopt;
    return static_cast<std::int64_t>(started.done);
  }

  // The moment at which what is sent now arrives.
  std::int64_t arrival_delay() {
    std::int64_t at =
        simulation_.now_ns() + random().between(options_.min_delay_ns, options_.max_delay_ns);
    at = std::max(at, out_->last_arrival_ns + 1);
    out_->last_arrival_ns = at;
    return at - simulation_.now_ns();
  }

  void send(std::vector<std::byte> bytes) {
    out_->under_way += bytes.size();
    const auto arrive = [direction = out_, bytes = std::move(bytes)] {
      direction->under_way -= bytes.size();
      if (direction->broken || direction->receive_closed) return;
      direction->arrived.insert(direction->arrived.end(), bytes.begin(), bytes.end());
      wake(direction->receiver);
    };
    later(arrival_delay(), "arrival", arrive);
  }

  void end_sending() {
    if (std::exchange(out_->send_closed, true)) return;
    const auto arrive = [direction = out_] {
      direction->ended = true;
      wake(direction->receiver);
    };
    later(arrival_delay(), "end of stream", arrive);
  }

  // Something has changed for this end, if it still exists.
  static void wake(Channel* end) {
    if (!end) return;
    if (end->receiving_) end->look(end->receiving_);
    if (end->sending_) end->look(end->sending_);
  }

  // Tries the request a little later, so that the order in which requests come back is not that
  // in which they could.
  void look(Started& started) {
    const auto attempt = [this, &started, request = started.request] {
      if (started.request != request) return;  // answered already
      const auto result = move(started);
      if (!result) return;  // until the next change
      const Started answered = std::exchange(started, {});
      answered.by->complete(*answered.request, *result);
    };
    // An end is not closed while something is in flight; but an attempt may outlive its request.
    later(random().between(0, options_.min_delay_ns), "look", guarded(attempt));
  }

  template <class Action>
  std::function<void()> guarded(Action action) {
    return [alive = std::weak_ptr<const bool>(alive_), action] {
      if (!alive.expired()) action();
    };
  }

  const SimulatedChannelOptions options_;
  const std::shared_ptr<Direction> in_;
  const std::shared_ptr<Direction> out_;
  const std::shared_ptr<const bool> alive_ = std::make_shared<const bool>(true);
  Started receiving_;
  Started sending_;
};

}  // namespace

std::pair<std::unique_ptr<SimulatedDevice>, std::unique_ptr<SimulatedDevice>>
make_simulated_channel(Simulation& simulation, int fd, const SimulatedChannelOptions& options) {
  auto to = std::make_shared<Direction>();
  auto fro = std::make_shared<Direction>();
  return {std::make_unique<Channel>(simulation, fd, options, fro, to),
          std::make_unique<Channel>(simulation, fd + 1, options, to, fro)};
}

namespace {

Channel& as_channel(SimulatedDevice& device) {
  auto* const channel = dynamic_cast<Channel*>(&device);
  ROOST_CHECK(channel, "a {} is no channel", device.kind());
  return *channel;
}

}  // namespace

void shut_down_simulated_channel(SimulatedDevice& end) { as_channel(end).shut_down(); }

void break_simulated_channel(SimulatedDevice& end) { as_channel(end).break_off(); }

}  // namespace roost
