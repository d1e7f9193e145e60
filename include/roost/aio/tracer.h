// SPDX-License-Identifier: MIT
// Tracer: records what coroutines and contexts do, for https://ui.perfetto.dev or chrome://tracing.
//
//   Tracer tracer;
//   IOThread thread({.name = "iothread0", .tracer = &tracer});
//   ...
//   tracer.write(file);   // once the threads have ended
//
// A context has a track, with a slice for each turn of a coroutine and each sleep; an arrow leads
// from where a coroutine was scheduled or woken to the turn that came of it. docs/tracing.md shows
// how to read it.
//
// A track keeps its last events in a ring of its home thread, which takes no lock; older ones are
// dropped, and counted. What threads without a context do (they schedule) is recorded on a track
// of theirs, under a mutex.
//
// Threads: add_track() from any thread. write() and statistics() while none of the contexts is
// polled and no thread schedules on them.
// Lifetime: outlives the contexts that were given it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "roost/base/clock.h"
#include "roost/coro/trace.h"

namespace roost {

class Tracer {
 public:
  struct Options {
    /// Rounded up to a power of two; 40 bytes each, used when needed.
    std::size_t events_per_track = std::size_t{1} << 17;
    const Clock* clock = &real_clock();
  };

  Tracer() : Tracer(Options{}) {}
  explicit Tracer(Options options);
  ~Tracer();
  Tracer(const Tracer&) = delete;
  Tracer& operator=(const Tracer&) = delete;

  /// The track of a context, for as long as the tracer lives. For contexts.
  TraceTrack& add_track(std::string name);

  struct Statistics {
    std::uint64_t kept = 0;
    std::uint64_t dropped = 0;
  };
  Statistics statistics() const;

  /// Writes all that was kept as Chrome's JSON. False: writing fails, errno says why.
  [[nodiscard]] bool write(std::FILE* to) const;

 private:
  class Track;

  const Options options_;
  mutable std::mutex mutex_;  // guards the list
  std::vector<std::unique_ptr<Track>> tracks_;
  std::mutex foreign_mutex_;        // guards recording on it
  std::unique_ptr<Track> foreign_;  // threads without a context
};

}  // namespace roost
