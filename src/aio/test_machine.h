// SPDX-License-Identifier: MIT
// Where a stress scenario runs: on real threads, or in a simulation. A scenario written for a
// TestMachine is run both ways.
//
// Threads: a scenario's contexts and threads are the machine's. Threads that wait for others call
// relax() in their loops.
// Lifetime: contexts go before their machine; join_threads() before what the threads use.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "roost/aio/iothread.h"
#include "roost/aio/simulation.h"

namespace roost {

class TestMachine {
 public:
  virtual ~TestMachine() = default;
  TestMachine() = default;
  TestMachine(const TestMachine&) = delete;
  TestMachine& operator=(const TestMachine&) = delete;

  /// A context that its thread polls until the last reference goes. `may_spin` means something on
  /// real threads only.
  virtual std::shared_ptr<AioContext> add_context(std::string name, bool may_spin = true) = 0;

  virtual void add_thread(std::string name, std::function<void()> body) = 0;

  /// For whoever drives the scenario.
  virtual void wait_until(const std::function<bool()>& done) = 0;
  virtual void join_threads() = 0;

  /// For threads and contexts.
  virtual void relax() = 0;
  virtual void interrupt() {}

  /// An event that a simulation is to have every time.
  virtual void note(const char* /*what*/, std::uint64_t /*a*/ = 0, std::uint64_t /*b*/ = 0) {}
};

class RealMachine final : public TestMachine {
 public:
  explicit RealMachine(AioContextOptions options) : options_(std::move(options)) {}
  ~RealMachine() override { join_threads(); }

  std::shared_ptr<AioContext> add_context(std::string name, bool may_spin = true) override {
    AioContextOptions o = options_;
    o.name = std::move(name);
    if (!may_spin) o.poll_max_ns = 0;
    auto thread = std::make_shared<IOThread>(std::move(o));
    AioContext* const context = &thread->context();
    return {std::move(thread), context};
  }

  void add_thread(std::string /*name*/, std::function<void()> body) override {
    threads_.emplace_back(std::move(body));
  }

  void wait_until(const std::function<bool()>& done) override {
    while (!done()) std::this_thread::yield();
  }

  void join_threads() override {
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }

  void relax() override { std::this_thread::yield(); }

 private:
  const AioContextOptions options_;
  std::vector<std::thread> threads_;
};

class SimulatedMachine final : public TestMachine {
 public:
  explicit SimulatedMachine(Simulation& simulation) noexcept : simulation_(simulation) {}

  std::shared_ptr<AioContext> add_context(std::string name, bool /*may_spin*/ = true) override {
    return simulation_.make_context(std::move(name));
  }

  void add_thread(std::string name, std::function<void()> body) override {
    ++running_;
    simulation_.add_thread(std::move(name), [this, body = std::move(body)] {
      body();
      --running_;
    });
  }

  void wait_until(const std::function<bool()>& done) override { simulation_.run_until(done); }
  void join_threads() override {
    simulation_.run_until([this] { return running_ == 0; });
  }
  void relax() override { simulation_.relax(); }
  void interrupt() override { simulation_.interrupt(); }
  void note(const char* what, std::uint64_t a = 0, std::uint64_t b = 0) override {
    simulation_.note(what, a, b);
  }

 private:
  Simulation& simulation_;
  int running_ = 0;
};

}  // namespace roost
