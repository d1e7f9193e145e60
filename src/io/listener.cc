// SPDX-License-Identifier: MIT
#include "roost/io/listener.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/vm_sockets.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdlib>
#include <cstring>

#include "io/resolve.h"
#include "roost/aio/io.h"
#include "roost/aio/timer.h"

namespace roost {

namespace {

// How long to leave clients in the queue when there are no descriptors for them.
constexpr std::int64_t kAcceptRetryNs = 100'000'000;

constexpr int kFirstActivated = 3;  // of systemd's protocol, as sd_listen_fds(3) says

UniqueFd stream_socket(int family) {
  return UniqueFd(::socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
}

// Nobody listens on it: left behind by a server that was killed.
bool is_stale(const SocketAddress& where, const ResolvedAddress& address) {
  struct stat info;
  if (::stat(where.path.c_str(), &info) < 0 || !S_ISSOCK(info.st_mode)) return false;
  const UniqueFd probe = stream_socket(AF_UNIX);
  return probe && ::connect(probe.get(), address.get(), address.length) < 0 &&
         errno == ECONNREFUSED;
}

void set_port(ResolvedAddress& address, std::uint16_t port) {
  if (address.family() == AF_INET) {
    reinterpret_cast<sockaddr_in&>(address.storage).sin_port = htons(port);
  } else if (address.family() == AF_INET6) {
    reinterpret_cast<sockaddr_in6&>(address.storage).sin6_port = htons(port);
  }
}

// `only_v6`: IPv6's any-address is not to be in the way of IPv4's.
Result<UniqueFd> listen_on(const SocketAddress& where, const ResolvedAddress& address,
                           bool only_v6) {
  UniqueFd fd = stream_socket(address.family());
  if (!fd) return fail(errno, where.text());
  const int on = 1;
  if (where.kind == SocketAddress::Kind::kTcp) {
    ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (only_v6 && address.family() == AF_INET6) {
      ::setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
    }
  }
  int bound = ::bind(fd.get(), address.get(), address.length);
  if (bound < 0 && errno == EADDRINUSE && where.kind == SocketAddress::Kind::kUnix &&
      !where.path.starts_with('@') && is_stale(where, address)) {
    ::unlink(where.path.c_str());
    bound = ::bind(fd.get(), address.get(), address.length);
  }
  if (bound < 0 || ::listen(fd.get(), SOMAXCONN) < 0) return fail(errno, where.text());
  return fd;
}

// What getsockname(2) says.
Result<SocketAddress> bound_address(int fd) {
  sockaddr_storage bound{};
  socklen_t length = sizeof bound;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&bound), &length) < 0) {
    return fail(errno, "getsockname");
  }
  SocketAddress address;
  if (bound.ss_family == AF_UNIX) {
    const auto& unix_address = reinterpret_cast<const sockaddr_un&>(bound);
    const std::size_t size = length - offsetof(sockaddr_un, sun_path);
    if (size > 0 && unix_address.sun_path[0] == '\0') {
      address.path.assign(unix_address.sun_path, size);
      address.path[0] = '@';
    } else {
      address.path = std::string(unix_address.sun_path, ::strnlen(unix_address.sun_path, size));
    }
    return address;
  }
  if (bound.ss_family == AF_VSOCK) {
    const auto& vsock = reinterpret_cast<const sockaddr_vm&>(bound);
    address.kind = SocketAddress::Kind::kVsock;
    address.cid = vsock.svm_cid;
    address.vsock_port = vsock.svm_port;
    return address;
  }
  char host[NI_MAXHOST];
  char port[NI_MAXSERV];
  if (::getnameinfo(reinterpret_cast<sockaddr*>(&bound), length, host, sizeof host, port,
                    sizeof port, NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
    return fail(EAFNOSUPPORT, "a socket of an unknown kind");
  }
  address.kind = SocketAddress::Kind::kTcp;
  address.host = host;
  address.port = port;
  return address;
}

}  // namespace

Result<ListenSocket> ListenSocket::open_at(const SocketAddress& where,
                                           const ResolvedAddress& address, bool only_v6) {
  Result<UniqueFd> fd = listen_on(where, address, only_v6);
  if (!fd) return std::unexpected(fd.error());
  ListenSocket socket(std::move(*fd), where);
  if (where.kind == SocketAddress::Kind::kUnix) {
    struct stat info;
    if (::stat(where.path.c_str(), &info) == 0) {
      socket.device_ = info.st_dev;
      socket.inode_ = info.st_ino;
    }
  } else if (const auto bound = bound_address(socket.fd())) {
    // The host as it was given: it says more than a number.
    socket.address_.port = bound->port;
    socket.address_.vsock_port = bound->vsock_port;
  }
  return socket;
}

Result<ListenSocket> ListenSocket::open(const SocketAddress& where) {
  const auto resolved = resolve_now(where, true);
  if (!resolved) return std::unexpected(resolved.error());
  Error last_error(EADDRNOTAVAIL, where.text());
  for (const ResolvedAddress& one : *resolved) {
    Result<ListenSocket> socket = open_at(where, one, false);
    if (socket) return socket;
    last_error = std::move(socket.error());
  }
  return std::unexpected(last_error);
}

Result<std::vector<ListenSocket>> ListenSocket::open_all(const SocketAddress& where) {
  const auto resolved = resolve_now(where, true);
  if (!resolved) return std::unexpected(resolved.error());
  std::vector<ListenSocket> sockets;
  SocketAddress address = where;
  for (ResolvedAddress one : *resolved) {
    if (!sockets.empty()) {
      // A port that was picked for the first is that of all.
      address.port = sockets.front().address().port;
      set_port(one, static_cast<std::uint16_t>(std::stoi(address.port)));
    }
    Result<ListenSocket> socket = open_at(address, one, resolved->size() > 1);
    // A host may have an address of a protocol that this machine has not.
    if (!socket && resolved->size() > 1 &&
        (socket.error().code() == EAFNOSUPPORT || socket.error().code() == EADDRNOTAVAIL)) {
      continue;
    }
    if (!socket) return std::unexpected(socket.error());
    sockets.push_back(std::move(*socket));
  }
  if (sockets.empty()) return fail(EADDRNOTAVAIL, where.text());
  return sockets;
}

Result<ListenSocket> ListenSocket::adopt(UniqueFd fd) {
  const std::string what = fmt::format("descriptor {}", fd.get());
  int type = 0;
  int listening = 0;
  socklen_t length = sizeof type;
  if (::getsockopt(fd.get(), SOL_SOCKET, SO_TYPE, &type, &length) < 0) return fail(errno, what);
  length = sizeof listening;
  if (::getsockopt(fd.get(), SOL_SOCKET, SO_ACCEPTCONN, &listening, &length) < 0) {
    return fail(errno, what);
  }
  if (type != SOCK_STREAM || !listening) {
    return fail(EINVAL, what + " is no listening stream socket");
  }
  Result<SocketAddress> address = bound_address(fd.get());
  if (!address) return std::unexpected(address.error());
  ::fcntl(fd.get(), F_SETFD, FD_CLOEXEC);
  ::fcntl(fd.get(), F_SETFL, ::fcntl(fd.get(), F_GETFL) | O_NONBLOCK);
  return ListenSocket(std::move(fd), std::move(*address));
}

ListenSocket::~ListenSocket() {
  struct stat info;
  if (fd_ && inode_ != 0 && ::stat(address_.path.c_str(), &info) == 0 && info.st_dev == device_ &&
      info.st_ino == inode_) {
    ::unlink(address_.path.c_str());
  }
}

bool out_of_descriptors(int error) noexcept {
  return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
}

Task<Result<UniqueFd>> ListenSocket::accept(std::stop_token stop,
                                            const std::function<void(const Error&)>* report) const {
  for (;;) {
    const std::int64_t fd = co_await io_accept(fd_.get(), SOCK_NONBLOCK, stop);
    if (fd >= 0) co_return UniqueFd(static_cast<int>(fd));
    const int error = static_cast<int>(-fd);
    // A client that gave up while it was queued is none.
    if (error == ECONNABORTED || error == EINTR || error == EAGAIN) continue;
    if (!out_of_descriptors(error)) co_return fail(error, "accept on " + address_.text());
    if (report) (*report)(Error(error, "accept on " + address_.text()));
    const Result<void> slept = co_await sleep_for(kAcceptRetryNs, stop);
    if (!slept) co_return fail(ECANCELED, "accept on " + address_.text());
  }
}

Result<std::vector<ListenSocket>> take_activated_sockets() {
  std::vector<ListenSocket> sockets;
  const char* const pid_text = std::getenv("LISTEN_PID");
  const char* const count_text = std::getenv("LISTEN_FDS");
  if (!pid_text || !count_text) return sockets;
  const auto number = [](const char* text, int& value) {
    const char* const end = text + std::strlen(text);
    const auto [after, error] = std::from_chars(text, end, value);
    return error == std::errc{} && after == end && value >= 0;
  };
  int pid = 0;
  int count = 0;
  const bool good = number(pid_text, pid) && number(count_text, count) && count < 4096;
  const std::string text = fmt::format("LISTEN_PID={} LISTEN_FDS={}", pid_text, count_text);
  if (good && pid != ::getpid()) return sockets;  // meant for somebody else
  ::unsetenv("LISTEN_PID");
  ::unsetenv("LISTEN_FDS");
  ::unsetenv("LISTEN_FDNAMES");
  if (!good) return fail(EINVAL, text);
  for (int i = 0; i < count; ++i) {
    Result<ListenSocket> socket = ListenSocket::adopt(UniqueFd(kFirstActivated + i));
    if (!socket) return fail(socket.error().code(), text + ": " + socket.error().doing());
    sockets.push_back(std::move(*socket));
  }
  return sockets;
}

}  // namespace roost
