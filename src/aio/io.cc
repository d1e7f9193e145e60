// SPDX-License-Identifier: MIT
#include "roost/aio/io.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <span>
#include <utility>

#include "roost/aio/aio_context.h"

namespace roost {

bool IoAwaiter::Request::try_now() {
  context = AioContext::current();
  return context->back_end().try_now(*this);
}

void IoAwaiter::Request::start() noexcept {
  complete = [](IoRequest& request) noexcept { wake_waiter(*static_cast<Request&>(request).co); };
  context->back_end().start(*this);
}

void IoSlot::interrupt() noexcept {
  if (request_) request_->context->back_end().cancel(*request_);
}

CancellableIoAwaiter::CancellableIoAwaiter(const IoRequest& what, std::stop_token stop,
                                           IoSlot* slot) noexcept
    : request_(what), stop_(std::move(stop)), slot_(slot) {
  request_.awaiter = this;
}

CancellableIoAwaiter::Relay::Relay(CancellableIoAwaiter& a) noexcept
    : StopRelay(
          *a.request_.context,
          [](StopRelay& relay) noexcept {
            auto& self = static_cast<Relay&>(relay).awaiter;
            self.request_.cancelled = !self.started_;
            if (self.started_) self.request_.context->back_end().cancel(self.request_);
          },
          [](StopRelay& relay) noexcept {
            wake_waiter(*static_cast<Relay&>(relay).awaiter.request_.co);
          }),
      awaiter(a) {}

bool CancellableIoAwaiter::await_ready() {
  request_.result = -ECANCELED;
  if (stop_.stop_requested()) return true;
  request_.context = AioContext::current();
  if (request_.context->back_end().try_now(request_)) return true;
  if (!stop_.stop_possible()) return false;
  relay_.emplace(*this).watch(stop_);
  if (!request_.cancelled) return false;
  // Requested between the two looks.
  request_.result = -ECANCELED;
  return true;
}

void CancellableIoAwaiter::start() noexcept {
  request_.complete = [](IoRequest& ended) noexcept {
    auto& request = static_cast<Request&>(ended);
    if (request.awaiter->slot_) request.awaiter->slot_->request_ = nullptr;
    auto& relay = request.awaiter->relay_;
    if (!relay || relay->ended()) wake_waiter(*request.co);
  };
  started_ = true;
  if (slot_) slot_->request_ = &request_;
  request_.context->back_end().start(request_);
}

namespace {

int poll_now(int fd, short events, int timeout_ms) noexcept {
  pollfd one{.fd = fd, .events = events, .revents = 0};
  const int count = ::poll(&one, 1, timeout_ms);
  return count > 0 ? one.revents : count;
}

void set_non_blocking(int fd) noexcept {
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags >= 0 && !(flags & O_NONBLOCK)) ::fcntl(fd, F_SETFL, flags | O_NONBLOCK);
}

// One that is under way (EINPROGRESS) is done once the socket is writable.
int connect_now(const IoRequest& request) noexcept {
  if (!request.tried) {
    set_non_blocking(request.fd);
    return ::connect(request.fd, static_cast<const sockaddr*>(request.address), request.length);
  }
  const int ready = poll_now(request.fd, POLLOUT, 0);
  if (ready < 0) return ready;
  int error = EINPROGRESS;
  socklen_t length = sizeof error;
  if (ready > 0 && ::getsockopt(request.fd, SOL_SOCKET, SO_ERROR, &error, &length) < 0) return -1;
  errno = error;
  return error == 0 ? 0 : -1;
}

// The kernel takes one such advice for no more than the device's read-ahead, silently.
int read_ahead(int fd, off_t offset, std::uint64_t size) noexcept {
  constexpr std::uint64_t kPiece = 128 << 10;
  while (size > 0) {
    const std::uint64_t count = std::min(size, kPiece);
    errno = ::posix_fadvise(fd, offset, static_cast<off_t>(count), POSIX_FADV_WILLNEED);
    if (errno != 0) return -1;
    offset += static_cast<off_t>(count);
    size -= count;
  }
  return 0;
}

// The file may change meanwhile: what SEEK_DATA found may be a hole for SEEK_HOLE.
std::int64_t find_extents(int fd, std::span<FileExtent> to, off_t at, off_t end) noexcept {
  std::size_t count = 0;
  bool at_data = false;
  while (at < end) {
    off_t next = ::lseek(fd, at, at_data ? SEEK_HOLE : SEEK_DATA);
    if (next < 0) {
      if (errno != ENXIO) return -1;
      // Nothing but a hole up to the end of the file, or `at` is beyond that.
      next = ::lseek(fd, 0, SEEK_END);
      if (next < 0) return -1;
      if (next <= at) {
        if (count > 0) break;
        errno = ENXIO;
        return -1;
      }
      if (std::exchange(at_data, false)) continue;
    }
    if (next > at) {
      const bool hole = !at_data;
      if (count > 0 && to[count - 1].hole == hole) {
        to[count - 1].length += static_cast<std::uint64_t>(next - at);
      } else if (count < to.size()) {
        to[count++] = {.length = static_cast<std::uint64_t>(next - at), .hole = hole};
      } else {
        break;
      }
    }
    at = next;
    at_data = !at_data;
  }
  return static_cast<std::int64_t>(count);
}

}  // namespace

std::int64_t IoRequest::execute(bool dont_wait) const noexcept {
  std::int64_t done = 0;
  const int nowait = dont_wait ? RWF_NOWAIT : 0;
  const auto file_offset = static_cast<off_t>(offset);
  do {
    switch (op) {
      case Op::kRead: {
        const iovec one{address, length};
        done = ::preadv2(fd, &one, 1, file_offset, flags | nowait);
        break;
      }
      case Op::kWritev:
        if (dont_wait && (flags & (RWF_DSYNC | RWF_SYNC))) return -EAGAIN;  // it waits for the disk
        done = ::pwritev2(fd, static_cast<const iovec*>(address), static_cast<int>(length),
                          file_offset, flags | nowait);
        break;
      case Op::kDataSync:
        done = dont_wait ? (errno = EAGAIN, -1) : ::fdatasync(fd);
        break;
      case Op::kAllocate:
        done = dont_wait ? (errno = EAGAIN, -1)
                         : ::fallocate(fd, flags, file_offset, static_cast<off_t>(size));
        break;
      case Op::kTruncate:
        done = dont_wait ? (errno = EAGAIN, -1) : ::ftruncate(fd, static_cast<off_t>(size));
        break;
      case Op::kReadAhead:
        done = dont_wait ? (errno = EAGAIN, -1) : read_ahead(fd, file_offset, size);
        break;
      case Op::kFindExtents:
        done = dont_wait ? (errno = EAGAIN, -1)
                         : find_extents(fd, {static_cast<FileExtent*>(address), length},
                                        file_offset, file_offset + static_cast<off_t>(size));
        break;
      case Op::kRecv:
        done = ::recv(fd, address, length, flags | (dont_wait ? MSG_DONTWAIT : 0));
        break;
      case Op::kRecvMsg:
        done = ::recvmsg(fd, static_cast<msghdr*>(address), flags | (dont_wait ? MSG_DONTWAIT : 0));
        break;
      case Op::kSendMsg:
        done = ::sendmsg(fd, static_cast<const msghdr*>(address),
                         flags | (dont_wait ? MSG_DONTWAIT : 0));
        break;
      case Op::kAccept:
        if (dont_wait) set_non_blocking(fd);
        done = ::accept4(fd, nullptr, nullptr, flags);
        break;
      case Op::kConnect:
        done = connect_now(*this);
        break;
      case Op::kPoll:
        done = poll_now(fd, static_cast<short>(flags), dont_wait ? 0 : -1);
        if (done == 0) done = (errno = EAGAIN, -1);
        break;
    }
  } while (done < 0 && errno == EINTR);
  return done < 0 ? -errno : done;
}

}  // namespace roost
