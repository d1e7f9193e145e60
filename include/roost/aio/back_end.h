// SPDX-License-Identifier: MIT
// What a context waits with: io_uring, epoll with a thread pool, or a simulation.
//
// Threads: made, used and destroyed on the context's home thread.
// Lifetime: owned by the context. It cancels and reaps everything before it goes; requests must
// not be in flight then.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "roost/aio/io_request.h"

namespace roost {

class AioContext;
class ThreadPool;

/// What to call when a descriptor is ready. An empty member is not waited for.
struct FdHandler {
  std::function<void()> read = nullptr;
  std::function<void()> write = nullptr;
  /// Asked while the context is busy polling, instead of a system call; true if `read` or `write`
  /// should be called (whichever are set).
  std::function<bool()> poll = nullptr;
};

/// A watched descriptor. Level-triggered: called again while it stays ready.
struct FdWatch {
  int fd = -1;
  std::shared_ptr<const FdHandler> handler;  // null: removed
  // For the back end:
  std::uint32_t armed_events = 0;  // POLLIN | POLLOUT that the kernel watches; 0: none
  bool removed = false;            // the back end frees it once nobody uses it any more
  bool in_callback = false;

  std::uint32_t wanted_events() const noexcept;
  /// Calls what `events` (POLL*) asks for; errors and hang-ups go to both.
  void dispatch(std::uint32_t events);
};

/// What a context waits with. Every function on the home thread.
class BackEnd {
 public:
  virtual ~BackEnd() = default;
  BackEnd() = default;
  BackEnd(const BackEnd&) = delete;
  BackEnd& operator=(const BackEnd&) = delete;

  /// "io_uring", "epoll" or "simulated".
  virtual const char* name() const noexcept = 0;

  /// Hands over what was started, waits up to `timeout_ns` (0: not at all, negative: without
  /// limit) for something to happen, and dispatches it. True if something was dispatched.
  virtual bool poll(std::int64_t timeout_ns) = 0;

  /// Hands over what was started, without waiting or dispatching.
  virtual void flush() = 0;

  /// Whether poll(0) would find something. Called in a busy loop.
  virtual bool ready() noexcept = 0;

  /// Tries what is held back for a busy wait, with system calls; true if something came of it, and
  /// poll(0) will find it. Called in a busy loop, less often than ready().
  virtual bool try_held() noexcept { return false; }

  /// Executes the request at once if that cannot block.
  virtual bool try_now(IoRequest& request) = 0;

  /// Starts the request; complete() is called from a later poll().
  virtual void start(IoRequest& request) = 0;

  /// Asks that a request in flight end early. complete() comes as ever, from a later poll(): with
  /// -ECANCELED if the operation was ended without effect, otherwise with what it did. Asking twice
  /// is asking once.
  virtual void cancel(IoRequest& request) = 0;

  /// `watch.handler` has changed, was set for the first time, or was removed; a removed watch
  /// belongs to the back end.
  virtual void watch_changed(FdWatch& watch) = 0;
};

/// What stands in for the kernel where a context is simulated: gives it its back end, carries its
/// wake-up signals in place of an eventfd, and blocks its callers. One for each context, and
/// outlives it.
class BackEndProvider {
 public:
  BackEndProvider() = default;
  BackEndProvider(const BackEndProvider&) = delete;
  BackEndProvider& operator=(const BackEndProvider&) = delete;

  virtual std::unique_ptr<BackEnd> make_back_end(AioContext& context) = 0;

  /// A producer has found the context asleep. Called by that producer; the signal arrives later,
  /// by AioContext::signalled().
  virtual void signal() noexcept = 0;

  /// Blocks the caller until `done()`. `what` says for a report what it waits for.
  virtual void wait_until(const char* what, const std::function<bool()>& done) = 0;

  /// The context is gone, but for its memory: nothing may reach it any more.
  virtual void context_gone() noexcept = 0;

 protected:
  ~BackEndProvider() = default;
};

/// What executes the operations on files.
enum class FileIo : std::uint8_t {
  kAuto,      // the ring of the io_uring loop; under epoll the thread pool and, for files opened
              // with O_DIRECT, Linux AIO where it can be had
  kPool,      // the thread pool
  kLinuxAio,  // Linux AIO for files opened with O_DIRECT, the thread pool for others, or an error
  kIoUring,   // the ring of the io_uring loop, or an error
};

/// Throws std::system_error where the kernel refuses. `wake_fd` is the context's eventfd: the back
/// end waits for it, and reports what it reads of it, if anything, to AioContext::signalled().
/// `pool` may be null: one of its own is made when needed.
std::unique_ptr<BackEnd> make_io_uring_back_end(AioContext& context, int wake_fd, FileIo file_io,
                                                std::shared_ptr<ThreadPool> pool);
std::unique_ptr<BackEnd> make_epoll_back_end(AioContext& context, int wake_fd, FileIo file_io,
                                             std::shared_ptr<ThreadPool> pool);

/// Whether this process may use io_uring, tried once.
bool io_uring_available() noexcept;

/// Whether Roost was built with libaio and this process may use Linux AIO, tried once.
bool linux_aio_available() noexcept;

}  // namespace roost
