// SPDX-License-Identifier: MIT
// File operations through Linux AIO (libaio), for files opened with O_DIRECT.
//
// What was started is submitted once an iteration, with one system call. The kernel adds to an
// eventfd for each completion; the loop watches that.

#include <libaio.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <deque>
#include <system_error>
#include <vector>

#include "aio/file_engine.h"
#include "roost/aio/aio_context.h"
#include "roost/aio/unique_fd.h"
#include "roost/base/check.h"

namespace roost {

namespace {

constexpr int kSlots = 128;  // operations that the kernel has at a time; others wait
constexpr int kBatch = 32;

class LinuxAio final : public FileEngine {
 public:
  LinuxAio(AioContext& context, Requests& requests, BackEnd& back_end)
      : context_(context), requests_(requests), back_end_(back_end), slots_(kSlots) {
    event_fd_ = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!event_fd_) throw std::system_error(errno, std::generic_category(), "eventfd");
    if (const int error = ::io_setup(kSlots, &kernel_); error < 0) {
      throw std::system_error(-error, std::generic_category(), "io_setup");
    }
    for (Slot& slot : slots_) free_.push_back(&slot);
    watch_ = new FdWatch{.fd = event_fd_.get(), .handler = nullptr};
    watch_->handler = std::make_shared<const FdHandler>(
        FdHandler{.read = [this] { take_completions(); }, .write = nullptr, .poll = nullptr});
    back_end_.watch_changed(*watch_);
  }

  // The descriptor goes last: the kernel's context refers to it.
  ~LinuxAio() override {
    ROOST_CHECK(waiting_.empty() && free_.size() == slots_.size(),
                "Linux AIO of context '{}' goes with operations in flight", context_.name());
    watch_->handler = nullptr;
    watch_->removed = true;
    back_end_.watch_changed(*watch_);  // which frees it
    ::io_destroy(kernel_);
  }

  void start(IoRequest& request) override {
    request.job = nullptr;
    waiting_.push_back(&request);
  }

  void flush() override {
    while (!waiting_.empty() && !free_.empty() && submit_some()) {
    }
  }

  // What was submitted runs to its end: io_cancel(2) is for USB gadgets and polls, and gives EINVAL
  // for every operation on a file.
  void cancel(IoRequest& request) override {
    if (request.job) return;
    waiting_.erase(std::ranges::find(waiting_, &request));
    requests_.end_later(request, -ECANCELED);
  }

 private:
  struct Slot {
    iocb block;
    iovec piece;  // of a read
    IoRequest* request = nullptr;
  };

  // False: no more can be submitted now.
  bool submit_some() {
    std::array<iocb*, kBatch> blocks;
    int count = 0;
    while (count < kBatch && !waiting_.empty() && !free_.empty()) {
      Slot& slot = *free_.back();
      free_.pop_back();
      slot.request = waiting_.front();
      waiting_.pop_front();
      prepare(slot);
      blocks[static_cast<std::size_t>(count++)] = &slot.block;
    }
    const int submitted = ::io_submit(kernel_, count, blocks.data());
    for (int i = count - 1; i >= std::max(submitted, 0); --i) {
      Slot& slot = *static_cast<Slot*>(blocks[static_cast<std::size_t>(i)]->data);
      slot.request->job = nullptr;
      waiting_.push_front(slot.request);
      free_.push_back(&slot);
    }
    if (submitted >= 0) return submitted > 0;
    // The kernel is short of something. It gets it back from what it completes.
    if (submitted == -EAGAIN && free_.size() < slots_.size()) return false;
    // Otherwise the first one is to blame.
    requests_.end_later(*waiting_.front(), submitted);
    waiting_.pop_front();
    return true;
  }

  void prepare(Slot& slot) noexcept {
    IoRequest& r = *slot.request;
    const auto offset = static_cast<long long>(r.offset);
    switch (r.op) {
      case IoRequest::Op::kRead:
        slot.piece = {r.address, r.length};
        ::io_prep_preadv(&slot.block, r.fd, &slot.piece, 1, offset);
        break;
      case IoRequest::Op::kWritev:
        ::io_prep_pwritev(&slot.block, r.fd, static_cast<const iovec*>(r.address),
                          static_cast<int>(r.length), offset);
        break;
      default:
        ::io_prep_fdsync(&slot.block, r.fd);
    }
    slot.block.aio_rw_flags = r.flags;
    slot.block.data = &slot;
    ::io_set_eventfd(&slot.block, event_fd_.get());
    r.job = &slot;
  }

  // Called by the loop. Completes nothing itself: the back end does, where a nested poll goes on
  // with the rest.
  void take_completions() noexcept {
    std::uint64_t signals = 0;
    [[maybe_unused]] const ssize_t size = ::read(event_fd_.get(), &signals, sizeof signals);
    std::array<io_event, kSlots> events;
    timespec at_once{};
    const int count = ::io_getevents(kernel_, 0, kSlots, events.data(), &at_once);
    for (int i = 0; i < count; ++i) {
      const io_event& event = events[static_cast<std::size_t>(i)];
      auto& slot = *static_cast<Slot*>(event.data);
      IoRequest& request = *slot.request;
      free_.push_back(&slot);
      requests_.end_later(request, static_cast<std::int64_t>(event.res));
    }
  }

  AioContext& context_;
  Requests& requests_;
  BackEnd& back_end_;
  UniqueFd event_fd_;
  io_context_t kernel_ = nullptr;
  FdWatch* watch_ = nullptr;
  std::vector<Slot> slots_;
  std::vector<Slot*> free_;
  std::deque<IoRequest*> waiting_;  // started, not submitted
};

}  // namespace

std::unique_ptr<FileEngine> make_linux_aio_engine(AioContext& context, Requests& requests,
                                                  BackEnd& back_end) {
  return std::make_unique<LinuxAio>(context, requests, back_end);
}

bool linux_aio_available() noexcept {
  static const bool available = [] {
    io_context_t kernel = nullptr;
    if (::io_setup(1, &kernel) < 0) return false;
    ::io_destroy(kernel);
    return true;
  }();
  return available;
}

}  // namespace roost
