// SPDX-License-Identifier: MIT
// Threads of a scenario that have no context, and do what the coroutines ask of other threads.
//
// Threads: the simulation's.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <stop_token>
#include <utility>
#include <vector>

#include "interruptible_stop.h"
#include "scenario.h"

namespace roost::sim {

/// Two threads without a context, which do what they are told: soon, in any order.
class Helpers {
 public:
  Helpers(Simulation& simulation, SimulatedMachine& machine) : simulation_(simulation) {
    for (int i = 0; i < 2; ++i) {
      machine.add_thread("helper", [this, &machine] {
        while (!over_ || !jobs_.empty()) {
          machine.relax();
          if (jobs_.empty()) continue;
          const auto at = static_cast<std::ptrdiff_t>(simulation_.random().below(jobs_.size()));
          const auto job = std::move(jobs_[static_cast<std::size_t>(at)]);
          jobs_.erase(jobs_.begin() + at);
          for (auto n = simulation_.random().below(6); n > 0; --n) machine.relax();
          job();
        }
      });
    }
  }

  void give(std::function<void()> job) { jobs_.push_back(std::move(job)); }

  void give_stop(const std::shared_ptr<std::stop_source>& source) {
    give([source] { source->request_stop(); });
  }

  /// When all is done.
  void finish(SimulatedMachine& machine) {
    over_ = true;
    machine.join_threads();
  }
  /// Likewise, and counts how often a stop's callback, interrupted, had to be waited for.
  void finish(SimulatedMachine& machine, Counters& counters) {
    finish(machine);
    counters.add("callbacks_awaited", stop_callbacks_awaited);
  }

 private:
  Simulation& simulation_;
  std::vector<std::function<void()>> jobs_;
  bool over_ = false;
};

}  // namespace roost::sim
