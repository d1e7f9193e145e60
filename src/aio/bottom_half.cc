// SPDX-License-Identifier: MIT
#include "roost/aio/bottom_half.h"

#include "aio/bottom_half_core.h"
#include "roost/base/check.h"

namespace roost {

using Flags = BottomHalfFlags<RealPlatform>;

BottomHalf::BottomHalf(AioContext& context, std::function<void()> callback)
    : core_(new Core(context, std::move(callback))) {
  context.bottom_halves_.fetch_add(1, std::memory_order_relaxed);
}

BottomHalf::~BottomHalf() {
  core_->context.bottom_halves_.fetch_sub(1, std::memory_order_relaxed);
  core_->request(Flags::kDeleted);
}

void BottomHalf::schedule() { core_->request(Flags::kScheduled); }

void BottomHalf::schedule_idle() { core_->request(Flags::kScheduled | Flags::kIdle); }

void BottomHalf::cancel() { core_->flags.cancel(); }

void BottomHalf::Core::request(std::uint64_t bits) {
  AioContext& home = context;
  const std::uint64_t before = flags.request(bits);
  if (!(before & Flags::kQueued)) {
    // Ours to enqueue; nobody frees it before its turn.
    ROOST_CHECK(home.post(*this), "bottom half scheduled on the closed context '{}'", home.name());
  } else if ((before & Flags::kIdle) && !(bits & Flags::kIdle)) {
    // It may be on the idle list, which is looked at after each wait. (If it was not, this is a
    // spurious notification.) `this` may be gone already.
    home.notify();
  }
}

bool BottomHalf::Core::run_now(Core& core) noexcept {
  const std::uint64_t bits = core.flags.take();
  if (bits & Flags::kDeleted) {
    // Under a nested poll of its own callback, that callback is still needed.
    core.deleted = true;
    if (core.running == 0) delete &core;
    return false;
  }
  if (!(bits & Flags::kScheduled)) return false;  // cancelled
  ++core.running;
  core.callback();
  if (--core.running == 0 && core.deleted) delete &core;
  return !(bits & Flags::kIdle);
}

bool AioContext::run_bottom_half(CallbackEntry& entry) noexcept {
  auto& core = static_cast<BottomHalf::Core&>(entry);
  const std::uint64_t bits = core.flags.peek();
  if ((bits & Flags::kIdle) && (bits & Flags::kScheduled) && !(bits & Flags::kDeleted)) {
    // Still queued, now on the idle list, where it waits for the end of the next wait.
    core.context.idle_.push(core);
    return false;
  }
  return BottomHalf::Core::run_now(core);
}

namespace {

class OneShot : public CallbackEntry {
 public:
  explicit OneShot(std::function<void()> callback)
      : CallbackEntry(&execute), callback_(std::move(callback)) {}

 private:
  static bool execute(CallbackEntry& entry) noexcept {
    std::unique_ptr<OneShot> self(static_cast<OneShot*>(&entry));
    self->callback_();
    return true;
  }

  std::function<void()> callback_;
};

}  // namespace

void schedule_oneshot(AioContext& context, std::function<void()> callback) {
  auto entry = std::make_unique<OneShot>(std::move(callback));
  ROOST_CHECK(context.post(*entry), "bottom half scheduled on the closed context '{}'",
              context.name());
  [[maybe_unused]] OneShot* queued = entry.release();
}

}  // namespace roost
