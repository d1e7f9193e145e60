// SPDX-License-Identifier: MIT
// What context an object lives on, and who has to be told when that changes.
//
// An object with handlers, timers or connections on a context (a channel, a node) has a
// ContextBinding; whoever holds something on that context for the object's sake has a
// ContextListener there. Moving the object calls each listener's `detach` on the old context,
// newest first, and then each `attach` on the new one, oldest first. Where one attach fails, those
// that had succeeded are detached and all go back to the old context.
//
// The mover sees to it that nothing of the object is in flight: to quiesce is its business, before
// and around move_to().
//
// Threads: context() from any. Listeners come and go on the home thread of context(), at any time,
// from within their own callbacks too; while the object is under way, context() is where it goes.
// move_to() from any context.
// Lifetime: a listener goes before its binding, both contexts of a move outlive it.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "roost/base/result.h"
#include "roost/coro/task.h"

namespace roost {

class AioContext;
class ContextListener;

/// Which context an object lives on. A member of the object.
class ContextBinding {
 public:
  explicit ContextBinding(AioContext& context) noexcept : context_(&context) {}
  /// Aborts while it is moved, and if it has listeners.
  ~ContextBinding();
  ContextBinding(const ContextBinding&) = delete;
  ContextBinding& operator=(const ContextBinding&) = delete;

  /// Where the object lives, or goes. Stable on that context's home thread until that returns to
  /// its loop or awaits; elsewhere it may be out of date at once.
  AioContext& context() const noexcept {
    // Acquire pairs with the stores in move_to(): who finds itself on this context's home thread
    // sees what the mover has done on the old one.
    return *context_.load(std::memory_order_acquire);
  }

  /// Moves the object, and returns on the context it was awaited on. EBUSY: another move is under
  /// way, and nothing was done. Another error: an attach failed with it, and the object is back on
  /// the old context. Should a listener fail to attach there again, the error says so, and the
  /// listener stays detached until a later move succeeds. A move is not cancelled.
  Task<Result<void>> move_to(AioContext& to);

 private:
  friend class ContextListener;

  void detach_all(AioContext& from);
  Result<void> attach_all(AioContext& to, bool stop_at_error);
  void check_on_home(const char* what) const;

  // context -> another: the mover, on the home thread of the old one, when all are detached.
  std::atomic<AioContext*> context_;
  // true: somebody moves it. The one who changed it changes it back.
  std::atomic<bool> moving_{false};

  // Home thread of context().
  std::vector<ContextListener*> listeners_;  // in the order they came
  bool under_way_ = false;                   // detached, not attached again
};

/// For as long as it lives, what to do when the object moves.
class ContextListener {
 public:
  using Detach = std::function<void(AioContext& from)>;
  using Attach = std::function<Result<void>(AioContext& to)>;

  /// Both are called on the home thread of the context they are given, in a coroutine: they must
  /// not block nor throw. The holder has attached what it has by itself, now; only where the object
  /// is under way is `attach` called soon. A listener that comes while others are being called has
  /// its turn in the same round, where one is left for it.
  ContextListener(ContextBinding& binding, Detach detach, Attach attach);
  ~ContextListener();
  ContextListener(const ContextListener&) = delete;
  ContextListener& operator=(const ContextListener&) = delete;

 private:
  friend class ContextBinding;

  struct Callbacks {
    Detach detach;
    Attach attach;
  };

  ContextBinding& binding_;
  const std::shared_ptr<const Callbacks> callbacks_;  // shared: it may go while one runs
  // Home thread of the binding's context.
  bool attached_;
  bool failed_ = false;   // in this round of attaching
  bool* gone_ = nullptr;  // set, if not null, when it is destroyed
};

}  // namespace roost
