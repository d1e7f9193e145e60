// SPDX-License-Identifier: MIT
// Replays the fuzzers' checked-in inputs, so that builds without libFuzzer check them too.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "nbd/fuzz_checks.h"

namespace roost::nbd {
namespace {

template <class Check>
int replay(const char* folder, Check check) {
  int count = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(std::filesystem::path(ROOST_FUZZ_CORPUS) / folder)) {
    SCOPED_TRACE(entry.path().string());
    std::ifstream file(entry.path(), std::ios::binary);
    const std::string input((std::istreambuf_iterator<char>(file)), {});
    EXPECT_FALSE(file.bad());
    check(std::as_bytes(std::span(input)));
    // Every input is a stream that a client may break off anywhere.
    for (std::size_t size = 0; size < input.size(); ++size) {
      check(std::as_bytes(std::span(input)).first(size));
    }
    ++count;
  }
  return count;
}

TEST(FuzzCorpus, NegotiationInputsKeepTheInvariants) {
  EXPECT_GE(replay("nbd_negotiation", check_negotiation), 10);
}

TEST(FuzzCorpus, TransmissionInputsKeepTheInvariants) {
  EXPECT_GE(replay("nbd_transmission", check_transmission), 10);
}

}  // namespace
}  // namespace roost::nbd
