// SPDX-License-Identifier: MIT
// Where a socket is: "unix:PATH", "tcp:HOST:PORT" (an IPv6 HOST in brackets) or "vsock:CID:PORT".
//
// Threads: values.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "roost/base/result.h"

namespace roost {

/// An address, taken apart. Names are not resolved.
struct SocketAddress {
  enum class Kind : std::uint8_t { kUnix, kTcp, kVsock };

  Kind kind = Kind::kUnix;
  std::string path{};     // of a unix socket; what begins with '@' is an abstract name
  std::string host{};     // of TCP, without brackets
  std::string port{};     // of TCP, a number; "0" picks a free one to listen on
  std::uint32_t cid = 0;  // of vsock; kAnyCid: any
  std::uint32_t vsock_port = 0;

  static constexpr std::uint32_t kAnyCid = ~std::uint32_t{0};

  /// EINVAL, with what is wrong with `text` in words. Resolves no names.
  static Result<SocketAddress> parse(const std::string& text);

  /// As parse() takes it.
  std::string text() const;

  /// The NBD URI of an export there, "" for the default one; `tls`: nbds.
  std::string nbd_uri(std::string_view export_name, bool tls = false) const;

  bool operator==(const SocketAddress&) const = default;
};

/// "%2F" and the like for what is not plain in a URI, nor in `also_plain`.
std::string percent_encoded(std::string_view text, std::string_view also_plain = "");

/// The peer of a connected socket, for log lines: "unix client (pid 123)", "127.0.0.1:4711".
std::string describe_peer(int fd);

}  // namespace roost
