// SPDX-License-Identifier: MIT
// One thing that roost_sim_test runs with each seed.
//
// Threads: the simulation's.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>

#include "aio/test_machine.h"
#include "roost/base/check.h"

namespace roost::sim {

/// What a scenario reached, summed over all seeds. A counter that is still 0 at the end fails the
/// run: the scenario does not test what it is to test. So all are there from the start, and those
/// that are not abort.
class Counters {
 public:
  /// `names` are separated by blanks.
  explicit Counters(std::string_view names) {
    while (!names.empty()) {
      const std::size_t end = std::min(names.find(' '), names.size());
      if (end > 0) values_[std::string(names.substr(0, end))] = 0;
      names.remove_prefix(std::min(end + 1, names.size()));
    }
  }

  void add(const char* name, std::uint64_t by) {
    const auto counter = values_.find(name);
    ROOST_CHECK(counter != values_.end(), "the scenario does not list its counter '{}'", name);
    counter->second += by;
  }
  const std::map<std::string, std::uint64_t>& values() const noexcept { return values_; }

 private:
  std::map<std::string, std::uint64_t> values_;
};

struct Scenario {
  const char* name;
  const char* what;
  /// Ends when everything it started has; broken invariants abort.
  void (*run)(Simulation& simulation, SimulatedMachine& machine, Counters& counters);
  /// What it counts, and what the seeds together have to reach.
  const char* counters;
};

std::span<const Scenario> runtime_scenarios();
std::span<const Scenario> device_scenarios();
std::span<const Scenario> sync_scenarios();
std::span<const Scenario> wait_scenarios();
std::span<const Scenario> stop_scenarios();
std::span<const Scenario> lockfree_scenarios();
std::span<const Scenario> structured_scenarios();
std::span<const Scenario> pool_scenarios();
std::span<const Scenario> nbd_scenarios();
std::span<const Scenario> crash_scenarios();

}  // namespace roost::sim
