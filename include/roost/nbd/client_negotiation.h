// SPDX-License-Identifier: MIT
// The client's side of the NBD handshake as a state machine: the caller carries the bytes.
//
//   ClientNegotiation negotiation(wishes);
//   loop while negotiation.state() is kNegotiating:
//     send output(), drain_output(sent)
//     receive input; drop feed(input) bytes from its front; at its end: end_of_input()
//   kStartTls:     send output(), do the TLS handshake, tls_started(), and go on over TLS; if input
//                  is left, somebody tampers with the connection: close
//   kTransmission: send output(); what is left of input are replies
//                  (roost/nbd/client_transmission.h)
//   kFinished:     what was asked for is in result(): send output() (it says goodbye), close
//   kFailed:       log failure(); send output() if that is easy (it says goodbye), close
//
// The options go out one at a time, STARTTLS first, then EXTENDED_HEADERS or else
// STRUCTURED_REPLY, SET_META_CONTEXT, GO. A server that does not know one of them is served with
// what is left, down to EXPORT_NAME, to newstyle without the "fixed", and to oldstyle; only a TLS
// that is required is never given up.
//
// What a server may cost is bounded: kMaxReplyData bytes of a half-received reply, kMaxListEntries
// and kMaxListBytes for what is listed, kMaxReplies replies to one option. A server that breaks
// the protocol fails the negotiation, with words that say what it did. A server that only dawdles
// is the caller's business (a time-out).
//
// How the protocol's freedoms are used:
// - Transmission flags without HAS_FLAGS count as none at all from a server that knows no GO.
//   SEND_DF without structured replies, SEND_FAST_ZERO without SEND_WRITE_ZEROES and
//   BLOCK_STATUS_PAYLOAD without extended headers are taken out of the flags.
// - Whatever error answers SET_META_CONTEXT, there are no contexts then.
// - Goodbyes are not waited for.
//
// Threads: none of its own; one thread at a time. No locks, no system calls.
// Lifetime: owns all it needs.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "roost/base/result.h"
#include "roost/nbd/protocol.h"

namespace roost::nbd {

/// A metadata context and the number that stands for it on this connection.
struct MetaContext {
  std::uint32_t id = 0;
  std::string name{};

  bool operator==(const MetaContext&) const = default;
};

struct ClientWishes {
  enum class Mode : std::uint8_t {
    kGo,
    /// What an export is, without using it. Ends in kFinished, or in kTransmission where the
    /// server cannot tell without: send DISC then.
    kInfo,
    kList,              // the exports
    kListMetaContexts,  // those that match meta_contexts; all, if there are none
  };
  enum class Tls : std::uint8_t { kOff, kAllowed, kRequired };

  std::string export_name{};  // empty: the default export
  Mode mode = Mode::kGo;
  Tls tls = Tls::kOff;
  bool structured_replies = true;
  bool extended_headers = true;
  std::vector<std::string> meta_contexts{};  // such as "base:allocation"
};

/// Whether the protocol has room for such wishes; ClientNegotiation requires it.
Result<void> check_wishes(const ClientWishes& wishes);

class ClientNegotiation {
 public:
  enum class State : std::uint8_t { kNegotiating, kStartTls, kTransmission, kFinished, kFailed };

  struct ListEntry {
    std::string name{};
    std::string description{};

    bool operator==(const ListEntry&) const = default;
  };

  struct Outcome {
    // Of the export; not when listing.
    std::uint64_t size = 0;
    std::uint16_t transmission_flags = kTransmissionHasFlags;
    std::uint32_t min_block = kDefaultMinBlock;
    std::uint32_t preferred_block = kDefaultPreferredBlock;
    std::uint32_t max_payload = kMaxPayload;
    bool block_sizes_known = false;  // the server told them
    std::string canonical_name{};    // the wished one unless the server told another
    std::string description{};

    ReplyStyle headers = ReplyStyle::kSimple;
    bool tls = false;
    std::vector<MetaContext> contexts{};  // in kListMetaContexts their ids mean nothing
    std::vector<ListEntry> entries{};
  };

  static constexpr std::size_t kMaxReplyData = 4 + 2 * kMaxString;
  static constexpr std::size_t kMaxReplies = 65536;
  static constexpr std::size_t kMaxListEntries = 65536;
  static constexpr std::size_t kMaxListBytes = 16u << 20;
  static constexpr std::size_t kMaxContexts = 1024;

  /// REQUIRES: check_wishes() is content.
  explicit ClientNegotiation(ClientWishes wishes);

  ClientNegotiation(const ClientNegotiation&) = delete;
  ClientNegotiation& operator=(const ClientNegotiation&) = delete;

  /// Takes bytes from the server and returns how many were taken: fewer than all only if
  /// kNegotiating has ended.
  std::size_t feed(std::span<const std::byte> input);

  /// The server will send no more: fails, and knows what that means at this point.
  /// REQUIRES: state() is kNegotiating.
  void end_of_input();

  /// TLS covers the connection from here on. REQUIRES: state() is kStartTls, output() is empty.
  void tls_started();

  /// Bytes for the server, oldest first. Valid until the next call of feed or drain_output.
  std::span<const std::byte> output() const noexcept {
    return std::span(output_).subspan(output_sent_);
  }

  /// The first `count` bytes of output() have been sent.
  void drain_output(std::size_t count);

  State state() const noexcept { return state_; }

  /// REQUIRES: state() is kTransmission or kFinished.
  const Outcome& outcome() const;

  /// Why it failed, in one line of printable characters; EPROTO is the code where the server broke
  /// the protocol. REQUIRES: state() is kFailed.
  const Error& failure() const;

 private:
  enum class Step : std::uint8_t {
    kMagic,           // 16 bytes
    kHandshakeFlags,  // 2
    kOldstyle,        // 136
    kReplyHeader,     // 20
    kReplyData,
    kExportInfo,  // the answer to EXPORT_NAME
  };

  void expect(Step step, std::size_t size);
  void on_input_complete();
  void on_magic();
  void on_oldstyle();
  void on_handshake_flags();
  void on_reply_header();
  void on_reply();
  void on_error_reply();
  void on_ack();
  void on_server_reply();
  void on_info_reply();
  void on_context_reply();
  void on_export_info();

  /// Sends the option that comes after `done`.
  void send_next(Option done);
  void send_last();
  void send_export_name();
  void start_transmission(std::uint64_t size, std::uint16_t flags);
  void settle_flags();
  void finish();
  void fail_with(int code, std::string reason);
  void lie(std::string_view what);  // fails with EPROTO

  template <std::unsigned_integral T>
  void put(T value);
  void put(std::string_view text);
  void put_option(Option option, std::size_t length);
  void put_contexts_option(Option option);

  const ClientWishes wishes_;

  State state_ = State::kNegotiating;
  Outcome outcome_;
  Error failure_{0, {}};

  // Input.
  Step step_ = Step::kMagic;
  std::vector<std::byte> buffer_;
  std::size_t wanted_ = 0;
  bool input_left_ = false;  // behind what is being looked at, more has arrived

  // The option that was sent, and what of its reply was seen.
  Option option_{};
  std::uint32_t reply_type_ = 0;
  std::size_t replies_seen_ = 0;
  std::size_t list_bytes_ = 0;
  bool export_seen_ = false;
  bool name_seen_ = false;
  bool description_seen_ = false;

  bool fixed_ = false;      // options have replies
  bool no_zeroes_ = false;  // negotiated
  bool tls_refused_ = false;

  std::vector<std::byte> output_;
  std::size_t output_sent_ = 0;
};

}  // namespace roost::nbd
