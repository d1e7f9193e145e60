// SPDX-License-Identifier: MIT
// Waits that end in more than one way: completions, gates, stops, the context lock, moves.

#include <cerrno>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "contexts.h"
#include "helpers.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/context_binding.h"
#include "roost/aio/io.h"
#include "roost/aio/timer.h"
#include "roost/coro/completion.h"
#include "roost/coro/gate.h"
#include "roost/sync/co_event.h"
#include "roost/sync/co_mutex.h"
#include "roost/sync/co_queue.h"
#include "roost/sync/co_semaphore.h"

namespace roost::sim {

namespace {

// A token is fired or dropped by another thread, by a coroutine elsewhere or by the one that is
// going to wait; and the wait may be stopped.
void completion(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Contexts contexts(simulation, machine);
  Helpers helpers(simulation, machine);
  Random& random = simulation.random();
  using Token = std::shared_ptr<CompletionToken<int>>;
  constexpr int kCoroutines = 5;
  constexpr int kEach = 8;
  int ended = 0;
  int firing = 0;
  const auto fire_elsewhere = [&](Token token, int answer) -> Task<void> {
    if (random.one_in(2)) co_await sleep_for(2'000);
    token->fire(answer);
    --firing;
  };
  const auto body = [&](int me) -> Task<void> {
    AioContext* const home = AioContext::current();
    for (int i = 0; i < kEach; ++i) {
      const int answer = 100 * me + i;
      Completion<int> done("an answer");
      Token token = std::make_shared<CompletionToken<int>>(done.token());
      bool dropped = false;
      switch (random.below(4)) {
        case 0:
          helpers.give([token = std::move(token), answer] { token->fire(answer); });
          break;
        case 1:
          dropped = true;
          helpers.give([token = std::move(token)]() mutable { token.reset(); });
          token.reset();
          break;
        case 2:
          ++firing;
          spawn(contexts.any(), fire_elsewhere(std::move(token), answer), "firing");
          break;
        default:
          token->fire(answer);
          counters.add("fired_before", 1);
          break;
      }
      const auto stop = std::make_shared<std::stop_source>();
      if (random.one_in(2)) helpers.give_stop(stop);
      const std::stop_token stopped = stop->get_token();
      Result<int> result = co_await done.wait(stopped);
      CHECK_AT_HOME(home);
      // If it was the stop that ended the wait, the answer is still to come.
      if (!result && stopped.stop_requested() && (!dropped || random.one_in(2))) {
        counters.add("stopped", 1);
        if (random.one_in(4)) continue;  // and nobody wants it any more
        if (dropped && done.fired()) continue;
        result = co_await done.wait();
        CHECK_AT_HOME(home);
      }
      if (dropped) {
        ROOST_CHECK(!result && result.error().code() == ECANCELED, "a dropped token gave a result");
        counters.add("dropped", 1);
      } else {
        ROOST_CHECK(result && *result == answer, "coroutine {} got a wrong answer", me);
      }
      simulation.note("answer", static_cast<std::uint64_t>(answer), dropped);
    }
    ++ended;
  };
  for (int i = 0; i < kCoroutines; ++i) simulation.spawn(contexts.any(), body(i), "asking");
  machine.wait_until([&] { return ended == kCoroutines && firing == 0; });
  helpers.finish(machine, counters);
}

// Requests come and go through a gate that others close, wait for and open again.
void gate(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Contexts contexts(simulation, machine);
  Helpers helpers(simulation, machine);
  Random& random = simulation.random();
  Gate gate("the requests");
  int inside = 0;
  int closed_by = 0;  // drains that are through: nobody may enter
  int ended = 0;
  constexpr int kRequesters = 5;
  constexpr int kDrains = 2;
  const auto part = [&]() -> Task<void> {
    co_await sleep_for(1'000);
    --inside;
    gate.leave();
  };
  const auto requester = [&]() -> Task<void> {
    for (int i = 0; i < 20; ++i) {
      if (Gate::Pass pass = gate.try_pass()) {
        ROOST_CHECK(closed_by == 0, "a request entered a gate that {} drains hold", closed_by);
        ++inside;
        if (random.one_in(3)) {
          gate.enter_inside();
          ++inside;
          counters.add("parts", 1);
          spawn(contexts.any(), part(), "part");
        }
        if (random.one_in(2)) co_await sleep_for(3'000);
        if (random.one_in(3)) co_await move_to(contexts.any());
        --inside;
      } else {
        counters.add("refused", 1);
        co_await sleep_for(5'000);
      }
    }
    ++ended;
  };
  const auto drain = [&](std::uint64_t me) -> Task<void> {
    AioContext* const home = AioContext::current();
    for (int i = 0; i < 6; ++i) {
      co_await sleep_for(static_cast<std::int64_t>(random.below(20'000)));
      gate.close();
      bool idle = true;
      if (random.one_in(2)) {
        const auto stop = std::make_shared<std::stop_source>();
        helpers.give_stop(stop);
        const std::stop_token stopped = stop->get_token();
        const Result<void> result = co_await gate.idle(stopped);
        idle = result.has_value();
        counters.add("stopped", !idle);
      } else {
        co_await gate.idle();
      }
      CHECK_AT_HOME(home);
      if (idle) {
        ++closed_by;
        ROOST_CHECK(inside == 0 && gate.in_flight() == 0, "{} requests during a drain", inside);
        simulation.note("drained", me);
        if (random.one_in(2)) co_await sleep_for(4'000);
        ROOST_CHECK(inside == 0, "{} requests during a drain", inside);
        counters.add("both", closed_by == kDrains);
        --closed_by;
      }
      gate.open();
    }
    ++ended;
  };
  for (int i = 0; i < kRequesters; ++i) simulation.spawn(contexts.any(), requester(), "request");
  for (int i = 0; i < kDrains; ++i) {
    simulation.spawn(contexts.any(), drain(static_cast<std::uint64_t>(i)), "drain");
  }
  machine.wait_until(
      [&] { return ended == kRequesters + kDrains && inside == 0 && gate.in_flight() == 0; });
  helpers.finish(machine, counters);
}

// What all kinds of waits leave behind when they are stopped: nothing.
void stops(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Contexts contexts(simulation, machine);
  Helpers helpers(simulation, machine);
  Random& random = simulation.random();
  CoMutex lock;
  CoMutex queue_lock;
  CoQueue queue;
  CoSemaphore units(2);
  CoEvent event;
  int tickets = 0;  // what the queue is about, under its lock
  int holders = 0;
  std::uint64_t taken = 0;
  int ended = 0;
  constexpr int kCoroutines = 6;
  const auto count = [&](const char* what, const char* stopped, bool done) {
    counters.add(done ? what : stopped, 1);
    simulation.note(what, done);
    return done;
  };
  const auto body = [&](int me) -> Task<void> {
    AioContext* const home = AioContext::current();
    for (int i = 0; i < 15; ++i) {
      const auto source = std::make_shared<std::stop_source>();
      if (!random.one_in(3)) helpers.give_stop(source);
      const std::stop_token stop = source->get_token();
      // Some waits have no other end.
      const bool stops_for_sure = random.one_in(4);
      if (stops_for_sure) helpers.give_stop(source);
      switch (random.below(5)) {
        case 0: {
          Result<CoMutex::Guard> guard = co_await lock.lock(stop);
          if (!count("locked", "lock_stopped", guard.has_value())) break;
          ROOST_CHECK(++holders == 1, "{} coroutines hold a mutex", holders);
          if (random.one_in(2)) co_await sleep_for(3'000);
          --holders;
          break;
        }
        case 1: {
          const Result<void> acquired = co_await units.acquire(2, stop);
          if (!count("acquired", "acquire_stopped", acquired.has_value())) break;
          taken += 2;
          ROOST_CHECK(taken == 2, "{} of 2 units are taken", taken);
          co_await sleep_for(3'000);
          taken -= 2;
          units.release(2);
          break;
        }
        case 2: {
          auto guard = co_await queue_lock.lock();
          if (me % 2) {
            ++tickets;
            queue.wake_one();
            break;
          }
          // An odd coroutine brings it, perhaps; else the stop comes.
          if (!stops_for_sure) helpers.give_stop(source);
          bool got = true;
          while (tickets == 0 && got) {
            const Result<void> woken = co_await queue.wait(guard, stop);
            got = woken.has_value();
          }
          ROOST_CHECK(guard, "a wait for a queue ended without the lock");
          if (tickets > 0) --tickets;
          count("ticket", "ticket_stopped", got);
          break;
        }
        case 3: {
          if (!stops_for_sure) helpers.give_stop(source);
          const Result<void> set = co_await event.wait(stop);
          ROOST_CHECK(!set, "an event that nobody sets came");
          counters.add("event_stopped", 1);
          break;
        }
        default: {
          const std::int64_t until = simulation.now_ns() + 10'000;
          const Result<void> slept = co_await sleep_for(10'000, stop);
          if (!count("slept", "sleep_stopped", slept.has_value())) break;
          ROOST_CHECK(simulation.now_ns() >= until, "a sleep ended early");
          break;
        }
      }
      CHECK_AT_HOME(home);
      if (source->stop_requested() && random.one_in(4)) co_await move_to(*home);
    }
    ++ended;
  };
  for (int i = 0; i < kCoroutines; ++i) simulation.spawn(contexts.any(), body(i), "waiting");
  machine.wait_until([&] { return ended == kCoroutines; });
  helpers.finish(machine, counters);
  ROOST_CHECK(units.available() == 2 && holders == 0, "a stopped wait holds something");
  counters.add("lock_stopped_late", lock.statistics().cancelled_late);
}

// A stopped receive leaves its bytes.
void stopped_receives(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Contexts contexts(simulation, machine);
  Helpers helpers(simulation, machine);
  Random& random = simulation.random();
  const auto channel = simulation.make_channel({.short_one_in = 3});
  constexpr unsigned kBytes = 200;
  int ended = 0;
  const auto sender = [&, far = channel.second]() -> Task<void> {
    unsigned sent = 0;
    std::array<std::byte, 16> bytes;
    while (sent < kBytes) {
      const std::size_t size = std::min<std::size_t>(1 + random.below(bytes.size()), kBytes - sent);
      for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(sent + i);
      iovec piece{bytes.data(), size};
      msghdr message{};
      message.msg_iov = &piece;
      message.msg_iovlen = 1;
      const std::int64_t n = co_await io_sendmsg(far, message);
      ROOST_CHECK(n > 0, "a send moved nothing: {}", n);
      sent += static_cast<unsigned>(n);
      if (random.one_in(2)) co_await sleep_for(30'000);
    }
    ++ended;
  };
  const auto receiver = [&, near = channel.first]() -> Task<void> {
    AioContext* const home = AioContext::current();
    unsigned received = 0;
    std::array<std::byte, 16> bytes;
    while (received < kBytes) {
      const auto source = std::make_shared<std::stop_source>();
      if (!random.one_in(3)) helpers.give_stop(source);
      const std::stop_token stop = source->get_token();
      const std::int64_t n = co_await io_recv(near, bytes, 0, stop);
      CHECK_AT_HOME(home);
      if (n == -ECANCELED) {
        counters.add("stopped", 1);
        continue;
      }
      ROOST_CHECK(n > 0, "a receive failed: {}", n);
      for (std::int64_t i = 0; i < n; ++i) {
        ROOST_CHECK(bytes[static_cast<std::size_t>(i)] == static_cast<std::byte>(received),
                    "byte {} is missing", received);
        ++received;
      }
      counters.add("received_although_stopped", stop.stop_requested());
      simulation.note("received", received);
    }
    ++ended;
  };
  simulation.spawn(contexts.any(), sender(), "sender");
  simulation.spawn(contexts.any(), receiver(), "receiver");
  machine.wait_until([&] { return ended == 2; });
  helpers.finish(machine, counters);
  simulation.close(channel.first);
  simulation.close(channel.second);
}

// A stopped send has sent nothing.
void stopped_sends(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Contexts contexts(simulation, machine);
  Helpers helpers(simulation, machine);
  Random& random = simulation.random();
  const auto channel = simulation.make_channel({.capacity = 24, .short_one_in = 3});
  constexpr unsigned kBytes = 200;
  int ended = 0;
  const auto sender = [&, near = channel.first]() -> Task<void> {
    AioContext* const home = AioContext::current();
    unsigned sent = 0;
    std::array<std::byte, 16> bytes;
    while (sent < kBytes) {
      const std::size_t size = std::min<std::size_t>(1 + random.below(bytes.size()), kBytes - sent);
      for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(sent + i);
      iovec piece{bytes.data(), size};
      msghdr message{};
      message.msg_iov = &piece;
      message.msg_iovlen = 1;
      const auto source = std::make_shared<std::stop_source>();
      if (!random.one_in(3)) helpers.give_stop(source);
      const std::stop_token stop = source->get_token();
      const std::int64_t n = co_await io_sendmsg(near, message, 0, stop);
      CHECK_AT_HOME(home);
      if (n == -ECANCELED) {
        counters.add("stopped", 1);
        continue;
      }
      ROOST_CHECK(n > 0, "a send failed: {}", n);
      counters.add("sent_although_stopped", stop.stop_requested());
      sent += static_cast<unsigned>(n);
      simulation.note("sent", sent);
    }
    ++ended;
  };
  const auto receiver = [&, far = channel.second]() -> Task<void> {
    unsigned received = 0;
    std::array<std::byte, 16> bytes;
    while (received < kBytes) {
      if (random.one_in(2)) co_await sleep_for(30'000);
      const std::int64_t n = co_await io_recv(far, bytes);
      ROOST_CHECK(n > 0, "a receive moved nothing: {}", n);
      for (std::int64_t i = 0; i < n; ++i) {
        ROOST_CHECK(bytes[static_cast<std::size_t>(i)] == static_cast<std::byte>(received),
                    "byte {} is missing, or came twice", received);
        ++received;
      }
    }
    ++ended;
  };
  simulation.spawn(contexts.any(), sender(), "sender");
  simulation.spawn(contexts.any(), receiver(), "receiver");
  machine.wait_until([&] { return ended == 2; });
  helpers.finish(machine, counters);
  simulation.close(channel.first);
  simulation.close(channel.second);
}

// Foreign threads hold a context while bottom halves, timers and coroutines want to run there.
void context_lock(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  auto context = machine.add_context("held");
  Random& random = simulation.random();
  int foreigners = 0;
  int touched = 0;
  const auto touch = [&] {
    ROOST_CHECK(foreigners == 0, "a callback ran while a foreign thread held its context");
    simulation.interrupt();
    ROOST_CHECK(foreigners == 0, "a foreign thread got a context that dispatches");
    ++touched;
  };
  std::optional<Timer> timer;
  int ticks = 0;
  context->run([&] {
    timer.emplace(*context, [&] {
      touch();
      if (++ticks < 40) timer->arm_after(5'000);
    });
    timer->arm_after(5'000);
  });
  BottomHalf bh(*context, touch);
  int ended = 0;
  constexpr int kThreads = 3;
  int over = 0;
  // Now and then it keeps the context from sleeping.
  const auto body = [&]() -> Task<void> {
    while (over < kThreads) {
      for (auto n = random.below(20); n > 0; --n) {
        touch();
        co_await move_to(*context);
      }
      co_await sleep_for(10'000);
    }
    ++ended;
  };
  simulation.spawn(*context, body(), "busy");
  for (int t = 0; t < kThreads; ++t) {
    machine.add_thread("acquirer", [&] {
      for (int i = 0; i < 12; ++i) {
        for (auto n = random.below(6); n > 0; --n) machine.relax();
        bh.schedule();
        {
          ContextGuard guard(*context);
          ROOST_CHECK(++foreigners == 1, "{} threads hold a context", foreigners);
          for (auto n = random.below(4); n > 0; --n) machine.relax();
          if (random.one_in(3)) {
            ContextGuard again(*context);
            machine.interrupt();
          }
          simulation.note("held");
          --foreigners;
        }
      }
      ++over;
    });
  }
  machine.join_threads();
  machine.wait_until([&] { return ended == 1 && over == kThreads && ticks == 40; });
  const auto statistics = context->run([&] {
    timer.reset();
    return context->statistics();
  });
  counters.add("passed_busy", statistics.lock_passed_busy);
  counters.add("passed_idle", statistics.lock_passed_idle);
  counters.add("home_waited", statistics.lock_waits);
}

// An object that works in a bottom half is moved about by several coroutines.
void moving(Simulation& simulation, SimulatedMachine& machine, Counters& counters) {
  Contexts contexts(simulation, machine);
  Random& random = simulation.random();
  ContextBinding binding(contexts.at(0));
  AioContext* at = nullptr;
  std::optional<BottomHalf> bh;
  std::uint64_t turns = 0;
  const auto attach_to = [&](AioContext& to) {
    ROOST_CHECK(!at, "attached twice");
    at = &to;
    bh.emplace(to, [&] {
      ROOST_CHECK(AioContext::current() == at, "an object worked on a context it has left");
      // It gives time the chance to pass.
      if (++turns % 4) bh->schedule();
    });
    bh->schedule();
  };
  const auto detach = [&](AioContext& from) {
    ROOST_CHECK(at == &from, "detached from a context it is not on");
    at = nullptr;
    bh.reset();
  };
  std::optional<ContextListener> listener;
  contexts.at(0).run([&] {
    listener.emplace(binding, detach, [&](AioContext& to) -> Result<void> {
      attach_to(to);
      return {};
    });
    attach_to(contexts.at(0));
  });
  int ended = 0;
  constexpr int kMovers = 3;
  const auto mover = [&]() -> Task<void> {
    AioContext* const home = AioContext::current();
    for (int i = 0; i < 10; ++i) {
      const Result<void> moved = co_await binding.move_to(contexts.any());
      CHECK_AT_HOME(home);
      counters.add(moved ? "moved" : "refused", 1);
      simulation.note("moved", moved.has_value());
      if (random.one_in(2)) co_await sleep_for(5'000);
    }
    ++ended;
  };
  for (int i = 0; i < kMovers; ++i) simulation.spawn(contexts.any(), mover(), "mover");
  machine.wait_until([&] { return ended == kMovers; });
  binding.context().run([&] {
    listener.reset();
    bh.reset();
  });
}

constexpr Scenario kScenarios[] = {
    {"completion", "tokens that are fired, dropped and given up", completion,
     "fired_before stopped dropped callbacks_awaited"},
    {"gate", "requests meet drains", gate, "parts refused stopped both callbacks_awaited"},
    {"stops", "waits of all kinds are stopped", stops,
     "locked lock_stopped lock_stopped_late acquired acquire_stopped ticket ticket_stopped "
     "event_stopped slept "
     "sleep_stopped callbacks_awaited"},
    {"stopped_receives", "a receive that is stopped leaves its bytes", stopped_receives,
     "stopped received_although_stopped callbacks_awaited"},
    {"stopped_sends", "a send that is stopped has sent nothing", stopped_sends,
     "stopped sent_although_stopped callbacks_awaited"},
    {"context_lock", "foreign threads hold a context", context_lock,
     "passed_busy passed_idle home_waited"},
    {"moving", "a busy object is moved between contexts", moving, "moved refused"},
};

}  // namespace

std::span<const Scenario> wait_scenarios() { return kScenarios; }

}  // namespace roost::sim
