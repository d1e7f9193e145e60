// SPDX-License-Identifier: MIT
#include "nbd/kept_writes.h"

#include <algorithm>
#include <map>
#include <new>
#include <ranges>
#include <utility>

namespace roost::nbd {

namespace {

bool is_durable(const ClientRequest& what) { return (what.flags & kCommandFua) != 0; }

// A set of bytes.
class Ranges {
 public:
  bool overlap(std::uint64_t begin, std::uint64_t end) const {
    const auto next = all_.upper_bound(begin);
    if (next != all_.begin() && std::prev(next)->second > begin) return true;
    return next != all_.end() && next->first < end;
  }

  // Calls `fresh(begin, end)` for what was not there.
  template <class Fresh>
  void add(std::uint64_t begin, std::uint64_t end, Fresh fresh) {
    auto next = all_.upper_bound(begin);
    if (next != all_.begin() && std::prev(next)->second >= begin) --next;
    std::uint64_t at = begin;
    while (next != all_.end() && next->first <= end) {
      if (next->first > at) fresh(at, next->first);
      at = std::max(at, next->second);
      begin = std::min(begin, next->first);
      next = all_.erase(next);
    }
    if (at < end) fresh(at, end);
    all_.emplace_hint(next, begin, std::max(at, end));
  }

 private:
  std::map<std::uint64_t, std::uint64_t> all_;  // begin and end, none touching the next
};

}  // namespace

KeptWrites::Data KeptWrites::copy(const ClientRequest& what, std::span<const iovec> data) const {
  std::vector<std::byte> copy;
  if (what.command != Command::kWrite || is_durable(what)) return copy;
  if (what.length > most_bytes_) return std::nullopt;
  try {
    copy.reserve(what.length);
    for (const iovec& piece : data) {
      const auto* const bytes = static_cast<const std::byte*>(piece.iov_base);
      copy.insert(copy.end(), bytes, bytes + piece.iov_len);
    }
  } catch (const std::bad_alloc&) {
    return std::nullopt;
  }
  return copy;
}

void KeptWrites::add(const ClientRequest& what, Data data) {
  const auto overlaps = [&](const Write& one) { return overlap(one.what, what); };
  if (is_durable(what) && std::ranges::none_of(writes_, overlaps)) return;
  ++acknowledged_;
  const std::uint64_t size = kOverhead + (data ? data->size() : 0);
  if (!data || size > most_bytes_ || bytes_ > most_bytes_ - size) {
    if (!is_durable(what)) unkept_ever_ += what.length;
    drop_older(what.offset, what.length);
    return;
  }
  Write& kept =
      writes_.emplace_back(Write{.number = acknowledged_, .what = what, .data = std::move(*data)});
  // Where it is zero fast, it is so once more; what was done may not fail for being slow.
  kept.what.flags &= static_cast<std::uint16_t>(~kCommandFastZero);
  bytes_ += size;
}

// An older write may not be sent over one that cannot be; nor one that is older still, over those
// that are not sent for that.
void KeptWrites::drop_older(std::uint64_t offset, std::uint64_t length) {
  const auto nothing = [](std::uint64_t, std::uint64_t) {};
  Ranges newer;
  newer.add(offset, offset + length, nothing);
  for (Write& one : std::views::reverse(writes_)) {
    const std::uint64_t end = one.what.offset + one.what.length;
    if (!newer.overlap(one.what.offset, end)) continue;
    newer.add(one.what.offset, end, nothing);
    bytes_ -= kOverhead + one.data.size();
    if (!is_durable(one.what)) unkept_ever_ += one.what.length;
    one.dropped = true;
  }
  std::erase_if(writes_, [](const Write& one) { return one.dropped; });
}

void KeptWrites::flushed(const Mark& mark) {
  while (!writes_.empty() && writes_.front().number <= mark.acknowledged) {
    bytes_ -= kOverhead + writes_.front().data.size();
    writes_.pop_front();
  }
  unkept_settled_ = std::max(unkept_settled_, mark.unkept);
}

// To send all of them in their order would end in the same; but the older of two would take the
// newer one back meanwhile, and for good if the connection were lost in between and not made again:
// even one that is durable, or that no server has lost.
std::vector<KeptWrites::Piece> KeptWrites::pieces() const {
  std::vector<Piece> pieces;
  Ranges newer;
  for (const Write& one : std::views::reverse(writes_)) {
    const std::uint64_t one_end = one.what.offset + one.what.length;
    newer.add(one.what.offset, one_end, [&](std::uint64_t begin, std::uint64_t end) {
      if (!is_durable(one.what)) pieces.push_back({&one, begin, end - begin});
    });
  }
  std::ranges::reverse(pieces);
  return pieces;
}

}  // namespace roost::nbd
