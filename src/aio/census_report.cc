// SPDX-License-Identifier: MIT
#include "roost/aio/census_report.h"

#include <fmt/format.h>

#include <chrono>
#include <condition_variable>
#include <iterator>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "roost/aio/aio_context.h"
#include "roost/base/check.h"

namespace roost {

namespace {

// Outlives the census: a context may answer when nobody waits any more.
struct Answers {
  std::mutex mutex;  // guards everything below
  std::condition_variable changed;
  std::size_t outstanding = 0;
  std::unordered_map<const Coroutine*, CoroutineReport> reports;
};

std::int64_t age_ns(const CoroutineInfo& info, std::int64_t now_ns) {
  const auto ticks = static_cast<std::uint32_t>(now_ns / CoContext::kTickNs) - info.since_tick;
  // A loop may have looked at its clock after we did at ours.
  return static_cast<std::int32_t>(ticks) < 0 ? 0 : std::int64_t{ticks} * CoContext::kTickNs;
}

void answer(Answers& answers, const AioContext& context) {
  auto here = list_coroutines_here();
  const std::int64_t now = context.clock().now_ns();
  std::lock_guard lock(answers.mutex);
  for (CoroutineInfo& info : here) {
    const Coroutine* const id = info.id;
    const std::int64_t age = age_ns(info, now);
    answers.reports[id] = {
        .info = std::move(info), .context = context.name(), .age_ns = age, .answered = true};
  }
  --answers.outstanding;
  answers.changed.notify_all();
}

}  // namespace

std::vector<CoroutineReport> take_census(std::int64_t timeout_ns) {
  if (Coroutine* self = Coroutine::self()) {
    panicf("a census would block inside coroutine '{}'", self->name());
  }
  const auto answers = std::make_shared<Answers>();
  std::unordered_map<std::uint32_t, std::string> names;
  AioContext* const current = AioContext::current();
  AioContext::for_each([&](AioContext& context) {
    names[context.index()] = context.name();
    {
      std::lock_guard lock(answers->mutex);
      ++answers->outstanding;
    }
    if (&context != current) {
      context.inspect([answers, &context] { answer(*answers, context); });
    }
  });
  if (current) answer(*answers, *current);
  {
    std::unique_lock lock(answers->mutex);
    answers->changed.wait_for(lock, std::chrono::nanoseconds(timeout_ns),
                              [&] { return answers->outstanding == 0; });
  }
  std::vector<CoroutineReport> all;
  auto listed = list_coroutines();
  const std::int64_t now = real_clock().now_ns();
  std::lock_guard lock(answers->mutex);
  for (CoroutineInfo& info : listed) {
    if (const auto found = answers->reports.find(info.id); found != answers->reports.end()) {
      all.push_back(std::move(found->second));
    } else {
      const auto name = names.find(info.context);
      const std::int64_t age = age_ns(info, now);
      all.push_back({.info = std::move(info),
                     .context = name == names.end() ? "" : name->second,
                     .age_ns = age,
                     .answered = false});
    }
  }
  return all;
}

std::string to_text(const std::vector<CoroutineReport>& census) {
  std::string text;
  const auto out = std::back_inserter(text);
  for (const CoroutineReport& report : census) {
    const CoroutineInfo& info = report.info;
    fmt::format_to(out, "coroutine '{}' ({}) on {}: {}{}{}, {} ms{}\n", info.name,
                   fmt::ptr(info.id), report.context.empty() ? "no context" : report.context,
                   to_string(info.state), info.waits_for ? " for " : "",
                   info.waits_for ? info.waits_for : "", report.age_ns / 1'000'000,
                   report.answered ? "" : " (its context did not answer)");
    if (info.locks > 0) fmt::format_to(out, "  holds {} coroutine locks\n", info.locks);
    fmt::format_to(out, "  created at {}\n", describe(info.created_at));
    const char* label = "awaits at ";
    for (const auto& place : info.await_chain) {
      fmt::format_to(out, "  {} {}\n", label, describe(place));
      label = "          ";
    }
    if (info.await_chain.empty() && info.awaits_at.line() != 0) {
      fmt::format_to(out, "  {} {}\n", label, describe(info.awaits_at));
    }
  }
  return text;
}

}  // namespace roost
