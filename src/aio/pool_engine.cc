// SPDX-License-Identifier: MIT
// File operations as jobs of a thread pool. Writes to one file that are started together are one
// job: a file system takes them one after the other anyway, and to wake a worker, and the loop, for
// each costs more than a write of a few pages to the page cache.

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

  ~PoolEngine() override { ROOST_CHECK(pending_.empty(), "writes were never handed over"); }

  void start(IoRequest& request) override {
    if (!pool_) pool_ = std::make_shared<ThreadPool>();
    if (request.op == IoRequest::Op::kWritev && request.flags == 0) {
      if (pending_count_ > 0 && pending_fd_ != request.fd) submit_pending();
      request.job = nullptr;
      pending_.push(request);
      pending_fd_ = request.fd;
      if (++pending_count_ == kMaxBatch) submit_pending();
      return;
    }
    auto* job = new Job(*this, request);
    request.job = job;
    pool_->submit(*job);
  }

  // A job that has started is waited for, and tells what it did.
  void cancel(IoRequest& request) override {
    if (!request.job) {
      pending_.remove(request);
      --pending_count_;
    } else {
      auto* job = static_cast<Job*>(request.job);
      if (!pool_->withdraw(*job)) return;
      job->requests.remove(request);
      if (job->batch) --batches_running_;
      if (!job->requests.empty()) submit_batch(job->requests, request.fd);
      delete job;
    }
    requests_.end_later(request, -ECANCELED);
  }

  // What comes while a batch of the same file runs makes up the next.
  void flush() override {
    if (pending_count_ == 0 || (batches_running_ > 0 && running_fd_ == pending_fd_)) return;
    submit_pending();
  }

 private:
  // Writes that one job takes: enough to make waking a worker cheap, and few enough for the first
  // not to wait long for the last.
  static constexpr unsigned kMaxBatch = 32;

  struct Job : ThreadPool::Work, CallbackEntry {
    Job(PoolEngine& owner, IoRequest& r) : Job(owner) { requests.push(r); }
    Job(PoolEngine& owner, RequestList list) : Job(owner) {
      requests = list;
      batch = true;
    }
    explicit Job(PoolEngine& owner)
        : CallbackEntry(&deliver), engine(owner), context(owner.context_) {
      ThreadPool::Work::run = &execute;
    }
    static void execute(ThreadPool::Work& work) noexcept {
      auto& job = static_cast<Job&>(work);
      for (IoRequest* one = job.requests.first(); one; one = one->next) {
        one->result = one->execute(false);
      }
      // After the post the job belongs to the context.
      ROOST_CHECK(job.context.post(job), "I/O finished after its context '{}' was closed",
                  job.context.name());
    }
    static bool deliver(CallbackEntry& entry) noexcept {
      auto& job = static_cast<Job&>(entry);
      Requests& requests = job.engine.requests_;
      RequestList done = job.requests;
      if (job.batch) --job.engine.batches_running_;
      delete &job;
      IoRequest* const first = done.pop();
      if (done.empty()) {
        requests.end(*first);
        return true;
      }
      // A nested poll goes on with the others.
      requests.end_later(*first, first->result);
      while (IoRequest* const one = done.pop()) requests.end_later(*one, one->result);
      requests.end_those_that_have();
      return true;
    }
    PoolEngine& engine;
    AioContext& context;
    RequestList requests;
    bool batch = false;
  };

  void submit_pending() {
    pending_count_ = 0;
    submit_batch(std::exchange(pending_, {}), pending_fd_);
  }

  void submit_batch(RequestList list, int fd) {
    auto* job = new Job(*this, list);
    for (IoRequest* one = list.first(); one; one = one->next) one->job = job;
    ++batches_running_;
    running_fd_ = fd;
    pool_->submit(*job);
  }

  AioContext& context_;
  Requests& requests_;
  std::shared_ptr<ThreadPool> pool_;
  RequestList pending_;  // writes to one file, not handed over yet
  unsigned pending_count_ = 0;
  int pending_fd_ = -1;
  unsigned batches_running_ = 0;
  int running_fd_ = -1;  // the file of the last batch
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
