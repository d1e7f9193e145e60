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
  std::size_t outstanding = 0;  // questions
  std::unordered_map<const Coroutine*, CoroutineReport> reports;
};

std::int64_t age_ns(const CoroutineInfo& info, std::int64_t now_ns) {
  if (info.since_tick == 0) return -1;  // its loop had not looked at its clock yet
  const auto ticks = static_cast<std::uint32_t>(now_ns / CoContext::kTickNs) - info.since_tick;
  // A loop may have looked at its clock after we did at ours.
  return static_cast<std::int32_t>(ticks) < 0 ? 0 : std::int64_t{ticks} * CoContext::kTickNs;
}

std::string age_text(std::int64_t age_ns) {
  return age_ns < 0 ? "" : fmt::format(", {} ms", age_ns / 1'000'000);
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
}

// What a context is asked. It goes when it was answered, or with a context that was never polled
// again: in both cases there is nothing more to wait for.
class Question {
 public:
  explicit Question(std::shared_ptr<Answers> answers) : answers_(std::move(answers)) {
    std::lock_guard lock(answers_->mutex);
    ++answers_->outstanding;
  }
  ~Question() {
    std::lock_guard lock(answers_->mutex);
    --answers_->outstanding;
    answers_->changed.notify_all();
  }
  Question(const Question&) = delete;
  Question& operator=(const Question&) = delete;

  void put_to(const AioContext& context) const { answer(*answers_, context); }

 private:
  const std::shared_ptr<Answers> answers_;
};

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
    if (&context == current) return;
    // Shared, since a std::function can be copied.
    context.inspect(
        [question = std::make_shared<Question>(answers), &context] { question->put_to(context); });
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
    fmt::format_to(out, "coroutine '{}' ({}) on {}: {}{}{}{}{}\n", info.name, fmt::ptr(info.id),
                   report.context.empty() ? "no context" : report.context, to_string(info.state),
                   info.waits_for ? " for " : "", info.waits_for ? info.waits_for : "",
                   age_text(report.age_ns), report.answered ? "" : " (its context did not answer)");
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
