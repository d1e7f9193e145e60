// SPDX-License-Identifier: MIT
// A socket of the simulation as a channel.
//
// Threads: the simulation's. Lifetime: as every Channel; the simulation outlives it.
#pragma once

#include <cstdint>
#include <memory>
#include <stop_token>
#include <string>
#include <utility>

#include "roost/aio/simulation.h"
#include "roost/io/socket_channel.h"

namespace roost::sim {

class SimulatedSocket final : public SocketChannel {
 public:
  /// `gone` is set when it goes, and the descriptor with it.
  SimulatedSocket(Simulation& simulation, int fd, std::string name,
                  std::shared_ptr<bool> gone = nullptr)
      : SocketChannel(UniqueFd(fd), std::move(name)),
        simulation_(simulation),
        gone_(std::move(gone)) {}
  ~SimulatedSocket() override {
    simulation_.close(release_fd());
    if (gone_) *gone_ = true;
  }

  void abort() noexcept override { simulation_.shut_down(fd()); }
  bool can_send_files() const noexcept override { return false; }
  Task<void> linger(std::int64_t, std::stop_token) override { co_return; }

 private:
  Simulation& simulation_;
  const std::shared_ptr<bool> gone_;
};

}  // namespace roost::sim
