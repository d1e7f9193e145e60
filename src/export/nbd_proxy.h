// SPDX-License-Identifier: MIT
// NbdProxy: carries NBD connections between clients and a server, and makes them fail as asked.
//
// It follows the protocol just enough to know requests and replies, which it learns from both
// directions of the handshake. What it cannot follow (TLS, oldstyle, a peer that breaks the
// protocol) is carried as plain bytes: then only drop_after, rate and delay count.
//
// What happens to a request and its reply is drawn when the request comes, always as many numbers,
// from the seed, the connection's number and nothing else: the Nth request of a connection has the
// same fate in every run with the seed, in whatever order the server answers.
//
// A reply in several chunks is held until its last one has come, and sent in one piece.
//
// Threads: carry() in coroutines of one context, any number at a time; the rest between them, on
// the context's thread. Lifetime: outlives its carry()s.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stop_token>
#include <string>
#include <vector>

#include "roost/coro/task.h"
#include "roost/io/channel.h"

namespace roost {

/// What goes wrong. Probabilities are from 0 to 1, for each request or its reply.
struct NbdFaults {
  /// What a corrupted reply has wrong: one byte of it.
  enum class Field : std::uint8_t {
    kAny,  // one of the others, but not data
    kMagic,
    kCookie,
    kError,  // of a chunk: its type, which says whether it is an error
    kData,   // of a read; other replies are left alone
  };

  std::uint64_t seed = 1;
  std::int64_t delay_least_ns = 0;  // of each reply
  std::int64_t delay_most_ns = 0;
  double drop = 0;      // the request does not arrive, the connection ends
  double truncate = 0;  // a part of the reply is sent, the connection ends
  double corrupt = 0;   // of the reply
  Field corrupt_field = Field::kAny;
  double reorder = 0;            // later replies may overtake this one
  std::uint64_t kill_at = 0;     // a connection ends at its request of this number; 0: none
  std::uint64_t drop_after = 0;  // and when so many bytes went through it, both ways; 0: any number
  std::uint64_t rate = 0;        // bytes a second in each direction; 0: any number
};

/// See the top of this file.
class NbdProxy {
 public:
  /// Something that was done to a connection.
  struct Fault {
    std::uint64_t connection = 0;  // from 1
    std::uint64_t request = 0;     // of the connection, from 1; 0: not because of one
    std::string what{};            // "drop", "truncate to 5 of 16 bytes"

    bool operator==(const Fault&) const = default;
  };

  struct Totals {
    std::uint64_t connections = 0;
    std::uint64_t unfollowed = 0;  // of them, were carried as plain bytes at the end
    std::uint64_t requests = 0;
    std::uint64_t replies = 0;
    std::uint64_t to_server = 0;  // bytes
    std::uint64_t to_client = 0;
    std::uint64_t faults = 0;
  };

  static constexpr std::size_t kMaxListed = 10'000;

  /// `say` gets each fault as it happens; `killed` is called when a connection has come to kill_at.
  /// Both may be null.
  explicit NbdProxy(NbdFaults faults, std::function<void(const Fault&)> say = nullptr,
                    std::function<void()> killed = nullptr);

  /// Carries one connection to its end.
  Task<void> carry(std::unique_ptr<Channel> client, std::unique_ptr<Channel> server,
                   std::stop_token stop = {});

  const Totals& totals() const noexcept { return totals_; }
  /// The first kMaxListed faults.
  const std::vector<Fault>& faults() const noexcept { return listed_; }

 private:
  class Connection;

  void note(Fault fault);

  const NbdFaults faults_;
  const std::function<void(const Fault&)> say_;
  const std::function<void()> killed_;
  Totals totals_;
  std::vector<Fault> listed_;
};

}  // namespace roost
