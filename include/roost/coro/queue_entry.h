// SPDX-License-Identifier: MIT
// What stands in a context's queues: an intrusive entry that says whose turn it is.
//
// Threads: an entry belongs to its producer until it is posted, to the queue until its turn comes,
// and then to the consumer. `next` is handed over with it.
// Lifetime: the producer keeps a posted entry alive until its turn comes or the context is closed.
#pragma once

#include <cstdint>

#include "roost/base/platform.h"

namespace roost {

class Coroutine;

struct QueueEntry {
  enum class Kind : std::uint8_t {
    kCoroutine,  // a CoroutineEntry: enter the coroutine, unless the entry has become stale
    kCallback,   // a CallbackEntry: call it
  };

  explicit QueueEntry(Kind k) noexcept : kind(k) {}

  RealPlatform::Shared<QueueEntry*> next;
  Kind kind;
};

/// One schedule of a coroutine. Embedded in its control block, or from frame memory where the
/// embedded one is still queued elsewhere.
struct CoroutineEntry : QueueEntry {
  explicit CoroutineEntry(Coroutine& coroutine, bool is_embedded) noexcept
      : QueueEntry(Kind::kCoroutine), embedded(is_embedded), co(&coroutine) {}

  bool embedded;
  std::uint32_t generation = 0;
  Coroutine* co;
};

struct CallbackEntry : QueueEntry {
  /// Returns whether it did something that counts as progress.
  using Function = bool (*)(CallbackEntry&) noexcept;

  explicit CallbackEntry(Function function) noexcept : QueueEntry(Kind::kCallback), run(function) {}

  Function run;
};

}  // namespace roost
