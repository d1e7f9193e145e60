// SPDX-License-Identifier: MIT
// In place of tls.cc where there is no GnuTLS to build with: there are no credentials, so there are
// no sessions.

#include <cerrno>

#include "roost/base/check.h"
#include "roost/io/tls.h"

namespace roost {

struct TlsCredentials::Loaded {};
struct TlsChannel::Session {};

TlsCredentials::TlsCredentials() = default;
TlsCredentials::~TlsCredentials() = default;

Result<std::shared_ptr<const TlsCredentials>> TlsCredentials::load(TlsOptions) {
  return fail(ENOTSUP, "TLS (built without GnuTLS)");
}

TlsChannel::~TlsChannel() = default;

void TlsChannel::interrupt(AioContext&) { panic("a TLS session without TLS"); }

Task<Result<std::unique_ptr<TlsChannel>>> TlsChannel::handshake(
    std::unique_ptr<Channel>, std::shared_ptr<const TlsCredentials>, std::string, std::stop_token) {
  co_return fail(ENOTSUP, "TLS (built without GnuTLS)");
}

Task<Result<std::size_t>> TlsChannel::do_readv(std::span<const iovec>, bool, std::stop_token) {
  panic("a TLS session without TLS");
}
Task<Result<std::size_t>> TlsChannel::do_writev(std::span<const iovec>, bool, std::stop_token) {
  panic("a TLS session without TLS");
}
Task<Result<void>> TlsChannel::do_shutdown(StreamEnd, std::stop_token) {
  panic("a TLS session without TLS");
}

}  // namespace roost
