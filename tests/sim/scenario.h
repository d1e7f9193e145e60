// SPDX-License-Identifier: MIT
// One thing that roost_sim_test runs with each seed.
//
// Threads: the simulation's.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>

#include "aio/test_machine.h"
#include "roost/base/check.h"

namespace roost::sim {

/// What a scenario reached, summed over all seeds. A counter that is required and still 0 at the
/// end fails the run: the scenario does not test what it is to test.
class Counters {
 public:
  void add(const char* name, std::uint64_t by) { values_[name] += by; }
  const std::map<std::string, std::uint64_t>& values() const noexcept { return values_; }

 private:
  std::map<std::string, std::uint64_t> values_;
};

struct Scenario {
  const char* name;
  const char* what;
  /// Ends when everything it started has; broken invariants abort.
  void (*run)(Simulation& simulation, SimulatedMachine& machine, Counters& counters);
};

std::span<const Scenario> runtime_scenarios();
std::span<const Scenario> device_scenarios();
std::span<const Scenario> sync_scenarios();
std::span<const Scenario> wait_scenarios();
std::span<const Scenario> stop_scenarios();
std::span<const Scenario> nbd_scenarios();
std::span<const Scenario> crash_scenarios();

}  // namespace roost::sim
