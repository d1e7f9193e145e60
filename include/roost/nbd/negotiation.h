// SPDX-License-Identifier: MIT
// The server's side of the fixed newstyle NBD handshake, from the greeting to the option that
// starts transmission, as a state machine: the caller carries the bytes.
//
//   ServerNegotiation negotiation(exports, tls);
//   loop while negotiation.state() is kNegotiating:
//     drop feed(input) bytes from the front of input
//     if output() is not empty: send it, drain_output(sent), and feed again
//     else: receive more input (feed took all of it)
//   send what output() still holds; then
//     kTransmission: what is left of input are requests (roost/nbd/transmission.h)
//     kStartTls:     do the TLS handshake, call tls_started(), go on with what comes decrypted
//     kFinished:     the client said goodbye: close
//     kFailed:       close, and log failure() with the peer's name
//
// feed() stops early while kOutputLimit bytes or more of output wait, so a client that asks and
// does not read is held back; it continues (with input or with none) once output was drained.
//
// What one client may cost is bounded: kMaxOutput bytes of output, kMaxOptionData bytes of a
// half-received option, kMaxOptions options, kMaxSkippedBytes bytes of option data that nobody
// wants. A client that only dawdles is the caller's business (a time-out).
//
// How the protocol's freedoms are used:
// - INFO and GO always answer with the export's size and flags, with its name and description
//   when asked, and with its block sizes when asked or when they are not the protocol's defaults.
//   A client that did not ask for block sizes is let in; see Selection.
// - Without the fixed newstyle client flag only EXPORT_NAME is taken, any other option fails.
// - The one metadata context is base:allocation. It counts for the export it was set for, until the
//   next SET_META_CONTEXT, which replaces it even where that fails. Without structured replies or
//   extended headers both metadata options are answered as invalid.
// - Extended headers take precedence over structured replies, whichever was asked for first; they
//   end the use of EXPORT_NAME: it fails.
// - SEND_DF is shown only to clients that get chunks, BLOCK_STATUS_PAYLOAD only to those that have
//   extended headers and the context.
// - Bytes that arrive in plain text together with STARTTLS, but behind it, are an attempt to slip
//   them into the encrypted session: the negotiation fails. Nothing said before TLS counts after it
//   but the client flags, which are not sent again, and the bounds above.
// - The empty name means the export whose name is empty, if there is one.
//
// The exports may change between options: each option sees the set that is current when it comes,
// and a listing ends with the set it began with. Selection names the export by its id.
//
// Threads: none of its own; one thread at a time. No locks, no system calls.
// Lifetime: holds the export set it works on.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "roost/base/result.h"
#include "roost/nbd/protocol.h"

namespace roost::nbd {

/// What a client is told about one export. Of its transmission flags, SEND_DF and
/// BLOCK_STATUS_PAYLOAD are shown only to clients that can use them.
struct ExportInfo {
  std::uint64_t id = 0;  // the server's own; never sent
  std::string name{};    // empty: the default export
  std::uint64_t size = 0;
  std::uint16_t transmission_flags = kTransmissionHasFlags;
  std::uint32_t min_block = kDefaultMinBlock;
  std::uint32_t preferred_block = kDefaultPreferredBlock;
  std::uint32_t max_payload = kMaxPayload;
  std::string description{};
};

/// Whether the protocol lets an export be offered like this: lengths of the strings, powers of
/// two, flags that belong together. For what a user configured; ExportSet requires it.
Result<void> check_export(const ExportInfo& info);

/// The exports a server offers at one time. Constant, so that threads may share it.
class ExportSet {
 public:
  ExportSet() = default;
  /// REQUIRES: check_export() is content with each of `exports`.
  explicit ExportSet(std::vector<ExportInfo> exports);

  std::span<const ExportInfo> all() const noexcept { return exports_; }

  /// Null if there is none of that name.
  const ExportInfo* find(std::string_view name) const noexcept;

 private:
  std::vector<ExportInfo> exports_;
};

/// Whether the session is to be encrypted.
enum class TlsPolicy : std::uint8_t {
  kUnsupported,  // STARTTLS is answered with ERR_UNSUP
  kForbidden,    // with ERR_POLICY
  kAllowed,      // the client may begin it
  kRequired,     // nothing but STARTTLS and ABORT is heeded before
};

/// The metadata context's number within a connection.
inline constexpr std::uint32_t kBaseAllocationId = 1;

class ServerNegotiation {
 public:
  enum class State : std::uint8_t { kNegotiating, kStartTls, kTransmission, kFinished, kFailed };

  /// The set that is current at the time of the call; not null.
  using Exports = std::function<std::shared_ptr<const ExportSet>()>;

  /// What client and server agreed on.
  struct Selection {
    std::uint64_t export_id = 0;           // ExportInfo::id
    std::uint64_t size = 0;                // what the client was told
    std::uint16_t transmission_flags = 0;  // likewise
    std::uint32_t min_block = kDefaultMinBlock;
    std::uint32_t max_payload = kMaxPayload;
    ReplyStyle reply_style = ReplyStyle::kSimple;
    bool base_allocation = false;  // the context was set for this export
    bool no_zeroes = false;
    /// The client asked for block sizes with the option that started transmission, and must keep
    /// to them. Another client may send requests of any alignment.
    bool block_size_requested = false;

    bool operator==(const Selection&) const = default;
  };

  static constexpr std::size_t kOutputLimit = 64 << 10;
  /// The replies to one option go on top of the limit: at worst a name and a description.
  static constexpr std::size_t kMaxOutput = kOutputLimit + 3 * kMaxString;
  static constexpr std::size_t kMaxOptionData = 8 << 10;
  static constexpr std::uint32_t kMaxOptions = 1024;
  static constexpr std::uint32_t kMaxSkippedBytes = 32u << 20;

  explicit ServerNegotiation(Exports exports, TlsPolicy tls = TlsPolicy::kUnsupported);

  ServerNegotiation(const ServerNegotiation&) = delete;
  ServerNegotiation& operator=(const ServerNegotiation&) = delete;

  /// Takes bytes from the client and returns how many were taken. Fewer than all are taken only
  /// if output waits to be drained, or if the negotiation has ended: the rest is not part of it.
  std::size_t feed(std::span<const std::byte> input);

  /// Bytes for the client, oldest first. Valid until the next call of feed or drain_output.
  std::span<const std::byte> output() const noexcept {
    return std::span(output_).subspan(output_sent_);
  }

  /// The first `count` bytes of output() have been sent.
  void drain_output(std::size_t count);

  State state() const noexcept { return state_; }

  /// The TLS handshake is done; input and output are what it decrypts and encrypts.
  /// REQUIRES: state() is kStartTls, and all output was drained before the handshake.
  void tls_started();

  /// Whether tls_started() was called.
  bool encrypted() const noexcept { return encrypted_; }

  /// REQUIRES: state() is kTransmission.
  const Selection& selection() const;

  /// Why the client has to go: one line of printable characters. REQUIRES: state() is kFailed.
  const std::string& failure() const;

 private:
  enum class Step : std::uint8_t { kClientFlags, kOptionHeader, kOptionData };

  void expect(Step step, std::size_t size);
  void skip(std::uint32_t size);
  void fail_with(std::string reason);

  void on_input_complete();
  void on_client_flags();
  void on_option_header();
  void on_option_complete();
  void on_export_name();
  void on_start_tls();
  void on_reply_style(ReplyStyle style);
  void on_info_or_go();
  void on_meta_context();
  void list_one_more();

  std::uint16_t shown_flags(const ExportInfo& info) const;
  bool has_context(const ExportInfo& info) const;
  void start_transmission(const ExportInfo& info, bool block_size_requested);

  template <std::unsigned_integral T>
  void put(T value);
  void put(std::string_view text);
  void put_reply_header(ReplyType type, std::size_t length);
  void put_error(ReplyType type, std::string_view message);

  const Exports current_exports_;
  const TlsPolicy tls_;
  std::shared_ptr<const ExportSet> exports_;  // as of the current option

  State state_ = State::kNegotiating;
  Selection selection_;
  std::string failure_;

  // Input: the part of the current step that has arrived, or what is still to be thrown away.
  Step step_ = Step::kClientFlags;
  std::vector<std::byte> buffer_;
  std::size_t wanted_ = 0;
  std::uint32_t skip_left_ = 0;

  // The current option.
  Option option_{};
  std::uint32_t option_length_ = 0;
  bool option_skipped_ = false;  // its data was thrown away, not collected in buffer_
  bool listing_ = false;         // exports from list_next_ on are still to be listed
  std::size_t list_next_ = 0;

  // What was agreed on; forgotten when TLS starts.
  ReplyStyle reply_style_ = ReplyStyle::kSimple;
  bool context_set_ = false;
  std::uint64_t context_export_ = 0;  // for which export; ExportInfo::id

  bool encrypted_ = false;
  std::uint32_t client_flags_ = 0;
  std::uint32_t options_seen_ = 0;
  std::uint32_t skip_budget_ = kMaxSkippedBytes;

  std::vector<std::byte> output_;
  std::size_t output_sent_ = 0;
};

}  // namespace roost::nbd
