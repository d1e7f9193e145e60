// SPDX-License-Identifier: MIT
// File operations as jobs of a thread pool.

#include <cerrno>
#include <system_error>
#include <utility>

#include "aio/file_engine.h"
#include "roost/aio/aio_context.h"
#include "roost/aio/thread_pool.h"
#include "roost/base/check.h"

namespace roost {

namespace {

class PoolEngine final : public FileEngine {
 public:
  PoolEngine(AioContext& context, Requests& requests, std::shared_ptr<ThreadPool> pool)
      : context_(context), requests_(requests), pool_(std::move(pool)) {}

  void start(IoRequest& request) override {
    if (!pool_) pool_ = std::make_shared<ThreadPool>();
    auto* job = new Job(*this, request);
    request.job = job;
    pool_->submit(*job);
  }

  // A job that has started is waited for, and tells what it did.
  void cancel(IoRequest& request) override {
    auto* job = static_cast<Job*>(request.job);
    if (!pool_->withdraw(*job)) return;
    delete job;
    requests_.end_later(request, -ECANCELED);
  }

 private:
  struct Job : ThreadPool::Work, CallbackEntry {
    Job(PoolEngine& owner, IoRequest& r)
        : CallbackEntry(&deliver), engine(owner), context(owner.context_), request(r) {
      ThreadPool::Work::run = &execute;
    }
    static void execute(ThreadPool::Work& work) noexcept {
      auto& job = static_cast<Job&>(work);
      job.request.result = job.request.execute(false);
      // After the post the job belongs to the context.
      ROOST_CHECK(job.context.post(job), "I/O finished after its context '{}' was closed",
                  job.context.name());
    }
    static bool deliver(CallbackEntry& entry) noexcept {
      auto& job = static_cast<Job&>(entry);
      IoRequest& request = job.request;
      Requests& requests = job.engine.requests_;
      delete &job;
      requests.end(request);
      return true;
    }
    PoolEngine& engine;
    AioContext& context;
    IoRequest& request;
  };

  AioContext& context_;
  Requests& requests_;
  std::shared_ptr<ThreadPool> pool_;
};

}  // namespace

std::unique_ptr<FileEngine> make_pool_engine(AioContext& context, Requests& requests,
                                             std::shared_ptr<ThreadPool> pool) {
  return std::make_unique<PoolEngine>(context, requests, std::move(pool));
}

FileEngines::FileEngines(AioContext& context, Requests& requests, BackEnd& back_end, FileIo file_io,
                         std::shared_ptr<ThreadPool> pool)
    : context_(context),
      requests_(requests),
      back_end_(back_end),
      try_linux_aio_(file_io == FileIo::kAuto && linux_aio_available()),
      pool_(make_pool_engine(context, requests, std::move(pool))) {
  if (file_io == FileIo::kLinuxAio) {
    linux_aio_ = make_linux_aio_engine(context, requests, back_end);
  }
}

bool FileEngines::may_use_linux_aio() {
  if (!linux_aio_ && std::exchange(try_linux_aio_, false)) {
    try {
      linux_aio_ = make_linux_aio_engine(context_, requests_, back_end_);
    } catch (const std::system_error&) {
      // All that the system allows is in use: the pool does as well.
    }
  }
  return linux_aio_ != nullptr;
}

bool linux_aio_takes(const IoRequest& request) noexcept {
  return request.direct &&
         (request.op == IoRequest::Op::kRead || request.op == IoRequest::Op::kWritev ||
          request.op == IoRequest::Op::kDataSync);
}

}  // namespace roost
