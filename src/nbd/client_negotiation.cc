// SPDX-License-Identifier: MIT
#include "roost/nbd/client_negotiation.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <utility>

#include "nbd/words.h"
#include "roost/base/bytes.h"
#include "roost/base/check.h"

namespace roost::nbd {
namespace {

using Mode = ClientWishes::Mode;
using Tls = ClientWishes::Tls;

constexpr std::uint32_t kErrorReplyBit = 1u << 31;
constexpr std::size_t kMagicSize = 16;
constexpr std::size_t kOldstyleSize = 8 + 4 + kExportNameZeroes;
constexpr std::uint64_t kOldstyleMagic = 0x00420281861253;

int errno_for(ReplyType type) {
  switch (type) {
    case ReplyType::kErrUnsup:
    case ReplyType::kErrPlatform:
    case ReplyType::kErrExtHeaderReqd:
      return ENOTSUP;
    case ReplyType::kErrPolicy:
    case ReplyType::kErrTlsReqd:
      return EACCES;
    case ReplyType::kErrUnknown:
      return ENOENT;
    case ReplyType::kErrShutdown:
      return ESHUTDOWN;
    case ReplyType::kErrTooBig:
      return E2BIG;
    default:
      return EINVAL;
  }
}

}  // namespace

Result<void> check_wishes(const ClientWishes& wishes) {
  if (wishes.export_name.size() > kMaxString) {
    return fail(EINVAL, "an export name of more than 4096 bytes");
  }
  if (wishes.export_name.contains('\0')) return fail(EINVAL, "an export name with a NUL in it");
  if (wishes.meta_contexts.size() > ClientNegotiation::kMaxContexts) {
    return fail(EINVAL, "more than 1024 metadata contexts");
  }
  for (const std::string& name : wishes.meta_contexts) {
    if (name.size() > kMaxString || name.contains('\0') || name.find(':', 1) == name.npos) {
      return fail(EINVAL, fmt::format("the metadata context {} is not of the form namespace:leaf",
                                      printable(name)));
    }
  }
  return {};
}

ClientNegotiation::ClientNegotiation(ClientWishes wishes) : wishes_(std::move(wishes)) {
  const Result<void> checked = check_wishes(wishes_);
  ROOST_CHECK(checked, "{}", checked.error().doing());
  outcome_.canonical_name = wishes_.export_name;
  expect(Step::kMagic, kMagicSize);
}

std::size_t ClientNegotiation::feed(std::span<const std::byte> input) {
  std::size_t taken = 0;
  while (state_ == State::kNegotiating && taken < input.size()) {
    const std::span<const std::byte> rest = input.subspan(taken);
    const auto part = rest.first(std::min(wanted_ - buffer_.size(), rest.size()));
    buffer_.insert(buffer_.end(), part.begin(), part.end());
    taken += part.size();
    if (buffer_.size() < wanted_) break;
    input_left_ = taken < input.size();
    on_input_complete();
  }
  return taken;
}

void ClientNegotiation::end_of_input() {
  ROOST_CHECK(state_ == State::kNegotiating, "the negotiation has ended");
  switch (step_) {
    case Step::kMagic:
      return fail_with(ECONNRESET, buffer_.empty()
                                       ? "the server closed the connection without a greeting"
                                       : "the server closed the connection within its greeting");
    case Step::kExportInfo:
      // The only way in which this option can be refused.
      if (buffer_.empty()) {
        return fail_with(ENOENT,
                         fmt::format("the server closed the connection when asked for export {}",
                                     printable(wishes_.export_name)));
      }
      break;
    case Step::kHandshakeFlags:
    case Step::kOldstyle:
      return fail_with(ECONNRESET, "the server closed the connection within its greeting");
    default:
      break;
  }
  fail_with(ECONNRESET, fmt::format("the server closed the connection within its reply to {}",
                                    option_words(option_)));
}

void ClientNegotiation::tls_started() {
  ROOST_CHECK(state_ == State::kStartTls, "nobody asked for TLS");
  ROOST_CHECK(output().empty(), "{} bytes should have been sent without TLS", output().size());
  state_ = State::kNegotiating;
  outcome_.tls = true;
  send_next(Option::kStartTls);
}

void ClientNegotiation::drain_output(std::size_t count) {
  ROOST_CHECK(count <= output().size(), "drained {} bytes of {}", count, output().size());
  output_sent_ += count;
  if (output_sent_ == output_.size()) {
    output_.clear();
    output_sent_ = 0;
  }
}

const ClientNegotiation::Outcome& ClientNegotiation::outcome() const {
  ROOST_CHECK(state_ == State::kTransmission || state_ == State::kFinished,
              "there is no outcome yet");
  return outcome_;
}

const Error& ClientNegotiation::failure() const {
  ROOST_CHECK(state_ == State::kFailed, "the negotiation has not failed");
  return failure_;
}

// ---- input ----

void ClientNegotiation::expect(Step step, std::size_t size) {
  step_ = step;
  wanted_ = size;
  buffer_.clear();
}

void ClientNegotiation::on_input_complete() {
  switch (step_) {
    case Step::kMagic:
      return on_magic();
    case Step::kHandshakeFlags:
      return on_handshake_flags();
    case Step::kOldstyle:
      return on_oldstyle();
    case Step::kReplyHeader:
      return on_reply_header();
    case Step::kReplyData:
      return on_reply();
    case Step::kExportInfo:
      return on_export_info();
  }
}

void ClientNegotiation::on_magic() {
  const auto first = load_be<std::uint64_t>(buffer_.data());
  const auto second = load_be<std::uint64_t>(buffer_.data() + 8);
  if (first != kInitMagic) {
    return lie(fmt::format("greeted with {}, which is not NBD",
                           printable(text_of(std::span(buffer_).first(8)))));
  }
  if (second == kOptionMagic) return expect(Step::kHandshakeFlags, 2);
  if (second != kOldstyleMagic) {
    return lie(fmt::format("sent {:#018x} behind NBDMAGIC", second));
  }
  if (wishes_.tls == Tls::kRequired) {
    return fail_with(EACCES, "TLS is required, and the server is of the old style, without TLS");
  }
  if (wishes_.mode == Mode::kList || wishes_.mode == Mode::kListMetaContexts) {
    return fail_with(ENOTSUP, "the server is of the old style: it cannot list");
  }
  if (!wishes_.export_name.empty()) {
    return fail_with(ENOENT, fmt::format("the server is of the old style: it has no export {}",
                                         printable(wishes_.export_name)));
  }
  expect(Step::kOldstyle, kOldstyleSize);
}

void ClientNegotiation::on_oldstyle() {
  const auto size = load_be<std::uint64_t>(buffer_.data());
  // The upper half are handshake flags, which mean nothing here.
  const auto flags = static_cast<std::uint16_t>(load_be<std::uint32_t>(buffer_.data() + 8));
  start_transmission(size, flags);
}

void ClientNegotiation::on_handshake_flags() {
  const auto flags = load_be<std::uint16_t>(buffer_.data());
  fixed_ = (flags & kHandshakeFixedNewstyle) != 0;
  no_zeroes_ = (flags & kHandshakeNoZeroes) != 0;
  if (!fixed_ && wishes_.tls == Tls::kRequired) {
    return fail_with(EACCES, "TLS is required, and the server does not know options");
  }
  if (!fixed_ && (wishes_.mode == Mode::kList || wishes_.mode == Mode::kListMetaContexts)) {
    return fail_with(ENOTSUP, "the server does not know options: it cannot list");
  }
  put((fixed_ ? kClientFixedNewstyle : 0u) | (no_zeroes_ ? kClientNoZeroes : 0u));
  if (!fixed_) return send_export_name();
  if (wishes_.tls != Tls::kOff) {
    put_option(Option::kStartTls, 0);
  } else {
    send_next(Option::kStartTls);
  }
}

void ClientNegotiation::on_reply_header() {
  const auto magic = load_be<std::uint64_t>(buffer_.data());
  const auto option = load_be<std::uint32_t>(buffer_.data() + 8);
  reply_type_ = load_be<std::uint32_t>(buffer_.data() + 12);
  const auto length = load_be<std::uint32_t>(buffer_.data() + 16);
  if (magic != kOptionReplyMagic) {
    return lie(fmt::format("sent the wrong magic {:#018x} before its reply to {}", magic,
                           option_words(option_)));
  }
  if (option != std::to_underlying(option_)) {
    return lie(fmt::format("replied to option {} when asked for {}", option_words(Option{option}),
                           option_words(option_)));
  }
  if (++replies_seen_ > kMaxReplies) {
    return lie(fmt::format("sent more than {} replies to {}", kMaxReplies, option_words(option_)));
  }

  const bool listing = option_ == Option::kList;
  const bool informing = option_ == Option::kInfo || option_ == Option::kGo;
  const bool naming = option_ == Option::kListMetaContext || option_ == Option::kSetMetaContext;
  std::size_t least = 0;
  std::size_t most = kMaxString;
  if (!(reply_type_ & kErrorReplyBit)) {
    const ReplyType type{reply_type_};
    if (type == ReplyType::kAck) {
      most = 0;
    } else if (type == ReplyType::kServer && listing) {
      least = 4;
      most = 4 + 2 * kMaxString;
    } else if (type == ReplyType::kInfo && informing) {
      least = 2;
      most = kMaxReplyData;  // the known ones look closer
    } else if (type == ReplyType::kMetaContext && naming) {
      least = 4;
      most = 4 + kMaxString;
    } else {
      return lie(
          fmt::format("answered {} with {}", option_words(option_), reply_type_words(reply_type_)));
    }
  }
  if (length < least || length > most) {
    return lie(fmt::format("sent {} bytes with {} in its reply to {}, where {} to {} are right",
                           length, reply_type_words(reply_type_), option_words(option_), least,
                           most));
  }
  expect(Step::kReplyData, length);
  if (length == 0) on_reply();
}

void ClientNegotiation::on_reply() {
  if (reply_type_ & kErrorReplyBit) return on_error_reply();
  switch (ReplyType{reply_type_}) {
    case ReplyType::kAck:
      return on_ack();
    case ReplyType::kServer:
      on_server_reply();
      break;
    case ReplyType::kInfo:
      on_info_reply();
      break;
    default:
      on_context_reply();
      break;
  }
  if (state_ == State::kNegotiating) expect(Step::kReplyHeader, kOptionReplyHeaderSize);
}

void ClientNegotiation::on_error_reply() {
  const ReplyType type{reply_type_};
  const bool serves_export = option_ == Option::kInfo || option_ == Option::kGo;
  if (type != ReplyType::kErrShutdown && type != ReplyType::kErrTlsReqd) {
    switch (option_) {
      case Option::kStartTls:
        if (wishes_.tls != Tls::kAllowed) break;
        tls_refused_ = true;
        return send_next(option_);
      case Option::kExtendedHeaders:
      case Option::kStructuredReply:
        return send_next(option_);
      case Option::kSetMetaContext:
        outcome_.contexts.clear();
        return send_next(option_);
      case Option::kInfo:
      case Option::kGo:
        if (type == ReplyType::kErrUnsup && outcome_.headers != ReplyStyle::kExtended) {
          return send_export_name();
        }
        break;
      case Option::kListMetaContext:
        // It listed what there is; some of that needs more than was negotiated.
        if (type == ReplyType::kErrExtHeaderReqd) return finish();
        break;
      default:
        break;
    }
  }
  std::string reason = fmt::format("the server answered {}", option_words(option_));
  if (serves_export) reason += fmt::format(" for export {}", printable(wishes_.export_name));
  reason += fmt::format(" with {}", reply_type_words(reply_type_));
  if (!buffer_.empty()) reason += fmt::format(": {}", printable(text_of(buffer_)));
  if (type == ReplyType::kErrTlsReqd && wishes_.tls == Tls::kOff) {
    reason += " (TLS is switched off here)";
  } else if (type == ReplyType::kErrTlsReqd && tls_refused_) {
    reason += " (and refused STARTTLS)";
  }
  put_option(Option::kAbort, 0);
  fail_with(errno_for(type), std::move(reason));
}

void ClientNegotiation::on_ack() {
  switch (option_) {
    case Option::kStartTls:
      if (input_left_) {
        // Somebody between here and the server may have put it there, to be taken for the server's
        // words once TLS vouches for them.
        return lie("sent bytes without TLS behind its ACK of STARTTLS");
      }
      state_ = State::kStartTls;
      return;
    case Option::kExtendedHeaders:
      outcome_.headers = ReplyStyle::kExtended;
      return send_next(option_);
    case Option::kStructuredReply:
      outcome_.headers = ReplyStyle::kStructured;
      return send_next(option_);
    case Option::kSetMetaContext:
      return send_next(option_);
    case Option::kInfo:
    case Option::kGo:
      if (!export_seen_) {
        return lie(fmt::format("acknowledged {} without telling the export's size",
                               option_words(option_)));
      }
      if (outcome_.block_sizes_known &&
          (!std::has_single_bit(outcome_.min_block) || outcome_.min_block > 65536 ||
           !std::has_single_bit(outcome_.preferred_block) || outcome_.preferred_block < 512 ||
           outcome_.preferred_block < outcome_.min_block ||
           outcome_.max_payload < outcome_.preferred_block)) {
        return lie(fmt::format("told the block sizes {}, {} and {}, which make no sense",
                               outcome_.min_block, outcome_.preferred_block, outcome_.max_payload));
      }
      if (!(outcome_.transmission_flags & kTransmissionHasFlags)) {
        return lie(fmt::format("told the transmission flags {:#06x}, without HAS_FLAGS",
                               outcome_.transmission_flags));
      }
      settle_flags();
      if (option_ == Option::kInfo) return finish();
      state_ = State::kTransmission;
      return;
    default:
      return finish();
  }
}

void ClientNegotiation::on_server_reply() {
  const std::span<const std::byte> data(buffer_);
  const auto name_size = load_be<std::uint32_t>(data.data());
  if (name_size > data.size() - 4) {
    return lie(fmt::format("listed a name of {} bytes in {}", name_size, data.size() - 4));
  }
  const std::string_view name = text_of(data.subspan(4, name_size));
  const std::string_view description = text_of(data.subspan(4 + name_size));
  if (name.size() > kMaxString || description.size() > kMaxString) {
    return lie("listed a name or description of more than 4096 bytes");
  }
  if (name.contains('\0')) return lie("listed a name with a NUL in it");
  list_bytes_ += sizeof(ListEntry) + data.size();
  if (outcome_.entries.size() == kMaxListEntries || list_bytes_ > kMaxListBytes) {
    return fail_with(EMSGSIZE, fmt::format("the server lists too many exports (over {})",
                                           outcome_.entries.size()));
  }
  outcome_.entries.push_back({std::string(name), std::string(description)});
}

void ClientNegotiation::on_info_reply() {
  const std::span<const std::byte> data(buffer_);
  const InfoType type{load_be<std::uint16_t>(data.data())};
  const std::span<const std::byte> rest = data.subspan(2);
  const auto sized = [&](std::string_view what, std::size_t size, bool& seen) {
    if (seen) {
      lie(fmt::format("told the export's {} twice", what));
    } else if (rest.size() != size) {
      lie(fmt::format("told the export's {} in {} bytes, not {}", what, rest.size(), size));
    }
    seen = true;
    return state_ == State::kNegotiating;
  };
  const auto told = [&](std::string_view what, std::string& to, bool& seen) {
    if (!sized(what, rest.size(), seen)) return;
    if (rest.size() > kMaxString) {
      return lie(fmt::format("told a {} of {} bytes", what, rest.size()));
    }
    to = text_of(rest);
  };
  switch (type) {
    case InfoType::kExport:
      if (!sized("size", 10, export_seen_)) return;
      outcome_.size = load_be<std::uint64_t>(rest.data());
      outcome_.transmission_flags = load_be<std::uint16_t>(rest.data() + 8);
      return;
    case InfoType::kName:
      return told("name", outcome_.canonical_name, name_seen_);
    case InfoType::kDescription:
      return told("description", outcome_.description, description_seen_);
    case InfoType::kBlockSize:
      if (!sized("block sizes", 12, outcome_.block_sizes_known)) return;
      outcome_.min_block = load_be<std::uint32_t>(rest.data());
      outcome_.preferred_block = load_be<std::uint32_t>(rest.data() + 4);
      outcome_.max_payload = load_be<std::uint32_t>(rest.data() + 8);
      return;
  }
  // Any other may be sent, and is to be ignored.
}

void ClientNegotiation::on_context_reply() {
  const std::span<const std::byte> data(buffer_);
  const bool set = option_ == Option::kSetMetaContext;
  MetaContext context{.id = set ? load_be<std::uint32_t>(data.data()) : 0,
                      .name = std::string(text_of(data.subspan(4)))};
  if (context.name.contains('\0') || !context.name.contains(':')) {
    return lie(fmt::format("sent the metadata context {}, which is not of the form namespace:leaf",
                           printable(context.name)));
  }
  if (outcome_.contexts.size() == kMaxContexts) {
    return lie(fmt::format("sent more than {} metadata contexts", kMaxContexts));
  }
  if (set) {
    for (const MetaContext& other : outcome_.contexts) {
      if (other.id == context.id || other.name == context.name) {
        return lie(fmt::format("sent the metadata contexts {} {} and {} {}, which is one too many",
                               other.id, printable(other.name), context.id,
                               printable(context.name)));
      }
    }
  }
  outcome_.contexts.push_back(std::move(context));
}

void ClientNegotiation::on_export_info() {
  start_transmission(load_be<std::uint64_t>(buffer_.data()),
                     load_be<std::uint16_t>(buffer_.data() + 8));
}

// ---- output ----

void ClientNegotiation::send_next(Option done) {
  const bool has_replies = outcome_.headers != ReplyStyle::kSimple;
  switch (done) {
    case Option::kStartTls:
      if (wishes_.mode == Mode::kList) return put_option(Option::kList, 0);
      if (wishes_.extended_headers) return put_option(Option::kExtendedHeaders, 0);
      [[fallthrough]];
    case Option::kExtendedHeaders:
      if (!has_replies && wishes_.structured_replies) {
        return put_option(Option::kStructuredReply, 0);
      }
      [[fallthrough]];
    case Option::kStructuredReply:
      if (wishes_.mode == Mode::kListMetaContexts) {
        return put_contexts_option(Option::kListMetaContext);
      }
      // Without structured replies there could be no answer to BLOCK_STATUS.
      if (outcome_.headers != ReplyStyle::kSimple && !wishes_.meta_contexts.empty()) {
        return put_contexts_option(Option::kSetMetaContext);
      }
      [[fallthrough]];
    default:
      return send_last();
  }
}

void ClientNegotiation::send_last() {
  const Option option = wishes_.mode == Mode::kInfo ? Option::kInfo : Option::kGo;
  put_option(option, 4 + wishes_.export_name.size() + 2 + 3 * 2);
  put(static_cast<std::uint32_t>(wishes_.export_name.size()));
  put(wishes_.export_name);
  put(std::uint16_t{3});
  put(std::to_underlying(InfoType::kName));
  put(std::to_underlying(InfoType::kDescription));
  put(std::to_underlying(InfoType::kBlockSize));
}

void ClientNegotiation::send_export_name() {
  // What was told with an error does not count.
  outcome_ = {.canonical_name = wishes_.export_name,
              .headers = outcome_.headers,
              .tls = outcome_.tls,
              .contexts = std::move(outcome_.contexts)};
  put_option(Option::kExportName, wishes_.export_name.size());
  put(wishes_.export_name);
  expect(Step::kExportInfo, 10 + (no_zeroes_ ? 0 : kExportNameZeroes));
}

void ClientNegotiation::start_transmission(std::uint64_t size, std::uint16_t flags) {
  outcome_.size = size;
  outcome_.transmission_flags = flags & kTransmissionHasFlags ? flags : kTransmissionHasFlags;
  settle_flags();
  state_ = State::kTransmission;
}

void ClientNegotiation::settle_flags() {
  std::uint16_t& flags = outcome_.transmission_flags;
  const auto drop = [&](std::uint16_t flag) { flags &= static_cast<std::uint16_t>(~flag); };
  if (outcome_.headers == ReplyStyle::kSimple) drop(kTransmissionSendDf);
  if (outcome_.headers != ReplyStyle::kExtended) drop(kTransmissionBlockStatusPayload);
  if (!(flags & kTransmissionSendWriteZeroes)) drop(kTransmissionSendFastZero);
}

void ClientNegotiation::finish() {
  put_option(Option::kAbort, 0);
  state_ = State::kFinished;
}

void ClientNegotiation::fail_with(int code, std::string reason) {
  failure_ = Error(code, std::move(reason));
  state_ = State::kFailed;
}

void ClientNegotiation::lie(std::string_view what) {
  fail_with(EPROTO, fmt::format("the server {}", what));
}

template <std::unsigned_integral T>
void ClientNegotiation::put(T value) {
  const std::size_t at = output_.size();
  output_.resize(at + sizeof value);
  store_be(output_.data() + at, value);
}

void ClientNegotiation::put(std::string_view text) {
  const auto bytes = std::as_bytes(std::span(text));
  output_.insert(output_.end(), bytes.begin(), bytes.end());
}

void ClientNegotiation::put_option(Option option, std::size_t length) {
  put(kOptionMagic);
  put(std::to_underlying(option));
  put(static_cast<std::uint32_t>(length));
  option_ = option;
  replies_seen_ = 0;
  expect(Step::kReplyHeader, kOptionReplyHeaderSize);
}

void ClientNegotiation::put_contexts_option(Option option) {
  std::size_t length = 4 + wishes_.export_name.size() + 4;
  for (const std::string& query : wishes_.meta_contexts) length += 4 + query.size();
  put_option(option, length);
  put(static_cast<std::uint32_t>(wishes_.export_name.size()));
  put(wishes_.export_name);
  put(static_cast<std::uint32_t>(wishes_.meta_contexts.size()));
  for (const std::string& query : wishes_.meta_contexts) {
    put(static_cast<std::uint32_t>(query.size()));
    put(query);
  }
}

}  // namespace roost::nbd
