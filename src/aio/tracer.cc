// SPDX-License-Identifier: MIT
#include "roost/aio/tracer.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <iterator>
#include <new>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "roost/base/check.h"
#include "roost/coro/coroutine.h"

namespace roost {

namespace {

enum class Kind : std::uint8_t { kSchedule, kEnter, kTurn, kSuspend, kEnd, kSleep, kWake };

struct Event {
  std::int64_t at_ns;
  const Coroutine* co;  // only its address counts: it may be gone
  const char* name;     // kSchedule, kEnter, kTurn: the coroutine's
  std::source_location place;
  Kind kind;
};

constexpr bool begins_turn(Kind kind) { return kind == Kind::kEnter || kind == Kind::kTurn; }

}  // namespace

// ---- Recording

class Tracer::Track final : public TraceTrack {
 public:
  Track(Tracer& tracer, std::string name)
      : tracer_(tracer),
        name_(std::move(name)),
        mask_(std::bit_ceil(std::max<std::size_t>(tracer.options_.events_per_track, 1)) - 1),
        events_(static_cast<Event*>(std::malloc((mask_ + 1) * sizeof(Event)))) {
    if (!events_) throw std::bad_alloc();
  }

  void scheduled(const Coroutine& co, Place by) noexcept override {
    const Event event = make(Kind::kSchedule, &co, co.name(), by);
    // On the track of the context that is current here, whichever this one is.
    const CoContext* const here = this_thread().context;
    auto* const track = here ? dynamic_cast<Track*>(here->trace()) : nullptr;
    if (track && &track->tracer_ == &tracer_) {
      track->add(event);
    } else {
      std::lock_guard lock(tracer_.foreign_mutex_);
      tracer_.foreign_->add(event);
    }
  }

  void turn_begins(const Coroutine& co, Turn why) noexcept override {
    add(make(why == Turn::kDirect ? Kind::kEnter : Kind::kTurn, &co, co.name(), Place{}));
  }

  void turn_ends(bool ended, Place awaits_at) noexcept override {
    add(make(ended ? Kind::kEnd : Kind::kSuspend, nullptr, nullptr, awaits_at));
  }

  void sleeps() noexcept override { add(make(Kind::kSleep, nullptr, nullptr, Place{})); }
  void woke() noexcept override { add(make(Kind::kWake, nullptr, nullptr, Place{})); }

  const std::string& name() const noexcept { return name_; }
  std::uint64_t kept() const noexcept { return std::min<std::uint64_t>(count_, mask_ + 1); }
  std::uint64_t dropped() const noexcept { return count_ - kept(); }

  // From the oldest to the newest.
  const Event& operator[](std::uint64_t i) const noexcept {
    return events_[(dropped() + i) & mask_];
  }

 private:
  Event make(Kind kind, const Coroutine* co, const char* name, Place place) const noexcept {
    return {.at_ns = tracer_.options_.clock->now_ns(),
            .co = co,
            .name = name,
            .place = place,
            .kind = kind};
  }

  void add(const Event& event) noexcept { events_[count_++ & mask_] = event; }

  Tracer& tracer_;
  const std::string name_;
  const std::size_t mask_;

  // The home thread.
  // (malloc'd: a constructor would write to all of the memory.)
  struct Free {
    void operator()(Event* events) const noexcept { std::free(events); }
  };
  const std::unique_ptr<Event[], Free> events_;
  std::uint64_t count_ = 0;
};

Tracer::Tracer(Options options)
    : options_(options), foreign_(std::make_unique<Track>(*this, "other threads")) {}

Tracer::~Tracer() = default;

TraceTrack& Tracer::add_track(std::string name) {
  auto track = std::make_unique<Track>(*this, std::move(name));
  std::lock_guard lock(mutex_);
  return *tracks_.emplace_back(std::move(track));
}

Tracer::Statistics Tracer::statistics() const {
  std::lock_guard lock(mutex_);
  Statistics all{.kept = foreign_->kept(), .dropped = foreign_->dropped()};
  for (const auto& track : tracks_) {
    all.kept += track->kept();
    all.dropped += track->dropped();
  }
  return all;
}

// ---- Writing

namespace {

// Which schedule led to which turn: each schedule, and the turn, get the number of an arrow.
// (The coroutine's address will not do, since it names one coroutine after the other.)
using Arrows = std::unordered_map<const Event*, std::uint64_t>;

Arrows find_arrows(const std::vector<const Event*>& events) {
  // In time; those of one moment, as they were recorded.
  std::vector<std::pair<std::int64_t, std::size_t>> order;
  order.reserve(events.size());
  for (std::size_t i = 0; i < events.size(); ++i) order.emplace_back(events[i]->at_ns, i);
  std::ranges::sort(order);
  std::unordered_map<const Coroutine*, const Event*> pending;
  Arrows arrows;
  std::uint64_t last = 0;
  for (const auto& [at_ns, i] : order) {
    const Event* const event = events[i];
    if (event->kind == Kind::kSchedule) {
      pending[event->co] = event;
    } else if (begins_turn(event->kind)) {
      const auto found = pending.find(event->co);
      if (found == pending.end()) continue;
      // A direct entry makes the schedule void.
      if (event->kind == Kind::kTurn) {
        ++last;
        arrows[found->second] = last;
        arrows[event] = last;
      }
      pending.erase(found);
    }
  }
  return arrows;
}

std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) < 0x20) {
      fmt::format_to(std::back_inserter(out), "\\u{:04x}", static_cast<unsigned>(c));
    } else {
      out += c;
    }
  }
  return out += '"';
}

// The events of one process, as JSON objects separated by commas.
class Writer {
 public:
  explicit Writer(std::FILE* to) : to_(to), pid_(::getpid()) {}

  template <class... Args>
  void add(char phase, unsigned track, fmt::format_string<Args...> format, Args&&... args) {
    std::string line =
        fmt::format("{}\n{{\"ph\":\"{}\",\"pid\":{},\"tid\":{},", separator_, phase, pid_, track);
    fmt::format_to(std::back_inserter(line), format, std::forward<Args>(args)...);
    line += '}';
    put(line);
    separator_ = ",";
  }

  void put(std::string_view text) {
    if (std::fwrite(text.data(), 1, text.size(), to_) != text.size()) failed_ = true;
  }

  bool failed() const { return failed_; }

 private:
  std::FILE* const to_;
  const int pid_;
  const char* separator_ = "";
  bool failed_ = false;
};

// Times are microseconds there.
std::string us(std::int64_t ns) { return fmt::format("{}.{:03}", ns / 1000, ns % 1000); }

template <class Track>
class TrackWriter {
 public:
  TrackWriter(Writer& out, const Track& track, unsigned number, const Arrows& arrows)
      : out_(out), track_(track), number_(number), arrows_(arrows) {}

  void write() {
    out_.add('M', number_, "\"name\":\"thread_name\",\"args\":{{\"name\":{}}}",
             quoted(track_.name()));
    out_.add('M', number_, "\"name\":\"thread_sort_index\",\"args\":{{\"sort_index\":{}}}",
             number_);
    if (track_.kept() == 0) return;
    if (track_.dropped() > 0) {
      out_.add('i', number_, "\"name\":\"{} events before were dropped\",\"s\":\"t\",\"ts\":{}",
               track_.dropped(), us(track_[0].at_ns));
    }
    for (std::uint64_t i = 0; i < track_.kept(); ++i) add(track_[i]);
    // What has not ended; what began before the ring does has no beginning, and was left out.
    const std::int64_t end = track_[track_.kept() - 1].at_ns;
    while (!open_.empty()) close(end, ",\"unfinished\":true");
  }

 private:
  void add(const Event& event) {
    switch (event.kind) {
      case Kind::kSchedule:
        add_schedule(event);
        return;
      case Kind::kEnter:
      case Kind::kTurn:
      case Kind::kSleep:
        open_.push_back(&event);
        return;
      case Kind::kSuspend:
        if (in_turn()) {
          close(event.at_ns, fmt::format(",\"awaits at\":{}", quoted(describe(event.place))));
        }
        return;
      case Kind::kEnd:
        if (in_turn()) close(event.at_ns, ",\"ended\":true");
        return;
      case Kind::kWake:
        if (!open_.empty() && !in_turn()) close(event.at_ns, "");
        return;
    }
  }

  bool in_turn() const { return !open_.empty() && begins_turn(open_.back()->kind); }

  void close(std::int64_t end_ns, std::string_view more) {
    const Event& begin = *open_.back();
    open_.pop_back();
    const std::string start = us(begin.at_ns);
    const std::string duration = us(end_ns - begin.at_ns);
    if (begin.kind == Kind::kSleep) {
      out_.add('X', number_, "\"cat\":\"loop\",\"name\":\"sleep\",\"ts\":{},\"dur\":{}", start,
               duration);
      return;
    }
    out_.add('X', number_,
             "\"cat\":\"coroutine\",\"name\":{},\"ts\":{},\"dur\":{},"
             "\"args\":{{\"coroutine\":\"{}\"{}}}",
             quoted(begin.name), start, duration, fmt::ptr(begin.co), more);
    // After its slice, which it points to.
    if (const auto arrow = arrows_.find(&begin); arrow != arrows_.end()) {
      out_.add('f', number_,
               "\"bp\":\"e\",\"cat\":\"schedule\",\"name\":\"schedule\",\"id\":{},\"ts\":{}",
               arrow->second, start);
    }
  }

  void add_schedule(const Event& event) {
    const std::string at = us(event.at_ns);
    // An arrow starts in a slice; where no coroutine runs, one of no length has to do.
    if (open_.empty()) {
      out_.add('X', number_,
               "\"cat\":\"schedule\",\"name\":{},\"ts\":{},\"dur\":0.001,"
               "\"args\":{{\"coroutine\":\"{}\",\"by\":{}}}",
               quoted(fmt::format("schedule {}", event.name)), at, fmt::ptr(event.co),
               quoted(describe(event.place)));
    }
    if (const auto arrow = arrows_.find(&event); arrow != arrows_.end()) {
      out_.add('s', number_,
               "\"cat\":\"schedule\",\"name\":\"schedule\",\"id\":{},\"ts\":{},"
               "\"args\":{{\"coroutine\":\"{}\",\"by\":{}}}",
               arrow->second, at, fmt::ptr(event.co), quoted(describe(event.place)));
    }
  }

  Writer& out_;
  const Track& track_;
  const unsigned number_;
  const Arrows& arrows_;
  std::vector<const Event*> open_;  // slices, innermost last
};

}  // namespace

bool Tracer::write(std::FILE* to) const {
  std::lock_guard lock(mutex_);
  std::vector<const Track*> tracks;
  for (const auto& track : tracks_) tracks.push_back(track.get());
  if (foreign_->kept() > 0) tracks.push_back(foreign_.get());

  std::vector<const Event*> events;
  std::uint64_t dropped = 0;
  for (const Track* track : tracks) {
    dropped += track->dropped();
    for (std::uint64_t i = 0; i < track->kept(); ++i) events.push_back(&(*track)[i]);
  }
  const Arrows arrows = find_arrows(events);

  Writer out(to);
  out.put(
      fmt::format("{{\"displayTimeUnit\":\"ns\",\"otherData\":{{\"dropped events\":{}}},\n"
                  "\"traceEvents\":[",
                  dropped));
  out.add('M', 0, "\"name\":\"process_name\",\"args\":{{\"name\":\"roost\"}}");
  unsigned number = 0;
  for (const Track* track : tracks) TrackWriter(out, *track, ++number, arrows).write();
  out.put("\n]}\n");
  return !out.failed() && std::fflush(to) == 0;
}

}  // namespace roost
