// SPDX-License-Identifier: MIT
#include "roost/nbd/negotiation.h"

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

constexpr std::size_t kGoFixedSize = 6;  // length of the name, number of information requests
constexpr std::string_view kBaseNamespace = "base:";

bool has_default_block_sizes(const ExportInfo& info) {
  return info.min_block == kDefaultMinBlock && info.preferred_block == kDefaultPreferredBlock &&
         info.max_payload == kMaxPayload;
}

}  // namespace

Result<void> check_export(const ExportInfo& info) {
  const auto refuse = [&](std::string_view why) {
    return fail(EINVAL, fmt::format("export {}: {}", printable(info.name), why));
  };
  if (info.name.size() > kMaxString) return refuse("the name is longer than 4096 bytes");
  if (info.description.size() > kMaxString) {
    return refuse("the description is longer than 4096 bytes");
  }
  if (info.name.contains('\0') || info.description.contains('\0')) {
    return refuse("the name or description has a NUL in it");
  }
  if (!std::has_single_bit(info.min_block) || info.min_block > 65536) {
    return refuse("the minimum block size is not a power of two up to 65536");
  }
  if (!std::has_single_bit(info.preferred_block) || info.preferred_block < 512 ||
      info.preferred_block < info.min_block) {
    return refuse("the preferred block size is not a power of two from 512 and the minimum up");
  }
  if (info.max_payload < info.preferred_block || info.max_payload > kMaxPayload) {
    return refuse("the maximum payload is not between the preferred block size and 32 MiB");
  }
  if (!(info.transmission_flags & kTransmissionHasFlags)) {
    return refuse("the transmission flags lack HAS_FLAGS");
  }
  if ((info.transmission_flags & kTransmissionSendResize) &&
      (info.transmission_flags & kTransmissionReadOnly)) {
    return refuse("SEND_RESIZE contradicts READ_ONLY");
  }
  if ((info.transmission_flags & kTransmissionSendFastZero) &&
      !(info.transmission_flags & kTransmissionSendWriteZeroes)) {
    return refuse("SEND_FAST_ZERO needs SEND_WRITE_ZEROES");
  }
  return {};
}

ExportSet::ExportSet(std::vector<ExportInfo> exports) : exports_(std::move(exports)) {
  for (const ExportInfo& info : exports_) {
    const Result<void> checked = check_export(info);
    ROOST_CHECK(checked, "{}", checked.error().doing());
  }
}

const ExportInfo* ExportSet::find(std::string_view name) const noexcept {
  const auto found = std::ranges::find(exports_, name, &ExportInfo::name);
  return found == exports_.end() ? nullptr : &*found;
}

ServerNegotiation::ServerNegotiation(Exports exports, TlsPolicy tls)
    : current_exports_(std::move(exports)), tls_(tls) {
  put(kInitMagic);
  put(kOptionMagic);
  put<std::uint16_t>(kHandshakeFixedNewstyle | kHandshakeNoZeroes);
  expect(Step::kClientFlags, kClientFlagsSize);
}

std::size_t ServerNegotiation::feed(std::span<const std::byte> input) {
  std::size_t taken = 0;
  while (state_ == State::kNegotiating && output().size() < kOutputLimit) {
    if (listing_) {
      list_one_more();
      continue;
    }
    if (taken == input.size()) break;
    const std::span<const std::byte> rest = input.subspan(taken);
    if (skip_left_ > 0) {
      const std::size_t count = std::min<std::size_t>(skip_left_, rest.size());
      skip_left_ -= static_cast<std::uint32_t>(count);
      taken += count;
      if (skip_left_ == 0) on_option_complete();
      continue;
    }
    const std::size_t count = std::min(wanted_ - buffer_.size(), rest.size());
    buffer_.insert(buffer_.end(), rest.begin(), rest.begin() + static_cast<std::ptrdiff_t>(count));
    taken += count;
    if (buffer_.size() == wanted_) on_input_complete();
  }
  if (state_ == State::kStartTls && taken < input.size()) {
    fail_with("plain text behind STARTTLS");
  }
  return taken;
}

void ServerNegotiation::tls_started() {
  ROOST_CHECK(state_ == State::kStartTls, "TLS was not asked for");
  ROOST_CHECK(output().empty(), "{} bytes were to be sent before TLS", output().size());
  encrypted_ = true;
  reply_style_ = ReplyStyle::kSimple;
  context_set_ = false;
  state_ = State::kNegotiating;
}

void ServerNegotiation::drain_output(std::size_t count) {
  ROOST_CHECK(count <= output().size(), "drained {} bytes of {}", count, output().size());
  output_sent_ += count;
  if (output_sent_ == output_.size()) {
    output_.clear();
    output_sent_ = 0;
  } else if (output_sent_ >= kOutputLimit) {
    // Against a client that never lets the output become empty.
    output_.erase(output_.begin(), output_.begin() + static_cast<std::ptrdiff_t>(output_sent_));
    output_sent_ = 0;
  }
}

const ServerNegotiation::Selection& ServerNegotiation::selection() const {
  ROOST_CHECK(state_ == State::kTransmission, "no export has been selected");
  return selection_;
}

const std::string& ServerNegotiation::failure() const {
  ROOST_CHECK(state_ == State::kFailed, "the negotiation has not failed");
  return failure_;
}

void ServerNegotiation::expect(Step step, std::size_t size) {
  step_ = step;
  wanted_ = size;
  buffer_.clear();
}

void ServerNegotiation::fail_with(std::string reason) {
  failure_ = std::move(reason);
  state_ = State::kFailed;
}

void ServerNegotiation::on_input_complete() {
  switch (step_) {
    case Step::kClientFlags:
      return on_client_flags();
    case Step::kOptionHeader:
      return on_option_header();
    case Step::kOptionData:
      return on_option_complete();
  }
}

void ServerNegotiation::on_client_flags() {
  client_flags_ = load_be<std::uint32_t>(buffer_.data());
  if (client_flags_ & ~(kClientFixedNewstyle | kClientNoZeroes)) {
    return fail_with(fmt::format("unknown client flags {:#x}", client_flags_));
  }
  expect(Step::kOptionHeader, kOptionHeaderSize);
}

void ServerNegotiation::on_option_header() {
  const auto magic = load_be<std::uint64_t>(buffer_.data());
  option_ = Option{load_be<std::uint32_t>(buffer_.data() + 8)};
  option_length_ = load_be<std::uint32_t>(buffer_.data() + 12);
  option_skipped_ = false;
  if (magic != kOptionMagic) {
    return fail_with(fmt::format("wrong magic {:#018x} before an option", magic));
  }
  if (++options_seen_ > kMaxOptions) {
    return fail_with(fmt::format("more than {} options", kMaxOptions));
  }
  if (!(client_flags_ & kClientFixedNewstyle) && option_ != Option::kExportName) {
    return fail_with(
        fmt::format("option {} without the fixed newstyle client flag", option_words(option_)));
  }

  bool collect = false;
  switch (option_) {
    case Option::kExportName:
      // There is no reply that could refuse it, so that it need not be received to its end.
      if (option_length_ > kMaxString) {
        return fail_with(fmt::format("an export name of {} bytes", option_length_));
      }
      collect = true;
      break;
    case Option::kInfo:
    case Option::kGo:
    case Option::kListMetaContext:
    case Option::kSetMetaContext:
      collect = option_length_ <= kMaxOptionData;
      break;
    default:
      break;
  }
  if (!collect) return skip(option_length_);
  expect(Step::kOptionData, option_length_);
  if (option_length_ == 0) on_option_complete();
}

void ServerNegotiation::skip(std::uint32_t size) {
  if (size > skip_budget_) {
    return fail_with(
        fmt::format("option {} with {} bytes of unwanted data", option_words(option_), size));
  }
  skip_budget_ -= size;
  skip_left_ = size;
  option_skipped_ = true;
  if (size == 0) on_option_complete();
}

void ServerNegotiation::on_option_complete() {
  const bool tls_lacks = tls_ == TlsPolicy::kRequired && !encrypted_;
  if (tls_lacks && option_ == Option::kExportName) {
    return fail_with("EXPORT_NAME without TLS");  // there is no reply that could say so
  }
  exports_ = current_exports_();
  if (tls_lacks && option_ != Option::kStartTls && option_ != Option::kAbort) {
    put_error(ReplyType::kErrTlsReqd, "TLS is required");
    expect(Step::kOptionHeader, kOptionHeaderSize);
    return;
  }
  switch (option_) {
    case Option::kExportName:
      on_export_name();
      break;
    case Option::kAbort:
      put_reply_header(ReplyType::kAck, 0);
      state_ = State::kFinished;
      break;
    case Option::kList:
      if (option_length_ > 0) {
        put_error(ReplyType::kErrInvalid, "LIST takes no data");
      } else {
        listing_ = true;
        list_next_ = 0;
      }
      break;
    case Option::kStartTls:
      on_start_tls();
      break;
    case Option::kInfo:
    case Option::kGo:
      if (option_skipped_) {
        put_error(ReplyType::kErrTooBig, "the option's data is too long");
      } else {
        on_info_or_go();
      }
      break;
    case Option::kStructuredReply:
      on_reply_style(ReplyStyle::kStructured);
      break;
    case Option::kExtendedHeaders:
      on_reply_style(ReplyStyle::kExtended);
      break;
    case Option::kListMetaContext:
    case Option::kSetMetaContext:
      if (option_ == Option::kSetMetaContext) context_set_ = false;  // even where it fails
      if (reply_style_ == ReplyStyle::kSimple) {
        put_error(ReplyType::kErrInvalid,
                  "metadata needs structured replies or extended headers first");
      } else if (option_skipped_) {
        put_error(ReplyType::kErrTooBig, "the option's data is too long");
      } else {
        on_meta_context();
      }
      break;
    default:
      put_error(ReplyType::kErrUnsup,
                fmt::format("option {} is not supported", option_words(option_)));
      break;
  }
  expect(Step::kOptionHeader, kOptionHeaderSize);
}

void ServerNegotiation::on_start_tls() {
  if (tls_ == TlsPolicy::kUnsupported) {
    return put_error(ReplyType::kErrUnsup, "option STARTTLS is not supported");
  }
  if (tls_ == TlsPolicy::kForbidden) {
    return put_error(ReplyType::kErrPolicy, "this server does not do TLS");
  }
  if (encrypted_) return put_error(ReplyType::kErrInvalid, "TLS has been started already");
  if (option_length_ > 0) return put_error(ReplyType::kErrInvalid, "STARTTLS takes no data");
  put_reply_header(ReplyType::kAck, 0);
  state_ = State::kStartTls;
}

void ServerNegotiation::on_reply_style(ReplyStyle style) {
  if (option_length_ > 0) {
    return put_error(ReplyType::kErrInvalid,
                     fmt::format("{} takes no data", option_words(option_)));
  }
  if (style == ReplyStyle::kStructured && reply_style_ == ReplyStyle::kExtended) {
    return put_error(ReplyType::kErrExtHeaderReqd, "extended headers have been agreed on already");
  }
  reply_style_ = style;
  put_reply_header(ReplyType::kAck, 0);
}

void ServerNegotiation::on_export_name() {
  if (reply_style_ == ReplyStyle::kExtended) {
    return fail_with("EXPORT_NAME after EXTENDED_HEADERS");
  }
  const std::string_view name = text_of(buffer_);
  const ExportInfo* const info = exports_->find(name);
  if (!info) return fail_with(fmt::format("unknown export {}", printable(name)));
  put(info->size);
  put(shown_flags(*info));
  if (!(client_flags_ & kClientNoZeroes)) {
    output_.resize(output_.size() + kExportNameZeroes);
  }
  start_transmission(*info, false);
}

void ServerNegotiation::on_info_or_go() {
  const std::span<const std::byte> data(buffer_);
  if (data.size() < kGoFixedSize) {
    return put_error(ReplyType::kErrInvalid, "the option's data is too short");
  }
  const auto name_length = load_be<std::uint32_t>(data.data());
  if (name_length > data.size() - kGoFixedSize) {
    return put_error(ReplyType::kErrInvalid, "the name is longer than the option's data");
  }
  const std::span<const std::byte> behind_name = data.subspan(4 + name_length);
  const auto request_count = load_be<std::uint16_t>(behind_name.data());
  const std::span<const std::byte> requests = behind_name.subspan(2);
  if (requests.size() != std::size_t{request_count} * 2) {
    return put_error(ReplyType::kErrInvalid,
                     "the number of information requests does not fit the option's data");
  }
  if (name_length > kMaxString) {
    return put_error(ReplyType::kErrTooBig, "the name is longer than 4096 bytes");
  }
  const std::string_view name = text_of(data.subspan(4, name_length));
  const ExportInfo* const info = exports_->find(name);
  if (!info) {
    return put_error(ReplyType::kErrUnknown, fmt::format("there is no export {}", printable(name)));
  }

  bool wants_name = false;
  bool wants_description = false;
  bool wants_block_size = false;
  for (std::size_t at = 0; at < requests.size(); at += 2) {
    switch (InfoType{load_be<std::uint16_t>(requests.data() + at)}) {
      case InfoType::kExport:
        break;  // sent in any case
      case InfoType::kName:
        wants_name = true;
        break;
      case InfoType::kDescription:
        wants_description = true;
        break;
      case InfoType::kBlockSize:
        wants_block_size = true;
        break;
      default:
        break;  // the protocol wants unknown requests ignored
    }
  }

  put_reply_header(ReplyType::kInfo, 12);
  put(std::to_underlying(InfoType::kExport));
  put(info->size);
  put(shown_flags(*info));
  if (wants_name) {
    put_reply_header(ReplyType::kInfo, 2 + info->name.size());
    put(std::to_underlying(InfoType::kName));
    put(info->name);
  }
  if (wants_description && !info->description.empty()) {
    put_reply_header(ReplyType::kInfo, 2 + info->description.size());
    put(std::to_underlying(InfoType::kDescription));
    put(info->description);
  }
  if (wants_block_size || !has_default_block_sizes(*info)) {
    put_reply_header(ReplyType::kInfo, 14);
    put(std::to_underlying(InfoType::kBlockSize));
    put(info->min_block);
    put(info->preferred_block);
    put(info->max_payload);
  }
  put_reply_header(ReplyType::kAck, 0);
  if (option_ == Option::kGo) start_transmission(*info, wants_block_size);
}

// Both options have the same data: the name of an export, and queries for contexts.
void ServerNegotiation::on_meta_context() {
  std::span<const std::byte> rest(buffer_);
  bool malformed = false;
  const auto take_number = [&]() -> std::uint32_t {
    if (rest.size() < 4) {
      malformed = true;
      return 0;
    }
    const auto value = load_be<std::uint32_t>(rest.data());
    rest = rest.subspan(4);
    return value;
  };
  bool too_long = false;
  const auto take_text = [&]() -> std::string_view {
    const std::uint32_t length = take_number();
    if (malformed || length > rest.size()) {
      malformed = true;
      return {};
    }
    too_long = too_long || length > kMaxString;
    const std::string_view text = text_of(rest.first(length));
    rest = rest.subspan(length);
    return text;
  };

  const bool set = option_ == Option::kSetMetaContext;
  const std::string_view name = take_text();
  const std::uint32_t queries = take_number();
  bool wanted = !set && queries == 0;  // a listing without a query asks for all
  bool no_colon = false;
  // Each query takes four bytes of the data at least, whatever the client says their number is.
  for (std::uint32_t i = 0; i < queries && !malformed; ++i) {
    const std::string_view query = take_text();
    no_colon = no_colon || !query.contains(':');
    // The wildcard is for listings alone. Other leaves and namespaces are ignored.
    if (query == kBaseAllocation || (!set && query == kBaseNamespace)) wanted = true;
  }
  if (malformed || !rest.empty()) {
    return put_error(ReplyType::kErrInvalid, "the names do not fit the option's data");
  }
  if (too_long) {
    return put_error(ReplyType::kErrTooBig, "a name or query is longer than 4096 bytes");
  }
  if (no_colon) return put_error(ReplyType::kErrInvalid, "a query lacks its colon");
  const ExportInfo* const info = exports_->find(name);
  if (!info) {
    return put_error(ReplyType::kErrUnknown, fmt::format("there is no export {}", printable(name)));
  }
  if (wanted) {
    put_reply_header(ReplyType::kMetaContext, 4 + kBaseAllocation.size());
    put(set ? kBaseAllocationId : std::uint32_t{0});
    put(kBaseAllocation);
  }
  put_reply_header(ReplyType::kAck, 0);
  if (set) {
    context_set_ = wanted;
    context_export_ = info->id;
  }
}

void ServerNegotiation::list_one_more() {
  if (list_next_ == exports_->all().size()) {
    put_reply_header(ReplyType::kAck, 0);
    listing_ = false;
    return;
  }
  const ExportInfo& info = exports_->all()[list_next_++];
  put_reply_header(ReplyType::kServer, 4 + info.name.size() + info.description.size());
  put(static_cast<std::uint32_t>(info.name.size()));
  put(info.name);
  put(info.description);
}

bool ServerNegotiation::has_context(const ExportInfo& info) const {
  return context_set_ && context_export_ == info.id;
}

std::uint16_t ServerNegotiation::shown_flags(const ExportInfo& info) const {
  std::uint16_t hidden = 0;
  if (reply_style_ == ReplyStyle::kSimple) hidden |= kTransmissionSendDf;
  if (reply_style_ != ReplyStyle::kExtended || !has_context(info)) {
    hidden |= kTransmissionBlockStatusPayload;
  }
  return info.transmission_flags & static_cast<std::uint16_t>(~hidden);
}

void ServerNegotiation::start_transmission(const ExportInfo& info, bool block_size_requested) {
  selection_ = {.export_id = info.id,
                .size = info.size,
                .transmission_flags = shown_flags(info),
                .min_block = info.min_block,
                .max_payload = info.max_payload,
                .reply_style = reply_style_,
                .base_allocation = has_context(info),
                .no_zeroes = (client_flags_ & kClientNoZeroes) != 0,
                .block_size_requested = block_size_requested};
  state_ = State::kTransmission;
}

template <std::unsigned_integral T>
void ServerNegotiation::put(T value) {
  const std::size_t at = output_.size();
  output_.resize(at + sizeof value);
  store_be(output_.data() + at, value);
}

void ServerNegotiation::put(std::string_view text) {
  const auto bytes = std::as_bytes(std::span(text));
  output_.insert(output_.end(), bytes.begin(), bytes.end());
}

void ServerNegotiation::put_reply_header(ReplyType type, std::size_t length) {
  put(kOptionReplyMagic);
  put(std::to_underlying(option_));
  put(std::to_underlying(type));
  put(static_cast<std::uint32_t>(length));
}

void ServerNegotiation::put_error(ReplyType type, std::string_view message) {
  put_reply_header(type, message.size());
  put(message);
}

}  // namespace roost::nbd
