// SPDX-License-Identifier: MIT
// NBD URIs: where a server is, which export is meant, and how TLS is to be used.
//
//   nbd://host:port/export            nbds://... the same, and the connection must use TLS
//   nbd+unix:///export?socket=PATH    nbds+unix://...
//   nbd+vsock://cid:port/export       nbds+vsock://...
//
// Behind a '?', separated by '&': socket, tls-type (anon, x509, psk), tls-certificates (a folder),
// tls-username, tls-hostname, tls-verify-peer (0 or 1), tls-psk-file. The user name may stand
// before an '@' and the host (empty with a socket) instead. Everything is percent-decoded; the
// export is all of the path behind its first '/'. What is not known is an error, as the
// specification asks for.
//
// Threads: values and pure functions.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "roost/base/result.h"

namespace roost::nbd {

inline constexpr std::uint32_t kDefaultPort = 10809;
inline constexpr std::uint32_t kVsockHost = 2;  // the host, as its guests number it

struct NbdUri {
  enum class Transport : std::uint8_t { kTcp, kUnix, kVsock };
  enum class TlsType : std::uint8_t { kUnspecified, kAnon, kX509, kPsk };

  Transport transport = Transport::kTcp;
  bool tls_required = false;       // nbds: fail rather than go without
  std::string host{};              // kTcp: a name or address without brackets; empty: this machine
  std::uint32_t cid = kVsockHost;  // kVsock
  std::uint32_t port = kDefaultPort;  // kTcp, kVsock
  std::string socket{};               // kUnix: a path; with a NUL in front, an abstract name
  std::string export_name{};

  TlsType tls_type = TlsType::kUnspecified;
  std::string tls_certificates{};
  std::string tls_username{};
  std::string tls_hostname{};
  std::string tls_psk_file{};
  std::optional<bool> tls_verify_peer{};

  bool operator==(const NbdUri&) const = default;
};

/// EINVAL says what is wrong and where.
Result<NbdUri> parse_uri(std::string_view text);

/// parse_uri() of the result gives `uri` again. REQUIRES: parse_uri() could have made it.
std::string to_string(const NbdUri& uri);

}  // namespace roost::nbd
