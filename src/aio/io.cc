// SPDX-License-Identifier: MIT
#include "roost/aio/io.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

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
      case Op::kRecv:
        done = ::recv(fd, address, length, flags | (dont_wait ? MSG_DONTWAIT : 0));
        break;
      case Op::kSendMsg:
        done = ::sendmsg(fd, static_cast<const msghdr*>(address),
                         flags | (dont_wait ? MSG_DONTWAIT : 0));
        break;
    }
  } while (done < 0 && errno == EINTR);
  return done < 0 ? -errno : done;
}

}  // namespace roost
