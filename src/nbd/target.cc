// SPDX-License-Identifier: MIT
#include "roost/nbd/target.h"

#include <fmt/format.h>

#include <cerrno>

#include "roost/io/socket_channel.h"
#include "roost/io/tls.h"

namespace roost::nbd {

namespace {

Task<Result<std::unique_ptr<Channel>>> secure(std::unique_ptr<Channel> channel,
                                              std::shared_ptr<const TlsCredentials> credentials,
                                              std::string hostname, std::stop_token stop) {
  Result<std::unique_ptr<TlsChannel>> secured = co_await TlsChannel::handshake(
      std::move(channel), std::move(credentials), std::move(hostname), std::move(stop));
  if (!secured) co_return std::unexpected(std::move(secured.error()));
  co_return std::unique_ptr<Channel>(std::move(*secured));
}

}  // namespace

SocketAddress address_of(const NbdUri& uri) {
  SocketAddress address;
  switch (uri.transport) {
    case NbdUri::Transport::kUnix:
      address.path = uri.socket;
      // An abstract name.
      if (address.path.starts_with('\0')) address.path.front() = '@';
      break;
    case NbdUri::Transport::kTcp:
      address.kind = SocketAddress::Kind::kTcp;
      address.host = uri.host.empty() ? "localhost" : uri.host;
      address.port = std::to_string(uri.port);
      break;
    case NbdUri::Transport::kVsock:
      address.kind = SocketAddress::Kind::kVsock;
      address.cid = uri.cid;
      address.vsock_port = uri.port;
      break;
  }
  return address;
}

bool looks_like_nbd_uri(std::string_view text) noexcept {
  for (const std::string_view scheme : {"nbd:", "nbds:", "nbd+", "nbds+"}) {
    if (text.starts_with(scheme)) return true;
  }
  return false;
}

Result<NbdTarget> NbdTarget::parse(std::string_view text) {
  Result<NbdUri> uri = parse_uri(text);
  if (!uri) return std::unexpected(uri.error());
  NbdTarget target;
  target.text_ = text;
  target.address_ = address_of(*uri);
  if (uri->tls_required) {
    if (uri->tls_type == NbdUri::TlsType::kAnon) {
      return fail(ENOTSUP, fmt::format("{}: anonymous TLS", text));
    }
    const bool psk = uri->tls_type == NbdUri::TlsType::kPsk ||
                     (uri->tls_type == NbdUri::TlsType::kUnspecified && !uri->tls_psk_file.empty());
    if (psk && uri->tls_psk_file.empty()) {
      return fail(EINVAL, fmt::format("{}: pre-shared keys without a tls-psk-file", text));
    }
    auto credentials = TlsCredentials::load({.role = TlsRole::kClient,
                                             .directory = psk ? "" : uri->tls_certificates,
                                             .psk_file = psk ? uri->tls_psk_file : "",
                                             .psk_username = uri->tls_username,
                                             .verify_peer = uri->tls_verify_peer.value_or(true)});
    if (!credentials) return std::unexpected(credentials.error());
    target.credentials_ = std::move(*credentials);
  }
  target.uri_ = std::move(*uri);
  return target;
}

Task<Result<std::unique_ptr<Channel>>> NbdTarget::dial(std::stop_token stop) const {
  Result<std::unique_ptr<SocketChannel>> socket =
      co_await SocketChannel::connect(address_, std::move(stop));
  if (!socket) co_return std::unexpected(std::move(socket.error()));
  co_return std::unique_ptr<Channel>(std::move(*socket));
}

NbdClientOptions NbdTarget::options(ClientWishes wishes) const {
  NbdClientOptions options;
  options.wishes = std::move(wishes);
  options.wishes.export_name = uri_.export_name;
  options.wishes.tls = credentials_ ? ClientWishes::Tls::kRequired : ClientWishes::Tls::kOff;
  if (credentials_) {
    std::string hostname = uri_.tls_hostname.empty() ? uri_.host : uri_.tls_hostname;
    options.start_tls = [credentials = credentials_, hostname = std::move(hostname)](
                            std::unique_ptr<Channel> channel, std::stop_token stop) {
      return secure(std::move(channel), credentials, hostname, std::move(stop));
    };
  }
  return options;
}

Task<Result<std::unique_ptr<NbdClient>>> NbdTarget::connect(ClientWishes wishes,
                                                            std::stop_token stop) const {
  wishes.mode = ClientWishes::Mode::kGo;
  const NbdClientOptions how = options(std::move(wishes));
  Result<std::unique_ptr<Channel>> channel = co_await dial(stop);
  if (!channel) co_return std::unexpected(std::move(channel.error()));
  co_return co_await NbdClient::connect(std::move(*channel), how, std::move(stop));
}

Task<Result<NbdClient::Outcome>> NbdTarget::query(ClientWishes wishes, std::stop_token stop) const {
  const NbdClientOptions how = options(std::move(wishes));
  Result<std::unique_ptr<Channel>> channel = co_await dial(stop);
  if (!channel) co_return std::unexpected(std::move(channel.error()));
  co_return co_await query_nbd_server(std::move(*channel), how, std::move(stop));
}

}  // namespace roost::nbd
