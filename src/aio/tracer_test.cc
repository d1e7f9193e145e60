// SPDX-License-Identifier: MIT
// The tracer: what its file says of coroutines that turn, hop and sleep.
#include "roost/aio/tracer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "roost/aio/aio_context.h"
#include "roost/aio/iothread.h"
#include "roost/aio/timer.h"
#include "roost/coro/task.h"

namespace roost {
namespace {

using Json = nlohmann::json;

Json written(const Tracer& tracer) {
  char* text = nullptr;
  std::size_t size = 0;
  std::FILE* const file = ::open_memstream(&text, &size);
  EXPECT_TRUE(tracer.write(file));
  std::fclose(file);
  const std::unique_ptr<char, void (*)(void*)> owner(text, &std::free);
  return Json::parse(text, text + size);
}

// The events of one trace, by what they are.
struct Trace {
  explicit Trace(const Json& file) {
    for (const Json& event : file.at("traceEvents")) {
      const std::string phase = event.at("ph");
      if (phase == "M" && event.at("name") == "thread_name") {
        names[event.at("tid")] = event.at("args").at("name");
      } else if (phase == "X") {
        slices.push_back(event);
      } else if (phase == "s" || phase == "f") {
        auto& of = phase == "s" ? starts : finishes;
        EXPECT_TRUE(of.emplace(event.at("id"), event).second) << "an arrow's number used twice";
      }
    }
  }

  std::string track_of(const Json& event) const { return names.at(event.at("tid")); }

  std::vector<Json> slices_of(const std::string& name) const {
    std::vector<Json> found;
    for (const Json& slice : slices) {
      if (slice.at("name") == name) found.push_back(slice);
    }
    return found;
  }

  // The slice that an end of an arrow lies in.
  const Json* slice_at(const Json& end) const {
    for (const Json& slice : slices) {
      const double ts = slice.at("ts");
      const double at = end.at("ts");
      // Times have three decimals, and are not exact.
      if (slice.at("tid") == end.at("tid") && at > ts - 0.0005 &&
          at < ts + slice.at("dur").get<double>() + 0.0005) {
        return &slice;
      }
    }
    return nullptr;
  }

  std::map<int, std::string> names;  // of tracks
  std::vector<Json> slices;
  std::map<int, Json> starts;  // of arrows
  std::map<int, Json> finishes;
};

class Tracing : public testing::Test {
 protected:
  AioContextOptions options(std::string name) {
    AioContextOptions o;
    o.name = std::move(name);
    o.tracer = &tracer_;
    return o;
  }
  Tracer tracer_;
};

Task<void> hop(AioContext& there, AioContext& back, std::promise<void>& done) {
  co_await move_to(there);
  co_await move_to(back);
  done.set_value();
}

TEST_F(Tracing, ACoroutineThatHopsBetweenThreadsShowsOnBothTracksWithArrowsBetween) {
  {
    std::promise<void> done;
    IOThread one(options("one"));
    IOThread two(options("two"));
    one.context().run(
        [&] { Coroutine::create(hop(two.context(), one.context(), done), "hopper")->enter(); });
    done.get_future().wait();
  }
  const Trace trace(written(tracer_));
  ASSERT_EQ(trace.names.size(), 2u);

  const auto turns = trace.slices_of("hopper");
  ASSERT_EQ(turns.size(), 3u);
  std::vector<std::pair<double, std::string>> in_time;
  for (const Json& turn : turns) in_time.emplace_back(turn.at("ts"), trace.track_of(turn));
  std::ranges::sort(in_time);
  EXPECT_EQ(in_time[0].second, "one");
  EXPECT_EQ(in_time[1].second, "two");
  EXPECT_EQ(in_time[2].second, "one");

  ASSERT_EQ(trace.starts.size(), 2u);
  ASSERT_EQ(trace.finishes.size(), 2u);
  for (const auto& [id, start] : trace.starts) {
    ASSERT_TRUE(trace.finishes.contains(id));
    const Json& finish = trace.finishes.at(id);
    EXPECT_NE(trace.track_of(start), trace.track_of(finish));
    EXPECT_LE(start.at("ts"), finish.at("ts"));
    for (const Json& end : {start, finish}) {
      const Json* const slice = trace.slice_at(end);
      ASSERT_NE(slice, nullptr);
      EXPECT_EQ(slice->at("name"), "hopper");
    }
  }
}

// The same by hand, on one thread.
class TracingByHand : public Tracing {
 protected:
  void turn(AioContext& context) {
    while (context.poll(false)) {
    }
  }
  std::shared_ptr<AioContext> one_ = AioContext::create(options("one"));
  std::shared_ptr<AioContext> two_ = AioContext::create(options("two"));
};

Task<void> await_twice() {
  co_await yield();
  co_await yield();
}

TEST_F(TracingByHand, ATurnSaysWhereItSuspendedAndTheLastThatItEnded) {
  ContextScope scope(*one_);
  Coroutine* co = Coroutine::create(await_twice(), "yielder");
  co->enter();
  co->enter();
  co->enter();
  const auto turns = Trace(written(tracer_)).slices_of("yielder");
  ASSERT_EQ(turns.size(), 3u);
  const std::string first = turns[0].at("args").at("awaits at");
  const std::string second = turns[1].at("args").at("awaits at");
  EXPECT_NE(first.find("tracer_test.cc:"), std::string::npos);
  EXPECT_NE(first, second);
  EXPECT_EQ(turns[2].at("args").at("ended"), true);
  EXPECT_EQ(turns[0].at("args").at("coroutine"), turns[2].at("args").at("coroutine"));
}

TEST_F(TracingByHand, AScheduleThatADirectEntryMadeVoidHasNoArrow) {
  Coroutine* co = nullptr;
  {
    ContextScope scope(*one_);
    co = Coroutine::create(await_twice(), "yielder");
    co->enter();
  }
  co_schedule(*two_, *co);
  {
    ContextScope scope(*one_);
    co->enter();
  }
  turn(*two_);
  co_schedule(*two_, *co);
  turn(*two_);
  const Trace trace(written(tracer_));
  ASSERT_EQ(trace.starts.size(), 1u);
  ASSERT_EQ(trace.finishes.size(), 1u);
  EXPECT_EQ(trace.track_of(trace.finishes.begin()->second), "two");
  // It was scheduled where no context was current.
  EXPECT_EQ(trace.track_of(trace.starts.begin()->second), "other threads");
  const Json* const from = trace.slice_at(trace.starts.begin()->second);
  ASSERT_NE(from, nullptr) << "an arrow starts in a slice, or it is not shown";
  EXPECT_EQ(from->at("name"), "schedule yielder");
}

TEST_F(TracingByHand, AWakeUpUnderADriverLoopHasAnArrowToo) {
  ContextScope scope(*one_);
  Coroutine* sleeper = Coroutine::create(await_twice(), "sleeper");
  sleeper->enter();
  sleeper->enter();
  const auto body = [&]() -> Task<void> {
    co_wake(*sleeper);
    co_return;
  };
  Coroutine::create(body(), "waker")->enter();
  const Trace trace(written(tracer_));
  ASSERT_EQ(trace.starts.size(), 1u);
  ASSERT_EQ(trace.finishes.size(), 1u);
  EXPECT_EQ(trace.slice_at(trace.starts.begin()->second)->at("name"), "waker");
  EXPECT_EQ(trace.slice_at(trace.finishes.begin()->second)->at("name"), "sleeper");
}

TEST_F(TracingByHand, OneThatEntersAnotherEnclosesIt) {
  ContextScope scope(*one_);
  const auto inner = []() -> Task<void> { co_return; };
  const auto outer = [&]() -> Task<void> {
    Coroutine::create(inner(), "inner")->enter();
    co_return;
  };
  Coroutine::create(outer(), "outer")->enter();
  const Trace trace(written(tracer_));
  const auto in = trace.slices_of("inner");
  const auto out = trace.slices_of("outer");
  ASSERT_EQ(in.size(), 1u);
  ASSERT_EQ(out.size(), 1u);
  const auto end = [](const Json& slice) {
    return slice.at("ts").get<double>() + slice.at("dur").get<double>();
  };
  EXPECT_LE(out[0].at("ts"), in[0].at("ts"));
  EXPECT_LE(end(in[0]), end(out[0]) + 0.0005);
}

TEST_F(TracingByHand, ASleepIsASliceAndWhatItWakesForComesAfterIt) {
  ContextScope scope(*one_);
  // On a busy machine, the time may be over before the context comes to sleep.
  for (std::int64_t ns = 1'000'000; one_->statistics().sleeps == 0; ns *= 2) {
    bool done = false;
    const auto body = [&]() -> Task<void> {
      (void)co_await sleep_for(ns);
      done = true;
    };
    Coroutine::create(body(), "dozer")->enter();
    while (!done) one_->poll(true);
  }
  const Trace trace(written(tracer_));
  const auto sleeps = trace.slices_of("sleep");
  ASSERT_EQ(sleeps.size(), one_->statistics().sleeps);
  const Json last = trace.slices_of("dozer").back();
  EXPECT_LE(sleeps.back().at("ts").get<double>() + sleeps.back().at("dur").get<double>(),
            last.at("ts").get<double>() + 0.0005);
}

TEST_F(TracingByHand, ATurnThatHasNotEndedIsWrittenAndSaysSo) {
  ContextScope scope(*one_);
  Json file;
  const auto body = [&]() -> Task<void> {
    file = written(tracer_);
    co_return;
  };
  Coroutine::create(body(), "writer")->enter();
  const auto turns = Trace(file).slices_of("writer");
  ASSERT_EQ(turns.size(), 1u);
  EXPECT_EQ(turns[0].at("args").at("unfinished"), true);
}

TEST(TracingRing, WhatIsTooMuchIsDroppedFromTheFrontAndCounted) {
  Tracer tracer({.events_per_track = 8});
  AioContextOptions options;
  options.name = "a \"name\"\\\n";
  options.tracer = &tracer;
  const auto context = AioContext::create(options);
  ContextScope scope(*context);
  const auto nothing = []() -> Task<void> { co_return; };
  for (int i = 0; i < 10; ++i) Coroutine::create(nothing(), i < 9 ? "early" : "last")->enter();
  EXPECT_EQ(tracer.statistics().kept, 8u);
  EXPECT_EQ(tracer.statistics().dropped, 12u);
  const Json file = written(tracer);
  EXPECT_EQ(file.at("otherData").at("dropped events"), 12);
  const Trace trace(file);
  EXPECT_EQ(trace.slices_of("early").size(), 3u);
  EXPECT_EQ(trace.slices_of("last").size(), 1u);
  EXPECT_EQ(trace.names.at(1), options.name);
}

TEST(TracingRing, ATurnWhoseBeginningWasDroppedIsLeftOut) {
  Tracer tracer({.events_per_track = 1});
  AioContextOptions options;
  options.tracer = &tracer;
  const auto context = AioContext::create(options);
  ContextScope scope(*context);
  const auto nothing = []() -> Task<void> { co_return; };
  Coroutine::create(nothing(), "cut off")->enter();
  EXPECT_TRUE(Trace(written(tracer)).slices.empty());
}

TEST_F(Tracing, AFileThatCannotBeWrittenIsReported) {
  std::FILE* const full = std::fopen("/dev/full", "w");
  ASSERT_NE(full, nullptr);
  EXPECT_FALSE(tracer_.write(full));
  std::fclose(full);
}

}  // namespace
}  // namespace roost
