// SPDX-License-Identifier: MIT
// TLS over any channel, by GnuTLS.
//
//   auto credentials = TlsCredentials::load({.role = TlsRole::kServer, .directory =
//   "/etc/pki/nbd"}); auto secure = co_await TlsChannel::handshake(std::move(socket),
//   *credentials);
//
// A session does not wait by itself: what it wants to send it leaves in memory, what it wants to
// read is there or not. So it is only touched between waits, on the context that the channel is
// attached to, and moves with its channel, with what it still has to send.
//
// Where Roost is built without GnuTLS, load() fails with ENOTSUP.
//
// Threads: credentials are constant once loaded, and may be shared by any threads. A TlsChannel as
// every Channel.
// Lifetime: sessions share their credentials.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "roost/io/channel.h"
#include "roost/sync/co_mutex.h"
#include "roost/sync/stop_scope.h"

namespace roost {

enum class TlsRole : std::uint8_t { kServer, kClient };

/// What TlsCredentials are loaded from. At least one of the two, but a client may do with neither:
/// then it believes the certificates that the system trusts.
struct TlsOptions {
  TlsRole role = TlsRole::kServer;
  /// A folder with ca-cert.pem, and of the role server-cert.pem and server-key.pem, or, if it is to
  /// identify itself, client-cert.pem and client-key.pem; and perhaps ca-crl.pem.
  std::string directory{};
  /// A file of lines "NAME:KEY", the key in hexadecimal digits.
  std::string psk_file{};
  /// Of a client with a psk_file: which line; empty: the first.
  std::string psk_username{};
  /// Whether the peer has to have a certificate that the authority has signed. Clients should.
  bool verify_peer = true;
  /// GnuTLS's priority string; empty: the default.
  std::string priority{};
};

/// Who one is, and whom one believes.
class TlsCredentials {
 public:
  /// Reads the files; blocks. Errors name the file.
  static Result<std::shared_ptr<const TlsCredentials>> load(TlsOptions options);

  ~TlsCredentials();
  TlsCredentials(const TlsCredentials&) = delete;
  TlsCredentials& operator=(const TlsCredentials&) = delete;

 private:
  friend class TlsChannel;
  struct Loaded;
  TlsCredentials();
  const std::unique_ptr<Loaded> loaded_;
};

/// A TLS session over another channel.
class TlsChannel final : public Channel {
 public:
  /// Does the handshake. `hostname`: of a client, the name that the server's certificate has to be
  /// for; empty: any. EPROTO, or EACCES where the peer is not to be believed; words of GnuTLS say
  /// why. The lower channel is gone then.
  static Task<Result<std::unique_ptr<TlsChannel>>> handshake(
      std::unique_ptr<Channel> lower, std::shared_ptr<const TlsCredentials> credentials,
      std::string hostname = {}, std::stop_token stop = {});

  ~TlsChannel() override;

  void abort() noexcept override {
    reading_ended_ = true;
    lower_->abort();
  }
  Task<void> linger(std::int64_t limit_ns, std::stop_token stop = {}) override {
    return lower_->linger(limit_ns, std::move(stop));
  }

  /// Who the peer is, as far as it has proved it: the distinguished name of its certificate (RFC
  /// 4514), or the name that came with its key; empty if it did not have to.
  const std::string& peer_name() const noexcept { return peer_name_; }

  /// "TLS1.3 AES-256-GCM", for messages.
  const std::string& protocol() const noexcept { return protocol_; }

 protected:
  Task<Result<std::size_t>> do_readv(std::span<const iovec> to, bool all,
                                     std::stop_token stop) override;
  Task<Result<std::size_t>> do_writev(std::span<const iovec> from, bool all,
                                      std::stop_token stop) override;
  Task<Result<void>> do_shutdown(StreamEnd end, std::stop_token stop) override;
  void interrupt(AioContext& to) override;

 private:
  struct Session;

  TlsChannel(std::unique_ptr<Channel> lower, std::shared_ptr<const TlsCredentials> credentials);

  Result<void> begin(const std::string& hostname);
  Task<Result<void>> shake_hands(std::stop_token stop);
  void learn_about_peer();
  Task<Result<void>> fill(std::stop_token stop);
  Task<Result<CoMutex::Guard>> wait_for_turn(Direction by, std::stop_token stop);
  Task<Result<void>> flush(Direction by, std::stop_token stop);
  Task<Result<void>> send_rest(std::stop_token stop);
  std::size_t encrypt(std::span<const iovec> from, int& error);
  std::unexpected<Error> tls_failure(const char* what, int code) const;

  const std::unique_ptr<Channel> lower_;
  const std::shared_ptr<const TlsCredentials> credentials_;
  std::string peer_name_;
  std::string protocol_;

  // The context that the channel is attached to.
  std::unique_ptr<Session> session_;
  bool reading_ended_ = false;  // by us
  CoMutex sending_turn_{"TLS's turn to send"};
  std::array<StopScope*, 2> waits_for_turn_{};  // by direction; while it waits
};

}  // namespace roost
