// SPDX-License-Identifier: MIT
#include "roost/export/listen_address.h"

#include <fmt/format.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cerrno>
#include <charconv>
#include <cstring>
#include <memory>

namespace roost {

namespace {

Result<sockaddr_un> unix_address(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) return fail(ENAMETOOLONG, "unix:" + path);
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

const sockaddr* as_sockaddr(const sockaddr_un& address) {
  return reinterpret_cast<const sockaddr*>(&address);
}

// Nobody listens on it: left behind by a server that was killed.
bool is_stale(const sockaddr_un& address) {
  struct stat info;
  if (::stat(address.sun_path, &info) < 0 || !S_ISSOCK(info.st_mode)) return false;
  UniqueFd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  return probe && ::connect(probe.get(), as_sockaddr(address), sizeof address) < 0 &&
         errno == ECONNREFUSED;
}

Result<UniqueFd> listen_unix(const ListenAddress& where) {
  const auto address = unix_address(where.path);
  if (!address) return std::unexpected(address.error());
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return fail(errno, where.text());
  int bound = ::bind(fd.get(), as_sockaddr(*address), sizeof *address);
  if (bound < 0 && errno == EADDRINUSE && is_stale(*address)) {
    ::unlink(where.path.c_str());
    bound = ::bind(fd.get(), as_sockaddr(*address), sizeof *address);
  }
  if (bound < 0 || ::listen(fd.get(), SOMAXCONN) < 0) return fail(errno, where.text());
  return fd;
}

Result<UniqueFd> listen_tcp(ListenAddress& where) {
  const std::string text = where.text();
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* list = nullptr;
  const int error = ::getaddrinfo(where.host.c_str(), where.port.c_str(), &hints, &list);
  if (error != 0) {
    return fail(error == EAI_SYSTEM ? errno : EADDRNOTAVAIL, text + ": " + ::gai_strerror(error));
  }
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owner(list, &::freeaddrinfo);
  int last_error = EADDRNOTAVAIL;
  for (const addrinfo* one = list; one; one = one->ai_next) {
    UniqueFd fd(::socket(one->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    const int on = 1;
    if (fd) ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (!fd || ::bind(fd.get(), one->ai_addr, one->ai_addrlen) < 0 ||
        ::listen(fd.get(), SOMAXCONN) < 0) {
      last_error = errno;
      continue;
    }
    sockaddr_storage bound{};
    socklen_t length = sizeof bound;
    char port[NI_MAXSERV];
    if (::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&bound), &length) == 0 &&
        ::getnameinfo(reinterpret_cast<sockaddr*>(&bound), length, nullptr, 0, port, sizeof port,
                      NI_NUMERICSERV) == 0) {
      where.port = port;
    }
    return fd;
  }
  return fail(last_error, text);
}

std::string percent_encoded(std::string_view text, std::string_view also_plain) {
  constexpr std::string_view kPlain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~";
  constexpr std::string_view kHex = "0123456789ABCDEF";
  std::string encoded;
  for (const char c : text) {
    if (kPlain.contains(c) || also_plain.contains(c)) {
      encoded += c;
    } else {
      const auto byte = static_cast<unsigned char>(c);
      encoded += {'%', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return encoded;
}

bool is_port(const std::string& text) {
  unsigned port = 0;
  const char* const end = text.data() + text.size();
  const auto [after, error] = std::from_chars(text.data(), end, port);
  return error == std::errc{} && after == end && port <= 65535;
}

}  // namespace

Result<ListenAddress> ListenAddress::parse(const std::string& text) {
  ListenAddress address;
  if (text.starts_with("unix:") && text.size() > 5) {
    address.path = text.substr(5);
    return address;
  }
  if (text.starts_with("tcp:")) {
    address.unix_socket = false;
    const std::string rest = text.substr(4);
    const auto colon = rest.rfind(':');
    if (colon != std::string::npos) {
      address.host = rest.substr(0, colon);
      address.port = rest.substr(colon + 1);
      const bool bracketed = address.host.starts_with('[') && address.host.ends_with(']');
      if (bracketed) address.host = address.host.substr(1, address.host.size() - 2);
      const bool ambiguous = !bracketed && address.host.contains(':');
      if (!address.host.empty() && is_port(address.port) && !ambiguous) return address;
    }
  }
  return fail(EINVAL, "address '" + text + "' (unix:PATH or tcp:HOST:PORT)");
}

std::string ListenAddress::text() const {
  if (unix_socket) return "unix:" + path;
  return "tcp:" + (host.contains(':') ? "[" + host + "]" : host) + ":" + port;
}

Result<ListenSocket> ListenSocket::open(const ListenAddress& where) {
  ListenAddress address = where;
  auto fd = where.unix_socket ? listen_unix(where) : listen_tcp(address);
  if (!fd) return std::unexpected(fd.error());
  ListenSocket socket(std::move(*fd), std::move(address));
  struct stat info;
  if (where.unix_socket && ::stat(where.path.c_str(), &info) == 0) {
    socket.device_ = info.st_dev;
    socket.inode_ = info.st_ino;
  }
  return socket;
}

ListenSocket::~ListenSocket() {
  struct stat info;
  if (fd_ && address_.unix_socket && ::stat(address_.path.c_str(), &info) == 0 &&
      info.st_dev == device_ && info.st_ino == inode_) {
    ::unlink(address_.path.c_str());
  }
}

std::string ListenSocket::uri(std::string_view export_name) const {
  const std::string name = percent_encoded(export_name, "");
  if (address_.unix_socket) {
    return "nbd+unix:///" + name + "?socket=" + percent_encoded(address_.path, "/");
  }
  const std::string host = address_.host.contains(':') ? "[" + address_.host + "]" : address_.host;
  return "nbd://" + host + ":" + address_.port + "/" + name;
}

std::string describe_peer(int fd) {
  sockaddr_storage peer{};
  socklen_t length = sizeof peer;
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &length) < 0) return "a lost client";
  if (peer.ss_family == AF_UNIX) {
    ucred credentials{};
    socklen_t size = sizeof credentials;
    if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &size) < 0) return "unix client";
    return "unix client (pid " + std::to_string(credentials.pid) + ")";
  }
  char host[NI_MAXHOST];
  char port[NI_MAXSERV];
  if (::getnameinfo(reinterpret_cast<sockaddr*>(&peer), length, host, sizeof host, port,
                    sizeof port, NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
    return "tcp client";
  }
  if (peer.ss_family == AF_INET6) return fmt::format("[{}]:{}", host, port);
  return fmt::format("{}:{}", host, port);
}

}  // namespace roost
