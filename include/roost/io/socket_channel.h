// SPDX-License-Identifier: MIT
// SocketChannel: a connected stream socket: unix, TCP or vsock.
//
// Threads and lifetime: as every Channel. connect() in a coroutine.
#pragma once

#include <array>
#include <memory>
#include <span>
#include <vector>

#include "roost/aio/io.h"
#include "roost/aio/unique_fd.h"
#include "roost/io/channel.h"
#include "roost/io/socket_address.h"

namespace roost {

/// A connected socket.
class SocketChannel : public Channel {
 public:
  /// Takes a connected socket. `name` is for messages.
  SocketChannel(UniqueFd fd, std::string name);
  ~SocketChannel() override;

  /// Connects. A host name is resolved on a thread of its own, which a stop leaves behind; its
  /// addresses are tried in their order. A unix socket whose queue is full is waited for.
  static Task<Result<std::unique_ptr<SocketChannel>>> connect(SocketAddress address,
                                                              std::stop_token stop = {});

  /// Both ends of a connection within the process. EMFILE and the like.
  static Result<std::pair<std::unique_ptr<SocketChannel>, std::unique_ptr<SocketChannel>>> pair();

  void abort() noexcept override;
  Task<void> linger(std::int64_t limit_ns, std::stop_token stop = {}) override;

  /// True of a unix socket: it passes references to the pages on. (TCP does, too; but over loopback
  /// that costs more than the copy, and who sends cannot know what is on the way.)
  bool can_send_files() const noexcept override { return local_; }

  int fd() const noexcept { return fd_.get(); }

  /// Sends descriptors, at most kMaxDescriptors, over a unix socket, beside the first byte of
  /// `bytes`, which is not empty. Those here stay open. As write_full() otherwise.
  Task<Result<void>> send_with_descriptors(std::span<const std::byte> bytes,
                                           std::span<const int> descriptors,
                                           std::stop_token stop = {});

  /// As read(), and appends the descriptors that came beside the bytes. EMSGSIZE: there were more
  /// than kMaxDescriptors, and they are lost.
  Task<Result<std::size_t>> read_with_descriptors(std::span<std::byte> to,
                                                  std::vector<UniqueFd>& descriptors,
                                                  std::stop_token stop = {});

  static constexpr std::size_t kMaxDescriptors = 64;

 protected:
  Task<Result<std::size_t>> do_readv(std::span<const iovec> to, bool all,
                                     std::stop_token stop) override;
  Task<Result<std::size_t>> do_writev(std::span<const iovec> from, bool all,
                                      std::stop_token stop) override;
  Task<Result<void>> do_shutdown(StreamEnd end, std::stop_token stop) override;
  Task<Result<std::size_t>> do_send_file(FilePart part, std::stop_token stop) override;
  void interrupt(AioContext& to) override;

  /// For a descriptor that is no real one: the subclass closes it.
  int release_fd() noexcept { return fd_.release(); }

 private:
  Task<Result<std::size_t>> receive(msghdr& message, int flags, std::stop_token stop);

  UniqueFd fd_;
  const bool local_;             // a unix socket
  bool sends_files_ = false;     // its buffer has been enlarged for them: for the writer
  std::array<IoSlot, 2> slots_;  // what waits, by direction
  bool more_is_likely_ = false;  // to be received: for the reader
  // What comes and goes beside the bytes of the operation that is under way.
  std::span<const int> send_descriptors_;
  std::vector<UniqueFd>* received_descriptors_ = nullptr;
};

}  // namespace roost
