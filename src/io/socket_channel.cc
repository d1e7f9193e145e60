// SPDX-License-Identifier: MIT
#include "roost/io/socket_channel.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/sockios.h>
#include <linux/vm_sockets.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstddef>
#include <cstring>

#include "io/resolve.h"
#include "roost/aio/timer.h"
#include "roost/base/check.h"

namespace roost {

namespace {

// A send and a receive that the kernel takes in one piece.
constexpr std::size_t kMaxPieces = 1024;

constexpr std::size_t kLargeReceive = 64 << 10;

// What may be on the way of files: the pages are the cache's, so this takes little memory, and a
// peer that is quick finds the next part when it has read one. As much as is allowed, if that is
// less.
constexpr int kFileSendBuffer = 4 << 20;

// How often a socket that lingers looks, and how long nothing must have come from a peer that had
// more to say: longer than its kernel waits to try again.
constexpr std::int64_t kLingerStepNs = 2'000'000;
constexpr int kLingerQuietSteps = 150;
constexpr std::size_t kLingerChunk = 64 << 10;

// Room for descriptors. Its alignment is its type's: GCC 12 does not heed alignas of a variable
// that lives in a coroutine's frame.
union ControlBuffer {
  std::uint64_t aligned;
  std::byte bytes[CMSG_SPACE(SocketChannel::kMaxDescriptors * sizeof(int))];
};
static_assert(alignof(ControlBuffer) >= alignof(cmsghdr));

int domain_of(int fd) noexcept {
  int domain = 0;
  socklen_t length = sizeof domain;
  ::getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length);
  return domain;
}

}  // namespace

SocketChannel::SocketChannel(UniqueFd fd, std::string name)
    : Channel(std::move(name)), fd_(std::move(fd)), local_(domain_of(fd_.get()) == AF_UNIX) {}

SocketChannel::~SocketChannel() = default;

Task<Result<std::unique_ptr<SocketChannel>>> SocketChannel::connect(SocketAddress address,
                                                                    std::stop_token stop) {
  const std::string name = address.text();
  const Result<std::vector<ResolvedAddress>> resolved = co_await resolve(address, stop);
  if (!resolved) co_return std::unexpected(resolved.error());
  int last_error = EADDRNOTAVAIL;
  for (const ResolvedAddress& one : *resolved) {
    UniqueFd fd(::socket(one.family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd) {
      last_error = errno;
      continue;
    }
    std::int64_t result = co_await io_connect(fd.get(), one.get(), one.length, stop);
    if (result == -EALREADY) {
      // The ring asks a socket once more that is being connected, and vsock says so.
      const std::int64_t ready = co_await io_poll(fd.get(), POLLOUT, stop);
      int error = ready < 0 ? static_cast<int>(-ready) : 0;
      socklen_t length = sizeof error;
      if (ready >= 0) ::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &length);
      result = -error;
    }
    if (result == 0) {
      const int on = 1;
      // Fails on other sockets, which do not delay anything.
      ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
      co_return std::make_unique<SocketChannel>(std::move(fd), name);
    }
    last_error = static_cast<int>(-result);
    if (result == -ECANCELED) break;
  }
  co_return fail(last_error, "connect to " + name);
}

Result<std::pair<std::unique_ptr<SocketChannel>, std::unique_ptr<SocketChannel>>>
SocketChannel::pair() {
  int fds[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) < 0) {
    return fail(errno, "socketpair");
  }
  UniqueFd one(fds[0]);
  UniqueFd other(fds[1]);
  return std::pair(std::make_unique<SocketChannel>(std::move(one), "one end of a socket pair"),
                   std::make_unique<SocketChannel>(std::move(other), "other end of a socket pair"));
}

// A receive of one piece is a recv, which costs the kernel less. Each iteration is one wait; a wait
// that a move has interrupted goes on where the channel is now.
Task<Result<std::size_t>> SocketChannel::do_readv(std::span<const iovec> to, bool all,
                                                  std::stop_token stop) {
  const int flags = all ? MSG_WAITALL : 0;
  if (to.size() > 1 || received_descriptors_) {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(to.data());
    message.msg_iovlen = std::min(to.size(), kMaxPieces);
    co_return co_await receive(message, flags, std::move(stop));
  }
  const std::span<std::byte> buffer(static_cast<std::byte*>(to[0].iov_base), to[0].iov_len);
  for (;;) {
    if (in_transit(Direction::kRead)) co_await arrive();
    IoRequest request = io_recv(fd_.get(), buffer, flags).request();
    request.likely = all || more_is_likely_;
    CancellableIoAwaiter wait(request, stop, &slots_[0]);
    const std::int64_t n = co_await std::move(wait);
    // A large part that left no room for more has most often not got all there was.
    more_is_likely_ =
        buffer.size() >= kLargeReceive && n == static_cast<std::int64_t>(buffer.size());
    if (n >= 0) co_return static_cast<std::size_t>(n);
    if (n == -ECANCELED && stop.stop_requested())
      co_return cancelled("read from", "nothing was taken");
    if (n == -ECANCELED || n == -EINTR || n == -EAGAIN) continue;
    co_return failure("read from", static_cast<int>(-n));
  }
}

Task<Result<std::size_t>> SocketChannel::receive(msghdr& message, int flags, std::stop_token stop) {
  ControlBuffer control;
  for (;;) {
    if (in_transit(Direction::kRead)) co_await arrive();
    if (received_descriptors_) {
      message.msg_control = control.bytes;
      message.msg_controllen = sizeof control.bytes;
    }
    CancellableIoAwaiter wait(io_recvmsg(fd_.get(), message, flags | MSG_CMSG_CLOEXEC).request(),
                              stop, &slots_[0]);
    const std::int64_t n = co_await std::move(wait);
    if (n == -ECANCELED && stop.stop_requested())
      co_return cancelled("read from", "nothing was taken");
    if (n == -ECANCELED || n == -EINTR || n == -EAGAIN) continue;
    if (n < 0) co_return failure("read from", static_cast<int>(-n));
    if (!received_descriptors_) co_return static_cast<std::size_t>(n);
    for (cmsghdr* c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
      if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
      const std::size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (std::size_t i = 0; i < count; ++i) {
        int fd = -1;
        std::memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
        received_descriptors_->emplace_back(fd);
      }
    }
    if (message.msg_flags & MSG_CTRUNC) co_return failure("receive descriptors from", EMSGSIZE);
    co_return static_cast<std::size_t>(n);
  }
}

Task<Result<std::size_t>> SocketChannel::do_writev(std::span<const iovec> from, bool all,
                                                   std::stop_token stop) {
  msghdr message{};
  message.msg_iov = const_cast<iovec*>(from.data());
  message.msg_iovlen = std::min(from.size(), kMaxPieces);
  ControlBuffer control;
  if (!send_descriptors_.empty()) {
    message.msg_control = control.bytes;
    message.msg_controllen = CMSG_SPACE(send_descriptors_.size_bytes());
    cmsghdr* const c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(send_descriptors_.size_bytes());
    std::memcpy(CMSG_DATA(c), send_descriptors_.data(), send_descriptors_.size_bytes());
  }
  for (;;) {
    if (in_transit(Direction::kWrite)) co_await arrive();
    CancellableIoAwaiter wait(io_sendmsg(fd_.get(), message, all ? MSG_WAITALL : 0).request(), stop,
                              &slots_[1]);
    const std::int64_t n = co_await std::move(wait);
    if (n >= 0) co_return static_cast<std::size_t>(n);
    if (n == -ECANCELED && stop.stop_requested())
      co_return cancelled("write to", "nothing was sent");
    if (n == -ECANCELED || n == -EINTR || n == -EAGAIN) continue;
    co_return failure("write to", static_cast<int>(-n));
  }
}

// The kernel has no way to wait for a socket in a ring and send a file then: so it is tried, and
// what is waited for is room. The socket does not block, the file's pages are there.
Task<Result<std::size_t>> SocketChannel::do_send_file(FilePart part, std::stop_token stop) {
  if (!std::exchange(sends_files_, true)) {
    int size = kFileSendBuffer;
    if (::setsockopt(fd_.get(), SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size) < 0) {
      ::setsockopt(fd_.get(), SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    }
    ::fcntl(fd_.get(), F_SETFL, ::fcntl(fd_.get(), F_GETFL) | O_NONBLOCK);
  }
  for (;;) {
    if (in_transit(Direction::kWrite)) co_await arrive();
    auto offset = static_cast<off_t>(part.offset);
    const ssize_t n = ::sendfile(fd_.get(), part.fd, &offset, part.length);
    if (n > 0) co_return static_cast<std::size_t>(n);
    if (n == 0) co_return failure("send a file that has ended to", ENODATA);
    if (errno == EINTR) continue;
    if (errno != EAGAIN) co_return failure("send a file to", errno);
    CancellableIoAwaiter wait(io_poll(fd_.get(), POLLOUT).request(), stop, &slots_[1]);
    const std::int64_t ready = co_await std::move(wait);
    if (ready == -ECANCELED && stop.stop_requested())
      co_return cancelled("write to", "nothing was sent");
    if (ready < 0 && ready != -ECANCELED && ready != -EINTR)
      co_return failure("wait for", static_cast<int>(-ready));
  }
}

Task<Result<void>> SocketChannel::send_with_descriptors(std::span<const std::byte> bytes,
                                                        std::span<const int> descriptors,
                                                        std::stop_token stop) {
  ROOST_CHECK(!bytes.empty() && descriptors.size() <= kMaxDescriptors,
              "{} descriptors beside {} bytes on {}", descriptors.size(), bytes.size(), name());
  send_descriptors_ = descriptors;
  const Result<std::size_t> first = co_await write(bytes, stop);
  send_descriptors_ = {};
  if (!first) co_return std::unexpected(first.error());
  co_return co_await write_full(bytes.subspan(*first), std::move(stop));
}

Task<Result<std::size_t>> SocketChannel::read_with_descriptors(std::span<std::byte> to,
                                                               std::vector<UniqueFd>& descriptors,
                                                               std::stop_token stop) {
  received_descriptors_ = &descriptors;
  Result<std::size_t> result = co_await read(to, std::move(stop));
  received_descriptors_ = nullptr;
  co_return result;
}

Task<Result<void>> SocketChannel::do_shutdown(StreamEnd end, std::stop_token) {
  // A peer that has gone first has ended both.
  if (::shutdown(fd_.get(), end == StreamEnd::kRead ? SHUT_RD : SHUT_WR) < 0 && errno != ENOTCONN) {
    co_return failure("shut down", errno);
  }
  co_return Result<void>();
}

void SocketChannel::abort() noexcept { ::shutdown(fd_.get(), SHUT_RDWR); }

// Closing a TCP socket that holds, or still gets, unread data resets the connection, and what was
// sent may be lost on either side: reads and forgets what comes until there is quiet and our side
// has arrived. The end of our side comes last, by the close: once it is sent, data that comes
// resets the connection, too. (What a unix socket has sent has arrived.)
Task<void> SocketChannel::linger(std::int64_t limit_ns, std::stop_token stop) {
  const int domain = domain_of(fd_.get());
  const bool tcp = domain == AF_INET || domain == AF_INET6;
  std::vector<std::byte> dropped(kLingerChunk);
  bool asked_for_more = false;
  int quiet_steps = 0;
  for (std::int64_t waited_ns = 0; waited_ns < limit_ns; waited_ns += kLingerStepNs) {
    ++quiet_steps;
    while (::recv(fd_.get(), dropped.data(), dropped.size(), MSG_DONTWAIT) > 0) {
      asked_for_more = true;
      quiet_steps = 0;
    }
    int unsent = 0;
    const bool arrived = !tcp || ::ioctl(fd_.get(), SIOCOUTQ, &unsent) < 0 || unsent == 0;
    const bool quiet = !tcp || !asked_for_more || quiet_steps >= kLingerQuietSteps;
    if (arrived && quiet) co_return;
    const Result<void> slept = co_await sleep_for(kLingerStepNs, stop);
    if (!slept) co_return;
  }
}

void SocketChannel::interrupt(AioContext&) {
  for (IoSlot& slot : slots_) slot.interrupt();
}

}  // namespace roost
