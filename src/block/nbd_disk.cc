// SPDX-License-Identifier: MIT
#include "roost/block/nbd_disk.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <utility>

#include "roost/aio/aio_context.h"
#include "roost/base/check.h"

namespace roost {

namespace {

constexpr std::size_t kZeroChunk = 1 << 20;

class NbdDisk final : public BlockDriver {
 public:
  struct Connection {
    std::unique_ptr<nbd::NbdClient> client;
    AioContext* context;  // the one it lives on
  };

  NbdDisk(const nbd::NbdTarget& target, std::vector<Connection> connections, bool read_only)
      : BlockDriver(target.text(), connections.front().client->size(), read_only),
        connections_(std::move(connections)),
        can_resize_(first().offers(nbd::kTransmissionSendResize)),
        can_zero_fast_(first().offers(nbd::kTransmissionSendFastZero)),
        knows_extents_(!first().outcome().contexts.empty()) {}

  ~NbdDisk() override { ROOST_CHECK(closed_, "disk {} was not closed", name()); }

  Task<Result<void>> read(std::uint64_t offset, std::span<std::byte> to) override {
    return choose().read(offset, to);
  }

  Task<Result<void>> write(std::uint64_t offset, std::span<const iovec> from, bool fua) override {
    const bool flag = fua && first().offers(nbd::kTransmissionSendFua);
    const std::uint16_t flags = flag ? nbd::kCommandFua : 0;
    Result<void> written = co_await choose().writev(offset, from, flags);
    if (written && fua && !flag) co_return co_await flush();
    co_return written;
  }

  // One flush covers what all connections were told is written: that is what a server promises that
  // allows several.
  Task<Result<void>> flush() override {
    if (!first().offers(nbd::kTransmissionSendFlush)) co_return Result<void>();
    co_return co_await choose().flush();
  }

  Task<Result<void>> discard(std::uint64_t offset, std::uint64_t length) override {
    if (!first().offers(nbd::kTransmissionSendTrim)) co_return Result<void>();
    co_return co_await choose().trim(offset, length);
  }

  Task<Result<void>> write_zeroes(std::uint64_t offset, std::uint64_t length,
                                  ZeroFlags flags) override {
    if (first().offers(nbd::kTransmissionSendWriteZeroes)) {
      std::uint16_t command_flags = 0;
      if (!flags.may_unmap) command_flags |= nbd::kCommandNoHole;
      if (flags.fast && can_zero_fast_) command_flags |= nbd::kCommandFastZero;
      const bool fua = flags.fua && first().offers(nbd::kTransmissionSendFua);
      if (fua) command_flags |= nbd::kCommandFua;
      Result<void> zeroed = co_await choose().zero(offset, length, command_flags);
      if (zeroed && flags.fua && !fua) co_return co_await flush();
      co_return zeroed;
    }
    if (flags.fast) co_return fail(ENOTSUP, "zero " + name() + " quickly");
    const std::vector<std::byte> zeroes(std::min<std::uint64_t>(length, kZeroChunk));
    while (length > 0) {
      const std::size_t part = std::min<std::uint64_t>(length, zeroes.size());
      const iovec piece{const_cast<std::byte*>(zeroes.data()), part};
      const Result<void> written = co_await write(offset, std::span(&piece, 1), false);
      if (!written) co_return written;
      offset += part;
      length -= part;
    }
    if (flags.fua) co_return co_await flush();
    co_return Result<void>();
  }

  Task<Result<std::vector<Extent>>> block_status(std::uint64_t offset, std::uint64_t length,
                                                 std::size_t max_extents) override {
    std::vector<Extent> extents;
    if (!knows_extents_) {
      extents.push_back({.length = length, .hole = false, .zero = false});
      co_return extents;
    }
    const std::uint16_t flags = max_extents == 1 ? nbd::kCommandReqOne : 0;
    const Result<std::vector<nbd::ContextExtents>> status =
        co_await choose().block_status(offset, length, flags);
    if (!status) co_return std::unexpected(status.error());
    for (const nbd::StatusExtent& one : status->front().extents) {
      if (length == 0 || extents.size() == max_extents) break;
      // The last one may be longer than what was asked for.
      const Extent extent{.length = std::min(one.length, length),
                          .hole = (one.flags & nbd::kStateHole) != 0,
                          .zero = (one.flags & nbd::kStateZero) != 0};
      length -= extent.length;
      if (!extents.empty() && extents.back().hole == extent.hole &&
          extents.back().zero == extent.zero) {
        extents.back().length += extent.length;
      } else {
        extents.push_back(extent);
      }
    }
    co_return extents;
  }

  Task<Result<void>> cache(std::uint64_t offset, std::uint64_t length) override {
    if (!first().offers(nbd::kTransmissionSendCache)) co_return Result<void>();
    co_return co_await choose().cache(offset, length);
  }

  Task<Result<void>> resize(std::uint64_t new_size) override {
    Result<void> resized = co_await first().resize(new_size);
    if (resized) set_size(new_size);
    co_return resized;
  }

  bool can_resize() const noexcept override { return can_resize_; }
  bool can_zero_fast() const noexcept override { return can_zero_fast_; }

  Task<void> close() override {
    for (const Connection& one : connections_) co_await one.client->disconnect();
    closed_ = true;
  }

 private:
  nbd::NbdClient& first() const noexcept { return *connections_.front().client; }

  // One of the current context, in turn; else any, in turn.
  nbd::NbdClient& choose() noexcept {
    // Relaxed: any number will do.
    const std::size_t turn = next_.fetch_add(1, std::memory_order_relaxed);
    const AioContext* const here = AioContext::current();
    const std::size_t count = connections_.size();
    for (std::size_t i = 0; i < count; ++i) {
      const Connection& one = connections_[(turn + i) % count];
      if (one.context == here) return *one.client;
    }
    return *connections_[turn % count].client;
  }

  const std::vector<Connection> connections_;
  const bool can_resize_;
  const bool can_zero_fast_;
  const bool knows_extents_;
  std::atomic<std::size_t> next_{0};  // any thread
  bool closed_ = false;
};

Task<void> disconnect_all(std::vector<NbdDisk::Connection>& connections) {
  for (NbdDisk::Connection& one : connections) co_await one.client->disconnect();
}

// What may differ between two connections to one export: nothing.
bool same_export(const nbd::NbdClient& one, const nbd::NbdClient& other) {
  return one.size() == other.size() &&
         one.outcome().transmission_flags == other.outcome().transmission_flags;
}

}  // namespace

Task<Result<std::unique_ptr<BlockDriver>>> open_nbd_disk(nbd::NbdTarget target,
                                                         NbdDiskOptions options,
                                                         std::stop_token stop) {
  ROOST_CHECK(!options.contexts.empty(), "an NBD disk needs a context");
  AioContext& home = *AioContext::current();
  nbd::ClientWishes wishes;
  wishes.meta_contexts = {std::string(nbd::kBaseAllocation)};
  std::size_t wanted = options.connections ? options.connections : options.contexts.size();
  std::vector<NbdDisk::Connection> connections;
  Result<void> good;
  while (connections.size() < wanted) {
    AioContext& context = *options.contexts[connections.size() % options.contexts.size()];
    if (AioContext::current() != &context) co_await move_to(context);
    Result<std::unique_ptr<nbd::NbdClient>> client = co_await target.connect(wishes, stop);
    if (!client) {
      good = std::unexpected(std::move(client.error()));
      break;
    }
    if (!(*client)->offers(nbd::kTransmissionCanMultiConn)) wanted = 1;
    connections.push_back({std::move(*client), &context});
    if (!same_export(*connections.front().client, *connections.back().client)) {
      good =
          fail(EMEDIUMTYPE, target.text() + ": the export changes from connection to connection");
      break;
    }
  }
  if (AioContext::current() != &home) co_await move_to(home);
  if (!good) {
    co_await disconnect_all(connections);
    co_return std::unexpected(good.error());
  }
  const bool read_only =
      options.read_only || connections.front().client->offers(nbd::kTransmissionReadOnly);
  co_return std::make_unique<NbdDisk>(target, std::move(connections), read_only);
}

}  // namespace roost
