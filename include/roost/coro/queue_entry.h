// SPDX-License-Identifier: MIT
// What stands in a context's queues: an intrusive entry that says whose turn it is.
//
// Threads: an entry belongs to its producer until it is posted, to the queue until its turn comes,
// and then to the consumer. `next` is handed over with it.
// Lifetime: the producer keeps a posted entry alive until its turn comes or the context is closed.
#pragma once

#include <cstdint>
#include <utility>

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
  /// An entry some places on in the direction the list is walked next; null if not known. Only
  /// ever prefetched: it may be gone.
  RealPlatform::Shared<const QueueEntry*> ahead;
  Kind kind;
};

/// One schedule of a coroutine. Embedded in its control block, or from frame memory where the
/// embedded one is still queued elsewhere (SpareEntry).
struct CoroutineEntry : QueueEntry {
  explicit CoroutineEntry(bool is_embedded) noexcept
      : QueueEntry(Kind::kCoroutine), embedded(is_embedded) {}

  /// Whose turn it is.
  Coroutine& coroutine() const noexcept;

  bool embedded;
  std::uint32_t generation = 0;
};

struct SpareEntry final : CoroutineEntry {
  explicit SpareEntry(Coroutine& of) noexcept : CoroutineEntry(false), co(of) {}

  Coroutine& co;
};

struct CallbackEntry : QueueEntry {
  /// Returns whether it did something that counts as progress.
  using Function = bool (*)(CallbackEntry&) noexcept;

  explicit CallbackEntry(Function function) noexcept : QueueEntry(Kind::kCallback), run(function) {}

  Function run;
};

/// Walking a long list that another CPU has written costs a cache miss an entry, one after the
/// other. Whoever builds a list remembers the last few entries, so that each can name one that its
/// walker will reach some steps later, and the misses overlap.
class FetchAhead {
 public:
  /// Returns the entry given kDistance calls ago, or null.
  const QueueEntry* exchange(const QueueEntry* entry) noexcept {
    return std::exchange(recent_[position_++ % kDistance], entry);
  }

 private:
  static constexpr unsigned kDistance = 16;
  const QueueEntry* recent_[kDistance] = {};
  unsigned position_ = 0;
};

/// A list of entries, first in first out. One thread.
class EntryQueue {
 public:
  bool empty() const noexcept { return !head_; }
  QueueEntry* front() const noexcept { return head_; }

  void push(QueueEntry& entry) noexcept {
    entry.next.set(nullptr);
    entry.ahead.set(nullptr);
    append(&entry, &entry);
  }

  /// Appends a list linked by next, from its first to its last entry (null: none).
  void append(QueueEntry* first, QueueEntry* last) noexcept {
    if (!first) return;
    if (tail_) {
      tail_->next.set(first);
    } else {
      head_ = first;
    }
    tail_ = last;
  }

  void append(EntryQueue& other) noexcept {
    append(std::exchange(other.head_, nullptr), std::exchange(other.tail_, nullptr));
  }

  QueueEntry* pop() noexcept {
    QueueEntry* entry = head_;
    if (!entry) return nullptr;
    head_ = entry->next.get();
    if (!head_) tail_ = nullptr;
    return entry;
  }

 private:
  QueueEntry* head_ = nullptr;
  QueueEntry* tail_ = nullptr;
};

}  // namespace roost
