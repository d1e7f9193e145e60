// SPDX-License-Identifier: MIT
#include "nbd/fuzz_checks.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "roost/base/bytes.h"
#include "roost/base/check.h"
#include "roost/nbd/negotiation.h"
#include "roost/nbd/transmission.h"

namespace roost::nbd {
namespace {

using Bytes = std::span<const std::byte>;

constexpr std::size_t kSetupSize = 5;

/// How one run cuts the stream and drains the output: not at all, or as a seed has it.
class Cuts {
 public:
  Cuts() = default;
  explicit Cuts(std::uint32_t seed)
      : random_(seed % 0x7ffffffe + 1), longest_(std::array{1, 7, 64, 4096}[seed % 4]) {}

  /// A part of `size`, at least 1 unless that is 0.
  std::size_t part_of(std::size_t size) {
    return longest_ == 0 ? size : std::min(size, 1 + random_() % longest_);
  }

  std::uint32_t choose(std::uint32_t count) {
    return longest_ == 0 ? 0 : static_cast<std::uint32_t>(random_() >> 8) % count;
  }

 private:
  std::minstd_rand random_;
  std::size_t longest_ = 0;
};

// ---- negotiation ----

std::vector<ExportInfo> make_exports(unsigned which) {
  constexpr std::uint16_t kFlags = kTransmissionHasFlags | kTransmissionSendFlush;
  switch (which) {
    case 0:
      return {};
    case 1:
      return {{.size = 1 << 30, .transmission_flags = kFlags}};
    case 2:
      return {
          {.id = 5,
           .name = "a",
           .size = 4096,
           .transmission_flags = kFlags | kTransmissionSendDf | kTransmissionBlockStatusPayload,
           .description = "first"},
          {.id = 6,
           .name = "",
           .size = ~std::uint64_t{0},
           .transmission_flags = kFlags | kTransmissionReadOnly,
           .min_block = 512,
           .preferred_block = 65536,
           .max_payload = 1 << 20},
          {.id = 7, .name = "disk", .size = 0, .transmission_flags = kFlags, .min_block = 4096}};
    default: {
      // One listing of these is longer than the limit of the output.
      std::vector<ExportInfo> exports;
      for (char c = 'a'; c < 'a' + 10; ++c) {
        exports.push_back({.name = std::string(kMaxString, c),
                           .size = 1,
                           .transmission_flags = kFlags,
                           .description = std::string(kMaxString, c)});
      }
      return exports;
    }
  }
}

using SharedSet = std::shared_ptr<const ExportSet>;

const SharedSet& exports_for(unsigned which) {
  const auto make = [](unsigned i) { return std::make_shared<const ExportSet>(make_exports(i)); };
  static const std::array<SharedSet, 4> kSets{make(0), make(1), make(2), make(3)};
  return kSets[which % kSets.size()];
}

struct NegotiationRun {
  std::vector<std::byte> output;
  std::size_t consumed = 0;
  ServerNegotiation::State state{};
  ServerNegotiation::Selection selection;
  std::string failure;
};

constexpr const char* kBehindTls = "plain text behind STARTTLS";

NegotiationRun negotiate(const SharedSet& exports, TlsPolicy tls, Bytes stream, Cuts cuts) {
  using State = ServerNegotiation::State;
  ServerNegotiation negotiation([&] { return exports; }, tls);
  NegotiationRun run;
  const auto drain = [&](std::size_t count) {
    const Bytes part = negotiation.output().first(count);
    run.output.insert(run.output.end(), part.begin(), part.end());
    negotiation.drain_output(count);
  };
  for (;;) {
    const Bytes offered = stream.subspan(run.consumed, cuts.part_of(stream.size() - run.consumed));
    const std::size_t taken = negotiation.feed(offered);
    ROOST_CHECK(taken <= offered.size(), "took {} bytes of {}", taken, offered.size());
    run.consumed += taken;
    const std::size_t waiting = negotiation.output().size();
    ROOST_CHECK(waiting <= ServerNegotiation::kMaxOutput, "{} bytes of output", waiting);
    if (negotiation.state() != State::kNegotiating) break;
    if (taken < offered.size()) {
      ROOST_CHECK(waiting > 0, "input was refused and there is nothing to drain");
      drain(cuts.part_of(waiting));
    } else if (waiting > 0 && (run.consumed == stream.size() || cuts.choose(3) == 0)) {
      drain(cuts.part_of(waiting));
    } else if (run.consumed == stream.size()) {
      break;
    }
  }
  drain(negotiation.output().size());
  run.state = negotiation.state();
  // Whether there was plain text behind STARTTLS in one piece with it is up to the cuts.
  if (run.state == State::kFailed && negotiation.failure() == kBehindTls) {
    run.state = State::kStartTls;
    return run;
  }
  if (run.state == State::kStartTls) {
    negotiation.tls_started();
    ROOST_CHECK(negotiation.state() == State::kNegotiating, "TLS did not start");
    return run;
  }
  ROOST_CHECK(run.state == State::kNegotiating || negotiation.feed(stream) == 0,
              "input was taken after the end");
  if (run.state == State::kTransmission) run.selection = negotiation.selection();
  if (run.state == State::kFailed) {
    run.failure = negotiation.failure();
    ROOST_CHECK(!run.failure.empty() && run.failure.size() < 512 &&
                    std::ranges::all_of(run.failure, [](char c) { return c >= 0x20 && c < 0x7f; }),
                "not fit for a log line: '{}'", run.failure);
  }
  return run;
}

/// Reads the client's stream and the server's output side by side, the slow and plain way.
class NegotiationReader {
 public:
  NegotiationReader(const ExportSet& exports, TlsPolicy tls, Bytes stream,
                    const NegotiationRun& run)
      : exports_(exports.all()), tls_(tls), stream_(stream), output_(run.output), run_(run) {}

  void check() {
    expect(kInitMagic);
    expect(kOptionMagic);
    expect(std::uint16_t{3});
    const State end = read_client();
    ROOST_CHECK(end == run_.state, "ended in state {} instead of {}",
                std::to_underlying(run_.state), std::to_underlying(end));
    ROOST_CHECK(output_.empty(), "{} bytes of output too many", output_.size());
    if (end == State::kTransmission || end == State::kFinished || end == State::kStartTls) {
      ROOST_CHECK(at_ == run_.consumed, "consumed {} bytes instead of {}", run_.consumed, at_);
    }
  }

 private:
  using State = ServerNegotiation::State;

  State read_client() {
    if (left() < 4) return State::kNegotiating;
    const auto flags = take<std::uint32_t>();
    if (flags > 3) return State::kFailed;
    std::uint32_t may_skip = 32u << 20;
    for (std::uint32_t count = 1; left() >= 16; ++count) {
      const bool magic_is_right = take<std::uint64_t>() == kOptionMagic;
      option_ = take<std::uint32_t>();
      const auto length = take<std::uint32_t>();
      if (!magic_is_right || count > ServerNegotiation::kMaxOptions) return State::kFailed;
      if (option_ != 1 && (flags & 1) == 0) return State::kFailed;
      if (option_ == 1) {
        if (length > kMaxString) return State::kFailed;
      } else if ((option_ != 6 && option_ != 7 && option_ != 9 && option_ != 10) ||
                 length > ServerNegotiation::kMaxOptionData) {
        if (length > may_skip) return State::kFailed;
        may_skip -= length;
      }
      if (left() < length) return State::kNegotiating;
      const Bytes data = stream_.subspan(at_, length);
      at_ += length;
      if (tls_ == TlsPolicy::kRequired && option_ != 2 && option_ != 5) {
        if (option_ == 1) return State::kFailed;
        expect_error(ReplyType::kErrTlsReqd);
        continue;
      }
      switch (option_) {
        case 1: {
          const ExportInfo* const info = find(data);
          if (!info || style_ == ReplyStyle::kExtended) return State::kFailed;
          expect(info->size);
          expect(flags_for(*info));
          if ((flags & 2) == 0) {
            for (int i = 0; i < 124; ++i) expect(std::uint8_t{0});
          }
          check_selection(*info, flags, false);
          return State::kTransmission;
        }
        case 2:
          expect_reply(ReplyType::kAck, 0);
          return State::kFinished;
        case 3:
          if (length > 0) {
            expect_error(ReplyType::kErrInvalid);
            break;
          }
          for (const ExportInfo& info : exports_) {
            expect_reply(ReplyType::kServer, 4 + info.name.size() + info.description.size());
            expect(static_cast<std::uint32_t>(info.name.size()));
            expect(info.name);
            expect(info.description);
          }
          expect_reply(ReplyType::kAck, 0);
          break;
        case 5:
          if (tls_ == TlsPolicy::kUnsupported) {
            expect_error(ReplyType::kErrUnsup);
          } else if (tls_ == TlsPolicy::kForbidden) {
            expect_error(ReplyType::kErrPolicy);
          } else if (length > 0) {
            expect_error(ReplyType::kErrInvalid);
          } else {
            expect_reply(ReplyType::kAck, 0);
            return State::kStartTls;
          }
          break;
        case 6:
        case 7:
          if (read_info_or_go(data, flags)) return State::kTransmission;
          break;
        case 8:
        case 11:
          if (length > 0) {
            expect_error(ReplyType::kErrInvalid);
          } else if (option_ == 8 && style_ == ReplyStyle::kExtended) {
            expect_error(ReplyType::kErrExtHeaderReqd);
          } else {
            expect_reply(ReplyType::kAck, 0);
            style_ = option_ == 8 ? ReplyStyle::kStructured : ReplyStyle::kExtended;
          }
          break;
        case 9:
        case 10:
          read_meta_context(data);
          break;
        default:
          expect_error(ReplyType::kErrUnsup);
          break;
      }
    }
    return State::kNegotiating;
  }

  bool read_info_or_go(Bytes data, std::uint32_t flags) {
    if (data.size() > ServerNegotiation::kMaxOptionData) {
      expect_error(ReplyType::kErrTooBig);
      return false;
    }
    const std::uint64_t name_length = data.size() < 6 ? 0 : load_be<std::uint32_t>(data.data());
    if (data.size() < 6 || 6 + name_length > data.size() ||
        6 + name_length + 2 * load_be<std::uint16_t>(&data[4 + name_length]) != data.size()) {
      expect_error(ReplyType::kErrInvalid);
      return false;
    }
    if (name_length > kMaxString) {
      expect_error(ReplyType::kErrTooBig);
      return false;
    }
    const ExportInfo* const info = find(data.subspan(4, name_length));
    if (!info) {
      expect_error(ReplyType::kErrUnknown);
      return false;
    }
    const auto asked_for = [&](std::uint16_t type) {
      for (std::size_t at = 6 + name_length; at < data.size(); at += 2) {
        if (load_be<std::uint16_t>(&data[at]) == type) return true;
      }
      return false;
    };
    expect_reply(ReplyType::kInfo, 12);
    expect(std::uint16_t{0});
    expect(info->size);
    expect(flags_for(*info));
    if (asked_for(1)) {
      expect_reply(ReplyType::kInfo, 2 + info->name.size());
      expect(std::uint16_t{1});
      expect(info->name);
    }
    if (asked_for(2) && !info->description.empty()) {
      expect_reply(ReplyType::kInfo, 2 + info->description.size());
      expect(std::uint16_t{2});
      expect(info->description);
    }
    if (asked_for(3) || info->min_block != 1 || info->preferred_block != 4096 ||
        info->max_payload != 32u << 20) {
      expect_reply(ReplyType::kInfo, 14);
      expect(std::uint16_t{3});
      expect(info->min_block);
      expect(info->preferred_block);
      expect(info->max_payload);
    }
    expect_reply(ReplyType::kAck, 0);
    if (option_ == 6) return false;
    check_selection(*info, flags, asked_for(3));
    return true;
  }

  void read_meta_context(Bytes data) {
    if (option_ == 10) context_of_ = nullptr;
    if (style_ == ReplyStyle::kSimple) return expect_error(ReplyType::kErrInvalid);
    if (data.size() > ServerNegotiation::kMaxOptionData) {
      return expect_error(ReplyType::kErrTooBig);
    }
    // All strings first: the name, then the queries.
    std::vector<std::string> strings;
    std::size_t at = 0;
    std::uint64_t wanted = 1;
    bool too_big = false;
    while (strings.size() < wanted) {
      if (data.size() - at < 4) return expect_error(ReplyType::kErrInvalid);
      const std::size_t size = load_be<std::uint32_t>(&data[at]);
      at += 4;
      if (data.size() - at < size) return expect_error(ReplyType::kErrInvalid);
      strings.emplace_back(reinterpret_cast<const char*>(data.data() + at), size);
      at += size;
      too_big = too_big || size > kMaxString;
      if (strings.size() == 1) {
        if (data.size() - at < 4) return expect_error(ReplyType::kErrInvalid);
        wanted += load_be<std::uint32_t>(&data[at]);
        at += 4;
      }
    }
    if (at != data.size()) return expect_error(ReplyType::kErrInvalid);
    if (too_big) return expect_error(ReplyType::kErrTooBig);
    bool found = option_ == 9 && wanted == 1;
    for (std::size_t i = 1; i < strings.size(); ++i) {
      if (strings[i].find(':') == std::string::npos) return expect_error(ReplyType::kErrInvalid);
      found = found || strings[i] == "base:allocation" || (option_ == 9 && strings[i] == "base:");
    }
    const ExportInfo* const info = find(std::as_bytes(std::span(strings[0])));
    if (!info) return expect_error(ReplyType::kErrUnknown);
    if (found) {
      expect_reply(ReplyType::kMetaContext, 19);
      expect(std::uint32_t{option_ == 9 ? 0u : kBaseAllocationId});
      expect(std::string("base:allocation"));
    }
    expect_reply(ReplyType::kAck, 0);
    if (option_ == 10 && found) context_of_ = info;
  }

  std::uint16_t flags_for(const ExportInfo& info) const {
    unsigned flags = info.transmission_flags;
    if (style_ == ReplyStyle::kSimple) flags &= ~(1u << 7);
    if (style_ != ReplyStyle::kExtended || context_of_ != &info) flags &= ~(1u << 12);
    return static_cast<std::uint16_t>(flags);
  }

  const ExportInfo* find(Bytes name) const {
    for (const ExportInfo& info : exports_) {
      if (std::ranges::equal(name, std::as_bytes(std::span(info.name)))) return &info;
    }
    return nullptr;
  }

  void check_selection(const ExportInfo& info, std::uint32_t flags, bool block_size_requested) {
    ROOST_CHECK(run_.state == State::kTransmission, "no transmission after all");
    const auto& got = run_.selection;
    ROOST_CHECK(got.export_id == info.id && got.size == info.size &&
                    got.transmission_flags == flags_for(info) && got.reply_style == style_ &&
                    got.base_allocation == (context_of_ == &info) &&
                    got.min_block == info.min_block && got.max_payload == info.max_payload &&
                    got.no_zeroes == ((flags & 2) != 0) &&
                    got.block_size_requested == block_size_requested,
                "something else was selected");
  }

  std::size_t left() const { return stream_.size() - at_; }

  template <class T>
  T take() {
    const T value = load_be<T>(&stream_[at_]);
    at_ += sizeof value;
    return value;
  }

  template <std::unsigned_integral T>
  void expect(T value) {
    ROOST_CHECK(output_.size() >= sizeof value, "the output ends too early");
    const T got = load_be<T>(output_.data());
    ROOST_CHECK(got == value, "{:#x} in the output instead of {:#x}", got, value);
    output_ = output_.subspan(sizeof value);
  }

  void expect(const std::string& text) {
    ROOST_CHECK(output_.size() >= text.size(), "the output ends too early");
    ROOST_CHECK(std::ranges::equal(output_.first(text.size()), std::as_bytes(std::span(text))),
                "not '{}' in the output", text);
    output_ = output_.subspan(text.size());
  }

  void expect_reply(ReplyType type, std::size_t length) {
    expect(kOptionReplyMagic);
    expect(option_);
    expect(std::to_underlying(type));
    expect(static_cast<std::uint32_t>(length));
  }

  void expect_error(ReplyType type) {
    expect(kOptionReplyMagic);
    expect(option_);
    expect(std::to_underlying(type));
    ROOST_CHECK(output_.size() >= 4, "the output ends too early");
    const auto length = load_be<std::uint32_t>(output_.data());
    output_ = output_.subspan(4);
    ROOST_CHECK(length > 0 && length <= kMaxString && length <= output_.size(),
                "an error message of {} bytes", length);
    for (std::byte c : output_.first(length)) {
      ROOST_CHECK(c >= std::byte{0x20} && c < std::byte{0x7f}, "an unprintable error message");
    }
    output_ = output_.subspan(length);
  }

  const std::span<const ExportInfo> exports_;
  const TlsPolicy tls_;
  ReplyStyle style_ = ReplyStyle::kSimple;
  const ExportInfo* context_of_ = nullptr;
  const Bytes stream_;
  std::size_t at_ = 0;
  std::uint32_t option_ = 0;
  Bytes output_;
  const NegotiationRun& run_;
};

// ---- transmission ----

struct FoundRequest {
  Request request;
  std::size_t payload_at = 0;  // in the stream

  bool operator==(const FoundRequest&) const = default;
};

struct TransmissionRun {
  std::vector<FoundRequest> requests{};
  bool failed = false;
  bool at_boundary = false;
};

/// Runs the parser over the stream; payloads are taken from it, received past it or skipped.
TransmissionRun parse_all(const ExportLimits& limits, Bytes stream, Cuts cuts) {
  RequestParser parser(limits.reply_style, limits.max_payload);
  TransmissionRun run;
  std::size_t fed = 0;
  Bytes input;
  const auto position = [&] { return fed - input.size(); };
  const auto receive = [&] {
    ROOST_CHECK(input.empty(), "{} bytes of input were left behind", input.size());
    const std::size_t count = cuts.part_of(stream.size() - fed);
    input = stream.subspan(fed, count);
    fed += count;
    return count > 0;
  };
  for (;;) {
    Request request;
    const RequestParser::Event event = parser.next(input, request);
    if (event == RequestParser::Event::kFailed) {
      ROOST_CHECK(parser.failed() && !parser.failure().empty(), "failed without a reason");
      run.failed = true;
      break;
    }
    if (event == RequestParser::Event::kNeedInput) {
      if (!receive()) break;
      continue;
    }
    ROOST_CHECK(parser.payload_left() == request.payload_size(), "the payload's size is wrong");
    run.requests.push_back({request, position()});
    std::size_t expected_at = position();
    switch (cuts.choose(3)) {
      case 0:
        while (parser.payload_left() > 0) {
          const Bytes part = parser.take_payload(input);
          ROOST_CHECK(part.empty() || part.data() == stream.data() + expected_at,
                      "a payload from elsewhere");
          expected_at += part.size();
          if (parser.payload_left() > 0 && !receive()) break;
        }
        break;
      case 1: {
        parser.take_payload(input);
        if (parser.payload_left() == 0) break;
        ROOST_CHECK(input.empty(), "{} bytes were not taken", input.size());
        const auto count = static_cast<std::uint32_t>(
            std::min<std::size_t>(parser.payload_left(), stream.size() - fed));
        fed += count;
        parser.payload_received(count);
        break;
      }
      default:
        parser.skip_payload();
        break;
    }
    if (parser.payload_left() > 0 && fed == stream.size() && input.empty()) break;
  }
  run.at_boundary = parser.at_boundary();
  return run;
}

TransmissionRun read_plainly(const ExportLimits& limits, Bytes stream) {
  TransmissionRun run{.at_boundary = true};
  const bool extended = limits.reply_style == ReplyStyle::kExtended;
  const std::size_t header_size = extended ? 32 : 28;
  std::size_t at = 0;
  while (at < stream.size()) {
    run.at_boundary = false;
    if (stream.size() - at < header_size) break;
    const std::byte* const header = &stream[at];
    at += header_size;
    Request request{.flags = load_be<std::uint16_t>(header + 4),
                    .command = Command{load_be<std::uint16_t>(header + 6)},
                    .extended = extended,
                    .cookie = load_be<std::uint64_t>(header + 8),
                    .offset = load_be<std::uint64_t>(header + 16),
                    .length = extended ? load_be<std::uint64_t>(header + 24)
                                       : load_be<std::uint32_t>(header + 24)};
    const bool carries =
        extended ? (request.flags & 0x20) != 0 : request.command == Command::kWrite;
    const std::uint64_t payload = carries ? request.length : 0;
    if (load_be<std::uint32_t>(header) != (extended ? kExtendedRequestMagic : kRequestMagic) ||
        payload > (extended ? limits.max_payload : 32u << 20)) {
      run.failed = true;
      run.at_boundary = true;
      break;
    }
    run.requests.push_back({request, at});
    if (stream.size() - at < payload) break;
    at += payload;
    run.at_boundary = true;
  }
  return run;
}

constexpr std::uint16_t kKnownFlags = kCommandFua | kCommandNoHole | kCommandDf | kCommandReqOne |
                                      kCommandFastZero | kCommandPayloadLen;

ExportLimits limits_for(unsigned which) {
  constexpr std::array<std::uint64_t, 4> kSizes{0, 4096, 1 << 30, ~std::uint64_t{0}};
  constexpr std::uint16_t kAll = kTransmissionHasFlags | kTransmissionSendFlush |
                                 kTransmissionSendFua | kTransmissionSendTrim |
                                 kTransmissionSendWriteZeroes;
  constexpr std::uint16_t kChunked = kAll | kTransmissionSendDf | kTransmissionSendCache |
                                     kTransmissionSendFastZero | kTransmissionSendResize;
  constexpr std::array kStyles{ReplyStyle::kSimple, ReplyStyle::kStructured, ReplyStyle::kExtended,
                               ReplyStyle::kExtended};
  const ReplyStyle style = kStyles[which >> 6];
  unsigned flags = style == ReplyStyle::kSimple ? kAll : kChunked;
  if (which >> 6 == 3) flags |= kTransmissionBlockStatusPayload;
  if (which & 4) flags = kTransmissionHasFlags;
  if (which & 8) flags |= kTransmissionReadOnly;
  return {.size = kSizes[which % 4],
          .former_size = which % 4 == 1 ? 8192u : 0u,
          .transmission_flags = static_cast<std::uint16_t>(flags),
          .min_block = which & 16 ? 512u : 1u,
          .max_payload = which & 32 ? 1u << 20 : kMaxPayload,
          .reply_style = style,
          .base_allocation = style != ReplyStyle::kSimple && (which & 4) == 0};
}

/// Every message that may answer the request, as far as its sizes and first fields go.
void check_replies(const Request& request, ReplyStyle style, std::uint32_t error,
                   std::string_view why) {
  std::array<std::byte, kSimpleReplySize> reply;
  encode_simple_reply(reply, error, request.cookie);
  ROOST_CHECK(load_be<std::uint32_t>(&reply[0]) == 0x67446698 &&
                  load_be<std::uint32_t>(&reply[4]) == error &&
                  load_be<std::uint64_t>(&reply[8]) == request.cookie,
              "a garbled reply");
  if (style == ReplyStyle::kSimple) return;

  const bool extended = style == ReplyStyle::kExtended;
  std::array<std::byte, 32 + 1> header{};
  header.back() = std::byte{0x77};
  const std::size_t size = chunk_header_size(style);
  encode_chunk_header(header.data(), style, request, kReplyDone, ChunkType::kError, 1234567);
  ROOST_CHECK(size == (extended ? 32 : 20) && header.back() == std::byte{0x77}, "a long header");
  ROOST_CHECK(load_be<std::uint64_t>(&header[8]) == request.cookie &&
                  load_be<std::uint32_t>(&header[size - 4]) == 1234567,
              "a garbled chunk");
  if (extended) {
    ROOST_CHECK(load_be<std::uint64_t>(&header[16]) == request.offset, "not the request's offset");
  }
  if (error == 0) return;
  ROOST_CHECK(!why.empty() && why.size() <= kMaxString, "an error without a reason");
  std::vector<std::byte> payload(error_size(why, true));
  encode_error(payload.data(), error, why, request.offset);
  ROOST_CHECK(load_be<std::uint32_t>(&payload[0]) == error &&
                  load_be<std::uint16_t>(&payload[4]) == why.size() &&
                  load_be<std::uint64_t>(&payload[payload.size() - 8]) == request.offset,
              "a garbled error");
}

void check_verdict(const Request& request, const ExportLimits& limits) {
  std::string_view why;
  const int error = validate(request, limits, &why);
  const bool writes = request.command == Command::kWrite || request.command == Command::kTrim ||
                      request.command == Command::kWriteZeroes ||
                      request.command == Command::kResize;
  std::uint64_t end = 0;
  const bool beyond =
      __builtin_add_overflow(request.offset, request.length, &end) || end > limits.size;
  ROOST_CHECK(
      error == 0 || error == EINVAL || error == EPERM || error == ENOSPC || error == EOVERFLOW,
      "the verdict {} is none of the protocol's", error);
  ROOST_CHECK(to_nbd_error(error) == static_cast<std::uint32_t>(error), "the verdict is lost");
  if (error == EPERM) {
    ROOST_CHECK(writes && (limits.transmission_flags & kTransmissionReadOnly), "EPERM for nothing");
  }
  if (error == ENOSPC) {
    const bool cut_off = limits.former_size > limits.size && end <= limits.former_size;
    ROOST_CHECK((beyond && (request.command == Command::kWrite ||
                            request.command == Command::kWriteZeroes || cut_off)) ||
                    (request.command == Command::kResize && request.offset >> 63),
                "ENOSPC for nothing");
  }
  if (error == EOVERFLOW) {
    ROOST_CHECK(request.command == Command::kRead && limits.reply_style != ReplyStyle::kSimple &&
                    request.length > limits.max_payload,
                "EOVERFLOW for nothing");
  }
  if (error == 0 && request.command != Command::kDisc) {
    const bool ranged = request.command != Command::kFlush && request.command != Command::kResize &&
                        !(request.command == Command::kBlockStatus && request.payload_len());
    ROOST_CHECK(!ranged || !beyond, "a request beyond the end");
    ROOST_CHECK(!writes || !(limits.transmission_flags & kTransmissionReadOnly),
                "a write to a read-only export");
    ROOST_CHECK((request.flags & ~kKnownFlags) == 0, "flags {:#x}", request.flags);
    ROOST_CHECK(request.payload_size() == 0 || request.command == Command::kWrite ||
                    (request.command == Command::kBlockStatus && request.payload_size() == 12),
                "a payload of {} bytes", request.payload_size());
    ROOST_CHECK((request.command != Command::kRead && request.command != Command::kWrite) ||
                    request.length <= limits.max_payload,
                "a payload of {} bytes", request.length);
    ROOST_CHECK(request.command != Command::kBlockStatus || limits.base_allocation,
                "a status without a context");
  }
  check_replies(request, limits.reply_style, to_nbd_error(error), why);
}

/// The query behind a BLOCK_STATUS is a request again.
void check_query(const FoundRequest& found, Bytes stream, const ExportLimits& limits) {
  if (validate(found.request, limits) != 0 || found.request.command != Command::kBlockStatus ||
      found.request.payload_size() == 0 || stream.size() - found.payload_at < kStatusQuerySize) {
    return;
  }
  const auto payload = stream.subspan(found.payload_at).first<kStatusQuerySize>();
  const auto query = parse_status_query(found.request, payload, kBaseAllocationId);
  ROOST_CHECK(query.has_value() == (load_be<std::uint32_t>(&payload[8]) == kBaseAllocationId),
              "the wrong context");
  if (!query) return;
  ROOST_CHECK(query->payload_size() == 0 && query->length == load_be<std::uint64_t>(&payload[0]) &&
                  query->offset == found.request.offset,
              "a garbled query");
  check_verdict(*query, limits);
}

}  // namespace

void check_negotiation(Bytes input) {
  if (input.size() < kSetupSize) return;
  const auto setup = std::to_integer<unsigned>(input[0]);
  const SharedSet& exports = exports_for(setup);
  const auto tls = TlsPolicy{static_cast<std::uint8_t>(setup >> 2 & 3)};
  const Bytes stream = input.subspan(kSetupSize);
  const NegotiationRun whole = negotiate(exports, tls, stream, Cuts());
  NegotiationReader(*exports, tls, stream, whole).check();
  const NegotiationRun cut =
      negotiate(exports, tls, stream, Cuts(load_be<std::uint32_t>(&input[1])));
  ROOST_CHECK(cut.output == whole.output && cut.consumed == whole.consumed &&
                  cut.state == whole.state && cut.failure == whole.failure &&
                  cut.selection == whole.selection,
              "cutting the stream changed the negotiation");
}

void check_transmission(Bytes input) {
  if (input.size() < kSetupSize) return;
  const ExportLimits limits = limits_for(std::to_integer<unsigned>(input[0]));
  const Bytes stream = input.subspan(kSetupSize);
  const TransmissionRun plain = read_plainly(limits, stream);
  for (const Cuts& cuts : {Cuts(), Cuts(load_be<std::uint32_t>(&input[1]))}) {
    const TransmissionRun run = parse_all(limits, stream, cuts);
    ROOST_CHECK(run.requests == plain.requests, "{} requests instead of {}, or other ones",
                run.requests.size(), plain.requests.size());
    ROOST_CHECK(run.failed == plain.failed, "the parser differs about the end of the stream");
    ROOST_CHECK(run.at_boundary == plain.at_boundary, "at_boundary() is wrong");
  }
  for (const FoundRequest& found : plain.requests) {
    check_verdict(found.request, limits);
    check_query(found, stream, limits);
  }
}

}  // namespace roost::nbd
