// SPDX-License-Identifier: MIT
#include "io/resolve.h"

#include <linux/vm_sockets.h>
#include <netdb.h>
#include <sys/un.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>

#include "roost/coro/completion.h"

namespace roost {

namespace {

Result<std::vector<ResolvedAddress>> one_address(const void* address, std::size_t length) {
  ResolvedAddress resolved;
  std::memcpy(&resolved.storage, address, length);
  resolved.length = static_cast<socklen_t>(length);
  return std::vector<ResolvedAddress>(1, resolved);
}

Result<std::vector<ResolvedAddress>> resolve_unix(const SocketAddress& where) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const bool abstract = where.path.starts_with('@');
  // A path ends with a NUL; an abstract name begins with one and ends where it is said to.
  if (where.path.size() + (abstract ? 0 : 1) > sizeof address.sun_path) {
    return fail(ENAMETOOLONG, where.text());
  }
  std::memcpy(address.sun_path, where.path.data(), where.path.size());
  if (!abstract) return one_address(&address, sizeof address);
  address.sun_path[0] = '\0';
  return one_address(&address, offsetof(sockaddr_un, sun_path) + where.path.size());
}

// EAI_NONAME of a lookup that may not ask anybody: it is a name.
Result<std::vector<ResolvedAddress>> resolve_tcp(const SocketAddress& where, int flags,
                                                 bool* is_a_name) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags;
  addrinfo* list = nullptr;
  const int error = ::getaddrinfo(where.host.c_str(), where.port.c_str(), &hints, &list);
  if (error != 0) {
    if (is_a_name) *is_a_name = error == EAI_NONAME;
    return fail(error == EAI_SYSTEM ? errno : EADDRNOTAVAIL,
                where.text() + ": " + ::gai_strerror(error));
  }
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owner(list, &::freeaddrinfo);
  std::vector<ResolvedAddress> all;
  for (const addrinfo* one = list; one; one = one->ai_next) {
    ResolvedAddress& resolved = all.emplace_back();
    std::memcpy(&resolved.storage, one->ai_addr, one->ai_addrlen);
    resolved.length = one->ai_addrlen;
  }
  return all;
}

}  // namespace

Result<std::vector<ResolvedAddress>> resolve_now(const SocketAddress& where, bool passive) {
  switch (where.kind) {
    case SocketAddress::Kind::kUnix:
      return resolve_unix(where);
    case SocketAddress::Kind::kTcp:
      return resolve_tcp(where, passive ? AI_PASSIVE : 0, nullptr);
    case SocketAddress::Kind::kVsock: {
      sockaddr_vm address{};
      address.svm_family = AF_VSOCK;
      address.svm_cid = where.cid;
      address.svm_port = where.vsock_port;
      return one_address(&address, sizeof address);
    }
  }
  return fail(EINVAL, where.text());
}

Task<Result<std::vector<ResolvedAddress>>> resolve(const SocketAddress& where,
                                                   std::stop_token stop) {
  if (stop.stop_requested()) co_return fail(ECANCELED, "resolve " + where.text());
  if (where.kind != SocketAddress::Kind::kTcp) co_return resolve_now(where, false);
  bool is_a_name = false;
  Result<std::vector<ResolvedAddress>> numeric = resolve_tcp(where, AI_NUMERICHOST, &is_a_name);
  if (!is_a_name) co_return numeric;
  // A lookup cannot be stopped, and may take half a minute: who is stopped leaves it behind. So it
  // has a thread to itself, and what it uses belongs to it.
  Completion<Result<std::vector<ResolvedAddress>>> found("a host name");
  try {
    std::thread([where, token = found.token()]() mutable {
      token.fire(resolve_tcp(where, 0, nullptr));
    }).detach();
  } catch (const std::system_error& error) {
    co_return fail(error.code().value(), "a thread to resolve " + where.text());
  }
  Result<std::vector<ResolvedAddress>> result = co_await found.wait(std::move(stop));
  if (!result && result.error().code() == ECANCELED) {
    co_return fail(ECANCELED, "resolve " + where.text());
  }
  co_return result;
}

}  // namespace roost
