// SPDX-License-Identifier: MIT
#include <cerrno>
#include <charconv>
#include <limits>

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

Result<std::unique_ptr<BlockDriver>> open_disk(const std::string& description,
                                               OpenOptions options) {
  for (const auto& [prefix, make] :
       {std::pair{"mem:", &make_memory_disk}, std::pair{"null:", &make_null_disk}}) {
    if (!description.starts_with(prefix)) continue;
    const auto size = parse_size(description.substr(std::string_view(prefix).size()));
    if (!size) return std::unexpected(size.error());
    return make(*size, options);
  }
  return open_file(description, options);
}

}  // namespace roost
