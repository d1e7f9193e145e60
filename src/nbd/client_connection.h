// SPDX-License-Identifier: MIT
// One connection of an NbdClient, behind the handshake: a coroutine that sends what is queued, one
// that receives replies, and the requests between them.
//
//   the caller                 the sender                    the receiver
//   run(): queues, waits  -->  marks them `sending`,
//                              writes them all at once,
//                              lets go of them          ---> finds them by cookie; `receiving`
//                                                            while data comes straight into the
//                                                            buffers; at the end `answered`
//   returns         <--------- whoever lets go last ---------'
//
// Threads: run(), leave() and the rest in coroutines on any context; the two loops run where the
// channel is. mutex_ guards what they share; nothing is awaited with it held.
// Lifetime: shared by its two loops, until leave() returned.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "roost/base/platform.h"
#include "roost/nbd/client.h"
#include "roost/sync/co_mutex.h"
#include "roost/sync/co_queue.h"

namespace roost::nbd {

/// A request, with all that it takes to send it, once or again.
struct PendingRequest {
  PendingRequest(const ClientRequest& r, std::span<const iovec> d) : request(r), data(d) {}

  ClientRequest request;                // the cookie is set when it is queued
  std::span<const iovec> data;          // READ: where it goes; WRITE: what is sent. The caller's.
  std::vector<ContextStatus> status{};  // of a BLOCK_STATUS that succeeded

  // The connection's mutex guards these.
  bool queued = false;     // not sent, may be withdrawn
  bool sending = false;    // the sender uses its buffers
  bool receiving = false;  // the receiver does
  bool answered = false;   // `result` is there
  bool stopped = false;    // its caller was told to stop
  bool left = false;       // nobody waits for it, its buffers are gone
  Result<void> result{};
  CoQueue changed{"a reply of an NBD server"};

  bool in_use() const noexcept { return sending || receiving; }

  std::array<std::byte, kMaxRequestHeader> header{};  // the sender
  std::optional<ReplyChecker> checker{};              // the receiver
};

class ClientConnection : public std::enable_shared_from_this<ClientConnection> {
 public:
  using Outcome = ClientNegotiation::Outcome;

  /// `received`: what had arrived behind the handshake.
  ClientConnection(std::unique_ptr<Channel> channel, Outcome outcome,
                   std::vector<std::byte> received);

  /// Starts the loops on the current context.
  void start();

  /// Queues a request and waits for its end.
  Task<Result<void>> run(std::shared_ptr<PendingRequest> pending, std::stop_token stop,
                         WhenStopped when);

  /// NbdClient::disconnect().
  Task<void> leave(std::stop_token stop);

  Task<Result<void>> move_to(AioContext& to);

  Result<void> state() const;
  std::size_t in_flight() const;
  bool ended() const;  // both loops are over
  const Outcome& outcome() const noexcept { return outcome_; }
  const std::string& name() const noexcept { return channel_->name(); }

  /// Written by who resizes.
  std::atomic<std::uint64_t> size;

 private:
  using Mutex = RealPlatform::Mutex;
  using Pending = std::shared_ptr<PendingRequest>;

  static constexpr std::size_t kBufferSize = 64 << 10;
  // One write takes no more than this: the kernel's limit is 1024 pieces.
  static constexpr std::size_t kMaxPieces = 512;
  static constexpr std::size_t kMaxBatchBytes = 1 << 20;

  static Task<void> send_loop(std::shared_ptr<ClientConnection> self);
  static Task<void> receive_loop(std::shared_ptr<ClientConnection> self);
  Task<Result<void>> send();
  Task<Result<void>> receive();
  Task<Result<void>> receive_data(PendingRequest& pending, std::uint64_t at,
                                  std::span<const std::byte>& input, ReplyParser& parser);
  Task<Result<void>> receive_some(std::span<const std::byte>& input);
  Pending find(std::uint64_t cookie);
  bool begin_receiving(PendingRequest& pending);
  void end_receiving(PendingRequest& pending);
  void answer(const Pending& pending, Result<void> result);
  void wake_sender_to_leave();
  void fail_all(const Error& error);
  void take_batch();
  Error words(const PendingRequest& pending, int code, std::string_view what) const;
  Task<void> cut_off();
  Task<void> end_loop();

  const std::unique_ptr<Channel> channel_;
  const Outcome outcome_;

  mutable Mutex mutex_;  // guards the following
  std::deque<Pending> queue_;
  std::unordered_map<std::uint64_t, Pending> in_flight_;  // the queued ones included
  std::uint64_t next_cookie_ = 1;
  bool leaving_ = false;          // no more requests start; goodbye once idle
  std::optional<Error> failure_;  // the connection is of no more use
  int loops_ = 0;

  // Held by who moves the channel and by who cuts it off, which has to be done where it is.
  CoMutex place_{"the place of an NBD connection"};

  CoQueue work_{"something to send to an NBD server"};
  CoQueue ended_{"the end of an NBD connection"};

  // The sender.
  std::vector<Pending> batch_;
  std::vector<iovec> pieces_;

  // The receiver.
  std::vector<std::byte> buffer_;
  std::vector<std::byte> received_;  // behind the handshake
};

/// The pieces of `data` that hold `size` bytes from `at` on.
/// REQUIRES: there are as many.
std::vector<iovec> pieces_of(std::span<const iovec> data, std::uint64_t at, std::uint64_t size);

}  // namespace roost::nbd
