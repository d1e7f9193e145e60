// SPDX-License-Identifier: MIT
#include <cerrno>
#include <charconv>
#include <limits>
#include <string_view>

#include "roost/block/block_driver.h"

namespace roost {

Result<std::uint64_t> parse_size(const std::string& text) {
  std::uint64_t number = 0;
  const char* const end = text.data() + text.size();
  const auto [after, error] = std::from_chars(text.data(), end, number);
  unsigned shift = 0;
  const char* rest = after;
  if (rest != end) {
    switch (*rest++) {
      case 'k':
      case 'K':
        shift = 10;
        break;
      case 'm':
      case 'M':
        shift = 20;
        break;
      case 'g':
      case 'G':
        shift = 30;
        break;
      case 't':
      case 'T':
        shift = 40;
        break;
      default:
        rest = nullptr;
    }
  }
  if (error != std::errc{} || rest != end) {
    return fail(EINVAL, "size '" + text + "' (bytes, or with K, M, G, T)");
  }
  constexpr std::uint64_t kMax = std::numeric_limits<std::int64_t>::max();
  if (number > kMax >> shift) return fail(EFBIG, "size '" + text + "'");
  return number << shift;
}

namespace {

using MakeDisk = Result<std::unique_ptr<BlockDriver>> (*)(std::uint64_t, OpenOptions);

struct SizedKind {
  std::string_view prefix;
  MakeDisk make;
};
constexpr SizedKind kSizedKinds[] = {{"mem:", &make_memory_disk}, {"null:", &make_null_disk}};

const SizedKind* sized_kind(const std::string& description) {
  for (const SizedKind& kind : kSizedKinds) {
    if (description.starts_with(kind.prefix)) return &kind;
  }
  return nullptr;
}

}  // namespace

Result<void> check_description(const std::string& description) {
  if (description.empty()) return fail(EINVAL, "disk ''");
  if (const SizedKind* kind = sized_kind(description)) {
    const auto size = parse_size(description.substr(kind->prefix.size()));
    if (!size) return fail(size.error().code(), description + ": " + size.error().doing());
  }
  return {};
}

Result<std::unique_ptr<BlockDriver>> open_disk(const std::string& description,
                                               OpenOptions options) {
  if (const auto good = check_description(description); !good) {
    return std::unexpected(good.error());
  }
  const SizedKind* kind = sized_kind(description);
  if (!kind) return open_file(description, options);
  return kind->make(*parse_size(description.substr(kind->prefix.size())), options);
}

}  // namespace roost
