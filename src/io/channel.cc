// SPDX-License-Identifier: MIT
#include "roost/io/channel.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>

#include "roost/aio/aio_context.h"
#include "roost/base/check.h"

namespace roost {

namespace {

// Pieces of a writev that are copied without an allocation, because they change as they are sent.
constexpr std::size_t kFewPieces = 8;

class Pieces {
 public:
  explicit Pieces(std::span<const iovec> from) {
    if (from.size() > few_.size()) many_.resize(from.size());
    rest_ = many_.empty() ? std::span(few_).first(from.size()) : std::span(many_);
    std::ranges::copy(from, rest_.begin());
  }
  Pieces(const Pieces&) = delete;
  Pieces& operator=(const Pieces&) = delete;

  std::span<iovec> get() noexcept { return rest_; }

 private:
  std::array<iovec, kFewPieces> few_;
  std::vector<iovec> many_;
  std::span<iovec> rest_;
};

}  // namespace

std::size_t total_size(std::span<const iovec> pieces) noexcept {
  std::size_t size = 0;
  for (const iovec& piece : pieces) size += piece.iov_len;
  return size;
}

void drop_front(std::span<iovec>& pieces, std::size_t count) noexcept {
  while (!pieces.empty() && (count > 0 || pieces.front().iov_len == 0)) {
    iovec& piece = pieces.front();
    const std::size_t part = std::min(count, piece.iov_len);
    piece.iov_base = static_cast<std::byte*>(piece.iov_base) + part;
    piece.iov_len -= part;
    count -= part;
    if (piece.iov_len == 0) pieces = pieces.subspan(1);
  }
}

// Marks a direction as used, for as long as an operation of it lives.
class Channel::Using {
 public:
  Using(Channel& channel, Direction direction) noexcept
      : channel_(channel), direction_(direction) {}
  Using(const Using&) = delete;
  Using& operator=(const Using&) = delete;
  ~Using() {
    if (began_) channel_.end(direction_);
  }

  bool try_begin() { return began_ = channel_.try_begin(direction_); }

 private:
  Channel& channel_;
  const Direction direction_;
  bool began_ = false;
};

Channel::~Channel() {
  for (const Use& one : uses_) {
    ROOST_CHECK(!one.busy, "channel {} is destroyed while coroutine '{}' uses it", name_,
                one.by->name());
  }
}

std::unexpected<Error> Channel::failure(const char* what, int error) const {
  return fail(error, fmt::format("{} {}", what, name_));
}

std::unexpected<Error> Channel::cancelled(const char* what, const char* done) const {
  return fail(ECANCELED, fmt::format("{} {} ({})", what, name_, done));
}

// True: the operation may begin, here. False: it has to begin where the channel is attached.
bool Channel::try_begin(Direction direction) {
  AioContext* const here = AioContext::current();
  Coroutine* const self = Coroutine::self();
  ROOST_CHECK(self, "channel {} is used outside of any coroutine", name_);
  const std::lock_guard lock(mutex_);
  Use& mine = use(direction);
  const Use& other = use(direction == Direction::kRead ? Direction::kWrite : Direction::kRead);
  ROOST_CHECK(!mine.busy, "coroutine '{}' is a second {} of channel {}: '{}' is at it",
              self->name(), direction == Direction::kRead ? "reader" : "writer", name_,
              mine.by->name());
  AioContext* const attached = context_.load(std::memory_order_relaxed);
  if (attached != here) {
    if (attached && (other.busy || moving_)) return false;
    context_.store(here, std::memory_order_release);
  }
  mine.busy = true;
  mine.by = self;
  return true;
}

void Channel::end(Direction direction) noexcept {
  const std::lock_guard lock(mutex_);
  use(direction).busy = false;
}

// ---- Moving

void Channel::redirect(AioContext& to) {
  {
    const std::lock_guard lock(mutex_);
    context_.store(&to, std::memory_order_release);
    for (Use& one : uses_) one.in_transit = one.busy;
  }
  interrupt(to);
}

Task<void> Channel::arrive() {
  co_await roost::move_to(*context());
  has_arrived(*Coroutine::self());
}

void Channel::has_arrived(const Coroutine& co) {
  Coroutine* mover = nullptr;
  {
    const std::lock_guard lock(mutex_);
    for (Use& one : uses_) {
      if (one.by == &co) one.in_transit = false;
    }
    if (std::ranges::none_of(uses_, &Use::in_transit)) mover = std::exchange(mover_, nullptr);
  }
  if (upper_) upper_->has_arrived(co);
  if (mover) co_wake(*mover);
}

Task<Result<void>> Channel::move_to(AioContext& to) {
  AioContext& from = *AioContext::current();
  AioContext* attached = nullptr;
  bool idle = false;
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(moving_, true)) {
      co_return fail(EBUSY, fmt::format("move channel {}", name_));
    }
    attached = context_.load(std::memory_order_relaxed);
    idle = std::ranges::none_of(uses_, &Use::busy);
    if (idle) context_.store(&to, std::memory_order_release);
  }
  if (!idle && attached != &to) {
    // What waits is interrupted where it waits. Until then operations may end and others begin
    // there, but nobody attaches the channel elsewhere.
    co_await roost::move_to(*attached);
    redirect(to);
    co_await roost::move_to(to);
    for (;;) {
      {
        const std::lock_guard lock(mutex_);
        if (std::ranges::none_of(uses_, &Use::in_transit)) break;
        mover_ = Coroutine::self();
      }
      co_await yield();
    }
  }
  {
    const std::lock_guard lock(mutex_);
    moving_ = false;
  }
  if (AioContext::current() != &from) co_await roost::move_to(from);
  co_return Result<void>();
}

// ---- Reading

std::size_t Channel::take_unread(std::span<const iovec> to) noexcept {
  std::size_t taken = 0;
  for (const iovec& piece : to) {
    const std::size_t part = std::min(piece.iov_len, unread_.size() - unread_begin_);
    if (part > 0) std::memcpy(piece.iov_base, unread_.data() + unread_begin_, part);
    unread_begin_ += part;
    taken += part;
  }
  if (unread_begin_ == unread_.size()) {
    unread_ = {};
    unread_begin_ = 0;
  }
  return taken;
}

// What take_unread() gave may be among it, so it goes in front of the rest.
void Channel::put_back(std::span<const iovec> from, std::size_t size) {
  std::vector<std::byte> bytes;
  bytes.reserve(size + unread_.size() - unread_begin_);
  for (const iovec& piece : from) {
    const auto* const begin = static_cast<const std::byte*>(piece.iov_base);
    const std::size_t part = std::min(size, piece.iov_len);
    bytes.insert(bytes.end(), begin, begin + part);
    size -= part;
  }
  bytes.insert(bytes.end(), unread_.begin() + static_cast<std::ptrdiff_t>(unread_begin_),
               unread_.end());
  unread_ = std::move(bytes);
  unread_begin_ = 0;
}

Task<Result<std::size_t>> Channel::read(std::span<std::byte> to, std::stop_token stop) {
  const iovec piece = as_iovec(to);
  co_return co_await readv(std::span(&piece, 1), std::move(stop));
}

Task<Result<std::size_t>> Channel::readv(std::span<const iovec> to, std::stop_token stop) {
  Using using_it(*this, Direction::kRead);
  while (!using_it.try_begin()) co_await roost::move_to(*context());
  if (stop.stop_requested()) co_return cancelled("read from", "nothing was taken");
  if (total_size(to) == 0) co_return 0;
  if (!unread_.empty()) co_return take_unread(to);
  Result<std::size_t> result = co_await do_readv(to, false, std::move(stop));
  if (in_transit(Direction::kRead)) co_await arrive();
  co_return result;
}

Task<Result<void>> Channel::read_full(std::span<std::byte> to, std::stop_token stop) {
  const iovec piece = as_iovec(to);
  co_return co_await readv_full(std::span(&piece, 1), std::move(stop));
}

Task<Result<void>> Channel::readv_full(std::span<const iovec> to, std::stop_token stop) {
  Using using_it(*this, Direction::kRead);
  while (!using_it.try_begin()) co_await roost::move_to(*context());
  if (stop.stop_requested()) co_return cancelled("read from", "nothing was taken");
  const std::size_t all = total_size(to);
  Pieces pieces(to);
  std::span<iovec> rest = pieces.get();
  std::size_t done = unread_.empty() ? 0 : take_unread(to);
  drop_front(rest, done);
  while (done < all) {
    const Result<std::size_t> n = co_await do_readv(rest, true, stop);
    if (in_transit(Direction::kRead)) co_await arrive();
    if (!n && n.error().code() == ECANCELED && done > 0) put_back(to, done);
    if (!n) co_return std::unexpected(n.error());
    if (*n == 0) {
      co_return fail(ECONNRESET, fmt::format("read from {}: the stream ended after {} of {} bytes",
                                             name_, done, all));
    }
    done += *n;
    drop_front(rest, *n);
  }
  co_return Result<void>();
}

// ---- Writing

Task<Result<std::size_t>> Channel::write(std::span<const std::byte> from, std::stop_token stop) {
  const iovec piece = as_iovec(from);
  co_return co_await writev(std::span(&piece, 1), std::move(stop));
}

Task<Result<std::size_t>> Channel::writev(std::span<const iovec> from, std::stop_token stop) {
  Using using_it(*this, Direction::kWrite);
  while (!using_it.try_begin()) co_await roost::move_to(*context());
  if (stop.stop_requested()) co_return cancelled("write to", "nothing was sent");
  if (total_size(from) == 0) co_return 0;
  Result<std::size_t> result = co_await do_writev(from, false, std::move(stop));
  if (in_transit(Direction::kWrite)) co_await arrive();
  co_return result;
}

Task<Result<void>> Channel::write_full(std::span<const std::byte> from, std::stop_token stop,
                                       std::size_t* sent) {
  const iovec piece = as_iovec(from);
  co_return co_await writev_full(std::span(&piece, 1), std::move(stop), sent);
}

Task<Result<void>> Channel::writev_full(std::span<const iovec> from, std::stop_token stop,
                                        std::size_t* sent) {
  Pieces pieces(from);
  co_return co_await writev_in_place(pieces.get(), std::move(stop), sent);
}

// `send` sends what it can of what is left, and is told what it has sent before.
template <class Send>
Task<Result<void>> Channel::send_all(std::uint64_t all, Send send, std::stop_token stop,
                                     std::size_t* sent) {
  std::size_t count = 0;
  std::size_t& done = sent ? *sent : count;
  done = 0;
  Using using_it(*this, Direction::kWrite);
  while (!using_it.try_begin()) co_await roost::move_to(*context());
  if (stop.stop_requested()) co_return cancelled("write to", "nothing was sent");
  std::size_t before = 0;
  while (done < all) {
    const Result<std::size_t> n = co_await send(before, stop);
    if (in_transit(Direction::kWrite)) co_await arrive();
    if (!n) {
      co_return fail(n.error().code(),
                     fmt::format("{}, after {} of {} bytes", n.error().doing(), done, all));
    }
    before = *n;
    done += before;
  }
  co_return Result<void>();
}

Task<Result<std::size_t>> Channel::do_send_file(FilePart, std::stop_token) {
  co_return failure("send a file to", ENOTSUP);
}

Task<Result<void>> Channel::send_file(FilePart part, std::stop_token stop, std::size_t* sent) {
  auto send = [this, part](std::size_t before, const std::stop_token& token) mutable {
    part.offset += before;
    part.length -= before;
    return do_send_file(part, token);
  };
  return send_all(part.length, send, std::move(stop), sent);
}

Task<Result<void>> Channel::writev_in_place(std::span<iovec> from, std::stop_token stop,
                                            std::size_t* sent) {
  auto send = [this, from](std::size_t before, const std::stop_token& token) mutable {
    drop_front(from, before);  // at first: what is empty
    return do_writev(from, true, token);
  };
  return send_all(total_size(from), send, std::move(stop), sent);
}

// ---- Ending

Task<Result<void>> Channel::shutdown(StreamEnd end, std::stop_token stop) {
  if (end == StreamEnd::kBoth) {
    abort();
    co_return Result<void>();
  }
  if (end == StreamEnd::kRead) co_return co_await do_shutdown(end, std::move(stop));
  Using using_it(*this, Direction::kWrite);
  while (!using_it.try_begin()) co_await roost::move_to(*context());
  Result<void> result = co_await do_shutdown(end, std::move(stop));
  if (in_transit(Direction::kWrite)) co_await arrive();
  co_return result;
}

Task<void> Channel::linger(std::int64_t, std::stop_token) { co_return; }

}  // namespace roost
