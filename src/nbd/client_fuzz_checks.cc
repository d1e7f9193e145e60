// SPDX-License-Identifier: MIT
#include "nbd/client_fuzz_checks.h"

#include <algorithm>
#include <array>
#include <bit>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "roost/base/bytes.h"
#include "roost/base/check.h"
#include "roost/nbd/client_negotiation.h"
#include "roost/nbd/client_transmission.h"

namespace roost::nbd {
namespace {

using Bytes = std::span<const std::byte>;

constexpr std::size_t kSetupSize = 5;

/// How one run cuts the stream: not at all, byte by byte, or as a seed has it.
class Cuts {
 public:
  explicit Cuts(std::size_t longest) : longest_(longest) {}
  static Cuts seeded(std::uint32_t seed) {
    Cuts cuts(std::array{1, 7, 64, 4096}[seed % 4]);
    cuts.random_.seed(seed % 0x7ffffffe + 1);
    return cuts;
  }

  /// A part of `size`, at least 1 unless that is 0.
  std::size_t part_of(std::size_t size) {
    return longest_ == 0 ? size : std::min<std::size_t>(size, 1 + random_() % longest_);
  }

  std::uint32_t choose(std::uint32_t count) {
    return longest_ == 0 ? 0 : static_cast<std::uint32_t>(random_() >> 8) % count;
  }

 private:
  std::minstd_rand random_;
  std::size_t longest_ = 0;
};

void check_log_line(const std::string& line) {
  ROOST_CHECK(!line.empty() && line.size() < 1024 &&
                  std::ranges::all_of(line, [](char c) { return c >= 0x20 && c < 0x7f; }),
              "not fit for a log line: '{}'", line);
}

// ---- the handshake ----

using State = ClientNegotiation::State;

ClientWishes wishes_for(unsigned which) {
  using enum ClientWishes::Mode;
  using enum ClientWishes::Tls;
  return {.export_name = which & 1 ? "disk" : "",
          .mode = std::array{kGo, kInfo, kList, kListMetaContexts}[which >> 1 & 3],
          .tls = which & 8 ? which & 16 ? kRequired : kAllowed : kOff,
          .structured_replies = !(which & 8) || !(which & 32),
          .extended_headers = (which & 16) == 0,
          .meta_contexts = which & 32 ? std::vector<std::string>{"base:allocation", "qemu:x"}
                                      : std::vector<std::string>{}};
}

struct HandshakeRun {
  std::vector<std::byte> output;
  std::size_t consumed = 0;
  State state{};
  bool injected = false;  // there was more behind the ACK of STARTTLS, without TLS
  std::string failure;
  ClientNegotiation::Outcome outcome;
};

/// `tls_at_ack`: what comes behind the ACK of STARTTLS comes through TLS.
HandshakeRun shake_hands(const ClientWishes& wishes, Bytes stream, Cuts cuts, bool tls_at_ack) {
  ClientNegotiation negotiation(wishes);
  HandshakeRun run;
  const auto drain = [&] {
    const Bytes part = negotiation.output();
    run.output.insert(run.output.end(), part.begin(), part.end());
    negotiation.drain_output(part.size());
  };
  while (negotiation.state() == State::kNegotiating && run.consumed < stream.size()) {
    const Bytes part = stream.subspan(run.consumed, cuts.part_of(stream.size() - run.consumed));
    const std::size_t taken = negotiation.feed(part);
    ROOST_CHECK(taken == part.size() || negotiation.state() != State::kNegotiating,
                "took {} bytes of {}", taken, part.size());
    run.consumed += taken;
    ROOST_CHECK(negotiation.output().size() < 16384, "{} bytes of output",
                negotiation.output().size());
    if (cuts.choose(2) == 0) drain();
    if (negotiation.state() == State::kStartTls) {
      drain();
      if (!tls_at_ack) {
        run.injected = run.consumed < stream.size();
        break;
      }
      negotiation.tls_started();
    }
  }
  drain();
  run.state = negotiation.state();
  if (run.state == State::kFailed) {
    run.failure = negotiation.failure().doing();
    check_log_line(run.failure);
    run.injected = run.failure.contains("without TLS behind");
  } else if (run.state == State::kTransmission || run.state == State::kFinished) {
    run.outcome = negotiation.outcome();
  } else if (run.state == State::kNegotiating) {
    negotiation.end_of_input();
    check_log_line(negotiation.failure().doing());
  }
  return run;
}

/// Reads what the client said, as a server would.
void check_options(const ClientWishes& wishes, Bytes output) {
  if (output.empty()) return;
  ROOST_CHECK(output.size() >= 4 && load_be<std::uint32_t>(output.data()) <= 3, "the client flags");
  output = output.subspan(4);
  constexpr std::array kOrder{Option::kStartTls,
                              Option::kList,
                              Option::kExtendedHeaders,
                              Option::kStructuredReply,
                              Option::kListMetaContext,
                              Option::kSetMetaContext,
                              Option::kInfo,
                              Option::kGo,
                              Option::kExportName,
                              Option::kAbort};
  auto next = kOrder.begin();
  while (!output.empty()) {
    ROOST_CHECK(output.size() >= 16 && load_be<std::uint64_t>(output.data()) == kOptionMagic,
                "not an option");
    const Option option{load_be<std::uint32_t>(&output[8])};
    const auto length = load_be<std::uint32_t>(&output[12]);
    ROOST_CHECK(length <= output.size() - 16, "an option that is cut");
    const auto found = std::find(next, kOrder.end(), option);
    ROOST_CHECK(found != kOrder.end(), "option {} out of its order", std::to_underlying(option));
    next = std::next(found);
    const bool goes = wishes.mode == ClientWishes::Mode::kGo;
    ROOST_CHECK(option != Option::kGo || goes, "GO, which nobody wished for");
    ROOST_CHECK(option != Option::kStartTls || wishes.tls != ClientWishes::Tls::kOff,
                "STARTTLS, which nobody wished for");
    output = output.subspan(16 + length);
  }
}

void check_outcome(const ClientWishes& wishes, const HandshakeRun& run) {
  const ClientNegotiation::Outcome& outcome = run.outcome;
  ROOST_CHECK(outcome.tls || wishes.tls != ClientWishes::Tls::kRequired,
              "went on without the TLS that is required");
  ROOST_CHECK(run.state == State::kFinished || wishes.mode == ClientWishes::Mode::kGo ||
                  wishes.mode == ClientWishes::Mode::kInfo,
              "transmission, which nobody wished for");
  ROOST_CHECK(outcome.transmission_flags & kTransmissionHasFlags, "flags without HAS_FLAGS");
  ROOST_CHECK(std::has_single_bit(outcome.min_block) && outcome.min_block <= 65536 &&
                  std::has_single_bit(outcome.preferred_block) &&
                  outcome.preferred_block >= outcome.min_block &&
                  outcome.max_payload >= outcome.preferred_block,
              "block sizes");
  ROOST_CHECK(outcome.canonical_name.size() <= kMaxString &&
                  outcome.description.size() <= kMaxString &&
                  outcome.entries.size() <= ClientNegotiation::kMaxListEntries,
              "long strings");
  const bool listing = wishes.mode == ClientWishes::Mode::kListMetaContexts;
  ROOST_CHECK(outcome.contexts.empty() || listing || outcome.headers != ReplyStyle::kSimple,
              "contexts without structured replies");
  std::set<std::uint32_t> ids;
  for (const MetaContext& context : outcome.contexts) ids.insert(context.id);
  ROOST_CHECK(listing || ids.size() == outcome.contexts.size(), "two contexts with one number");
}

// ---- replies ----

const std::vector<MetaContext> kContexts = {{7, "base:allocation"}, {9, "qemu:x"}};

/// The requests in flight; each has its place as its cookie.
const std::array kRequests{
    ClientRequest{.command = Command::kRead, .cookie = 0, .offset = 4096, .length = 64},
    ClientRequest{
        .command = Command::kRead, .flags = kCommandDf, .cookie = 1, .offset = 16, .length = 64},
    ClientRequest{.command = Command::kWrite, .cookie = 2, .offset = 512, .length = 512},
    ClientRequest{.command = Command::kBlockStatus, .cookie = 3, .offset = 0, .length = 1024},
    ClientRequest{.command = Command::kBlockStatus,
                  .flags = kCommandReqOne,
                  .cookie = 4,
                  .offset = 512,
                  .length = 512},
    ClientRequest{.command = Command::kFlush, .cookie = 5}};

/// What the plain reading finds: where a message and its payload begin and end.
struct PlainMessage {
  bool simple = false;
  std::uint16_t flags = 1;
  std::uint16_t type = 0;
  std::uint64_t cookie = 0;
  std::optional<std::uint64_t> request_offset{};
  std::uint32_t error = 0;
  std::string message{};
  std::uint64_t offset = 0;
  std::uint64_t size = 0;  // of data or a hole
  std::uint32_t context = 0;
  std::size_t payload_at = 0;
  std::size_t payload_size = 0;
};

/// What became of one request, by counting.
struct PlainRequest {
  std::array<bool, 64> seen{};
  std::set<std::uint64_t> error_offsets{};
  std::set<std::uint32_t> contexts{};
  bool started = false;
  bool done = false;
  bool failed = false;  // the server says so
  bool spoiled = false;
  int parts = 0;
};

/// Reads the server's stream the slow and plain way, up to what ends the connection.
class PlainReader {
 public:
  PlainReader(ReplyStyle style, Bytes stream) : style_(style), stream_(stream) {}

  std::vector<PlainMessage> messages;
  std::array<PlainRequest, kRequests.size()> requests;
  bool parser_failed = false;
  bool fatal = false;  // the last message ends the connection

  void read() {
    while (read_message()) {
    }
  }

 private:
  bool has(std::size_t size) const { return stream_.size() - at_ >= size; }
  template <class T>
  T take() {
    const T value = load_be<T>(stream_.data() + at_);
    at_ += sizeof value;
    return value;
  }
  bool wrong() {
    parser_failed = true;
    return false;
  }

  bool read_message() {
    if (!has(4)) return false;
    PlainMessage m;
    const auto magic = take<std::uint32_t>();
    if (magic == 0x67446698 && style_ != ReplyStyle::kExtended) {
      if (!has(12)) return false;
      m.simple = true;
      m.error = take<std::uint32_t>();
      m.cookie = take<std::uint64_t>();
      m.payload_at = at_;
      if (m.error == 0 && style_ == ReplyStyle::kSimple && m.cookie < kRequests.size() &&
          kRequests[m.cookie].command == Command::kRead && !requests[m.cookie].done) {
        m.payload_size = 64;
      }
      return judge(m);
    }
    std::uint64_t length = 0;
    if (magic == 0x668e33ef && style_ == ReplyStyle::kStructured) {
      if (!has(16)) return false;
      m.flags = take<std::uint16_t>();
      m.type = take<std::uint16_t>();
      m.cookie = take<std::uint64_t>();
      length = take<std::uint32_t>();
    } else if (magic == 0x6e8a278c && style_ == ReplyStyle::kExtended) {
      if (!has(28)) return false;
      m.flags = take<std::uint16_t>();
      m.type = take<std::uint16_t>();
      m.cookie = take<std::uint64_t>();
      m.request_offset = take<std::uint64_t>();
      length = take<std::uint64_t>();
    } else {
      return wrong();
    }
    switch (m.type) {
      case 0:
        if (length != 0 || !(m.flags & 1)) return wrong();
        break;
      case 1:
        if (length < 9 || length > (32u << 20) + 8) return wrong();
        if (!has(8)) return false;
        m.offset = take<std::uint64_t>();
        m.payload_size = m.size = length - 8;
        break;
      case 2:
        if (length != 12) return wrong();
        if (!has(12)) return false;
        m.offset = take<std::uint64_t>();
        m.size = take<std::uint32_t>();
        if (m.size == 0) return wrong();
        break;
      case 5:
        if (style_ == ReplyStyle::kExtended) return wrong();
        if (length < 12 || (length - 4) % 8 != 0 || length > 4 + (8u << 20)) return wrong();
        if (!has(4)) return false;
        m.context = take<std::uint32_t>();
        m.payload_size = length - 4;
        break;
      case 6: {
        if (style_ != ReplyStyle::kExtended) return wrong();
        if (length < 24 || (length - 8) % 16 != 0 || length > 8 + (16u << 20)) return wrong();
        if (!has(8)) return false;
        m.context = take<std::uint32_t>();
        if (take<std::uint32_t>() != (length - 8) / 16) return wrong();
        m.payload_size = length - 8;
        break;
      }
      default: {
        if (!(m.type & 0x8000)) return wrong();
        const std::size_t tail = m.type == 0x8002 ? 8 : 0;
        if (length < 6 + tail || length > 8192) return wrong();
        if (!has(length)) return false;
        const std::size_t end = at_ + length;
        m.error = take<std::uint32_t>();
        const auto size = take<std::uint16_t>();
        if (size > length - 6 - tail || size > 4096 || m.error == 0) return wrong();
        for (int i = 0; i < size; ++i) m.message += static_cast<char>(take<std::uint8_t>());
        if (tail > 0) m.offset = take<std::uint64_t>();
        at_ = end;
        break;
      }
    }
    m.payload_at = at_;
    return judge(m);
  }

  bool judge(const PlainMessage& m) {
    messages.push_back(m);
    at_ += std::min(m.payload_size, stream_.size() - at_);
    if (m.cookie >= kRequests.size()) {
      fatal = true;
      return false;
    }
    const ClientRequest& request = kRequests[m.cookie];
    PlainRequest& r = requests[m.cookie];
    const bool reads = request.command == Command::kRead;
    const bool asks = request.command == Command::kBlockStatus;
    const bool content = m.type == 1 || m.type == 2;
    const bool status = m.type == 5 || m.type == 6;
    fatal = r.done || (m.request_offset && *m.request_offset != request.offset) ||
            (m.simple && (r.started || (reads && style_ != ReplyStyle::kSimple))) ||
            (content && !reads) || (status && !asks);
    if (fatal) return false;
    r.started = true;
    r.done = (m.flags & 1) != 0;
    if (m.error != 0) {
      r.failed = true;
      if (m.type == 0x8002) {
        if (request.command == Command::kFlush || m.offset < request.offset ||
            m.offset >= request.offset + request.length) {
          r.spoiled = true;
        } else {
          r.error_offsets.insert(m.offset);
        }
      }
    } else if (m.simple && reads) {
      r.seen.fill(true);
    } else if (content) {
      judge_content(m, request, r);
    } else if (status) {
      judge_status(m, request, r);
    }
    return m.payload_at + m.payload_size <= stream_.size();
  }

  static void judge_content(const PlainMessage& m, const ClientRequest& request, PlainRequest& r) {
    if (m.offset < request.offset || m.offset > request.offset + 64 ||
        m.size > request.offset + 64 - m.offset) {
      r.spoiled = true;
      return;
    }
    bool fits = !((request.flags & kCommandDf) && r.parts > 0);
    for (std::uint64_t i = m.offset; i < m.offset + m.size; ++i) {
      fits = fits && !r.seen[i - request.offset] && !r.error_offsets.contains(i);
    }
    r.spoiled |= !fits;
    ++r.parts;
    if (!fits) return;
    for (std::uint64_t i = 0; i < m.size; ++i) r.seen[m.offset - request.offset + i] = true;
  }

  void judge_status(const PlainMessage& m, const ClientRequest& request, PlainRequest& r) {
    if ((m.context != 7 && m.context != 9) || !r.contexts.insert(m.context).second) {
      r.spoiled = true;
      return;
    }
    const std::size_t size = style_ == ReplyStyle::kExtended ? 16 : 8;
    const bool one = (request.flags & kCommandReqOne) != 0;
    if (one && m.payload_size != size) r.spoiled = true;
    if (stream_.size() - m.payload_at < m.payload_size) return;  // then it is not complete anyway
    std::uint64_t total = 0;
    for (std::size_t at = m.payload_at; at < m.payload_at + m.payload_size; at += size) {
      const std::uint64_t length =
          size == 16 ? load_be<std::uint64_t>(&stream_[at]) : load_be<std::uint32_t>(&stream_[at]);
      const std::uint64_t flags = size == 16 ? load_be<std::uint64_t>(&stream_[at + 8]) : 0;
      std::uint64_t end = 0;
      if (length == 0 || total >= request.length || (one && length > request.length) ||
          __builtin_add_overflow(request.offset + total, length, &end) ||
          (m.context == 7 && flags > 0xffffffff)) {
        r.spoiled = true;
        return;
      }
      total += length;
    }
  }

  const ReplyStyle style_;
  const Bytes stream_;
  std::size_t at_ = 0;
};

void expect_same(const ReplyMessage& got, const PlainMessage& plain) {
  ROOST_CHECK((got.kind == ReplyMessage::Kind::kSimple) == plain.simple &&
                  std::to_underlying(got.type) == plain.type && got.flags == plain.flags &&
                  got.cookie == plain.cookie && got.request_offset == plain.request_offset,
              "a message of another kind");
  ROOST_CHECK(got.error == plain.error && got.message == plain.message &&
                  got.offset == plain.offset && got.context_id == plain.context &&
                  (plain.type != 2 || got.hole_size == plain.size) &&
                  (plain.simple || got.payload_size == plain.payload_size),
              "a message with other contents");
}

/// Runs parser and checkers over the stream; payloads are taken from it or received past it.
void check_replies(ReplyStyle style, Bytes stream, Cuts cuts, const PlainReader& plain) {
  ReplyParser parser(style);
  std::vector<ReplyChecker> checkers;
  for (const ClientRequest& request : kRequests) checkers.emplace_back(request, style, kContexts);
  std::size_t found = 0;
  std::size_t fed = 0;
  Bytes input;
  const auto receive = [&] {
    ROOST_CHECK(input.empty(), "{} bytes of input were left behind", input.size());
    const std::size_t count = cuts.part_of(stream.size() - fed);
    input = stream.subspan(fed, count);
    fed += count;
    return count > 0;
  };
  bool fatal = false;
  ReplyMessage message;
  while (!fatal) {
    const ReplyParser::Event event = parser.next(input, message);
    if (event == ReplyParser::Event::kFailed) {
      check_log_line(parser.failure());
      break;
    }
    if (event == ReplyParser::Event::kNeedInput) {
      if (!receive()) break;
      continue;
    }
    ROOST_CHECK(found < plain.messages.size(), "a message too many");
    const PlainMessage& expected = plain.messages[found++];
    expect_same(message, expected);
    if (message.cookie >= kRequests.size()) {
      fatal = true;
      break;
    }
    ReplyChecker& checker = checkers[message.cookie];
    const ReplyChecker::Verdict verdict = checker.check(message);
    if (verdict.payload_size > 0) parser.expect_payload(verdict.payload_size);
    using enum ReplyChecker::Action;
    if (verdict.action == kData || verdict.action == kZeroes) {
      ROOST_CHECK(verdict.size > 0 && verdict.at <= 64 && verdict.size <= 64 - verdict.at,
                  "{} bytes at {} of a buffer of 64", verdict.size, verdict.at);
    }
    fatal = verdict.fatal;
    if (fatal) {
      check_log_line(checker.fault());
      break;
    }
    ROOST_CHECK(parser.payload_left() == expected.payload_size, "a payload of {} bytes, not {}",
                parser.payload_left(), expected.payload_size);
    std::size_t at = expected.payload_at;
    if (verdict.action == kSkip) {
      parser.skip_payload();
    } else if (verdict.action == kData && cuts.choose(2) == 0) {
      at += parser.take_payload(input).size();
      if (parser.payload_left() > 0) {
        const auto count = static_cast<std::uint32_t>(
            std::min<std::size_t>(parser.payload_left(), stream.size() - fed));
        fed += count;
        parser.payload_received(count);
      }
    } else {
      while (parser.payload_left() > 0) {
        const Bytes part = parser.take_payload(input);
        ROOST_CHECK(part.empty() || part.data() == stream.data() + at, "a payload from elsewhere");
        at += part.size();
        if (verdict.action == kStatus) checker.take_status(part);
        if (parser.payload_left() > 0 && !receive()) break;
      }
    }
    if (parser.payload_left() > 0 && fed == stream.size() && input.empty()) break;
  }
  ROOST_CHECK(found == plain.messages.size(), "{} messages instead of {}", found,
              plain.messages.size());
  ROOST_CHECK(parser.failed() == plain.parser_failed, "the parser differs about the end: {}",
              parser.failed() ? parser.failure() : "it has not failed");
  ROOST_CHECK(fatal == plain.fatal, "the checker differs about what is fatal");
  if (fatal || (!plain.messages.empty() && parser.payload_left() > 0)) return;
  for (std::size_t i = 0; i < kRequests.size(); ++i) {
    const PlainRequest& expected = plain.requests[i];
    ROOST_CHECK(checkers[i].done() == expected.done, "request {} differs about its end", i);
    if (!expected.done) continue;
    bool good = !expected.spoiled && !expected.failed;
    if (kRequests[i].command == Command::kRead) {
      good = good && std::ranges::count(expected.seen, false) == 0;
    } else if (kRequests[i].command == Command::kBlockStatus) {
      good = good && expected.contexts.size() == 2;
    }
    const Result<void> result = checkers[i].finish();
    ROOST_CHECK(result.has_value() == good, "request {} differs: {}", i,
                result ? "success" : result.error().doing());
    if (!result) check_log_line(result.error().doing());
    ROOST_CHECK(!expected.spoiled || result.error().code() == EPROTO, "a lie was overlooked");
  }
}

void check_transmission_phase(ReplyStyle style, Bytes stream, std::uint32_t seed) {
  PlainReader plain(style, stream);
  plain.read();
  check_replies(style, stream, Cuts(0), plain);
  check_replies(style, stream, Cuts::seeded(seed), plain);
}

}  // namespace

void check_client(Bytes input) {
  if (input.size() < kSetupSize) return;
  const auto setup = std::to_integer<unsigned>(input[0]);
  const auto seed = load_be<std::uint32_t>(&input[1]);
  const Bytes stream = input.subspan(kSetupSize);
  if (setup & 128) {
    using enum ReplyStyle;
    return check_transmission_phase(std::array{kSimple, kStructured, kExtended}[setup % 3], stream,
                                    seed);
  }
  const ClientWishes wishes = wishes_for(setup);
  const HandshakeRun whole = shake_hands(wishes, stream, Cuts(0), false);
  const HandshakeRun cut = shake_hands(wishes, stream, Cuts::seeded(seed), false);
  ROOST_CHECK(whole.injected == cut.injected, "cutting the stream hid what was injected");
  ROOST_CHECK(whole.injected || (whole.output == cut.output && whole.consumed == cut.consumed &&
                                 whole.state == cut.state && whole.failure == cut.failure),
              "cutting the stream changed the handshake");
  const HandshakeRun through_tls = shake_hands(wishes, stream, Cuts(1), true);
  for (const HandshakeRun* run : {&whole, &through_tls}) {
    check_options(wishes, run->output);
    if (run->state == State::kTransmission || run->state == State::kFinished) {
      check_outcome(wishes, *run);
    }
  }
  if (whole.state == State::kTransmission) {
    check_transmission_phase(whole.outcome.headers, stream.subspan(whole.consumed), seed);
  }
}

}  // namespace roost::nbd
