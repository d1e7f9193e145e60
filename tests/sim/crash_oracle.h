// SPDX-License-Identifier: MIT
// What a part of a disk may hold, while writes to it are acknowledged, made durable and lost.
//
// A part is some cells; a write covers whole ones, and each writes a number of its own, so a cell
// tells who wrote it. One coroutine writes a part, one write at a time; flushes are everybody's.
//
// Threads: the simulation's.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "roost/base/check.h"

namespace roost::sim {

using WriteNumber = std::uint32_t;  // 0: zeroes
constexpr std::size_t kCellSize = 16;

inline std::byte byte_of(WriteNumber number, std::size_t at) {
  return static_cast<std::byte>(number >> (at % sizeof number * 8));
}

/// What is the same for all parts: moments in the order in which coroutines came to know of things,
/// and what happened so often.
struct History {
  std::uint64_t now = 0;
  unsigned power_losses = 0;
  unsigned told = 0;     // flushes that said that writes may be lost
  unsigned flushes = 0;  // whose outcome is not known yet
};

class CrashOracle {
 public:
  /// `kept`: what is acknowledged is there again after a power loss, before anybody may look.
  CrashOracle(History& history, std::size_t cells, bool kept)
      : history_(history), kept_(kept), cells_(cells) {}

  struct Write {
    std::size_t first;
    std::size_t count;
    WriteNumber number;
    bool durable;
    // What was so when it began.
    unsigned power_losses = 0;
    unsigned told = 0;
  };

  void begin(Write& write) {
    write.power_losses = history_.power_losses;
    write.told = history_.told;
    under_way_ = &write;
  }

  void acknowledged(const Write& write) {
    for (Cell& cell : range(write)) {
      if (write.durable) {
        cell.older.clear();
      } else {
        append(cell.older, {&cell.latest, 1});
        append(cell.older, cell.maybe);
        append(cell.older, cell.lost);
      }
      cell.latest = write.number;
      cell.maybe.clear();
      cell.lost.clear();
      cell.told = false;
      // Acknowledged by one who has lost it since?
      if (!write.durable && write.power_losses != history_.power_losses) {
        power_lost(cell);
        cell.told = write.told != history_.told;
      }
    }
    ended(write);
  }

  /// Nobody has it under way any more; whether it was carried out is not known.
  void may_have_happened(const Write& write) {
    for (Cell& cell : range(write)) append(cell.maybe, {&write.number, 1});
    ended(write);
  }

  void never_happened(const Write& /*write*/) { under_way_ = nullptr; }

  void power_lost() {
    for (Cell& cell : cells_) power_lost(cell);
  }

  /// A flush has said that what was not durable may be lost: now or later, it is not said again.
  void told() {
    for (Cell& cell : cells_) cell.told |= !cell.lost.empty() || !cell.older.empty();
  }

  /// Nobody keeps any more what was acknowledged.
  void abandoned() {
    for (Cell& cell : cells_) {
      append(cell.lost, cell.older);
      cell.older.clear();
      cell.told |= !cell.lost.empty();
    }
  }

  /// A flush that began at `begin` has succeeded, and no other is in flight: what was lost would
  /// have been told.
  void flushed(std::uint64_t begin) {
    ++history_.now;
    for (Cell& cell : cells_) {
      if (cell.changed > begin) continue;
      cell.older.clear();
      if (!cell.told && history_.flushes == 0) cell.lost.clear();
      // Whatever it is, it stays.
      if (cell.in_doubt() && cell.fixed == 0) cell.fixed = history_.now;
    }
  }

  /// Checks what a read that began at `begin` has brought. Returns how many cells were lost.
  std::size_t read(std::size_t first, std::span<const std::byte> bytes, std::uint64_t begin,
                   std::uint64_t part) {
    std::size_t lost = 0;
    for (std::size_t i = first; !bytes.empty(); ++i, bytes = bytes.subspan(kCellSize)) {
      Cell& cell = cells_[i];
      const auto found = bytes.first<kCellSize>();
      if (is(found, cell.latest)) {
        if (cell.fixed != 0 && cell.fixed <= begin) cell.settle(cell.latest);
        continue;
      }
      const auto same = [&](WriteNumber one) { return is(found, one); };
      if (std::ranges::any_of(cell.lost, same) && std::ranges::none_of(cell.maybe, same)) ++lost;
      const auto candidates = candidates_of(cell, false);
      check(found, candidates, part, i, "is read");
      if (cell.fixed == 0 || cell.fixed > begin) continue;
      if (const auto which = std::ranges::find_if(candidates, same); which != candidates.end()) {
        cell.settle(*which);
      }
    }
    return lost;
  }

  /// Checks what the disk itself holds after a crash.
  void check_medium(std::span<const std::byte> bytes, std::uint64_t part) const {
    for (std::size_t i = 0; i < cells_.size(); ++i, bytes = bytes.subspan(kCellSize)) {
      std::vector<WriteNumber> candidates = candidates_of(cells_[i], true);
      if (under_way_ && i >= under_way_->first && i < under_way_->first + under_way_->count) {
        candidates.push_back(under_way_->number);
      }
      check(bytes.first<kCellSize>(), candidates, part, i, "is on the disk");
    }
  }

 private:
  using Numbers = std::vector<WriteNumber>;

  struct Cell {
    WriteNumber latest = 0;     // that was acknowledged
    Numbers older{};            // what a power loss could bring back
    Numbers lost{};             // what one may have brought back
    Numbers maybe{};            // may have been written
    std::uint64_t changed = 0;  // when it was last written
    std::uint64_t fixed = 0;    // when it was known to stay what it is; 0: it is not
    bool told = false;          // that the latest may be lost

    bool in_doubt() const noexcept { return !lost.empty() || !maybe.empty(); }
    void settle(WriteNumber number) {
      latest = number;
      lost.clear();
      maybe.clear();
      fixed = 0;
    }
  };

  static void append(Numbers& to, std::span<const WriteNumber> from) {
    for (const WriteNumber one : from) {
      if (std::ranges::find(to, one) == to.end()) to.push_back(one);
    }
  }

  static bool is(std::span<const std::byte, kCellSize> bytes, WriteNumber number) {
    for (std::size_t i = 0; i < kCellSize; ++i) {
      if (bytes[i] != byte_of(number, i)) return false;
    }
    return true;
  }

  std::span<Cell> range(const Write& write) {
    return std::span(cells_).subspan(write.first, write.count);
  }

  void ended(const Write& write) {
    ++history_.now;
    for (Cell& cell : range(write)) {
      cell.changed = history_.now;
      cell.fixed = 0;
    }
    under_way_ = nullptr;
  }

  void power_lost(Cell& cell) const {
    if (kept_ || cell.older.empty()) return;
    append(cell.lost, cell.older);
    cell.older.clear();
  }

  static Numbers candidates_of(const Cell& cell, bool crashed) {
    Numbers all{cell.latest};
    append(all, cell.maybe);
    append(all, cell.lost);
    if (crashed) append(all, cell.older);
    return all;
  }

  // Byte by byte: a write that was interrupted may end anywhere.
  static void check(std::span<const std::byte, kCellSize> bytes, const Numbers& candidates,
                    std::uint64_t part, std::size_t cell, const char* how) {
    for (std::size_t i = 0; i < kCellSize; ++i) {
      const auto same = [&](WriteNumber one) { return bytes[i] == byte_of(one, i); };
      ROOST_CHECK(std::ranges::any_of(candidates, same),
                  "byte {} of cell {} of part {} {} as {:#x}, not as write {} had it, nor as {} "
                  "others",
                  i, cell, part, how, std::to_integer<int>(bytes[i]), candidates.front(),
                  candidates.size() - 1);
    }
  }

  History& history_;
  const bool kept_;
  std::vector<Cell> cells_;
  const Write* under_way_ = nullptr;
};

}  // namespace roost::sim
