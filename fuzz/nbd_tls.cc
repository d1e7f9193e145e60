// SPDX-License-Identifier: MIT
// libFuzzer target: one end of TLS, and a peer whose records somebody tampers with.
//
// The first byte of an input says what there is: bit 0, our end is the client; bit 1, TLS 1.2 and
// not 1.3; bit 2, no TLS at all: the rest of the input is what the peer sends. Otherwise the rest
// are bytes that are asked for one after the other, zeroes once there are no more: what to do to
// each record of the peer's, and what the peer does next. GnuTLS draws keys anew each time, so the
// bytes of records differ from run to run, but not their kind, length and order.
//
// What must hold: the run ends; what our end reads is what the peer wrote, from its beginning and
// without a gap; it sees the end of the stream only where the peer ended TLS, and after everything
// it wrote; errors name the peer; and where nobody tampered with anything, everything arrives.
#include <fmt/format.h>
#include <gnutls/gnutls.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "roost/aio/aio_context.h"
#include "roost/base/check.h"
#include "roost/io/memory_channel.h"
#include "roost/io/tls.h"

namespace roost {
namespace {

constexpr std::size_t kHeader = 5;       // of a record
constexpr std::size_t kWire = 64 << 10;  // kept small: it is cleared for each input
constexpr unsigned kMaxActions = 24;
constexpr unsigned kMaxNewKeys = 8;  // GnuTLS takes no more of them within a second
constexpr std::array<unsigned char, 16> kKey{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
constexpr const char* kKeyLine = "fuzz:0102030405060708090a0b0c0d0e0f10\n";

std::byte pattern(std::size_t at) { return static_cast<std::byte>(at * 7 + at / 251); }

void must(int code, const char* what) {
  ROOST_CHECK(code >= 0, "{}: {}", what, ::gnutls_strerror(code));
}

const char* priority(bool old) {
  return old ? "NORMAL:-VERS-ALL:+VERS-TLS1.2:-GROUP-ALL:+GROUP-X25519:-KX-ALL:+ECDHE-PSK:+PSK"
             : "NORMAL:-VERS-ALL:+VERS-TLS1.3:-GROUP-ALL:+GROUP-X25519:+PSK:+ECDHE-PSK";
}

// What is made once.
struct Shared {
  Shared() {
    AioContextOptions options;
    options.name = "fuzz";
    options.poll_max_ns = 0;
    context = AioContext::create(std::move(options));
    // Read again for each handshake.
    const int fd = ::memfd_create("key", 0);
    const std::string path = fmt::format("/proc/self/fd/{}", fd);
    const std::string_view line = kKeyLine;
    ROOST_CHECK(fd >= 0 && ::write(fd, line.data(), line.size()) > 0, "no file for a key");
    for (const bool client : {false, true}) {
      for (const bool old : {false, true}) {
        auto loaded = TlsCredentials::load({.role = client ? TlsRole::kClient : TlsRole::kServer,
                                            .psk_file = path,
                                            .priority = priority(old)});
        ROOST_CHECK(loaded, "{}", loaded.error().message());
        credentials[client][old] = *loaded;
      }
    }
    must(::gnutls_psk_allocate_client_credentials(&client_key), "credentials");
    const gnutls_datum_t key{const_cast<unsigned char*>(kKey.data()), kKey.size()};
    must(::gnutls_psk_set_client_credentials(client_key, "fuzz", &key, GNUTLS_PSK_KEY_RAW), "key");
    must(::gnutls_psk_allocate_server_credentials(&server_key), "credentials");
    ::gnutls_psk_set_server_credentials_function(
        server_key, [](gnutls_session_t, const char*, gnutls_datum_t* to) {
          to->data = static_cast<unsigned char*>(::gnutls_malloc(kKey.size()));
          to->size = kKey.size();
          std::ranges::copy(kKey, to->data);
          return 0;
        });
  }

  std::shared_ptr<AioContext> context;
  std::shared_ptr<const TlsCredentials> credentials[2][2];
  gnutls_psk_client_credentials_t client_key = nullptr;
  gnutls_psk_server_credentials_t server_key = nullptr;
};

// Our end, and what it has read.
struct Subject {
  std::unique_ptr<TlsChannel> channel;
  std::string name;
  std::size_t read = 0;
  std::size_t written = 0;
  bool saw_end = false;
  bool ended = false;  // it reads no more
  bool writing = false;
  bool gone = false;
  std::string error;
};

Task<void> be_subject(Subject& self, std::unique_ptr<Channel> lower,
                      std::shared_ptr<const TlsCredentials> credentials) {
  self.name = lower->name();
  auto shaking = TlsChannel::handshake(std::move(lower), std::move(credentials));
  auto secured = co_await std::move(shaking);
  if (!secured) {
    self.error = secured.error().message();
    self.ended = self.gone = true;
    co_return;
  }
  self.channel = std::move(*secured);
  std::array<std::byte, 1000> buffer;
  for (;;) {
    const Result<std::size_t> n = co_await self.channel->read(buffer);
    if (!n) {
      self.error = n.error().message();
      break;
    }
    if (*n == 0) {
      self.saw_end = true;
      break;
    }
    for (std::size_t i = 0; i < *n; ++i) {
      ROOST_CHECK(buffer[i] == pattern(self.read + i), "byte {} is not the peer's", self.read + i);
    }
    self.read += *n;
  }
  self.ended = true;
}

Task<void> write_as_subject(Subject& self, std::size_t size) {
  std::vector<std::byte> bytes(size);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = pattern(self.written + i);
  self.written += size;
  (void)co_await self.channel->write_full(bytes);
  self.writing = false;
}

Task<void> leave_as_subject(Subject& self) {
  (void)co_await self.channel->shutdown(StreamEnd::kWrite);
  self.channel.reset();
  self.gone = true;
}

Task<void> collect(Channel& from, std::vector<std::byte>& to, bool& ended) {
  std::array<std::byte, 4096> buffer;
  for (;;) {
    const Result<std::size_t> n = co_await from.read(buffer);
    if (!n || *n == 0) break;
    to.insert(to.end(), buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(*n));
  }
  ended = true;
}

Task<void> send(Channel& to, std::span<const std::byte> bytes, bool& sent) {
  (void)co_await to.write_full(bytes);
  sent = true;
}

class Run {
 public:
  Run(Shared& shared, std::span<const std::uint8_t> input) : shared_(shared), input_(input) {}

  void run() {
    const std::uint8_t kind = next();
    client_ = kind & 1;
    old_ = kind & 2;
    auto [upper, lower] = make_memory_channels(kWire);
    wire_ = std::move(lower);
    spawn(*shared_.context,
          be_subject(subject_, std::move(upper), shared_.credentials[client_][old_]), "subject");
    spawn(*shared_.context, collect(*wire_, from_subject_, collected_), "wire");
    settle();
    if (kind & 4) {
      touched_ = true;
      deliver(std::as_bytes(input_));
    } else {
      begin_peer();
      talk();
    }
    finish();
    if (peer_) ::gnutls_deinit(peer_);
  }

 private:
  std::uint8_t next() {
    if (input_.empty()) return 0;
    const std::uint8_t one = input_.front();
    input_ = input_.subspan(1);
    return one;
  }

  void settle() {
    for (unsigned i = 0; shared_.context->poll(false); ++i) {
      ROOST_CHECK(i < 100'000, "it does not come to rest");
    }
  }

  void deliver(std::span<const std::byte> bytes) {
    // Our end has taken what came before, or takes nothing any more.
    std::vector<std::byte> all = std::exchange(waiting_, {});
    if (!all.empty()) {
      all.insert(all.end(), bytes.begin(), bytes.end());
      bytes = all;
    }
    while (!bytes.empty() && !cut_ && !subject_.ended) {
      const auto piece = bytes.first(std::min(bytes.size(), kWire));
      bytes = bytes.subspan(piece.size());
      bool sent = false;
      spawn(*shared_.context, send(*wire_, piece, sent), "sending");
      settle();
      ROOST_CHECK(sent, "our end does not take what is sent");
    }
  }

  void cut() {
    deliver({});
    if (std::exchange(cut_, true)) return;
    bool done = false;
    spawn(*shared_.context, end_wire(*wire_, done), "ending");
    settle();
  }
  static Task<void> end_wire(Channel& wire, bool& done) {
    (void)co_await wire.shutdown(StreamEnd::kWrite);
    done = true;
  }

  // ---- The peer

  void begin_peer() {
    must(::gnutls_init(&peer_, (client_ ? GNUTLS_SERVER | GNUTLS_NO_TICKETS : GNUTLS_CLIENT) |
                                   GNUTLS_NONBLOCK | GNUTLS_NO_SIGNAL),
         "peer");
    must(::gnutls_priority_set_direct(peer_, priority(old_), nullptr), "priority");
    must(::gnutls_credentials_set(peer_, GNUTLS_CRD_PSK,
                                  client_ ? static_cast<void*>(shared_.server_key)
                                          : static_cast<void*>(shared_.client_key)),
         "credentials");
    ::gnutls_transport_set_ptr(peer_, this);
    ::gnutls_transport_set_pull_function(
        peer_, [](gnutls_transport_ptr_t self, void* to, std::size_t size) {
          return static_cast<Run*>(self)->pull(to, size);
        });
    ::gnutls_transport_set_push_function(
        peer_, [](gnutls_transport_ptr_t self, const void* from, std::size_t size) -> ssize_t {
          auto& to = static_cast<Run*>(self)->from_peer_;
          const auto* const bytes = static_cast<const std::byte*>(from);
          to.insert(to.end(), bytes, bytes + size);
          return static_cast<ssize_t>(size);
        });
  }

  ssize_t pull(void* to, std::size_t size) {
    if (from_subject_.empty()) {
      if (collected_) return 0;
      ::gnutls_transport_set_errno(peer_, EAGAIN);
      return -1;
    }
    size = std::min(size, from_subject_.size());
    std::copy_n(from_subject_.begin(), size, static_cast<std::byte*>(to));
    from_subject_.erase(from_subject_.begin(),
                        from_subject_.begin() + static_cast<std::ptrdiff_t>(size));
    return static_cast<ssize_t>(size);
  }

  void talk() {
    bool shaken = false;
    for (unsigned i = 0; i < 20 && !shaken; ++i) {
      const int code = ::gnutls_handshake(peer_);
      shaken = code == GNUTLS_E_SUCCESS;
      if (code != GNUTLS_E_AGAIN && code < 0 && ::gnutls_error_is_fatal(code)) break;
      forward();
      deliver({});  // an answer may be wanted
    }
    if (!shaken) {
      ROOST_CHECK(touched_, "no handshake although nobody tampered with it: {}", subject_.error);
      return;
    }
    for (unsigned i = 0; i < kMaxActions && !input_.empty(); ++i) {
      act();
      forward();
      hear();
    }
    if (!bye_) said_bye(::gnutls_bye(peer_, GNUTLS_SHUT_WR));
    forward();
    release_held();
  }

  // The next record is the one that ends TLS. What is lost of later ones changes nothing.
  void said_bye(int code) {
    if (code >= 0 && !std::exchange(bye_, true)) bye_next_ = true;
  }

  void alert(gnutls_alert_level_t level) {
    touched_ = true;
    const std::uint8_t what = next();
    const int code =
        ::gnutls_alert_send(peer_, level, static_cast<gnutls_alert_description_t>(what));
    if (what == GNUTLS_A_CLOSE_NOTIFY) said_bye(code);
  }

  void act() {
    switch (next() % 8) {
      default: {
        std::vector<std::byte> bytes(1 + next() + 80 * std::size_t{next()});
        if (bye_) break;
        for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = pattern(sent_ + i);
        std::span<const std::byte> rest(bytes);
        while (!rest.empty()) {
          const ssize_t n = ::gnutls_record_send(peer_, rest.data(), rest.size());
          if (n <= 0) break;
          sent_ += static_cast<std::size_t>(n);
          rest = rest.subspan(static_cast<std::size_t>(n));
        }
        break;
      }
      case 3:
        if (old_) {
          touched_ = true;
          (void)(client_ ? ::gnutls_rehandshake(peer_) : ::gnutls_handshake(peer_));
        } else {
          if (++new_keys_ > kMaxNewKeys) touched_ = true;
          (void)::gnutls_session_key_update(peer_, next() & 1 ? GNUTLS_KU_PEER : 0);
        }
        break;
      case 4:
        alert(GNUTLS_AL_WARNING);
        break;
      case 5:
        alert(GNUTLS_AL_FATAL);
        break;
      case 6:
        said_bye(::gnutls_bye(peer_, GNUTLS_SHUT_WR));
        break;
      case 7:
        if (subject_.channel && !subject_.ended && !subject_.writing) {
          subject_.writing = true;
          spawn(*shared_.context, write_as_subject(subject_, 1 + 90 * std::size_t{next()}),
                "writing");
          settle();
        }
        break;
    }
  }

  // What our end has written arrives as it was.
  void hear() {
    std::array<std::byte, 5000> buffer;
    for (unsigned i = 0; i < 100; ++i) {
      const ssize_t n = ::gnutls_record_recv(peer_, buffer.data(), buffer.size());
      if (n <= 0) break;
      for (std::size_t at = 0; at < static_cast<std::size_t>(n); ++at) {
        ROOST_CHECK(buffer[at] == pattern(heard_ + at), "byte {} is not ours", heard_ + at);
      }
      heard_ += static_cast<std::size_t>(n);
    }
    ROOST_CHECK(heard_ <= subject_.written, "the peer got more than was written");
  }

  // ---- In between

  // Whole records of the peer's, as they are or not.
  void forward() {
    settle();
    while (from_peer_.size() >= kHeader) {
      const std::size_t size = kHeader + (std::to_integer<std::size_t>(from_peer_[3]) << 8) +
                               std::to_integer<std::size_t>(from_peer_[4]);
      if (from_peer_.size() < size) break;
      const auto end = from_peer_.begin() + static_cast<std::ptrdiff_t>(size);
      std::vector<std::byte> record(from_peer_.begin(), end);
      from_peer_.erase(from_peer_.begin(), end);
      tamper(std::move(record));
    }
    settle();
  }

  void release_held() { deliver(std::exchange(held_, {})); }

  void tamper(std::vector<std::byte> record) {
    const std::uint8_t what = next();
    const bool bye = std::exchange(bye_next_, false);
    const bool lost = cut_ || (what >= 0xc0 && (what % 8 == 1 || what % 8 == 4));
    if (bye && lost) bye_lost_ = true;
    if (what >= 0x80 && what < 0xc0) {  // in one piece with what follows
      waiting_.insert(waiting_.end(), record.begin(), record.end());
      return;
    }
    if (what < 0x80) {
      deliver(record);
      release_held();
      return;
    }
    if (what % 8 != 7) touched_ = true;
    switch (what % 8) {
      case 0: {  // other bits
        const std::size_t at = (next() + 256 * std::size_t{next()}) % record.size();
        record[at] ^= static_cast<std::byte>(1 << next() % 8);
        deliver(record);
        break;
      }
      case 1:  // only its beginning, and the end of everything
        record.resize(next() % record.size());
        deliver(record);
        cut();
        break;
      case 2:  // twice
        deliver(record);
        deliver(record);
        break;
      case 3:  // later
        held_.insert(held_.end(), record.begin(), record.end());
        break;
      case 4:  // not at all
        break;
      case 5: {  // after something that nobody sent
        std::vector<std::byte> other(kHeader + next() % 64);
        for (std::byte& b : other) b = std::byte{next()};
        other[1] = std::byte{3};
        other[2] = std::byte{3};
        other[3] = std::byte{0};
        other[4] = static_cast<std::byte>(other.size() - kHeader);
        deliver(other);
        deliver(record);
        break;
      }
      case 6:  // shorter, with a length that says so
        record.resize(kHeader + next() % (record.size() - kHeader + 1));
        record[3] = static_cast<std::byte>((record.size() - kHeader) >> 8);
        record[4] = static_cast<std::byte>(record.size() - kHeader);
        deliver(record);
        break;
      default: {  // as it is, in two pieces
        const auto half = record.cbegin() + static_cast<std::ptrdiff_t>(next() % record.size());
        deliver(std::span(record.cbegin(), half));
        deliver(std::span(half, record.cend()));
        break;
      }
    }
  }

  // ---- The end

  void finish() {
    cut();
    ROOST_CHECK(subject_.ended, "our end waits for more than the end of the stream");
    ROOST_CHECK(!subject_.writing, "our end still writes");
    ROOST_CHECK(subject_.read <= sent_, "{} bytes are read of {}", subject_.read, sent_);
    if (subject_.saw_end) {
      ROOST_CHECK(bye_ && !bye_lost_, "an end of TLS that the peer did not send");
      ROOST_CHECK(subject_.read == sent_, "an end after {} of {} bytes", subject_.read, sent_);
    }
    if (!subject_.saw_end) {
      ROOST_CHECK(subject_.error.find(subject_.name) != std::string::npos,
                  "an error does not name the peer '{}': {}", subject_.name, subject_.error);
    }
    if (!touched_) {
      ROOST_CHECK(subject_.saw_end && subject_.read == sent_, "{} of {} bytes arrived, then: {}",
                  subject_.read, sent_, subject_.error);
    }
    if (subject_.channel) {
      spawn(*shared_.context, leave_as_subject(subject_), "leaving");
      settle();
    }
    ROOST_CHECK(subject_.gone, "our end does not end");
    wire_->abort();
    settle();
    ROOST_CHECK(collected_, "the wire is still read");
  }

  Shared& shared_;
  std::span<const std::uint8_t> input_;
  bool client_ = false;  // our end
  bool old_ = false;
  Subject subject_;
  std::unique_ptr<Channel> wire_;
  std::vector<std::byte> from_subject_;
  bool collected_ = false;
  gnutls_session_t peer_ = nullptr;
  std::vector<std::byte> from_peer_;
  std::vector<std::byte> held_;     // for later than what follows
  std::vector<std::byte> waiting_;  // for what follows
  std::size_t sent_ = 0;            // by the peer
  std::size_t heard_ = 0;           // of what our end wrote
  unsigned new_keys_ = 0;
  bool bye_ = false;
  bool bye_next_ = false;
  bool bye_lost_ = false;
  bool touched_ = false;  // the peer need not get through
  bool cut_ = false;
};

}  // namespace
}  // namespace roost

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static roost::Shared shared;
  const roost::ContextScope scope(*shared.context);
  roost::Run(shared, std::span(data, size)).run();
  return 0;
}
