// SPDX-License-Identifier: MIT
// The contexts of a scenario, and a choice among them.
//
// Threads: the simulation's.
#pragma once

#include <array>
#include <cstddef>
#include <memory>

#include "scenario.h"

namespace roost::sim {

class Contexts {
 public:
  Contexts(Simulation& simulation, SimulatedMachine& machine) : random_(simulation.random()) {
    for (auto& context : all_) context = machine.add_context("shared");
  }
  AioContext& any() { return *all_[random_.below(all_.size())]; }
  AioContext& at(std::size_t i) { return *all_[i % all_.size()]; }

 private:
  Random& random_;
  std::array<std::shared_ptr<AioContext>, 3> all_;
};

// Checks that whoever was woken is where it waited.
#define CHECK_AT_HOME(home) \
  ROOST_CHECK(AioContext::current() == (home), "a coroutine woke on another context")

}  // namespace roost::sim
