// SPDX-License-Identifier: MIT
#include "roost/io/tls.h"

#include <fmt/format.h>
#include <gnutls/gnutls.h>
#include <gnutls/x509.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <span>
#include <vector>

namespace roost {

namespace {

constexpr std::size_t kMaxRecord = 16384;          // of plaintext, as the protocol has it
constexpr std::size_t kMaxBatch = 8 * kMaxRecord;  // encrypted before it is sent
constexpr std::size_t kReceiveSize = 64 << 10;

constexpr const char* kKeyExchangesWithPsk = ":+ECDHE-PSK:+DHE-PSK:+PSK";

struct FreeCertificates {
  void operator()(gnutls_certificate_credentials_t c) const noexcept {
    ::gnutls_certificate_free_credentials(c);
  }
};
struct FreePskServer {
  void operator()(gnutls_psk_server_credentials_t c) const noexcept {
    ::gnutls_psk_free_server_credentials(c);
  }
};
struct FreePskClient {
  void operator()(gnutls_psk_client_credentials_t c) const noexcept {
    ::gnutls_psk_free_client_credentials(c);
  }
};
template <class Handle, class Free>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Free>;

std::unexpected<Error> load_failure(const std::string& what, int code) {
  return fail(code == GNUTLS_E_FILE_ERROR ? ENOENT : EINVAL,
              fmt::format("TLS credentials: {}: {}", what, ::gnutls_strerror(code)));
}

bool exists(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

// The key of one user of a file of "NAME:KEY" lines.
struct PskLine {
  std::string name;
  std::string key;
};
Result<PskLine> find_psk(const std::string& path, const std::string& wanted) {
  std::ifstream file(path);
  if (!file) return fail(errno, "TLS credentials: " + path);
  for (std::string line; std::getline(file, line);) {
    const auto colon = line.rfind(':');
    if (line.starts_with('#') || colon == std::string::npos) continue;
    if (wanted.empty() || line.substr(0, colon) == wanted) {
      return PskLine{line.substr(0, colon), line.substr(colon + 1)};
    }
  }
  return fail(ENOENT, wanted.empty()
                          ? fmt::format("TLS credentials: {}: no line NAME:KEY", path)
                          : fmt::format("TLS credentials: {}: no key of '{}'", path, wanted));
}

}  // namespace

// ---- Credentials

struct TlsCredentials::Loaded {
  TlsOptions options;
  Owned<gnutls_certificate_credentials_t, FreeCertificates> certificates;
  Owned<gnutls_psk_server_credentials_t, FreePskServer> psk_server;
  Owned<gnutls_psk_client_credentials_t, FreePskClient> psk_client;

  std::string priority() const {
    std::string all = options.priority.empty() ? "NORMAL" : options.priority;
    if (psk_server || psk_client) all += kKeyExchangesWithPsk;
    return all;
  }

  Result<void> load_certificates();
  Result<void> load_psk();
};

TlsCredentials::TlsCredentials() : loaded_(std::make_unique<Loaded>()) {}
TlsCredentials::~TlsCredentials() = default;

Result<std::shared_ptr<const TlsCredentials>> TlsCredentials::load(TlsOptions options) {
  const std::shared_ptr<TlsCredentials> credentials(new TlsCredentials);
  Loaded& loaded = *credentials->loaded_;
  loaded.options = std::move(options);
  const bool server = loaded.options.role == TlsRole::kServer;
  if (server && loaded.options.directory.empty() && loaded.options.psk_file.empty()) {
    return fail(EINVAL, "TLS credentials: a server needs certificates or pre-shared keys");
  }
  if (!loaded.options.directory.empty() || loaded.options.psk_file.empty()) {
    if (const auto done = loaded.load_certificates(); !done) return std::unexpected(done.error());
  }
  if (!loaded.options.psk_file.empty()) {
    if (const auto done = loaded.load_psk(); !done) return std::unexpected(done.error());
  }
  gnutls_priority_t parsed = nullptr;
  const char* wrong_at = nullptr;
  const std::string priority = loaded.priority();
  const int code = ::gnutls_priority_init(&parsed, priority.c_str(), &wrong_at);
  if (code < 0) return load_failure(fmt::format("priority '{}' at '{}'", priority, wrong_at), code);
  ::gnutls_priority_deinit(parsed);
  return credentials;
}

Result<void> TlsCredentials::Loaded::load_certificates() {
  gnutls_certificate_credentials_t raw = nullptr;
  int code = ::gnutls_certificate_allocate_credentials(&raw);
  if (code < 0) return load_failure("certificates", code);
  certificates.reset(raw);
  if (options.directory.empty()) {
    code = ::gnutls_certificate_set_x509_system_trust(raw);
    if (code < 0) return load_failure("the system's trusted certificates", code);
    return {};
  }
  const std::string authority = options.directory + "/ca-cert.pem";
  const std::string revoked = options.directory + "/ca-crl.pem";
  const bool server = options.role == TlsRole::kServer;
  const std::string own = options.directory + (server ? "/server-" : "/client-");
  const std::string certificate = own + "cert.pem";
  const std::string key = own + "key.pem";
  // A server that asks nobody for a certificate needs no authority.
  if (!server || options.verify_peer || exists(authority)) {
    code = ::gnutls_certificate_set_x509_trust_file(raw, authority.c_str(), GNUTLS_X509_FMT_PEM);
    if (code < 0) return load_failure(authority, code);
    if (code == 0) return fail(EINVAL, "TLS credentials: " + authority + ": no certificate in it");
  }
  if (exists(revoked)) {
    code = ::gnutls_certificate_set_x509_crl_file(raw, revoked.c_str(), GNUTLS_X509_FMT_PEM);
    if (code < 0) return load_failure(revoked, code);
  }
  // A client may do without one of its own.
  if (server || exists(certificate)) {
    for (const std::string& file : {certificate, key}) {
      if (::access(file.c_str(), R_OK) < 0) return fail(errno, "TLS credentials: " + file);
    }
    code = ::gnutls_certificate_set_x509_key_file(raw, certificate.c_str(), key.c_str(),
                                                  GNUTLS_X509_FMT_PEM);
    if (code < 0) return load_failure(certificate + " with " + key, code);
  }
  ::gnutls_certificate_set_known_dh_params(raw, GNUTLS_SEC_PARAM_MEDIUM);
  return {};
}

Result<void> TlsCredentials::Loaded::load_psk() {
  const auto line = find_psk(options.psk_file, options.psk_username);
  if (!line) return std::unexpected(line.error());
  if (options.role == TlsRole::kServer) {
    gnutls_psk_server_credentials_t raw = nullptr;
    int code = ::gnutls_psk_allocate_server_credentials(&raw);
    if (code < 0) return load_failure(options.psk_file, code);
    psk_server.reset(raw);
    code = ::gnutls_psk_set_server_credentials_file(raw, options.psk_file.c_str());
    if (code < 0) return load_failure(options.psk_file, code);
    ::gnutls_psk_set_server_known_dh_params(raw, GNUTLS_SEC_PARAM_MEDIUM);
    return {};
  }
  gnutls_psk_client_credentials_t raw = nullptr;
  int code = ::gnutls_psk_allocate_client_credentials(&raw);
  if (code < 0) return load_failure(options.psk_file, code);
  psk_client.reset(raw);
  const gnutls_datum_t key{reinterpret_cast<unsigned char*>(const_cast<char*>(line->key.data())),
                           static_cast<unsigned>(line->key.size())};
  code = ::gnutls_psk_set_client_credentials(raw, line->name.c_str(), &key, GNUTLS_PSK_KEY_HEX);
  if (code < 0) return load_failure(options.psk_file + ": key of " + line->name, code);
  return {};
}

// ---- Sessions

// GnuTLS's view of the channel below: bytes that have arrived, and bytes that are to be sent.
struct TlsChannel::Session {
  gnutls_session_t handle = nullptr;

  // What came from below and is not yet taken.
  std::vector<std::byte> received;
  std::size_t received_begin = 0;
  std::size_t received_end = 0;
  std::size_t times_left = 0;  // since it was filled: GnuTLS wanted more, and had not taken all
  bool received_all = false;

  // What is to go below; `sending` is what a flush is at.
  std::vector<std::byte> unsent;
  std::vector<std::byte> sending;
  std::size_t sending_begin = 0;
  bool flushing = false;

  std::vector<std::byte> record;  // small pieces, until they fill one

  ~Session() {
    if (handle) ::gnutls_deinit(handle);
  }

  static ssize_t pull(gnutls_transport_ptr_t self, void* to, std::size_t size) {
    Session& session = *static_cast<Session*>(self);
    const std::size_t there = session.received_end - session.received_begin;
    if (there == 0) {
      if (session.received_all) return 0;
      ::gnutls_transport_set_errno(session.handle, EAGAIN);
      return -1;
    }
    const std::size_t count = std::min(there, size);
    std::memcpy(to, session.received.data() + session.received_begin, count);
    session.received_begin += count;
    return static_cast<ssize_t>(count);
  }

  static ssize_t push(gnutls_transport_ptr_t self, const giovec_t* pieces, int count) {
    Session& session = *static_cast<Session*>(self);
    std::size_t size = 0;
    try {
      for (const giovec_t& piece : std::span(pieces, static_cast<std::size_t>(count))) {
        const auto* const begin = static_cast<const std::byte*>(piece.iov_base);
        session.unsent.insert(session.unsent.end(), begin, begin + piece.iov_len);
        size += piece.iov_len;
      }
    } catch (const std::bad_alloc&) {
      ::gnutls_transport_set_errno(session.handle, ENOMEM);
      return -1;
    }
    return static_cast<ssize_t>(size);
  }

  bool something_to_send() const noexcept {
    return !unsent.empty() || sending_begin < sending.size();
  }

  void forget_unsent() noexcept {
    unsent.clear();
    sending.clear();
    sending_begin = 0;
  }
};

TlsChannel::TlsChannel(std::unique_ptr<Channel> lower,
                       std::shared_ptr<const TlsCredentials> credentials)
    : Channel(lower->name()),
      lower_(std::move(lower)),
      credentials_(std::move(credentials)),
      session_(std::make_unique<Session>()) {}

TlsChannel::~TlsChannel() = default;

std::unexpected<Error> TlsChannel::tls_failure(const char* what, int code) const {
  if (code == GNUTLS_E_PREMATURE_TERMINATION) {
    return fail(ECONNRESET, fmt::format("{} {}: the peer closed without ending TLS", what, name()));
  }
  std::string words = ::gnutls_strerror(code);
  if (code == GNUTLS_E_FATAL_ALERT_RECEIVED || code == GNUTLS_E_WARNING_ALERT_RECEIVED) {
    const char* const alert = ::gnutls_alert_get_name(::gnutls_alert_get(session_->handle));
    words += fmt::format(" ({})", alert ? alert : "unknown");
  }
  return fail(EPROTO, fmt::format("{} {}: TLS: {}", what, name(), words));
}

Result<void> TlsChannel::begin(const std::string& hostname) {
  const TlsCredentials::Loaded& credentials = *credentials_->loaded_;
  const bool server = credentials.options.role == TlsRole::kServer;
  Session& session = *session_;
  session.received.resize(kReceiveSize);
  const unsigned flags = GNUTLS_NONBLOCK | GNUTLS_NO_SIGNAL |
                         (server ? GNUTLS_SERVER | GNUTLS_NO_TICKETS : GNUTLS_CLIENT);
  int code = ::gnutls_init(&session.handle, flags);
  if (code < 0) return tls_failure("begin TLS with", code);
  code = ::gnutls_priority_set_direct(session.handle, credentials.priority().c_str(), nullptr);
  if (code >= 0 && credentials.certificates) {
    code = ::gnutls_credentials_set(session.handle, GNUTLS_CRD_CERTIFICATE,
                                    credentials.certificates.get());
  }
  if (code >= 0 && (credentials.psk_server || credentials.psk_client)) {
    void* const psk = server ? static_cast<void*>(credentials.psk_server.get())
                             : static_cast<void*>(credentials.psk_client.get());
    code = ::gnutls_credentials_set(session.handle, GNUTLS_CRD_PSK, psk);
  }
  if (code >= 0 && !hostname.empty() && !server) {
    code =
        ::gnutls_server_name_set(session.handle, GNUTLS_NAME_DNS, hostname.data(), hostname.size());
  }
  if (code < 0) return tls_failure("begin TLS with", code);
  if (credentials.certificates && credentials.options.verify_peer) {
    ::gnutls_session_set_verify_cert(session.handle, hostname.empty() ? nullptr : hostname.c_str(),
                                     0);
    // One who has a pre-shared key needs no certificate, but a client of certificates does.
    if (server) ::gnutls_certificate_server_set_request(session.handle, GNUTLS_CERT_REQUIRE);
  }
  ::gnutls_transport_set_ptr(session.handle, &session);
  ::gnutls_transport_set_pull_function(session.handle, &Session::pull);
  ::gnutls_transport_set_vec_push_function(session.handle, &Session::push);
  return {};
}

Task<Result<std::unique_ptr<TlsChannel>>> TlsChannel::handshake(
    std::unique_ptr<Channel> lower, std::shared_ptr<const TlsCredentials> credentials,
    std::string hostname, std::stop_token stop) {
  std::unique_ptr<TlsChannel> channel(new TlsChannel(std::move(lower), std::move(credentials)));
  if (const auto begun = channel->begin(hostname); !begun) co_return std::unexpected(begun.error());
  const Result<void> done = co_await channel->shake_hands(std::move(stop));
  if (!done) co_return std::unexpected(done.error());
  channel->learn_about_peer();
  co_return channel;
}

Task<Result<void>> TlsChannel::shake_hands(std::stop_token stop) {
  const auto below = [](const Error& error) {
    return fail(error.code(), "TLS handshake: " + error.doing());
  };
  for (;;) {
    const int code = ::gnutls_handshake(session_->handle);
    if (code != GNUTLS_E_AGAIN && ::gnutls_error_is_fatal(code)) {
      ::gnutls_alert_send_appropriate(session_->handle, code);
    }
    // What it has to say is sent in any case: an alert tells the peer what is wrong.
    const Result<void> sent = co_await flush(Direction::kWrite, stop);
    if (code == GNUTLS_E_SUCCESS) {
      if (!sent) co_return below(sent.error());
      co_return sent;
    }
    if (code == GNUTLS_E_CERTIFICATE_VERIFICATION_ERROR) {
      gnutls_datum_t words{};
      ::gnutls_certificate_verification_status_print(
          ::gnutls_session_get_verify_cert_status(session_->handle),
          ::gnutls_certificate_type_get2(session_->handle, GNUTLS_CTYPE_PEERS), &words, 0);
      std::string why = words.data ? reinterpret_cast<const char*>(words.data) : "not trusted";
      while (why.ends_with(' ')) why.pop_back();
      ::gnutls_free(words.data);
      co_return fail(EACCES, fmt::format("TLS handshake with {}: {}", name(), why));
    }
    if (code != GNUTLS_E_AGAIN && ::gnutls_error_is_fatal(code)) {
      co_return tls_failure("TLS handshake with", code);
    }
    if (!sent) {
      // A peer that hung up has most likely said why: that is worth more than the broken pipe.
      const int error = sent.error().code();
      if (error != EPIPE && error != ECONNRESET) co_return below(sent.error());
      session_->forget_unsent();
    }
    if (code == GNUTLS_E_AGAIN && ::gnutls_record_get_direction(session_->handle) == 0) {
      const Result<void> more = co_await fill(stop);
      if (!more) co_return below(more.error());
    }
  }
}

void TlsChannel::learn_about_peer() {
  gnutls_session_t const session = session_->handle;
  protocol_ =
      fmt::format("{} {}", ::gnutls_protocol_get_name(::gnutls_protocol_get_version(session)),
                  ::gnutls_cipher_get_name(::gnutls_cipher_get(session)));
  // With a key, only the client has a name. On a client, GnuTLS reads one that TLS 1.2 left null.
  if (credentials_->loaded_->options.role == TlsRole::kServer) {
    if (const char* const name = ::gnutls_psk_server_get_username(session)) {
      peer_name_ = name;
      return;
    }
  }
  unsigned count = 0;
  const gnutls_datum_t* const chain = ::gnutls_certificate_get_peers(session, &count);
  gnutls_x509_crt_t certificate = nullptr;
  if (!chain || count == 0 || ::gnutls_x509_crt_init(&certificate) < 0) return;
  gnutls_datum_t name{};
  if (::gnutls_x509_crt_import(certificate, chain, GNUTLS_X509_FMT_DER) >= 0 &&
      ::gnutls_x509_crt_get_dn3(certificate, &name, 0) >= 0) {
    peer_name_.assign(reinterpret_cast<const char*>(name.data), name.size);
    ::gnutls_free(name.data);
  }
  ::gnutls_x509_crt_deinit(certificate);
}

// Gets more from below, unless there is some left: after some messages (a part of a handshake, a
// ticket, a key update) GnuTLS wants to be called again before it takes what came behind them. It
// has then used up at least a byte of what it took before.
Task<Result<void>> TlsChannel::fill(std::stop_token stop) {
  Session& session = *session_;
  if (session.received_begin < session.received_end) {
    if (++session.times_left > kReceiveSize) {
      co_return fail(EPROTO, fmt::format("read from {}: TLS does not get on", name()));
    }
    co_return Result<void>();
  }
  session.times_left = 0;
  const Result<std::size_t> n = co_await lower_->read(session.received, std::move(stop));
  if (!n) co_return std::unexpected(n.error());
  session.received_begin = 0;
  session.received_end = *n;
  session.received_all = *n == 0;
  co_return Result<void>();
}

void TlsChannel::interrupt(AioContext& to) {
  for (StopScope* const one : waits_for_turn_) {
    if (one) one->request_stop();
  }
  redirect_lower(*lower_, to);
}

// A stop ends the wait, and so does a move, to go on where the channel is then.
Task<Result<CoMutex::Guard>> TlsChannel::wait_for_turn(Direction by, std::stop_token stop) {
  StopScope*& mine = waits_for_turn_[static_cast<std::size_t>(by)];
  for (;;) {
    if (in_transit(by)) co_await arrive();
    StopScope stopped_or_moved(stop);
    mine = &stopped_or_moved;
    Result<CoMutex::Guard> turn = co_await sending_turn_.lock(stopped_or_moved.token());
    mine = nullptr;
    if (turn || stop.stop_requested()) co_return turn;
  }
}

// Sends what there is to send. What is not sent when it ends early is the first to be sent next.
Task<Result<void>> TlsChannel::flush(Direction by, std::stop_token stop) {
  Session& session = *session_;
  if (!session.something_to_send()) co_return Result<void>();
  CoMutex::Guard turn = sending_turn_.try_lock();
  if (!turn) {
    Result<CoMutex::Guard> waited = co_await wait_for_turn(by, stop);
    if (!waited) co_return std::unexpected(waited.error());
    turn = std::move(*waited);
  }
  if (in_transit(by)) co_await arrive();
  session.flushing = true;
  const Result<void> done = co_await send_rest(std::move(stop));
  session.flushing = false;
  co_return done;
}

Task<Result<void>> TlsChannel::send_rest(std::stop_token stop) {
  Session& session = *session_;
  while (session.something_to_send()) {
    if (session.sending_begin == session.sending.size()) {
      session.sending.clear();
      session.sending_begin = 0;
      std::swap(session.sending, session.unsent);
    }
    std::size_t sent = 0;
    const auto rest = std::span<const std::byte>(session.sending).subspan(session.sending_begin);
    const Result<void> done = co_await lower_->write_full(rest, stop, &sent);
    session.sending_begin += sent;
    if (!done) co_return done;
  }
  co_return Result<void>();
}

Task<Result<std::size_t>> TlsChannel::do_readv(std::span<const iovec> to, bool,
                                               std::stop_token stop) {
  const auto piece = std::ranges::find_if(to, [](const iovec& one) { return one.iov_len > 0; });
  for (;;) {
    if (reading_ended_) co_return 0;
    const ssize_t n = ::gnutls_record_recv(session_->handle, piece->iov_base, piece->iov_len);
    // Reading may have to answer, to a key update for one. Who is writing sends that, too.
    if (session_->something_to_send() && !session_->flushing) {
      const Result<void> answered = co_await flush(Direction::kRead, stop);
      if (!answered && n < 0) co_return std::unexpected(answered.error());
    }
    if (n >= 0) co_return static_cast<std::size_t>(n);
    const int code = static_cast<int>(n);
    if (code == GNUTLS_E_REHANDSHAKE) {
      co_return fail(EPROTO, fmt::format("read from {}: the peer wants another handshake", name()));
    }
    if (reading_ended_) co_return 0;
    if (code != GNUTLS_E_AGAIN && ::gnutls_error_is_fatal(code)) {
      co_return tls_failure("read from", code);
    }
    if (code == GNUTLS_E_AGAIN) {
      const Result<void> more = co_await fill(stop);
      if (!more) co_return std::unexpected(more.error());
    }
  }
}

// Makes records of at most kMaxBatch bytes of `from`. Returns how many; with none, `error` says
// why.
std::size_t TlsChannel::encrypt(std::span<const iovec> from, int& error) {
  Session& session = *session_;
  std::size_t done = 0;
  const auto emit = [&](std::span<const std::byte> record) {
    const ssize_t n = ::gnutls_record_send(session.handle, record.data(), record.size());
    if (n < 0) error = static_cast<int>(n);
    if (n > 0) done += static_cast<std::size_t>(n);
    return n == static_cast<ssize_t>(record.size());
  };
  session.record.clear();
  for (const iovec& piece : from) {
    std::span<const std::byte> rest(static_cast<const std::byte*>(piece.iov_base), piece.iov_len);
    while (!rest.empty()) {
      if (done + session.record.size() >= kMaxBatch) break;
      const std::size_t count = std::min(rest.size(), kMaxRecord - session.record.size());
      if (session.record.empty() && count == kMaxRecord) {
        if (!emit(rest.first(count))) return done;
      } else {
        session.record.insert(session.record.end(), rest.begin(),
                              rest.begin() + static_cast<std::ptrdiff_t>(count));
        if (session.record.size() == kMaxRecord) {
          if (!emit(session.record)) return done;
          session.record.clear();
        }
      }
      rest = rest.subspan(count);
    }
  }
  if (!session.record.empty()) emit(session.record);
  return done;
}

Task<Result<std::size_t>> TlsChannel::do_writev(std::span<const iovec> from, bool,
                                                std::stop_token stop) {
  if (stop.stop_requested()) co_return cancelled("write to", "nothing was sent");
  int error = GNUTLS_E_INTERNAL_ERROR;
  const std::size_t taken = encrypt(from, error);
  if (taken == 0) co_return tls_failure("write to", error);
  const Result<void> sent = co_await flush(Direction::kWrite, std::move(stop));
  // What was encrypted cannot be taken back: it is sent before anything else.
  if (!sent && sent.error().code() != ECANCELED) co_return std::unexpected(sent.error());
  co_return taken;
}

Task<Result<void>> TlsChannel::do_shutdown(StreamEnd end, std::stop_token stop) {
  if (end == StreamEnd::kRead) {
    reading_ended_ = true;
    co_return co_await lower_->shutdown(end, std::move(stop));
  }
  const int code = ::gnutls_bye(session_->handle, GNUTLS_SHUT_WR);
  if (code < 0) co_return tls_failure("end TLS with", code);
  const Result<void> said = co_await flush(Direction::kWrite, stop);
  if (!said) co_return said;
  co_return co_await lower_->shutdown(end, std::move(stop));
}

}  // namespace roost
