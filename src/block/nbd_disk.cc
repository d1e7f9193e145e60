// SPDX-License-Identifier: MIT
#include "roost/block/nbd_disk.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <utility>

#include "roost/base/check.h"
#include "roost/nbd/remote_export.h"

namespace roost {

namespace {

constexpr std::size_t kZeroStep = 1 << 20;

class NbdDisk final : public BlockDriver {
 public:
  NbdDisk(const nbd::NbdTarget& target, std::unique_ptr<nbd::RemoteExport> remote, bool read_only)
      : BlockDriver(target.text(), remote->size(), read_only),
        remote_(std::move(remote)),
        // The others would not know.
        can_resize_(remote_->connections() == 1 && remote_->offers(nbd::kTransmissionSendResize)),
        can_zero_fast_(remote_->offers(nbd::kTransmissionSendFastZero)),
        knows_extents_(!remote_->outcome().contexts.empty()) {}

  ~NbdDisk() override { ROOST_CHECK(closed_, "disk {} was not closed", name()); }

  Task<Result<void>> read(std::uint64_t offset, std::span<std::byte> to) override {
    return remote_->read(offset, to);
  }

  Task<Result<void>> write(std::uint64_t offset, std::span<const iovec> from, bool fua) override {
    const bool flag = fua && remote_->offers(nbd::kTransmissionSendFua);
    const std::uint16_t flags = flag ? nbd::kCommandFua : 0;
    Result<void> written = co_await remote_->writev(offset, from, flags);
    if (written && fua && !flag) co_return co_await flush();
    co_return written;
  }

  // One flush covers what all connections were told is written: that is what a server promises that
  // allows several.
  Task<Result<void>> flush() override {
    if (!remote_->offers(nbd::kTransmissionSendFlush)) co_return Result<void>();
    co_return co_await remote_->flush();
  }

  Task<Result<void>> discard(std::uint64_t offset, std::uint64_t length) override {
    if (!remote_->offers(nbd::kTransmissionSendTrim)) co_return Result<void>();
    co_return co_await remote_->trim(offset, length);
  }

  Task<Result<void>> write_zeroes(std::uint64_t offset, std::uint64_t length,
                                  ZeroFlags flags) override {
    if (remote_->offers(nbd::kTransmissionSendWriteZeroes)) {
      std::uint16_t command_flags = 0;
      if (!flags.may_unmap) command_flags |= nbd::kCommandNoHole;
      if (flags.fast && can_zero_fast_) command_flags |= nbd::kCommandFastZero;
      const bool fua = flags.fua && remote_->offers(nbd::kTransmissionSendFua);
      if (fua) command_flags |= nbd::kCommandFua;
      Result<void> zeroed = co_await remote_->zero(offset, length, command_flags);
      if (zeroed && flags.fua && !fua) co_return co_await flush();
      co_return zeroed;
    }
    if (flags.fast) co_return fail(ENOTSUP, "zero " + name() + " quickly");
    const std::vector<std::byte> zeroes(std::min<std::uint64_t>(length, kZeroStep));
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
        co_await remote_->block_status(offset, length, flags);
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
    if (!remote_->offers(nbd::kTransmissionSendCache)) co_return Result<void>();
    co_return co_await remote_->cache(offset, length);
  }

  Task<Result<void>> resize(std::uint64_t new_size) override {
    Result<void> resized = co_await remote_->resize(new_size);
    if (resized) set_size(new_size);
    co_return resized;
  }

  bool can_resize() const noexcept override { return can_resize_; }
  bool can_zero_fast() const noexcept override { return can_zero_fast_; }

  Task<Result<void>> close() override {
    const Result<void> closed = co_await remote_->close();
    closed_ = true;
    if (!closed) co_return fail(closed.error().code(), name() + ": " + closed.error().doing());
    co_return Result<void>();
  }

 private:
  const std::unique_ptr<nbd::RemoteExport> remote_;
  const bool can_resize_;
  const bool can_zero_fast_;
  const bool knows_extents_;
  bool closed_ = false;
};

}  // namespace

Task<Result<std::unique_ptr<BlockDriver>>> open_nbd_disk(nbd::NbdTarget target,
                                                         NbdDiskOptions options,
                                                         std::stop_token stop) {
  ROOST_CHECK(!options.contexts.empty(), "an NBD disk needs a context");
  nbd::RemoteExportOptions how;
  how.contexts = options.contexts;
  how.connections = options.connections;
  how.reconnect_timeout_ns = options.reconnect_timeout_ns;
  how.replay_writes = options.replay_writes;
  // The address is taken to tell one client from another.
  how.seed = reinterpret_cast<std::uintptr_t>(&how);
  const auto shared = std::make_shared<const nbd::NbdTarget>(std::move(target));
  nbd::RemoteExport::Connect connect = [shared](std::stop_token stopping) {
    nbd::ClientWishes wishes;
    wishes.meta_contexts = {std::string(nbd::kBaseAllocation)};
    return shared->connect(std::move(wishes), std::move(stopping));
  };
  auto opening = nbd::RemoteExport::open(std::move(connect), how, std::move(stop));
  Result<std::unique_ptr<nbd::RemoteExport>> remote = co_await std::move(opening);
  if (!remote) {
    const Error& error = remote.error();
    if (error.code() != EMEDIUMTYPE) co_return std::unexpected(error);
    co_return fail(EMEDIUMTYPE, shared->text() + ": " + error.doing());
  }
  const bool read_only = options.read_only || (*remote)->offers(nbd::kTransmissionReadOnly);
  co_return std::make_unique<NbdDisk>(*shared, std::move(*remote), read_only);
}

}  // namespace roost
