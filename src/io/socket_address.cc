// SPDX-License-Identifier: MIT
#include "roost/io/socket_address.h"

#include <fmt/format.h>
#include <linux/vm_sockets.h>
#include <netdb.h>
#include <sys/socket.h>

#include <cerrno>
#include <charconv>

namespace roost {

namespace {

// An IPv6 address, so that what follows is told from it.
std::string bracketed(const std::string& host) {
  return host.contains(':') ? "[" + host + "]" : host;
}

template <class Number>
bool parse_number(std::string_view text, Number most, Number& number) {
  const char* const end = text.data() + text.size();
  const auto [after, error] = std::from_chars(text.data(), end, number);
  return error == std::errc{} && after == end && number <= most;
}

}  // namespace

Result<SocketAddress> SocketAddress::parse(const std::string& text) {
  SocketAddress address;
  if (text.starts_with("unix:") && text.size() > 5) {
    address.path = text.substr(5);
    return address;
  }
  if (text.starts_with("tcp:")) {
    address.kind = Kind::kTcp;
    const std::string rest = text.substr(4);
    const auto colon = rest.rfind(':');
    if (colon != std::string::npos) {
      address.host = rest.substr(0, colon);
      address.port = rest.substr(colon + 1);
      const bool in_brackets = address.host.starts_with('[') && address.host.ends_with(']');
      if (in_brackets) address.host = address.host.substr(1, address.host.size() - 2);
      const bool ambiguous = !in_brackets && address.host.contains(':');
      unsigned number = 0;
      if (!address.host.empty() && parse_number(address.port, 65535u, number) && !ambiguous) {
        return address;
      }
    }
  }
  if (text.starts_with("vsock:")) {
    address.kind = Kind::kVsock;
    const std::string_view rest = std::string_view(text).substr(6);
    const auto colon = rest.find(':');
    if (colon != std::string::npos) {
      const std::string_view cid = rest.substr(0, colon);
      const bool any = cid == "*";
      if (any) address.cid = kAnyCid;
      if ((any || parse_number(cid, kAnyCid - 1, address.cid)) &&
          parse_number(rest.substr(colon + 1), ~std::uint32_t{0}, address.vsock_port)) {
        return address;
      }
    }
  }
  return fail(EINVAL, "address '" + text + "' (unix:PATH, tcp:HOST:PORT or vsock:CID:PORT)");
}

std::string SocketAddress::text() const {
  switch (kind) {
    case Kind::kUnix:
      return "unix:" + path;
    case Kind::kTcp:
      return fmt::format("tcp:{}:{}", bracketed(host), port);
    case Kind::kVsock:
      return cid == kAnyCid ? fmt::format("vsock:*:{}", vsock_port)
                            : fmt::format("vsock:{}:{}", cid, vsock_port);
  }
  return {};
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

std::string SocketAddress::nbd_uri(std::string_view export_name, bool tls) const {
  const char* const scheme = tls ? "nbds" : "nbd";
  const std::string name = percent_encoded(export_name);
  switch (kind) {
    case Kind::kUnix:
      return fmt::format("{}+unix:///{}?socket={}", scheme, name, percent_encoded(path, "/"));
    case Kind::kTcp:
      return fmt::format("{}://{}:{}/{}", scheme, bracketed(host), port, name);
    case Kind::kVsock:
      return fmt::format("{}+vsock://{}:{}/{}", scheme, cid == kAnyCid ? VMADDR_CID_LOCAL : cid,
                         vsock_port, name);
  }
  return {};
}

std::string describe_peer(int fd) {
  sockaddr_storage peer{};
  socklen_t length = sizeof peer;
  auto* const address = reinterpret_cast<sockaddr*>(&peer);
  if (::getpeername(fd, address, &length) < 0) return "a lost client";
  if (peer.ss_family == AF_UNIX) {
    ucred credentials{};
    socklen_t size = sizeof credentials;
    if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &size) < 0) return "unix client";
    return fmt::format("unix client (pid {})", credentials.pid);
  }
  if (peer.ss_family == AF_VSOCK) {
    const auto& vsock = reinterpret_cast<const sockaddr_vm&>(peer);
    return fmt::format("vsock client {}:{}", vsock.svm_cid, vsock.svm_port);
  }
  char host[NI_MAXHOST];
  char port[NI_MAXSERV];
  if (::getnameinfo(address, length, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
    return "tcp client";
  }
  return fmt::format("{}:{}", bracketed(host), port);
}

}  // namespace roost
