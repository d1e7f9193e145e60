// SPDX-License-Identifier: MIT
#include "roost/nbd/client.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

#include "nbd/client_connection.h"
#include "roost/base/check.h"

namespace roost::nbd {
namespace {

struct Handshake {
  std::unique_ptr<Channel> channel{};
  ClientNegotiation::Outcome outcome{};
  bool in_transmission = false;
  std::vector<std::byte> received{};  // behind it
};

Task<Result<void>> send_output(Channel& channel, ClientNegotiation& negotiation,
                               std::stop_token stop) {
  if (negotiation.output().empty()) co_return Result<void>();
  const Result<void> sent = co_await channel.write_full(negotiation.output(), std::move(stop));
  if (sent) negotiation.drain_output(negotiation.output().size());
  co_return sent;
}

Task<Result<Handshake>> shake_hands(std::unique_ptr<Channel> channel,
                                    const NbdClientOptions& options, std::stop_token stop) {
  using State = ClientNegotiation::State;
  const std::string name = channel->name();
  const auto with_name = [&](const Error& error) {
    return std::unexpected(Error(error.code(), fmt::format("{}: {}", name, error.doing())));
  };
  if (const Result<void> checked = check_wishes(options.wishes); !checked) {
    co_return with_name(checked.error());
  }
  if (options.wishes.tls != ClientWishes::Tls::kOff && !options.start_tls) {
    co_return fail(ENOTSUP, fmt::format("{}: there is no TLS to start", name));
  }
  ClientNegotiation negotiation(options.wishes);
  std::array<std::byte, 4096> buffer;
  std::span<const std::byte> input;
  while (negotiation.state() == State::kNegotiating) {
    Result<void> sent = co_await send_output(*channel, negotiation, stop);
    if (!sent) co_return std::unexpected(sent.error());
    const Result<std::size_t> got = co_await channel->read(buffer, stop);
    if (!got) co_return std::unexpected(got.error());
    if (*got == 0) {
      negotiation.end_of_input();
      break;
    }
    input = std::span(buffer).first(*got);
    input = input.subspan(negotiation.feed(input));
    if (negotiation.state() != State::kStartTls) continue;
    sent = co_await send_output(*channel, negotiation, stop);
    if (!sent) co_return std::unexpected(sent.error());
    auto handshake = options.start_tls(std::move(channel), stop);
    auto secure = co_await std::move(handshake);
    if (!secure) co_return std::unexpected(secure.error());
    channel = *std::move(secure);
    negotiation.tls_started();
  }
  const Result<void> sent = co_await send_output(*channel, negotiation, stop);
  if (negotiation.state() == State::kFailed) co_return with_name(negotiation.failure());
  if (!sent && negotiation.state() == State::kTransmission) co_return std::unexpected(sent.error());
  Handshake result;
  result.channel = std::move(channel);
  result.outcome = negotiation.outcome();
  result.in_transmission = negotiation.state() == State::kTransmission;
  result.received.assign(input.begin(), input.end());
  co_return std::move(result);
}

}  // namespace

Task<Result<ClientNegotiation::Outcome>> query_nbd_server(std::unique_ptr<Channel> channel,
                                                          const NbdClientOptions& options,
                                                          std::stop_token stop) {
  Result<Handshake> done = co_await shake_hands(std::move(channel), options, stop);
  if (!done) co_return std::unexpected(done.error());
  if (done->in_transmission) {
    std::array<std::byte, kMaxRequestHeader> header;
    const ClientRequest goodbye = {.command = Command::kDisc};
    const std::size_t size = encode_request(header, done->outcome.headers, goodbye);
    (void)co_await done->channel->write_full(std::span(header).first(size), stop);
  }
  (void)co_await done->channel->shutdown(StreamEnd::kWrite, stop);
  co_return std::move(done->outcome);
}

NbdClient::NbdClient(std::shared_ptr<ClientConnection> connection)
    : connection_(std::move(connection)) {}

NbdClient::~NbdClient() {
  ROOST_CHECK(connection_->ended(), "the NBD client of {} goes without disconnect()",
              connection_->name());
}

Task<Result<std::unique_ptr<NbdClient>>> NbdClient::connect(std::unique_ptr<Channel> channel,
                                                            const NbdClientOptions& options,
                                                            std::stop_token stop) {
  ROOST_CHECK(options.wishes.mode == ClientWishes::Mode::kGo, "a client that only asks");
  Result<Handshake> done = co_await shake_hands(std::move(channel), options, std::move(stop));
  if (!done) co_return std::unexpected(done.error());
  auto connection = std::make_shared<ClientConnection>(
      std::move(done->channel), std::move(done->outcome), std::move(done->received));
  connection->start();
  co_return std::unique_ptr<NbdClient>(new NbdClient(std::move(connection)));
}

const NbdClient::Outcome& NbdClient::outcome() const noexcept { return connection_->outcome(); }

std::uint64_t NbdClient::size() const noexcept {
  return connection_->size.load(std::memory_order_acquire);
}

Result<void> NbdClient::state() const { return connection_->state(); }

std::size_t NbdClient::in_flight() const { return connection_->in_flight(); }

Task<void> NbdClient::disconnect(std::stop_token stop) {
  return connection_->leave(std::move(stop));
}

Task<Result<void>> NbdClient::move_to(AioContext& to) { return connection_->move_to(to); }

// ---- requests ----

Result<void> NbdClient::check(const ClientRequest& request, std::uint16_t needs,
                              std::uint16_t allowed_flags) const {
  const auto refuse = [&](int code, std::string_view why) {
    return fail(code, fmt::format("{}: {}: {}", connection_->name(), to_string(request), why));
  };
  if (request.flags & ~allowed_flags) return refuse(EINVAL, "such flags do not belong to it");
  if (needs && !offers(needs)) return refuse(ENOTSUP, "the server does not offer it");
  if ((request.flags & kCommandFua) && !offers(kTransmissionSendFua)) {
    return refuse(ENOTSUP, "the server does not offer FUA");
  }
  if ((request.flags & kCommandFastZero) && !offers(kTransmissionSendFastZero)) {
    return refuse(ENOTSUP, "the server does not offer FAST_ZERO");
  }
  const bool writes = request.command == Command::kWrite || request.command == Command::kTrim ||
                      request.command == Command::kWriteZeroes ||
                      request.command == Command::kResize;
  if (writes && offers(kTransmissionReadOnly)) return refuse(EROFS, "the export is read-only");
  if (request.command == Command::kFlush || request.command == Command::kResize) return {};
  const std::uint64_t end = size();
  if (request.length > end || request.offset > end - request.length) {
    return refuse(EINVAL, fmt::format("beyond the export's {} bytes", end));
  }
  const std::uint32_t block = outcome().min_block;
  if (request.offset % block != 0 || request.length % block != 0) {
    return refuse(EINVAL, fmt::format("not in whole blocks of {} bytes", block));
  }
  return {};
}

std::uint64_t NbdClient::longest_part(Command command) const {
  const std::uint64_t most = command == Command::kRead || command == Command::kWrite
                                 ? std::min(outcome().max_payload, kMaxPayload)
                                 : longest_request(outcome().headers);
  return most - most % std::max(outcome().min_block, 1u);
}

Task<Result<void>> NbdClient::in_parts(ClientRequest request, std::span<const iovec> data,
                                       std::stop_token stop, WhenStopped when) {
  const std::uint64_t end = request.offset + request.length;
  const std::uint64_t most = longest_part(request.command);
  const bool has_data = !data.empty();
  const std::uint64_t begin = request.offset;
  while (request.offset < end) {
    request.length = std::min(end - request.offset, most);
    std::vector<iovec> pieces;
    if (has_data) pieces = pieces_of(data, request.offset - begin, request.length);
    auto pending = std::make_shared<PendingRequest>(request, pieces);
    Result<void> done = co_await connection_->run(std::move(pending), stop, when);
    if (!done) {
      if (done.error().code() == ECANCELED && request.offset > begin) {
        co_return fail(EINPROGRESS,
                       fmt::format("{}, but what comes before it was done", done.error().doing()));
      }
      co_return done;
    }
    request.offset += request.length;
  }
  co_return Result<void>();
}

Task<Result<void>> NbdClient::readv(std::uint64_t offset, std::span<const iovec> to,
                                    std::stop_token stop, WhenStopped when) {
  const ClientRequest request = {
      .command = Command::kRead, .offset = offset, .length = total_size(to)};
  if (Result<void> fits = check(request, 0, 0); !fits) co_return fits;
  co_return co_await in_parts(request, to, std::move(stop), when);
}

Task<Result<void>> NbdClient::read(std::uint64_t offset, std::span<std::byte> to,
                                   std::stop_token stop, WhenStopped when) {
  const iovec piece = as_iovec(to);
  co_return co_await readv(offset, std::span(&piece, 1), std::move(stop), when);
}

Task<Result<void>> NbdClient::writev(std::uint64_t offset, std::span<const iovec> from,
                                     std::uint16_t flags, std::stop_token stop, WhenStopped when) {
  const ClientRequest request = {
      .command = Command::kWrite, .flags = flags, .offset = offset, .length = total_size(from)};
  if (Result<void> fits = check(request, 0, kCommandFua); !fits) co_return fits;
  co_return co_await in_parts(request, from, std::move(stop), when);
}

Task<Result<void>> NbdClient::write(std::uint64_t offset, std::span<const std::byte> from,
                                    std::uint16_t flags, std::stop_token stop, WhenStopped when) {
  const iovec piece = as_iovec(from);
  co_return co_await writev(offset, std::span(&piece, 1), flags, std::move(stop), when);
}

Task<Result<void>> NbdClient::flush(std::stop_token stop, WhenStopped when) {
  const ClientRequest request = {.command = Command::kFlush};
  if (Result<void> fits = check(request, kTransmissionSendFlush, 0); !fits) co_return fits;
  auto pending = std::make_shared<PendingRequest>(request, std::span<const iovec>());
  co_return co_await connection_->run(std::move(pending), std::move(stop), when);
}

Task<Result<void>> NbdClient::trim(std::uint64_t offset, std::uint64_t length, std::uint16_t flags,
                                   std::stop_token stop, WhenStopped when) {
  const ClientRequest request = {
      .command = Command::kTrim, .flags = flags, .offset = offset, .length = length};
  if (Result<void> fits = check(request, kTransmissionSendTrim, kCommandFua); !fits) co_return fits;
  co_return co_await in_parts(request, {}, std::move(stop), when);
}

Task<Result<void>> NbdClient::zero(std::uint64_t offset, std::uint64_t length, std::uint16_t flags,
                                   std::stop_token stop, WhenStopped when) {
  const ClientRequest request = {
      .command = Command::kWriteZeroes, .flags = flags, .offset = offset, .length = length};
  const Result<void> fits =
      check(request, kTransmissionSendWriteZeroes, kCommandFua | kCommandNoHole | kCommandFastZero);
  if (!fits) co_return fits;
  co_return co_await in_parts(request, {}, std::move(stop), when);
}

Task<Result<void>> NbdClient::cache(std::uint64_t offset, std::uint64_t length,
                                    std::stop_token stop, WhenStopped when) {
  const ClientRequest request = {.command = Command::kCache, .offset = offset, .length = length};
  if (Result<void> fits = check(request, kTransmissionSendCache, 0); !fits) co_return fits;
  co_return co_await in_parts(request, {}, std::move(stop), when);
}

Task<Result<std::vector<ContextExtents>>> NbdClient::block_status(std::uint64_t offset,
                                                                  std::uint64_t length,
                                                                  std::uint16_t flags,
                                                                  std::stop_token stop,
                                                                  WhenStopped when) {
  ClientRequest request = {
      .command = Command::kBlockStatus, .flags = flags, .offset = offset, .length = length};
  if (Result<void> fits = check(request, 0, kCommandReqOne); !fits) {
    co_return std::unexpected(fits.error());
  }
  if (outcome().contexts.empty()) {
    co_return fail(ENOTSUP, fmt::format("{}: {}: no metadata contexts were negotiated",
                                        connection_->name(), to_string(request)));
  }
  if (length == 0) {
    co_return fail(EINVAL,
                   fmt::format("{}: {}: of nothing", connection_->name(), to_string(request)));
  }
  request.length = std::min(length, longest_part(request.command));
  auto pending = std::make_shared<PendingRequest>(request, std::span<const iovec>());
  const Result<void> done = co_await connection_->run(pending, std::move(stop), when);
  if (!done) co_return std::unexpected(done.error());

  std::vector<ContextExtents> result;
  for (const MetaContext& context : outcome().contexts) {
    const auto found = std::ranges::find(pending->status, context.id, &ContextStatus::context_id);
    // An extent may reach further than anybody asked, but there is nothing behind the end.
    std::uint64_t left = std::max(size(), offset) - offset;
    ContextExtents& extents = result.emplace_back(ContextExtents{.context = context.name});
    for (StatusExtent extent : found->extents) {
      extent.length = std::min(extent.length, left);
      left -= extent.length;
      if (extent.length > 0) extents.extents.push_back(extent);
    }
  }
  co_return std::move(result);
}

Task<Result<void>> NbdClient::resize(std::uint64_t size, std::stop_token stop, WhenStopped when) {
  const ClientRequest request = {.command = Command::kResize, .offset = size};
  if (Result<void> fits = check(request, kTransmissionSendResize, 0); !fits) co_return fits;
  auto pending = std::make_shared<PendingRequest>(request, std::span<const iovec>());
  Result<void> done = co_await connection_->run(std::move(pending), std::move(stop), when);
  if (done) connection_->size.store(size, std::memory_order_release);
  co_return done;
}

}  // namespace roost::nbd
