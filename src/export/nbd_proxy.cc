// SPDX-License-Identifier: MIT
#include "roost/export/nbd_proxy.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>
#include <span>
#include <unordered_map>
#include <utility>

#include "roost/aio/aio_context.h"
#include "roost/aio/timer.h"
#include "roost/base/bytes.h"
#include "roost/base/random.h"
#include "roost/nbd/client_transmission.h"
#include "roost/nbd/transmission.h"
#include "roost/sync/co_event.h"
#include "roost/sync/stop_scope.h"
#include "roost/sync/task_group.h"

namespace roost {

namespace {

using Bytes = std::span<const std::byte>;

constexpr std::size_t kBufferSize = 128 << 10;
constexpr std::size_t kPieceSize = 16 << 10;  // of a write that is slowed down
// Replies that wait to be sent; the server is not read from while there are more.
constexpr std::size_t kMaxQueued = 64 << 20;
constexpr std::int64_t kPatienceNs = 200'000'000;

// The first bytes of something, until there are as many as it takes.
class Header {
 public:
  // True: `size` bytes are at data(), until the next call.
  bool fill(Bytes& in, std::size_t size) {
    if (full_) have_ = 0;
    const std::size_t part = std::min(size - have_, in.size());
    std::copy_n(in.begin(), part, bytes_.begin() + static_cast<std::ptrdiff_t>(have_));
    have_ += part;
    in = in.subspan(part);
    full_ = have_ == size;
    return full_;
  }
  template <class T>
  T at(std::size_t offset) const noexcept {
    return load_be<T>(bytes_.data() + offset);
  }

 private:
  std::array<std::byte, 32> bytes_{};
  std::size_t have_ = 0;
  bool full_ = false;
};

// What the seed has in store for a request.
struct Fate {
  std::int64_t delay_ns = 0;
  bool drop = false;
  bool truncate = false;
  bool corrupt = false;
  bool reorder = false;
  std::uint64_t where = 0;  // a random number
  std::uint64_t bits = 0;
};

struct Reply {
  std::vector<std::byte> bytes{};
  std::vector<std::pair<std::size_t, std::size_t>> data{};  // where in it there is data, how much
  std::uint64_t request = 0;                                // 0: no reply, only bytes
  Fate fate{};
  std::int64_t due_ns = 0;
  bool held = false;  // until another one has overtaken it
};

struct Pending {
  nbd::Command command{};
  std::uint32_t length = 0;
  Reply reply{};
};

}  // namespace

class NbdProxy::Connection {
 public:
  Connection(NbdProxy& proxy, std::uint64_t number, std::unique_ptr<Channel> client,
             std::unique_ptr<Channel> server, std::stop_token stop)
      : proxy_(proxy),
        faults_(proxy.faults_),
        number_(number),
        random_(Random::mix(faults_.seed) ^ number),
        client_(std::move(client)),
        server_(std::move(server)),
        scope_(std::move(stop)),
        stop_(scope_.token()) {}

  Task<void> run() {
    TaskGroup group({.name = "proxy"});
    group.spawn(carry_requests());
    group.spawn(carry_replies());
    group.spawn(send_replies());
    const Result<void> joined = co_await group.join();
    if (!joined) client_->abort();
    if (mode_ == Mode::kPlain) ++proxy_.totals_.unfollowed;
  }

 private:
  enum class Mode : std::uint8_t { kHandshake, kTransmission, kPlain };
  enum class Step : std::uint8_t {
    kGo,     // go on
    kWait,   // what comes next depends on the server's answer
    kClose,  // without what was taken last
  };

  void close() {
    client_->abort();
    server_->abort();
    scope_.request_stop();
  }

  void note(std::uint64_t request, std::string what) {
    proxy_.note({number_, request, std::move(what)});
  }

  // ---- Client to server

  Task<void> carry_requests() {
    std::vector<std::byte> buffer(kBufferSize);
    for (;;) {
      const Result<std::size_t> count = co_await client_->read(buffer, stop_);
      if (!count) co_return close();
      if (*count == 0) break;
      Bytes in = Bytes(buffer).first(*count);
      while (!in.empty()) {
        // As much as can be sent in one piece.
        const Bytes before = in;
        std::size_t good = 0;
        Step step = Step::kGo;
        while (!in.empty() && step == Step::kGo) {
          step = follow_client(in);
          if (step != Step::kClose) good = before.size() - in.size();
        }
        const bool sent = co_await send(*server_, before.first(good), to_server_free_ns_,
                                        proxy_.totals_.to_server);
        if (dropped_ || step == Step::kClose) co_return close();
        if (!sent) {
          // The server is gone; what it has said still goes to the client.
          requests_ended_.set();
          co_return;
        }
        if (step == Step::kWait) {
          const Result<void> happened = co_await decided_.wait(stop_);
          if (!happened) co_return close();
        }
      }
    }
    const Result<void> ended = co_await server_->shutdown(StreamEnd::kWrite, stop_);
    if (!ended) close();
    requests_ended_.set();
  }

  // Takes one thing, or a part of one, off the front of `in`.
  Step follow_client(Bytes& in) {
    switch (mode_) {
      case Mode::kHandshake:
        return follow_options(in);
      case Mode::kTransmission:
        return follow_requests(in);
      case Mode::kPlain:
        break;
    }
    in = {};
    return Step::kGo;
  }

  Step follow_options(Bytes& in) {
    if (!flags_seen_) {
      if (from_client_.fill(in, nbd::kClientFlagsSize)) {
        flags_seen_ = true;
        no_zeroes_ = no_zeroes_ && (from_client_.at<std::uint32_t>(0) & nbd::kClientNoZeroes) != 0;
      }
      return Step::kGo;
    }
    if (!in_option_) {
      if (!from_client_.fill(in, nbd::kOptionHeaderSize)) return Step::kGo;
      if (from_client_.at<std::uint64_t>(0) != nbd::kOptionMagic) return plain();
      option_ = nbd::Option{from_client_.at<std::uint32_t>(8)};
      option_left_ = from_client_.at<std::uint32_t>(12);
      in_option_ = true;
    }
    const std::size_t part = std::min<std::size_t>(option_left_, in.size());
    option_left_ -= static_cast<std::uint32_t>(part);
    in = in.subspan(part);
    if (option_left_ > 0) return Step::kGo;
    in_option_ = false;
    if (option_ == nbd::Option::kExportName) {
      export_name_sent_ = true;
    } else {
      ++unanswered_;
      if (option_ != nbd::Option::kGo && option_ != nbd::Option::kStartTls) return Step::kGo;
    }
    decided_.reset();
    return Step::kWait;
  }

  Step follow_requests(Bytes& in) {
    if (requests_.payload_left() > 0) {
      requests_.take_payload(in);
      return Step::kGo;
    }
    nbd::Request request;
    switch (requests_.next(in, request)) {
      case nbd::RequestParser::Event::kNeedInput:
        return Step::kGo;
      case nbd::RequestParser::Event::kFailed:
        return plain();
      case nbd::RequestParser::Event::kRequest:
        break;
    }
    ++request_;
    ++proxy_.totals_.requests;
    const Fate fate = draw();
    if (request_ == faults_.kill_at) {
      note(request_, "kill");
      if (proxy_.killed_) proxy_.killed_();
      return Step::kClose;
    }
    if (fate.drop) {
      note(request_, "drop");
      return Step::kClose;
    }
    if (request.command == nbd::Command::kDisc) return Step::kGo;
    Pending pending{.command = request.command,
                    .length = static_cast<std::uint32_t>(request.length),
                    .reply = {.request = request_, .fate = fate}};
    pending_.insert_or_assign(request.cookie, std::move(pending));
    return Step::kGo;
  }

  // Always as many numbers, so that the next request's do not depend on this one's.
  Fate draw() {
    const auto happens = [&](double probability) {
      return static_cast<double>(random_.next() >> 11) * 0x1p-53 < probability;
    };
    Fate fate;
    fate.delay_ns =
        faults_.delay_least_ns +
        static_cast<std::int64_t>(
            random_.next() %
            (static_cast<std::uint64_t>(faults_.delay_most_ns - faults_.delay_least_ns) + 1));
    fate.drop = happens(faults_.drop);
    fate.truncate = happens(faults_.truncate);
    fate.corrupt = happens(faults_.corrupt);
    fate.reorder = happens(faults_.reorder);
    fate.where = random_.next();
    fate.bits = random_.next();
    return fate;
  }

  // ---- Server to client

  Task<void> carry_replies() {
    std::vector<std::byte> buffer(kBufferSize);
    for (;;) {
      const Result<std::size_t> count = co_await server_->read(buffer, stop_);
      if (!count) co_return close();
      if (*count == 0) break;
      Bytes in = Bytes(buffer).first(*count);
      while (!in.empty()) follow_server(in);
      changed_.set();
      while (queued_bytes_ > kMaxQueued) {
        room_.reset();
        const Result<void> happened = co_await room_.wait(stop_);
        if (!happened) co_return close();
      }
    }
    server_ended_ = true;
    give_up_following();
    changed_.set();
  }

  void follow_server(Bytes& in) {
    const Bytes before = in;
    switch (mode_) {
      case Mode::kHandshake:
        follow_handshake(in);
        enqueue_bytes(before.first(before.size() - in.size()), 0);
        return;
      case Mode::kTransmission:
        follow_replies(in);
        return;
      case Mode::kPlain:
        give_up_following();
        enqueue_bytes(in, plain_delay());
        in = {};
        return;
    }
  }

  void follow_handshake(Bytes& in) {
    if (!greeted_) {
      if (!from_server_.fill(in, nbd::kGreetingSize)) return;
      greeted_ = true;
      if (from_server_.at<std::uint64_t>(0) != nbd::kInitMagic ||
          from_server_.at<std::uint64_t>(8) != nbd::kOptionMagic) {
        plain();
      }
      no_zeroes_ = (from_server_.at<std::uint16_t>(16) & nbd::kHandshakeNoZeroes) != 0;
      return;
    }
    if (answer_left_ > 0) {
      const std::size_t part = std::min<std::size_t>(answer_left_, in.size());
      answer_left_ -= static_cast<std::uint32_t>(part);
      in = in.subspan(part);
      if (answer_left_ == 0) answered();
      return;
    }
    if (export_name_sent_ && unanswered_ == 0) {
      // Size and flags, without a header.
      answer_left_ = static_cast<std::uint32_t>(10 + (no_zeroes_ ? 0 : nbd::kExportNameZeroes));
      answer_to_ = nbd::Option::kExportName;
      answer_ = nbd::ReplyType::kAck;
      return;
    }
    if (!from_server_.fill(in, nbd::kOptionReplyHeaderSize)) return;
    if (from_server_.at<std::uint64_t>(0) != nbd::kOptionReplyMagic) {
      plain();
      return;
    }
    answer_to_ = nbd::Option{from_server_.at<std::uint32_t>(8)};
    answer_ = nbd::ReplyType{from_server_.at<std::uint32_t>(12)};
    answer_left_ = from_server_.at<std::uint32_t>(16);
    if (answer_left_ == 0) answered();
  }

  void answered() {
    const bool ack = answer_ == nbd::ReplyType::kAck;
    if (!ack && (std::to_underlying(answer_) & 0x80000000) == 0) return;  // more is to come
    if (answer_to_ != nbd::Option::kExportName && unanswered_ > 0) --unanswered_;
    switch (answer_to_) {
      case nbd::Option::kStructuredReply:
        if (ack && style_ == nbd::ReplyStyle::kSimple) style_ = nbd::ReplyStyle::kStructured;
        return;
      case nbd::Option::kExtendedHeaders:
        if (ack) style_ = nbd::ReplyStyle::kExtended;
        return;
      case nbd::Option::kStartTls:
        if (ack) mode_ = Mode::kPlain;
        break;
      case nbd::Option::kGo:
      case nbd::Option::kExportName:
        if (!ack) break;
        mode_ = Mode::kTransmission;
        requests_ = nbd::RequestParser(style_);
        replies_.emplace(style_);
        break;
      default:
        return;
    }
    decided_.set();
  }

  void follow_replies(Bytes& in) {
    if (replies_->payload_left() > 0) {
      const Bytes part = replies_->take_payload(in);
      Reply& reply = current();
      if (has_data_) {
        // OFFSET_DATA's payload is what stands behind its offset, which the parser has taken.
        reply.data.emplace_back(reply.bytes.size(), part.size());
      }
      reply.bytes.insert(reply.bytes.end(), part.begin(), part.end());
      if (replies_->payload_left() == 0) message_complete();
      return;
    }
    const Bytes before = in;
    const nbd::ReplyParser::Event event = replies_->next(in, message_);
    if (event == nbd::ReplyParser::Event::kFailed) {
      in = before;
      plain();
      return;
    }
    const Bytes taken = before.first(before.size() - in.size());
    header_.insert(header_.end(), taken.begin(), taken.end());
    if (event == nbd::ReplyParser::Event::kNeedInput) return;

    const auto found = pending_.find(message_.cookie);
    known_ = found != pending_.end();
    has_data_ = message_.type == nbd::ChunkType::kOffsetData;
    if (message_.kind == nbd::ReplyMessage::Kind::kSimple) {
      const bool read = known_ && found->second.command == nbd::Command::kRead;
      has_data_ = read && message_.error == 0 && style_ == nbd::ReplyStyle::kSimple;
      if (has_data_) replies_->expect_payload(found->second.length);
    }
    Reply& reply = current();
    reply.bytes.insert(reply.bytes.end(), header_.begin(), header_.end());
    header_.clear();
    if (replies_->payload_left() == 0) message_complete();
  }

  Reply& current() { return known_ ? pending_.find(message_.cookie)->second.reply : unknown_; }

  void message_complete() {
    if (known_ && !message_.done()) return;
    Reply reply = std::move(current());
    if (known_) {
      pending_.erase(message_.cookie);
    } else {
      unknown_ = {};
    }
    ++proxy_.totals_.replies;
    if (reply.fate.corrupt) corrupt(reply);
    reply.held = reply.fate.reorder;
    enqueue(std::move(reply));
  }

  void corrupt(Reply& reply) {
    using Field = NbdFaults::Field;
    Field field = faults_.corrupt_field;
    std::uint64_t where = reply.fate.where;
    if (field == Field::kAny) {
      constexpr Field kFields[] = {Field::kMagic, Field::kCookie, Field::kError};
      field = kFields[where % 3];
      where /= 3;
    }
    std::size_t at = 0;
    const char* name = "";
    switch (field) {
      case Field::kAny:
      case Field::kMagic:
        at = where % 4;
        name = "magic";
        break;
      case Field::kError:
        // Of a chunk without its flags: a reply that seems to go on keeps a client waiting.
        at = load_be<std::uint32_t>(reply.bytes.data()) == nbd::kSimpleReplyMagic ? 4 + where % 4
                                                                                  : 6 + where % 2;
        name = "error";
        break;
      case Field::kCookie:
        at = 8 + where % 8;
        name = "cookie";
        break;
      case Field::kData: {
        std::size_t total = 0;
        for (const auto& [begin, size] : reply.data) total += size;
        if (total == 0) return;
        std::size_t left = where % total;
        for (const auto& [begin, size] : reply.data) {
          at = begin + left;
          if (left < size) break;
          left -= size;
        }
        name = "data";
        break;
      }
    }
    const auto flip = static_cast<std::byte>(1 + reply.fate.bits % 255);
    reply.bytes[at] ^= flip;
    note(reply.request,
         fmt::format("corrupt {}, byte {} ^ {:#04x}", name, at, std::to_integer<unsigned>(flip)));
  }

  std::int64_t now() const { return AioContext::current()->clock().now_ns(); }

  std::int64_t plain_delay() {
    // No request to draw it for; the middle, so that no numbers are used up.
    return (faults_.delay_least_ns + faults_.delay_most_ns) / 2;
  }

  void enqueue_bytes(Bytes bytes, std::int64_t delay_ns) {
    if (bytes.empty()) return;
    Reply reply{.bytes = {bytes.begin(), bytes.end()}, .fate = {.delay_ns = delay_ns}};
    enqueue(std::move(reply));
  }

  // In the order they came: a longer delay holds up those behind it.
  void enqueue(Reply reply) {
    last_due_ns_ = std::max(last_due_ns_, now() + reply.fate.delay_ns);
    reply.due_ns = last_due_ns_;
    queued_bytes_ += reply.bytes.size();
    queue_.push_back(std::move(reply));
  }

  // What was held back of messages that did not become whole goes as it is.
  void give_up_following() {
    for (auto& [cookie, pending] : pending_) enqueue_bytes(pending.reply.bytes, 0);
    pending_.clear();
    enqueue_bytes(unknown_.bytes, 0);
    unknown_ = {};
    enqueue_bytes(header_, 0);
    header_.clear();
  }

  // The reply to be sent next: the first that is not held, or the last that is, if nothing is on
  // its way that could overtake them.
  std::size_t next_reply() const {
    const auto free = std::ranges::find(queue_, false, &Reply::held);
    if (free != queue_.end()) return static_cast<std::size_t>(free - queue_.begin());
    return pending_.empty() && !queue_.empty() ? queue_.size() - 1 : queue_.size();
  }

  Task<void> send_replies() {
    for (;;) {
      const std::size_t next = next_reply();
      if (next == queue_.size()) {
        if (server_ended_) break;
        changed_.reset();
        const Result<void> happened = co_await changed_.wait(stop_);
        if (!happened) co_return close();
        continue;
      }
      if (queue_[next].due_ns > now()) {
        const std::int64_t due_ns = queue_[next].due_ns;
        const Result<void> slept = co_await sleep_until(due_ns, stop_);
        if (!slept) co_return close();
        continue;  // something better may have come
      }
      Reply reply = std::move(queue_[next]);
      queue_.erase(queue_.begin() + static_cast<std::ptrdiff_t>(next));
      queued_bytes_ -= reply.bytes.size();
      room_.set();
      for (std::size_t i = 0; i < next; ++i) {
        if (!queue_[i].held) continue;
        queue_[i].held = false;
        note(queue_[i].request, fmt::format("reorder behind request {}", reply.request));
      }
      Bytes bytes = reply.bytes;
      if (reply.fate.truncate) {
        bytes = bytes.first(reply.fate.where % bytes.size());
        note(reply.request,
             fmt::format("truncate to {} of {} bytes", bytes.size(), reply.bytes.size()));
      }
      const bool sent =
          co_await send(*client_, bytes, to_client_free_ns_, proxy_.totals_.to_client);
      if (!sent || reply.fate.truncate) {
        if (sent) co_await end_replies();
        co_return close();
      }
    }
    co_await end_replies();
    close();
  }

  // A client that goes on to send may take a moment to read; a socket that is closed on unread
  // requests would take from it what it has not read.
  Task<void> end_replies() {
    const Result<void> ended = co_await client_->shutdown(StreamEnd::kWrite, stop_);
    if (!ended) co_return;
    StopScope patience(stop_);
    patience.set_deadline(now() + kPatienceNs);
    const std::stop_token until = patience.token();
    [[maybe_unused]] const Result<void> gone = co_await requests_ended_.wait(until);
  }

  // ---- Both

  Step plain() {
    mode_ = Mode::kPlain;
    decided_.set();
    return Step::kGo;
  }

  // False: the connection has ended.
  Task<bool> send(Channel& to, Bytes bytes, std::int64_t& free_ns, std::uint64_t& total) {
    while (!bytes.empty()) {
      if (dropped_) co_return false;
      Bytes piece = bytes.first(faults_.rate ? std::min(bytes.size(), kPieceSize) : bytes.size());
      const bool last = faults_.drop_after != 0 && piece.size() >= faults_.drop_after - carried_;
      if (last) piece = piece.first(faults_.drop_after - carried_);
      bytes = bytes.subspan(piece.size());
      carried_ += piece.size();
      if (last) dropped_ = true;
      total += piece.size();
      if (faults_.rate != 0) {
        const std::int64_t wait_until = std::max(free_ns, now());
        free_ns = wait_until + static_cast<std::int64_t>(static_cast<double>(piece.size()) * 1e9 /
                                                         static_cast<double>(faults_.rate));
        const Result<void> slept = co_await sleep_until(wait_until, stop_);
        if (!slept) co_return false;
      }
      const Result<void> sent = co_await to.write_full(piece, stop_);
      if (!sent) co_return false;
      if (last) {
        note(0, fmt::format("drop after {} bytes", carried_));
        co_return false;
      }
    }
    co_return true;
  }

  NbdProxy& proxy_;
  const NbdFaults& faults_;
  const std::uint64_t number_;
  Random random_;
  const std::unique_ptr<Channel> client_;
  const std::unique_ptr<Channel> server_;
  StopScope scope_;
  const std::stop_token stop_;

  Mode mode_ = Mode::kHandshake;
  CoEvent decided_{"what the server answers"};
  nbd::ReplyStyle style_ = nbd::ReplyStyle::kSimple;
  bool no_zeroes_ = false;
  bool export_name_sent_ = false;
  std::uint32_t unanswered_ = 0;  // options
  std::uint64_t carried_ = 0;     // bytes
  bool dropped_ = false;          // that was drop_after

  // Client to server.
  Header from_client_;
  bool flags_seen_ = false;
  bool in_option_ = false;
  nbd::Option option_{};
  std::uint32_t option_left_ = 0;
  nbd::RequestParser requests_;
  std::uint64_t request_ = 0;
  CoEvent requests_ended_{"the client's end"};
  std::int64_t to_server_free_ns_ = 0;

  // Server to client.
  Header from_server_;
  bool greeted_ = false;
  nbd::Option answer_to_{};
  nbd::ReplyType answer_{};
  std::uint32_t answer_left_ = 0;
  std::optional<nbd::ReplyParser> replies_;
  nbd::ReplyMessage message_;                           // the one that is being received
  std::vector<std::byte> header_;                       // its first bytes
  bool known_ = false;                                  // it answers a request
  bool has_data_ = false;                               // its payload is data of a read
  Reply unknown_;                                       // if it does not
  std::unordered_map<std::uint64_t, Pending> pending_;  // by cookie, not answered
  std::vector<Reply> queue_;                            // in the order they came
  std::size_t queued_bytes_ = 0;
  std::int64_t last_due_ns_ = 0;
  std::int64_t to_client_free_ns_ = 0;
  bool server_ended_ = false;
  CoEvent changed_{"replies"};
  CoEvent room_{"room for replies"};
};

NbdProxy::NbdProxy(NbdFaults faults, std::function<void(const Fault&)> say,
                   std::function<void()> killed)
    : faults_(faults), say_(std::move(say)), killed_(std::move(killed)) {}

Task<void> NbdProxy::carry(std::unique_ptr<Channel> client, std::unique_ptr<Channel> server,
                           std::stop_token stop) {
  Connection connection(*this, ++totals_.connections, std::move(client), std::move(server),
                        std::move(stop));
  co_await connection.run();
}

void NbdProxy::note(Fault fault) {
  ++totals_.faults;
  if (say_) say_(fault);
  if (listed_.size() < kMaxListed) listed_.push_back(std::move(fault));
}

}  // namespace roost
