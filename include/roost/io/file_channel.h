// SPDX-License-Identifier: MIT
// FileChannel: a file, as a stream: reads and writes each go on from where the last one ended.
//
// Threads and lifetime: as every Channel.
#pragma once

#include "roost/aio/io.h"
#include "roost/aio/unique_fd.h"
#include "roost/io/channel.h"

namespace roost {

/// A regular file or block device.
class FileChannel : public Channel {
 public:
  /// Opens `path` with open(2)'s `flags` and O_CLOEXEC. Blocks.
  static Result<std::unique_ptr<FileChannel>> open(const std::string& path, int flags,
                                                   unsigned mode = 0644);

  /// Takes the descriptor; reads and writes begin at `offset`.
  FileChannel(UniqueFd fd, std::string name, std::uint64_t offset = 0);
  ~FileChannel() override;

  void abort() noexcept override { read_ended_ = write_ended_ = true; }

 protected:
  Task<Result<std::size_t>> do_readv(std::span<const iovec> to, bool all,
                                     std::stop_token stop) override;
  Task<Result<std::size_t>> do_writev(std::span<const iovec> from, bool all,
                                      std::stop_token stop) override;
  /// Of kWrite: makes what was written durable.
  Task<Result<void>> do_shutdown(StreamEnd end, std::stop_token stop) override;
  void interrupt(AioContext& to) override;

 private:
  const UniqueFd fd_;
  std::uint64_t read_offset_;
  std::uint64_t write_offset_;
  bool read_ended_ = false;
  bool write_ended_ = false;
  IoSlot slots_[2];  // by direction
};

}  // namespace roost
