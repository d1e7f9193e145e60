// SPDX-License-Identifier: MIT
#include "roost/nbd/uri.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <utility>

#include "nbd/words.h"
#include "roost/nbd/protocol.h"

namespace roost::nbd {
namespace {

using Transport = NbdUri::Transport;
using TlsType = NbdUri::TlsType;

struct Scheme {
  std::string_view name;
  Transport transport;
  bool tls_required;
};

constexpr std::array kSchemes{
    Scheme{"nbd", Transport::kTcp, false},         Scheme{"nbds", Transport::kTcp, true},
    Scheme{"nbd+unix", Transport::kUnix, false},   Scheme{"nbds+unix", Transport::kUnix, true},
    Scheme{"nbd+vsock", Transport::kVsock, false}, Scheme{"nbds+vsock", Transport::kVsock, true}};

constexpr std::array<std::pair<std::string_view, TlsType>, 3> kTlsTypes{
    {{"anon", TlsType::kAnon}, {"x509", TlsType::kX509}, {"psk", TlsType::kPsk}}};

bool is_unreserved(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
         c == '.' || c == '_' || c == '~';
}

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

/// `also`: what besides letters and digits may stand as it is.
std::string encode(std::string_view text, std::string_view also) {
  std::string result;
  for (char c : text) {
    if (is_unreserved(c) || also.contains(c)) {
      result += c;
    } else {
      result += fmt::format("%{:02X}", static_cast<unsigned char>(c));
    }
  }
  return result;
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Result<NbdUri> parse() {
    for (unsigned char c : text_) {
      if (c <= 0x20 || c == 0x7f) return refuse("a blank or control character has to be encoded");
    }
    const std::size_t colon = text_.find(':');
    if (colon == text_.npos) return refuse("there is no scheme, such as nbd://");
    std::string scheme(text_.substr(0, colon));
    for (char& c : scheme) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    bool known = false;
    for (const Scheme& candidate : kSchemes) {
      if (candidate.name != scheme) continue;
      uri_.transport = candidate.transport;
      uri_.tls_required = candidate.tls_required;
      known = true;
    }
    if (!known) {
      return refuse(
          fmt::format("the scheme {} is none of nbd, nbds, nbd+unix, nbds+unix, "
                      "nbd+vsock and nbds+vsock",
                      printable(scheme)));
    }
    std::string_view rest = text_.substr(colon + 1);
    if (rest.contains('#')) return refuse("a fragment (#) means nothing here");

    std::optional<std::string_view> query;
    if (const std::size_t mark = rest.find('?'); mark != rest.npos) {
      query = rest.substr(mark + 1);
      rest = rest.substr(0, mark);
    }
    std::string_view authority;
    if (rest.starts_with("//")) {
      rest.remove_prefix(2);
      const std::size_t slash = std::min(rest.find('/'), rest.size());
      authority = rest.substr(0, slash);
      rest.remove_prefix(slash);
    }
    if (!rest.empty() && !rest.starts_with('/')) return refuse("// is missing behind the scheme");
    if (!rest.empty()) rest.remove_prefix(1);

    auto name = decode("the export name", rest);
    if (!name) return std::unexpected(std::move(name.error()));
    if (name->contains('\0')) return refuse("the export name has a NUL in it");
    if (name->size() > kMaxString) return refuse("the export name is longer than 4096 bytes");
    uri_.export_name = *std::move(name);

    if (Result<void> done = parse_authority(authority); !done) {
      return std::unexpected(std::move(done.error()));
    }
    if (query) {
      if (Result<void> done = parse_query(*query); !done) {
        return std::unexpected(std::move(done.error()));
      }
    }
    if (uri_.transport == Transport::kUnix && uri_.socket.empty()) {
      return refuse("a UNIX socket needs the parameter socket=PATH");
    }
    return std::move(uri_);
  }

 private:
  std::unexpected<Error> refuse(std::string_view why) const {
    return fail(EINVAL, fmt::format("NBD URI {}: {}", printable(text_), why));
  }

  Result<std::string> decode(std::string_view what, std::string_view encoded) const {
    std::string result;
    for (std::size_t at = 0; at < encoded.size(); ++at) {
      if (encoded[at] != '%') {
        result += encoded[at];
        continue;
      }
      const int high = at + 1 < encoded.size() ? hex_digit(encoded[at + 1]) : -1;
      const int low = at + 2 < encoded.size() ? hex_digit(encoded[at + 2]) : -1;
      if (high < 0 || low < 0) {
        return refuse(fmt::format("{} has a % without two hexadecimal digits behind it", what));
      }
      result += static_cast<char>(high * 16 + low);
      at += 2;
    }
    return result;
  }

  Result<void> parse_number(std::string_view what, std::string_view digits, std::uint32_t most,
                            std::uint32_t& number) const {
    std::uint32_t value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (error != std::errc() || end != digits.data() + digits.size() || value > most) {
      return refuse(fmt::format("{} {} is not a number up to {}", what, printable(digits), most));
    }
    number = value;
    return {};
  }

  Result<void> parse_authority(std::string_view authority) {
    if (const std::size_t at = authority.rfind('@'); at != authority.npos) {
      auto user = decode("the user name", authority.substr(0, at));
      if (!user) return std::unexpected(std::move(user.error()));
      if (user->contains('\0')) return refuse("the user name has a NUL in it");
      uri_.tls_username = *std::move(user);
      authority.remove_prefix(at + 1);
    }
    if (uri_.transport == Transport::kUnix) {
      if (!authority.empty()) {
        return refuse("a host means nothing to a UNIX socket: write /// before the export name");
      }
      return {};
    }
    std::string_view host = authority;
    std::optional<std::string_view> port;
    if (authority.starts_with('[')) {
      const std::size_t close = authority.find(']');
      if (close == authority.npos) return refuse("the ] behind the address is missing");
      host = authority.substr(1, close - 1);
      if (!host.contains(':')) return refuse("only an IPv6 address stands in brackets");
      const std::string_view behind = authority.substr(close + 1);
      if (behind.starts_with(':')) {
        port = behind.substr(1);
      } else if (!behind.empty()) {
        return refuse("only a port may follow the address");
      }
    } else if (const std::size_t colon = authority.find(':'); colon != authority.npos) {
      host = authority.substr(0, colon);
      port = authority.substr(colon + 1);
      if (port->contains(':')) return refuse("an IPv6 address has to stand in brackets");
    }
    const bool vsock = uri_.transport == Transport::kVsock;
    // RFC 3986 lets the number behind the colon be left out.
    if (port && !port->empty()) {
      const std::uint32_t most = vsock ? 0xffffffff : 65535;
      if (Result<void> done = parse_number("the port", *port, most, uri_.port); !done) return done;
      if (uri_.port == 0 && !vsock) return refuse("the port is 0");
    }
    if (vsock) {
      if (host.empty()) return {};
      return parse_number("the context id", host, 0xffffffff, uri_.cid);
    }
    auto decoded = decode("the host", host);
    if (!decoded) return std::unexpected(std::move(decoded.error()));
    if (decoded->contains('\0')) return refuse("the host has a NUL in it");
    uri_.host = *std::move(decoded);
    return {};
  }

  Result<void> parse_query(std::string_view query) {
    std::array<std::string_view, 7> seen;
    std::size_t seen_count = 0;
    while (!query.empty()) {
      const std::size_t end = std::min(query.find('&'), query.size());
      const std::string_view parameter = query.substr(0, end);
      query.remove_prefix(std::min(end + 1, query.size()));
      if (parameter.empty()) continue;
      const std::size_t equals = parameter.find('=');
      const std::string_view key = parameter.substr(0, equals);
      if (equals == parameter.npos) {
        return refuse(fmt::format("the parameter {} has no value", printable(key)));
      }
      auto value =
          decode(fmt::format("the parameter {}", printable(key)), parameter.substr(equals + 1));
      if (!value) return std::unexpected(std::move(value.error()));
      for (std::size_t i = 0; i < seen_count; ++i) {
        if (seen[i] == key) {
          return refuse(fmt::format("the parameter {} is there twice", printable(key)));
        }
      }
      if (Result<void> done = take_parameter(key, *std::move(value)); !done) return done;
      seen[seen_count++] = key;  // only known ones get here, so that there is room
    }
    return {};
  }

  Result<void> take_parameter(std::string_view key, std::string value) {
    const auto take_text = [&](std::string& to) -> Result<void> {
      if (value.empty()) return refuse(fmt::format("the parameter {} is empty", key));
      if (value.contains('\0')) return refuse(fmt::format("the parameter {} has a NUL in it", key));
      to = std::move(value);
      return {};
    };
    if (key == "socket") {
      if (uri_.transport != Transport::kUnix) {
        return refuse("the parameter socket is for nbd+unix and nbds+unix");
      }
      if (value.empty()) return refuse("the parameter socket is empty");
      if (value.find('\0', 1) != value.npos) {
        return refuse("the parameter socket has a NUL behind its beginning");
      }
      uri_.socket = std::move(value);
      return {};
    }
    if (key == "tls-type") {
      for (const auto& [name, type] : kTlsTypes) {
        if (value != name) continue;
        uri_.tls_type = type;
        return {};
      }
      return refuse(fmt::format("tls-type {} is none of anon, x509 and psk", printable(value)));
    }
    if (key == "tls-certificates") return take_text(uri_.tls_certificates);
    if (key == "tls-username") {
      if (!uri_.tls_username.empty()) return refuse("there are two user names");
      return take_text(uri_.tls_username);
    }
    if (key == "tls-hostname") return take_text(uri_.tls_hostname);
    if (key == "tls-psk-file") return take_text(uri_.tls_psk_file);
    if (key == "tls-verify-peer") {
      if (value != "0" && value != "1") {
        return refuse(fmt::format("tls-verify-peer {} is neither 0 nor 1", printable(value)));
      }
      uri_.tls_verify_peer = value == "1";
      return {};
    }
    return refuse(fmt::format("the parameter {} is not known", printable(key)));
  }

  const std::string_view text_;
  NbdUri uri_;
};

}  // namespace

Result<NbdUri> parse_uri(std::string_view text) { return Parser(text).parse(); }

std::string to_string(const NbdUri& uri) {
  std::string result;
  for (const Scheme& scheme : kSchemes) {
    if (scheme.transport == uri.transport && scheme.tls_required == uri.tls_required) {
      result = scheme.name;
    }
  }
  result += "://";
  // Without a host for a user name to stand before, it looks odd there, although it is understood.
  const bool user_in_authority = !uri.tls_username.empty() && uri.transport != Transport::kUnix;
  if (user_in_authority) result += encode(uri.tls_username, "") + '@';
  if (uri.transport == Transport::kTcp) {
    result +=
        uri.host.contains(':') ? fmt::format("[{}]", encode(uri.host, ":")) : encode(uri.host, "");
  } else if (uri.transport == Transport::kVsock) {
    result += fmt::format("{}", uri.cid);
  }
  if (uri.transport != Transport::kUnix && uri.port != kDefaultPort) {
    result += fmt::format(":{}", uri.port);
  }
  result += '/';
  result += encode(uri.export_name, "/:@+,");

  char separator = '?';
  const auto add = [&](std::string_view key, std::string_view value) {
    if (value.empty()) return;
    result += separator;
    result += key;
    result += '=';
    result += encode(value, "/:");
    separator = '&';
  };
  if (uri.transport == Transport::kUnix) add("socket", uri.socket);
  for (const auto& [name, type] : kTlsTypes) {
    if (type == uri.tls_type) add("tls-type", name);
  }
  add("tls-certificates", uri.tls_certificates);
  if (!user_in_authority) add("tls-username", uri.tls_username);
  add("tls-hostname", uri.tls_hostname);
  if (uri.tls_verify_peer) add("tls-verify-peer", *uri.tls_verify_peer ? "1" : "0");
  add("tls-psk-file", uri.tls_psk_file);
  return result;
}

}  // namespace roost::nbd
