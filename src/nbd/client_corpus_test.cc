// SPDX-License-Identifier: MIT
// Replays the client fuzzer's checked-in inputs, so that builds without libFuzzer check them too.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "nbd/client_fuzz_checks.h"

namespace roost::nbd {
namespace {

TEST(FuzzCorpus, ClientInputsKeepTheInvariants) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(
           std::filesystem::path(ROOST_FUZZ_CORPUS) / "nbd_client")) {
    SCOPED_TRACE(entry.path().string());
    std::ifstream file(entry.path(), std::ios::binary);
    const std::string input((std::istreambuf_iterator<char>(file)), {});
    EXPECT_FALSE(file.bad());
    check_client(std::as_bytes(std::span(input)));
    // Every input is a stream that a server may break off anywhere.
    for (std::size_t size = 0; size < input.size(); ++size) {
      check_client(std::as_bytes(std::span(input)).first(size));
    }
    ++count;
  }
  EXPECT_GE(count, 30);
}

}  // namespace
}  // namespace roost::nbd
