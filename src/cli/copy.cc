// SPDX-License-Identifier: MIT
// `roost copy`: copies a disk, here or on an NBD server, to another.

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/commands.h"
#include "cli/progress.h"
#include "cli/runtime.h"
#include "roost/block/copy_disk.h"
#include "roost/nbd/target.h"

namespace roost::cli {

namespace {

constexpr const char* kExamples = R"(Examples:
  roost copy disk.img 'nbd+unix:///?socket=roost.sock' --flush
      Fill the disk of a running server.
  roost copy nbd://server/disk copy.img --verify
      Fetch one, and compare.
  roost copy nbd://one/a nbds://two/b --connections 4 --progress json
      From server to server.
)";

struct CopyCommand {
  std::string from;
  std::string to;
  unsigned iothreads = 2;
  unsigned connections = 0;  // to each server; 0: one for each I/O thread
  std::int64_t reconnect_s = 60;
  unsigned depth = 16;  // requests in flight on each I/O thread
  std::string request_size = "256K";
  bool target_is_zero = false;
  bool flush = false;
  bool verify = false;
  bool no_zeroes = false;  // do not look for zeroes in data
  bool direct = false;     // files past the page cache
  ProgressStyle progress = ProgressStyle::kAuto;
  bool json = false;
};

bool is_path(const std::string& description) {
  return !nbd::looks_like_nbd_uri(description) && !description.starts_with("mem:") &&
         !description.starts_with("null:");
}

Result<void> refuse_the_same_file(const std::string& from, const struct stat& to,
                                  const std::string& name) {
  struct stat source;
  if (!is_path(from) || ::stat(from.c_str(), &source) < 0) return {};
  const bool same = S_ISBLK(to.st_mode) ? S_ISBLK(source.st_mode) && source.st_rdev == to.st_rdev
                                        : source.st_dev == to.st_dev && source.st_ino == to.st_ino;
  if (!same) return {};
  return fail(EINVAL, name + " is the source itself");
}

// Makes a regular file an empty one of `size` bytes, which reads as zeroes then: true. Leaves
// everything else alone.
Result<bool> prepare_destination(const CopyCommand& command, std::uint64_t size) {
  const std::string& path = command.to;
  struct stat info;
  const bool there = ::stat(path.c_str(), &info) == 0;
  if (!there && errno != ENOENT) return fail(errno, path);
  if (there) {
    if (const auto good = refuse_the_same_file(command.from, info, path); !good) {
      return std::unexpected(good.error());
    }
    if (!S_ISREG(info.st_mode)) return false;
  }
  const UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644));
  if (!fd) return fail(errno, "open " + path);
  if (::ftruncate(fd.get(), 0) < 0 || ::ftruncate(fd.get(), static_cast<off_t>(size)) < 0) {
    return fail(errno, "truncate " + path);
  }
  return true;
}

class Copying {
 public:
  Copying(Runtime& runtime, const CopyCommand& command, std::size_t request_size)
      : runtime_(runtime), command_(command) {
    options_.contexts = runtime.contexts();
    options_.depth = command.depth;
    options_.request_size = request_size;
    options_.target_is_zero = command.target_is_zero;
    options_.detect_zeroes = !command.no_zeroes;
    options_.stop = runtime.stop();
  }

  Task<int> run() {
    Result<void> done;
    try {
      done = co_await work();
    } catch (const std::bad_alloc&) {
      done = fail(ENOMEM, "copy");
    }
    for (const std::unique_ptr<BlockDriver>* disk : {&from_, &to_}) {
      if (!*disk) continue;
      const Result<void> closed = co_await (*disk)->close();
      if (done) done = closed;
    }
    if (done) co_return kSuccess;
    if (runtime_.interrupted()) {
      report("interrupted");
      co_return kInterrupted;
    }
    report(done.error().message());
    co_return kFailure;
  }

 private:
  Task<Result<void>> open() {
    OpenOptions reading;
    reading.read_only = true;
    reading.direct = command_.direct;
    Result<std::unique_ptr<BlockDriver>> from =
        co_await open_any_disk(runtime_, command_.from, reading, remote_);
    if (!from) co_return std::unexpected(from.error());
    from_ = std::move(*from);
    if (is_path(command_.to)) {
      const Result<bool> zero = prepare_destination(command_, from_->size());
      if (!zero) co_return std::unexpected(zero.error());
      if (*zero) options_.target_is_zero = true;
    }
    OpenOptions writing;
    writing.direct = command_.direct;
    Result<std::unique_ptr<BlockDriver>> to =
        co_await open_any_disk(runtime_, command_.to, writing, remote_);
    if (!to) co_return std::unexpected(to.error());
    to_ = std::move(*to);
    if (to_->read_only()) co_return fail(EROFS, to_->name());
    if (to_->size() < from_->size()) {
      co_return fail(ENOSPC, fmt::format("{} has {} bytes, {} has {}", to_->name(), to_->size(),
                                         from_->name(), from_->size()));
    }
    co_return Result<void>();
  }

  Task<Result<void>> work() {
    const Result<void> opened = co_await open();
    if (!opened) co_return opened;
    const std::int64_t began_ns = real_clock().now_ns();
    CopyReport copied;
    {
      Progress progress(runtime_.main(), "copying", from_->size(), command_.progress);
      options_.progress = progress.counter();
      const Result<CopyReport> done = co_await copy_disk(*from_, *to_, options_);
      if (!done) co_return std::unexpected(done.error());
      copied = *done;
    }
    // What is compared has to be what stays.
    if (command_.flush || command_.verify) {
      const Result<void> flushed = co_await to_->flush();
      if (!flushed) co_return flushed;
    }
    const std::int64_t ended_ns = real_clock().now_ns();
    if (command_.verify) {
      Progress progress(runtime_.main(), "verifying", from_->size(), command_.progress);
      options_.progress = progress.counter();
      const Result<std::optional<std::uint64_t>> differ =
          co_await compare_disks(*from_, *to_, options_);
      if (!differ) co_return std::unexpected(differ.error());
      if (*differ) {
        co_return fail(EIO, fmt::format("verify: {} and {} differ at {}", from_->name(),
                                        to_->name(), **differ));
      }
    }
    if (command_.json) {
      const nlohmann::json summary{{"size", from_->size()},
                                   {"written", copied.written},
                                   {"zeroed", copied.zeroed},
                                   {"skipped", copied.skipped},
                                   {"seconds", static_cast<double>(ended_ns - began_ns) / 1e9},
                                   {"flushed", command_.flush || command_.verify},
                                   {"verified", command_.verify}};
      fmt::print("{}\n", summary.dump());
    }
    co_return Result<void>();
  }

  Runtime& runtime_;
  const CopyCommand& command_;
  const RemoteOptions remote_{.connections = command_.connections,
                              .reconnect_timeout_ns = command_.reconnect_s * 1'000'000'000};
  CopyOptions options_;
  std::unique_ptr<BlockDriver> from_;
  std::unique_ptr<BlockDriver> to_;
};

int copy(const CopyCommand& command) {
  const Result<std::uint64_t> request_size = parse_size(command.request_size);
  if (!request_size || !std::has_single_bit(*request_size) || *request_size < 4096 ||
      *request_size > (32u << 20)) {
    report("--request-size is a power of two from 4K to 32M");
    return kUsageError;
  }
  try {
    Runtime runtime(command.iothreads);
    Copying copying(runtime, command, *request_size);
    return runtime.run(copying.run());
  } catch (const std::exception& e) {
    report(e.what());
    return kFailure;
  }
}

}  // namespace

void add_copy(CLI::App& app, Action& action) {
  const auto command = std::make_shared<CopyCommand>();
  CLI::App* const copying = app.add_subcommand("copy", "Copy a disk, here or on an NBD server");
  copying->footer(kExamples);
  copying->add_option("from", command->from, "A file, a block device or an NBD URI")->required();
  copying
      ->add_option("to", command->to,
                   "The same. A file is made, or made empty; anything else has to be large enough")
      ->required();
  copying->add_flag("--target-is-zero", command->target_is_zero,
                    "The destination reads as zeroes already: do not make it so");
  copying->add_flag("--no-detect-zeroes", command->no_zeroes,
                    "Copy data as it is, without looking for zeroes to make holes of");
  copying->add_flag("--flush", command->flush, "Do not end before everything is durable");
  copying->add_flag("--verify", command->verify,
                    "Afterwards flush, read both and compare; a difference is an error");
  copying->add_option("--iothreads", command->iothreads, "Threads that copy")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  copying
      ->add_option("--connections", command->connections,
                   "Connections to each server, if it allows several; 0: one for each thread")
      ->check(CLI::Range(0, 256))
      ->capture_default_str();
  copying
      ->add_option("--reconnect", command->reconnect_s,
                   "Seconds for which a lost connection is tried to be made again; 0: not at all")
      ->check(CLI::Range(0, 86'400))
      ->capture_default_str();
  copying->add_option("--depth", command->depth, "Requests in flight on each thread")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  copying
      ->add_option("--request-size", command->request_size,
                   "Of the longest read and write: a power of two from 4K to 32M")
      ->type_name("SIZE")
      ->capture_default_str();
  copying->add_flag("--direct", command->direct, "Open files with O_DIRECT");
  const std::map<std::string, ProgressStyle> styles{{"auto", ProgressStyle::kAuto},
                                                    {"none", ProgressStyle::kNone},
                                                    {"bar", ProgressStyle::kBar},
                                                    {"json", ProgressStyle::kJson}};
  copying
      ->add_option("--progress", command->progress,
                   "auto, none, bar or json (lines, on standard error); auto shows a bar on a "
                   "terminal")
      ->transform(CLI::CheckedTransformer(styles).description(""))
      ->type_name("STYLE")
      ->default_str("auto");
  copying->add_flag("--json", command->json, "Say at the end what was done, as a line of JSON");
  copying->callback([command, &action] { action = [command] { return copy(*command); }; });
}

}  // namespace roost::cli
