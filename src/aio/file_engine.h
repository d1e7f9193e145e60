// SPDX-License-Identifier: MIT
// What executes file operations where the event loop does not do so itself: a thread pool, or
// Linux AIO.
//
// Threads: home thread; a job's operation runs on a worker.
// Lifetime: owned by the back end and gone before its Requests. No request may be in flight then.
#pragma once

#include <memory>

#include "aio/requests.h"
#include "roost/aio/back_end.h"

namespace roost {

class FileEngine {
 public:
  virtual ~FileEngine() = default;
  FileEngine() = default;
  FileEngine(const FileEngine&) = delete;
  FileEngine& operator=(const FileEngine&) = delete;

  virtual void start(IoRequest& request) = 0;

  /// As BackEnd::cancel().
  virtual void cancel(IoRequest& request) = 0;

  /// Hands over what was started.
  virtual void flush() {}
};

/// `pool` may be null: one of its own is made when needed. Takes every operation.
std::unique_ptr<FileEngine> make_pool_engine(AioContext& context, Requests& requests,
                                             std::shared_ptr<ThreadPool> pool);

/// Linux AIO takes reads, writes and syncs of files opened with O_DIRECT; for anything else
/// io_submit(2) would wait. Its completions come through a descriptor that `back_end` watches.
/// Throws std::system_error; ENOSYS where Roost was built without libaio.
std::unique_ptr<FileEngine> make_linux_aio_engine(AioContext& context, Requests& requests,
                                                  BackEnd& back_end);
bool linux_aio_takes(const IoRequest& request) noexcept;

/// The engines of a back end, by what its context asks for.
class FileEngines {
 public:
  /// Throws std::system_error: Linux AIO demanded and not to be had.
  FileEngines(AioContext& context, Requests& requests, BackEnd& back_end, FileIo file_io,
              std::shared_ptr<ThreadPool> pool);

  void start(IoRequest& request) {
    if (linux_aio_takes(request) && may_use_linux_aio()) {
      request.stage = kInLinuxAio;
      linux_aio_->start(request);
    } else {
      request.stage = kInPool;
      pool_->start(request);
    }
  }

  /// REQUIRES: its stage is kInPool or kInLinuxAio.
  void cancel(IoRequest& request) {
    (request.stage == kInLinuxAio ? linux_aio_ : pool_)->cancel(request);
  }

  void flush() {
    pool_->flush();
    if (linux_aio_) linux_aio_->flush();
  }

 private:
  bool may_use_linux_aio();

  AioContext& context_;
  Requests& requests_;
  BackEnd& back_end_;
  bool try_linux_aio_;  // when first needed
  std::unique_ptr<FileEngine> pool_;
  std::unique_ptr<FileEngine> linux_aio_;
};

}  // namespace roost
