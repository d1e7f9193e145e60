// SPDX-License-Identifier: MIT
// PipeChannel: what is read from one descriptor and written to another, where both can be polled: a
// pipe, a terminal, a process's standard input and output.
//
// Threads and lifetime: as every Channel.
#pragma once

#include <array>

#include "roost/aio/io.h"
#include "roost/aio/unique_fd.h"
#include "roost/io/channel.h"

namespace roost {

/// One or two descriptors that can be polled.
class PipeChannel : public Channel {
 public:
  /// Takes the descriptors, of which one may be none: that direction then is at its end. Makes them
  /// non-blocking, which everybody sees who shares them.
  PipeChannel(UniqueFd read_end, UniqueFd write_end, std::string name);
  ~PipeChannel() override;

  void abort() noexcept override;

 protected:
  Task<Result<std::size_t>> do_readv(std::span<const iovec> to, bool all,
                                     std::stop_token stop) override;
  Task<Result<std::size_t>> do_writev(std::span<const iovec> from, bool all,
                                      std::stop_token stop) override;
  Task<Result<void>> do_shutdown(StreamEnd end, std::stop_token stop) override;
  void interrupt(AioContext& to) override;

 private:
  template <class Call>
  Task<Result<std::size_t>> transfer(Direction direction, const char* what, Call call,
                                     std::stop_token stop);

  UniqueFd& end(Direction direction) noexcept { return ends_[static_cast<std::size_t>(direction)]; }

  // By direction. A waiting read's descriptor stays until the read has returned.
  std::array<UniqueFd, 2> ends_;
  std::array<bool, 2> ended_{};
  std::array<IoSlot, 2> slots_;
};

}  // namespace roost
