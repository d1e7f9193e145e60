// SPDX-License-Identifier: MIT
#include "roost/io/pipe_channel.h"

#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>

namespace roost {

PipeChannel::PipeChannel(UniqueFd read_end, UniqueFd write_end, std::string name)
    : Channel(std::move(name)), ends_{std::move(read_end), std::move(write_end)} {
  for (std::size_t i = 0; i < ends_.size(); ++i) {
    ended_[i] = !ends_[i];
    if (ends_[i]) ::fcntl(ends_[i].get(), F_SETFL, ::fcntl(ends_[i].get(), F_GETFL) | O_NONBLOCK);
  }
}

PipeChannel::~PipeChannel() = default;

// Tries, and polls where there is nothing to be had. Polling, unlike reading in the ring, works
// for everything that can be polled, and is ended without a doubt about what was transferred.
template <class Call>
Task<Result<std::size_t>> PipeChannel::transfer(Direction direction, const char* what, Call call,
                                                std::stop_token stop) {
  const bool reads = direction == Direction::kRead;
  const auto index = static_cast<std::size_t>(direction);
  for (;;) {
    if (in_transit(direction)) co_await arrive();
    if (ended_[index]) {
      ends_[index].reset();
      if (reads) co_return 0;
      co_return failure(what, EPIPE);
    }
    const ssize_t n = call(ends_[index].get());
    if (n >= 0) co_return static_cast<std::size_t>(n);
    if (errno == EINTR) continue;
    if (errno != EAGAIN) co_return failure(what, errno);
    CancellableIoAwaiter wait(io_poll(ends_[index].get(), reads ? POLLIN : POLLOUT).request(), stop,
                              &slots_[index]);
    const std::int64_t ready = co_await std::move(wait);
    if (ready == -ECANCELED && stop.stop_requested()) {
      co_return cancelled(what, reads ? "nothing was taken" : "nothing was sent");
    }
    if (ready < 0 && ready != -ECANCELED && ready != -EINTR) {
      co_return failure(what, static_cast<int>(-ready));
    }
  }
}

Task<Result<std::size_t>> PipeChannel::do_readv(std::span<const iovec> to, bool,
                                                std::stop_token stop) {
  const auto call = [to](int fd) noexcept {
    return ::readv(fd, to.data(), static_cast<int>(std::min<std::size_t>(to.size(), IOV_MAX)));
  };
  co_return co_await transfer(Direction::kRead, "read from", call, std::move(stop));
}

Task<Result<std::size_t>> PipeChannel::do_writev(std::span<const iovec> from, bool,
                                                 std::stop_token stop) {
  const auto call = [from](int fd) noexcept {
    return ::writev(fd, from.data(), static_cast<int>(std::min<std::size_t>(from.size(), IOV_MAX)));
  };
  co_return co_await transfer(Direction::kWrite, "write to", call, std::move(stop));
}

Task<Result<void>> PipeChannel::do_shutdown(StreamEnd which, std::stop_token) {
  if (which == StreamEnd::kRead) {
    // A read that waits finds it, and closes the descriptor.
    ended_[0] = true;
    slots_[0].interrupt();
  } else {
    ended_[1] = true;
    ends_[1].reset();  // nobody else writes
  }
  co_return Result<void>();
}

void PipeChannel::abort() noexcept {
  ended_ = {true, true};
  for (IoSlot& slot : slots_) slot.interrupt();
}

void PipeChannel::interrupt(AioContext&) {
  for (IoSlot& slot : slots_) slot.interrupt();
}

}  // namespace roost
