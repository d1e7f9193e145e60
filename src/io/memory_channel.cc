// SPDX-License-Identifier: MIT
#include "roost/io/memory_channel.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <vector>

#include "roost/sync/co_queue.h"

namespace roost {

namespace {

// One direction: a ring of bytes between two coroutines.
class Stream {
 public:
  explicit Stream(std::size_t capacity) : bytes_(capacity) {}

  RealPlatform::Mutex mutex;  // guards the rest
  CoQueue changed{"a memory channel"};
  bool write_ended = false;
  bool read_ended = false;

  std::size_t filled() const noexcept { return filled_; }

  std::size_t put(std::span<const iovec> from) noexcept {
    std::size_t done = 0;
    for (const iovec& piece : from) {
      const auto* at = static_cast<const std::byte*>(piece.iov_base);
      for (std::size_t left = std::min(piece.iov_len, bytes_.size() - filled_); left > 0;) {
        const std::size_t end = (begin_ + filled_) % bytes_.size();
        const std::size_t part = std::min(left, bytes_.size() - end);
        std::memcpy(bytes_.data() + end, at, part);
        at += part;
        left -= part;
        done += part;
        filled_ += part;
      }
    }
    return done;
  }

  std::size_t take(std::span<const iovec> to) noexcept {
    std::size_t done = 0;
    for (const iovec& piece : to) {
      auto* at = static_cast<std::byte*>(piece.iov_base);
      for (std::size_t left = std::min(piece.iov_len, filled_); left > 0;) {
        const std::size_t part = std::min(left, bytes_.size() - begin_);
        std::memcpy(at, bytes_.data() + begin_, part);
        at += part;
        left -= part;
        done += part;
        begin_ = (begin_ + part) % bytes_.size();
        filled_ -= part;
      }
    }
    return done;
  }

 private:
  std::vector<std::byte> bytes_;
  std::size_t begin_ = 0;
  std::size_t filled_ = 0;
};

// A wake-up may enter the other end's coroutine at once, so none is made with the mutex held.
class MemoryChannel final : public Channel {
 public:
  MemoryChannel(std::string name, std::shared_ptr<Stream> in, std::shared_ptr<Stream> out)
      : Channel(std::move(name)), in_(std::move(in)), out_(std::move(out)) {}

  ~MemoryChannel() override {
    end_reading();
    end_writing();
  }

  void abort() noexcept override {
    end_reading();
    end_writing();
  }

 protected:
  Task<Result<std::size_t>> do_readv(std::span<const iovec> to, bool,
                                     std::stop_token stop) override {
    std::size_t taken = 0;
    for (;;) {
      if (in_transit(Direction::kRead)) co_await arrive();
      std::unique_lock lock(in_->mutex);
      taken = in_->read_ended ? 0 : in_->take(to);
      if (taken > 0 || in_->write_ended || in_->read_ended) break;
      const Result<void> waited = co_await in_->changed.wait(lock, stop);
      lock.unlock();
      if (!waited && !in_transit(Direction::kRead)) {
        co_return cancelled("read from", "nothing was taken");
      }
    }
    in_->changed.wake_all();
    co_return taken;
  }

  Task<Result<std::size_t>> do_writev(std::span<const iovec> from, bool,
                                      std::stop_token stop) override {
    std::size_t put = 0;
    for (;;) {
      if (in_transit(Direction::kWrite)) co_await arrive();
      std::unique_lock lock(out_->mutex);
      if (out_->write_ended || out_->read_ended) co_return failure("write to", EPIPE);
      put = out_->put(from);
      if (put > 0) break;
      const Result<void> waited = co_await out_->changed.wait(lock, stop);
      lock.unlock();
      if (!waited && !in_transit(Direction::kWrite)) {
        co_return cancelled("write to", "nothing was sent");
      }
    }
    out_->changed.wake_all();
    co_return put;
  }

  Task<Result<void>> do_shutdown(StreamEnd end, std::stop_token) override {
    end == StreamEnd::kRead ? end_reading() : end_writing();
    co_return Result<void>();
  }

  void interrupt(AioContext&) override {
    in_->changed.wake_all();
    out_->changed.wake_all();
  }

 private:
  static void end(Stream& stream, bool Stream::*which) noexcept {
    {
      const std::lock_guard lock(stream.mutex);
      stream.*which = true;
    }
    stream.changed.wake_all();
  }
  void end_reading() noexcept { end(*in_, &Stream::read_ended); }
  void end_writing() noexcept { end(*out_, &Stream::write_ended); }

  const std::shared_ptr<Stream> in_;
  const std::shared_ptr<Stream> out_;
};

}  // namespace

std::pair<std::unique_ptr<Channel>, std::unique_ptr<Channel>> make_memory_channels(
    std::size_t capacity) {
  auto to = std::make_shared<Stream>(capacity);
  auto fro = std::make_shared<Stream>(capacity);
  return {std::make_unique<MemoryChannel>("one end in memory", fro, to),
          std::make_unique<MemoryChannel>("other end in memory", to, fro)};
}

}  // namespace roost
