// SPDX-License-Identifier: MIT
#include "roost/coro/census.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <optional>

#include "roost/base/check.h"

namespace roost {

// What the census reads of a control block.
struct CensusAccess {
  using Place = Coroutine::Place;

  // From atomics alone. Nothing, if no coroutine lives there.
  static std::optional<CoroutineInfo> read(const Coroutine& co) noexcept {
    constexpr auto relaxed = std::memory_order_relaxed;
    // The state first, then the name. Acquire (both): a coroutine's first state is stored after its
    // block was marked free, and the name after everything else; so with its state and a name, what
    // is read is all of this coroutine, or of one that got the block after it.
    const CoStateValue seen = co.state_.peek();
    if (seen.state() == CoState::kEnded) return {};
    const char* const name = co.name_.load(std::memory_order_acquire);
    if (!name) return {};
    const bool waits = seen.state() == CoState::kWaiting || seen.owned();
    return CoroutineInfo{
        .id = &co,
        .name = name,
        .state = seen.state() == CoState::kInspected ? CoState::kIdle : seen.state(),
        .context = seen.context(),
        .waits_for = waits ? co.waits_for_.load(relaxed) : nullptr,
        .since_tick = co.since_.load(relaxed),
        .locks = co.locks(),
        .created_at = co.created_at_.load(relaxed),
        .placed_at = co.placed_at_.load(relaxed),
        .awaits_at = co.awaits_at_.load(relaxed),
        .await_chain = {}};
  }

  // On the thread of `home`, where nothing is dispatched meanwhile.
  static void read_chain_here(Coroutine& co, const CoContext& home, CoroutineInfo& info) {
    const CoStateValue seen = co.state_.peek();
    // In this order, as in read(): with the name, the home is that of this coroutine.
    if (!co.name_.load(std::memory_order_acquire)) return;
    if (co.home_.load(std::memory_order_acquire) != &home) return;
    switch (seen.state()) {
      case CoState::kWaiting:
        // It goes on here, whoever wakes it.
        read_chain(co.suspended_at_, info);
        break;
      case CoState::kScheduled:
        // As above; or in its turn here, unless somebody holds a reference and enters it elsewhere.
        if (seen.owned() || (seen.context() == home.index() && seen.entries() == 1)) {
          read_chain(co.suspended_at_, info);
        }
        break;
      case CoState::kIdle:
        // Whoever holds it may enter it anywhere, so it is held for a moment. A block that has
        // changed hands since has another state word.
        if (co.state_.begin_inspection(seen)) {
          if (co.suspended_at_ != co.root_ || info.awaits_at.line() != 0) {
            read_chain(co.suspended_at_, info);
          }
          co.state_.end_inspection();
        }
        break;
      case CoState::kRunning:
        // Further down this thread's stack, under a nested poll, or the caller.
        if (co.runs_on_this_thread()) read_chain(co.next_, info);
        break;
      case CoState::kListed:
        read_chain(co.suspended_at_, info);
        break;
      case CoState::kEnded:
      case CoState::kInspected:
        break;
    }
  }

  template <class Add>
  static void walk(std::coroutine_handle<> frame, Add add) {
    while (frame) {
      const auto& promise =
          std::coroutine_handle<PromiseBase>::from_address(frame.address()).promise();
      if (!add(promise.awaits_at)) return;
      frame = promise.continuation;
    }
  }

  static void read_chain(std::coroutine_handle<> frame, CoroutineInfo& info) {
    walk(frame, [&](Place place) {
      info.await_chain.push_back(place);
      return true;
    });
  }

  static std::coroutine_handle<> running_frame(const Coroutine& co) noexcept { return co.next_; }
};

std::vector<CoroutineInfo> list_coroutines() {
  std::vector<CoroutineInfo> all;
  for_each_control_block(
      [](void* block, void* argument) {
        if (auto info = CensusAccess::read(*static_cast<Coroutine*>(block))) {
          static_cast<std::vector<CoroutineInfo>*>(argument)->push_back(std::move(*info));
        }
      },
      &all);
  return all;
}

std::vector<CoroutineInfo> list_coroutines_here() {
  struct Visit {
    std::vector<CoroutineInfo> all;
    CoContext& home;
  } visit{{}, *this_thread().context};
  for_each_control_block(
      [](void* block, void* argument) {
        auto& [all, home] = *static_cast<Visit*>(argument);
        auto& co = *static_cast<Coroutine*>(block);
        if (co.home() != &home) return;
        auto info = CensusAccess::read(co);
        if (!info) return;
        CensusAccess::read_chain_here(co, home, *info);
        all.push_back(std::move(*info));
      },
      &visit);
  return std::move(visit.all);
}

std::size_t report_leaked_coroutines() noexcept {
  constexpr std::size_t kAtMost = 10;
  const auto all = list_coroutines();
  for (std::size_t i = 0; i < std::min(all.size(), kAtMost); ++i) {
    const CoroutineInfo& info = all[i];
    fmt::print(stderr, "roost: coroutine '{}', created at {}, never ended; it is {}{}{}\n",
               info.name, describe(info.created_at), to_string(info.state),
               info.waits_for ? " for " : "", info.waits_for ? info.waits_for : "");
  }
  if (all.size() > kAtMost) {
    fmt::print(stderr, "roost: and {} more coroutines never ended\n", all.size() - kAtMost);
  }
  return all.size();
}

std::size_t own_await_chain(Coroutine::Place* places, std::size_t size) noexcept {
  const Coroutine* const self = Coroutine::self();
  if (!self) return 0;
  std::size_t count = 0;
  CensusAccess::walk(CensusAccess::running_frame(*self), [&](Coroutine::Place place) {
    if (count == size) return false;
    places[count++] = place;
    return true;
  });
  return count;
}

}  // namespace roost
