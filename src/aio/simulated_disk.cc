// SPDX-License-Identifier: MIT
// A disk in memory, with a volatile write cache that a power loss may empty.
//
// Threads: the simulation's.
// Lifetime: requests in flight when power is lost are answered with EIO.

#include <fcntl.h>
#include <linux/falloc.h>
#include <poll.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <list>
#include <memory>
#include <vector>

#include "aio/simulated_context.h"
#include "roost/base/check.h"

namespace roost {

namespace {

constexpr std::size_t kSector = 512;

class Disk final : public SimulatedDevice {
 public:
  Disk(Simulation& simulation, int fd, std::size_t size, const SimulatedDiskOptions& options)
      : SimulatedDevice(simulation, fd),
        options_(options),
        now_(size),
        durable_(size),
        written_(sectors(size)) {}

  // The same disk, as the next one who opens it finds it.
  Disk(Simulation& simulation, int fd, const Disk& before)
      : SimulatedDevice(simulation, fd),
        options_(before.options_),
        now_(before.now_),
        durable_(before.durable_),
        cached_(before.cached_),
        written_(before.written_),
        next_write_(before.next_write_) {}

  const char* kind() const noexcept override { return "disk"; }

  // A read may find everything in the page cache, a write room there; a sync waits.
  bool try_now(IoRequest& request) override {
    const bool cached = request.op == IoRequest::Op::kRead ||
                        (request.op == IoRequest::Op::kWritev && !(request.flags & RWF_DSYNC));
    if (!cached || !random().one_in(3)) return false;
    request.result = execute(request, 0);
    return true;
  }

  void start(SimulatedContext& by, IoRequest& request) override {
    const auto place = in_flight_.insert(in_flight_.end(), {.by = &by, .request = &request});
    // A sync covers what was written when it started.
    const std::uint64_t covers = next_write_;
    const auto finish = [this, place, power = std::weak_ptr<const bool>(power_), covers] {
      if (power.expired()) return;  // answered when the power went; the disk may be gone since
      const Started started = *place;
      in_flight_.erase(place);
      started.by->complete(*started.request, execute(*started.request, covers));
    };
    later(random().between(options_.min_delay_ns, options_.max_delay_ns), "disk", finish);
  }

  std::uint32_t ready_events() const override { return POLLIN | POLLOUT; }

  void close() override {
    ROOST_CHECK(in_flight_.empty(), "disk {} is closed with I/O in flight", fd_);
  }

  std::string in_flight() const override {
    std::string text;
    for (const Started& started : in_flight_) {
      text += fmt::format("operation {} for '{}' ", static_cast<int>(started.request->op),
                          started.by->name);
    }
    return text;
  }

  // From now on it is nobody's: what is in flight may have been carried out.
  void take_away() {
    for (const Started& started : in_flight_) {
      if (random().one_in(2)) (void)execute(*started.request, 0);
    }
    fail_in_flight();
    taken_away_ = true;
  }

  void crash() {
    fail_in_flight();
    // What lay in the cache may have got to the medium, in any order but that of one sector.
    for (const Write& write : cached_) {
      for (std::size_t done = 0; done < write.bytes.size();) {
        const std::size_t at = write.offset + done;
        const std::size_t piece = std::min(kSector - at % kSector, write.bytes.size() - done);
        if (random().one_in(2)) put(durable_, at, std::span(write.bytes).subspan(done, piece));
        done += piece;
      }
    }
    cached_.clear();
    now_ = durable_;
    // A hole that was punched, and not synced, may be none.
    written_.assign(sectors(now_.size()), true);
  }

  void fail_next(IoRequest::Op op, int error) { failures_.emplace_back(op, error); }

  std::span<const std::byte> contents() const { return now_; }

 private:
  struct Write {
    std::uint64_t number;
    std::size_t offset;
    std::vector<std::byte> bytes;
  };

  void fail_in_flight() {
    power_ = std::make_shared<const bool>(true);
    for (const Started& started : in_flight_) started.by->complete(*started.request, -EIO);
    in_flight_.clear();
  }

  static std::size_t sectors(std::size_t bytes) { return (bytes + kSector - 1) / kSector; }

  static void put(std::vector<std::byte>& medium, std::size_t offset,
                  std::span<const std::byte> bytes) {
    if (medium.size() < offset + bytes.size()) medium.resize(offset + bytes.size());
    std::ranges::copy(bytes, medium.begin() + static_cast<std::ptrdiff_t>(offset));
  }

  std::int64_t execute(const IoRequest& request, std::uint64_t covers) {
    if (taken_away_) return -EIO;
    const auto failure =
        std::ranges::find(failures_, request.op, [](const auto& f) { return f.first; });
    if (failure != failures_.end()) {
      const int error = failure->second;
      failures_.erase(failure);
      return fail(request, covers, error);
    }
    if (random().one_in(options_.error_one_in)) return fail(request, covers, EIO);
    switch (request.op) {
      case IoRequest::Op::kRead:
        return read(request);
      case IoRequest::Op::kWritev:
        return write(request);
      case IoRequest::Op::kDataSync:
        sync(covers);
        return 0;
      case IoRequest::Op::kAllocate:
        return allocate(request);
      case IoRequest::Op::kTruncate:
        truncate(request.size);
        return 0;
      case IoRequest::Op::kReadAhead:
        return 0;
      case IoRequest::Op::kFindExtents:
        return find_extents(request);
      default:
        refuse(request);
    }
  }

  // A sync that failed has given up what it was to write: a later one does not bring it back.
  std::int64_t fail(const IoRequest& request, std::uint64_t covers, int error) {
    if (request.op == IoRequest::Op::kDataSync) {
      std::erase_if(cached_, [covers](const Write& write) { return write.number < covers; });
    }
    return -error;
  }

  std::int64_t read(const IoRequest& request) {
    if (request.offset >= now_.size()) return 0;
    const std::size_t count = maybe_short(
        std::min<std::size_t>(request.length, now_.size() - request.offset), options_.short_one_in);
    const auto from = now_.begin() + static_cast<std::ptrdiff_t>(request.offset);
    std::copy_n(from, count, static_cast<std::byte*>(request.address));
    return static_cast<std::int64_t>(count);
  }

  std::int64_t write(const IoRequest& request) {
    const auto* const buffers = static_cast<const iovec*>(request.address);
    std::vector<std::byte> bytes(
        maybe_short(total_length(buffers, request.length), options_.short_one_in));
    gather(buffers, request.length, 0, bytes);
    const auto count = static_cast<std::int64_t>(bytes.size());
    write_cached(request.offset, std::move(bytes));
    // Durable before it is answered, as is what it was written over.
    if (request.flags & (RWF_DSYNC | RWF_SYNC)) {
      const std::size_t end = cached_.back().offset + cached_.back().bytes.size();
      std::erase_if(cached_, [this, end, from = request.offset](const Write& cached) {
        if (cached.offset >= end || cached.offset + cached.bytes.size() <= from) return false;
        put(durable_, cached.offset, cached.bytes);
        return true;
      });
    }
    return count;
  }

  std::int64_t allocate(const IoRequest& request) {
    const bool keep_size = request.flags & FALLOC_FL_KEEP_SIZE;
    const std::uint64_t end = request.offset + request.size;
    if (request.flags & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)) {
      const std::uint64_t limit = keep_size ? std::min<std::uint64_t>(end, now_.size()) : end;
      if (request.offset < limit) {
        write_cached(request.offset, std::vector<std::byte>(limit - request.offset));
        const std::size_t first = sectors(request.offset);
        const std::size_t last = limit == now_.size() ? sectors(limit) : limit / kSector;
        if ((request.flags & FALLOC_FL_PUNCH_HOLE) && first < last) {
          std::fill(written_.begin() + static_cast<std::ptrdiff_t>(first),
                    written_.begin() + static_cast<std::ptrdiff_t>(last), false);
        }
      }
      return 0;
    }
    if (request.flags & ~FALLOC_FL_KEEP_SIZE) return -EOPNOTSUPP;
    if (!keep_size && now_.size() < end) {
      truncate(end);
    }
    return 0;
  }

  // As a file system with a journal does it: the size is on the medium at once.
  void truncate(std::size_t size) {
    now_.resize(size);
    durable_.resize(size);
    written_.resize(sectors(size));
    std::erase_if(cached_, [size](const Write& write) { return write.offset >= size; });
    for (Write& write : cached_) {
      write.bytes.resize(std::min(write.bytes.size(), size - write.offset));
    }
  }

  std::int64_t find_extents(const IoRequest& request) {
    if (request.offset >= now_.size()) return -ENXIO;
    auto* const to = static_cast<FileExtent*>(request.address);
    const std::size_t end = std::min<std::size_t>(request.offset + request.size, now_.size());
    std::size_t count = 0;
    for (std::size_t at = request.offset; at < end;) {
      const bool hole = !written_[at / kSector];
      const std::size_t next = std::min(end, at / kSector * kSector + kSector);
      if (count == 0 || to[count - 1].hole != hole) {
        if (count == request.length) break;
        to[count++] = {.length = 0, .hole = hole};
      }
      to[count - 1].length += next - at;
      at = next;
    }
    return static_cast<std::int64_t>(maybe_short(count, options_.short_one_in));
  }

  void write_cached(std::size_t offset, std::vector<std::byte> bytes) {
    put(now_, offset, bytes);
    written_.resize(sectors(now_.size()));
    const auto first = written_.begin() + static_cast<std::ptrdiff_t>(offset / kSector);
    std::fill(first, written_.begin() + static_cast<std::ptrdiff_t>(sectors(offset + bytes.size())),
              true);
    cached_.push_back({.number = next_write_++, .offset = offset, .bytes = std::move(bytes)});
  }

  void sync(std::uint64_t covers) {
    while (!cached_.empty() && cached_.front().number < covers) {
      put(durable_, cached_.front().offset, cached_.front().bytes);
      cached_.pop_front();
    }
  }

  const SimulatedDiskOptions options_;
  std::vector<std::byte> now_;      // what a read finds
  std::vector<std::byte> durable_;  // what is on the medium for sure
  std::deque<Write> cached_;        // the difference, oldest first
  std::vector<bool> written_;       // sectors that are no holes
  std::uint64_t next_write_ = 0;
  bool taken_away_ = false;  // nothing gets to it any more
  std::shared_ptr<const bool> power_ = std::make_shared<const bool>(true);  // anew with each crash
  std::list<Started> in_flight_;
  std::deque<std::pair<IoRequest::Op, int>> failures_;
};

Disk& as_disk(SimulatedDevice& device) {
  auto* const disk = dynamic_cast<Disk*>(&device);
  ROOST_CHECK(disk, "a {} is no disk", device.kind());
  return *disk;
}

}  // namespace

std::unique_ptr<SimulatedDevice> make_simulated_disk(Simulation& simulation, int fd,
                                                     std::size_t size,
                                                     const SimulatedDiskOptions& options) {
  return std::make_unique<Disk>(simulation, fd, size, options);
}

void crash_simulated_disk(SimulatedDevice& disk) { as_disk(disk).crash(); }

std::unique_ptr<SimulatedDevice> take_over_simulated_disk(Simulation& simulation, int fd,
                                                          SimulatedDevice& from, bool power_lost) {
  Disk& before = as_disk(from);
  before.take_away();
  if (power_lost) before.crash();
  return std::make_unique<Disk>(simulation, fd, before);
}

void fail_next_on_simulated_disk(SimulatedDevice& disk, IoRequest::Op op, int error) {
  as_disk(disk).fail_next(op, error);
}

std::span<const std::byte> simulated_disk_contents(const SimulatedDevice& disk) {
  return as_disk(const_cast<SimulatedDevice&>(disk)).contents();
}

}  // namespace roost
