// SPDX-License-Identifier: MIT
// What is kept of acknowledged writes, and what is sent again of that.
#include "nbd/kept_writes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "roost/base/random.h"

namespace roost::nbd {
namespace {

using Words = std::vector<std::string>;

constexpr std::uint64_t kOverhead = KeptWrites::kOverhead;

ClientRequest request(Command command, std::uint64_t offset, std::uint64_t length,
                      std::uint16_t flags) {
  return {.command = command, .flags = flags, .offset = offset, .length = length};
}

iovec piece_of(std::string& text) { return {text.data(), text.size()}; }

std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

class KeptWritesTest : public testing::Test {
 protected:
  void make(std::uint64_t most_bytes) { kept_.emplace(most_bytes); }

  void write(std::uint64_t offset, std::string text, std::uint16_t flags = 0) {
    const ClientRequest what = request(Command::kWrite, offset, text.size(), flags);
    const iovec data = piece_of(text);
    kept_->add(what, kept_->copy(what, std::span(&data, 1)));
  }
  void zero(std::uint64_t offset, std::uint64_t length, std::uint16_t flags = 0) {
    const ClientRequest what = request(Command::kWriteZeroes, offset, length, flags);
    kept_->add(what, kept_->copy(what, {}));
  }
  void trim(std::uint64_t offset, std::uint64_t length, std::uint16_t flags = 0) {
    const ClientRequest what = request(Command::kTrim, offset, length, flags);
    kept_->add(what, kept_->copy(what, {}));
  }

  // What is sent again: "0 aaaa", "ZERO 4+4", "TRIM 8+4", with the flags behind it, if there are
  // any.
  Words sent() const {
    Words words;
    for (const KeptWrites::Piece& piece : kept_->pieces()) {
      const ClientRequest& what = piece.of->what;
      std::string one = std::to_string(piece.offset);
      if (what.command == Command::kWrite) {
        one += " " + text_of(piece.data());
      } else {
        one = (what.command == Command::kTrim ? "TRIM " : "ZERO ") + one + "+" +
              std::to_string(piece.length);
      }
      if (what.flags != 0) one += " " + std::to_string(what.flags);
      words.push_back(std::move(one));
    }
    return words;
  }

  std::optional<KeptWrites> kept_{std::in_place, 1 << 20};
};

TEST_F(KeptWritesTest, SendsWhatWasAcknowledgedTheOldestFirst) {
  write(8, "bbbb");
  write(0, "aaaa");
  zero(4, 4);
  trim(100, 16);
  EXPECT_EQ(sent(), (Words{"8 bbbb", "0 aaaa", "ZERO 4+4", "TRIM 100+16"}));
  EXPECT_EQ(kept_->bytes(), 4 * kOverhead + 8);
  EXPECT_EQ(kept_->unkept_bytes(), 0u);
}

TEST_F(KeptWritesTest, CopiesAWriteOfSeveralPieces) {
  std::string a = "ab", b = "cde";
  const iovec data[] = {piece_of(a), piece_of(b)};
  const ClientRequest what = request(Command::kWrite, 10, 5, 0);
  KeptWrites::Data copy = kept_->copy(what, data);
  a = b = "???";
  kept_->add(what, std::move(copy));
  EXPECT_EQ(sent(), (Words{"10 abcde"}));
}

TEST_F(KeptWritesTest, CopiesOnlyWhatHasToBeSentAgain) {
  make(4);
  std::string text = "aaaa";
  const iovec data = piece_of(text);
  const auto copy = [&](Command command, std::uint64_t length, std::uint16_t flags) {
    return kept_->copy(request(command, 0, length, flags), std::span(&data, 1));
  };
  ASSERT_TRUE(copy(Command::kWrite, 4, 0));
  EXPECT_EQ(copy(Command::kWrite, 4, 0)->size(), 4u);
  EXPECT_FALSE(copy(Command::kWrite, 5, 0)) << "it could not be kept";
  // These are kept without data, however long.
  for (const Command command : {Command::kTrim, Command::kWriteZeroes}) {
    ASSERT_TRUE(copy(command, 5, 0));
    EXPECT_TRUE(copy(command, 5, 0)->empty());
  }
  ASSERT_TRUE(copy(Command::kWrite, 5, kCommandFua));
  EXPECT_TRUE(copy(Command::kWrite, 4, kCommandFua)->empty());
}

TEST_F(KeptWritesTest, SendsOnlyWhatNoLaterWriteHasWrittenOver) {
  write(0, "abcdefghij");
  write(2, "BB");
  zero(4, 2);
  write(3, "C");
  EXPECT_EQ(sent(), (Words{"6 ghij", "0 ab", "2 B", "ZERO 4+2", "3 C"}));
  write(0, "0123456789");
  EXPECT_EQ(sent(), (Words{"0 0123456789"}));
  // What only touches it takes nothing of it.
  write(10, "x");
  EXPECT_EQ(sent(), (Words{"0 0123456789", "10 x"}));
}

TEST_F(KeptWritesTest, AFlushCoversWhatWasAcknowledgedBeforeItBegan) {
  write(0, "aaaa");
  write(8, "bbbb");
  const KeptWrites::Mark mark = kept_->mark();
  write(16, "cccc");
  kept_->flushed(mark);
  EXPECT_EQ(sent(), (Words{"16 cccc"}));
  EXPECT_EQ(kept_->bytes(), kOverhead + 4);
  kept_->flushed(kept_->mark());
  EXPECT_EQ(sent(), Words{});
  EXPECT_EQ(kept_->bytes(), 0u);
  // One that began earlier and ends now covers nothing that came meanwhile.
  write(0, "dddd");
  kept_->flushed(mark);
  EXPECT_EQ(sent(), (Words{"0 dddd"}));
}

TEST_F(KeptWritesTest, ADurableWriteIsKeptOnlyWhereAnOlderOneWouldBeSentOverIt) {
  write(0, "xxxx", kCommandFua);
  EXPECT_EQ(kept_->bytes(), 0u);
  write(0, "aaaa");
  write(4, "yyyy", kCommandFua);
  EXPECT_EQ(kept_->bytes(), kOverhead + 4);
  write(2, "zzzz", kCommandFua);
  trim(0, 1, kCommandFua);
  EXPECT_EQ(kept_->bytes(), 3 * kOverhead + 4);
  EXPECT_EQ(sent(), (Words{"1 a"}));
  EXPECT_EQ(kept_->unkept_bytes(), 0u);
  write(3, "b");  // newer than what is durable
  EXPECT_EQ(sent(), (Words{"1 a", "3 b"}));
}

TEST_F(KeptWritesTest, FastZeroesMayTakeTheirTimeTheSecondTime) {
  zero(0, 4, kCommandFastZero | kCommandNoHole);
  EXPECT_EQ(sent(), (Words{"ZERO 0+4 " + std::to_string(kCommandNoHole)}));
}

TEST_F(KeptWritesTest, KeepsAsMuchAsItMay) {
  make(2 * kOverhead + 8);
  write(0, "aaaa");
  write(100, "bbbb");
  EXPECT_EQ(kept_->bytes(), 2 * kOverhead + 8);
  EXPECT_EQ(kept_->unkept_bytes(), 0u);
  zero(200, 16);
  EXPECT_EQ(kept_->unkept_bytes(), 16u);
  EXPECT_EQ(sent(), (Words{"0 aaaa", "100 bbbb"}));
  // What a flush has covered gives its room back.
  kept_->flushed(kept_->mark());
  write(300, "cccc");
  EXPECT_EQ(sent(), (Words{"300 cccc"}));
  // Too large even for an empty one; and without room for its overhead.
  make(2 * kOverhead);
  write(0, std::string(kOverhead + 1, 'a'));
  EXPECT_EQ(kept_->unkept_bytes(), kOverhead + 1);
  write(0, std::string(2 * kOverhead + 1, 'a'));
  EXPECT_EQ(kept_->unkept_bytes(), 3 * kOverhead + 2);
  write(0, std::string(kOverhead, 'a'));
  EXPECT_EQ(kept_->bytes(), 2 * kOverhead);
}

TEST_F(KeptWritesTest, WhatCannotBeKeptTakesWithItWhatOverlapsAndWhatOverlapsThat) {
  make(5 * kOverhead + 20);
  write(0, "aaaa");
  write(3, "bbbb");
  write(100, "cccc");
  write(6, "dddd");  // newer than b, which it touches in a byte, and than a
  write(9, "eeee");  // newer than d
  write(7, "ffff");  // cannot be kept: over d and e, and so b and a
  EXPECT_EQ(sent(), (Words{"100 cccc"}));
  EXPECT_EQ(kept_->bytes(), kOverhead + 4);
  EXPECT_EQ(kept_->unkept_bytes(), 20u);
}

TEST_F(KeptWritesTest, WhatCannotBeKeptTakesNothingWithItThatIsNewerThanWhatItTakes) {
  make(3 * kOverhead + 12);
  write(0, "aaaa");
  write(2, "bbbb");
  write(100, "cccc");
  write(0, "d");  // over a only: b, which is newer than a, may be sent
  EXPECT_EQ(sent(), (Words{"2 bbbb", "100 cccc"}));
  EXPECT_EQ(kept_->unkept_bytes(), 5u);
}

TEST_F(KeptWritesTest, WhatOnlyTouchesWhatCannotBeKeptStays) {
  make(3 * kOverhead + 12);
  write(0, "aaaa");
  write(4, "bbbb");
  write(8, "cccc");
  write(4, "dddd");
  EXPECT_EQ(sent(), (Words{"0 aaaa", "8 cccc"}));
  EXPECT_EQ(kept_->unkept_bytes(), 8u);
}

TEST_F(KeptWritesTest, ADurableWriteIsNeverCountedAsUnkept) {
  make(2 * kOverhead + 8);
  write(0, "aaaa");
  write(100, "bbbb");
  write(2, "cccc", kCommandFua);  // there is no room to remember it
  EXPECT_EQ(sent(), (Words{"100 bbbb"}));
  EXPECT_EQ(kept_->unkept_bytes(), 4u) << "a, and nothing else";
  make(2 * kOverhead + 4);
  write(0, "aaaa");
  write(2, "cccc", kCommandFua);
  write(3, "d");
  EXPECT_EQ(sent(), Words{});
  EXPECT_EQ(kept_->bytes(), 0u);
  EXPECT_EQ(kept_->unkept_bytes(), 5u) << "a and d";
}

TEST_F(KeptWritesTest, AFlushCoversWhatWasNotKeptBeforeItBegan) {
  make(0);
  write(0, "aaaa");
  const KeptWrites::Mark mark = kept_->mark();
  write(0, "bb");
  const KeptWrites::Mark later = kept_->mark();
  write(0, "c");
  kept_->flushed(mark);
  EXPECT_EQ(kept_->unkept_bytes(), 3u);
  kept_->flushed(later);
  EXPECT_EQ(kept_->unkept_bytes(), 1u);
  kept_->flushed(mark);
  EXPECT_EQ(kept_->unkept_bytes(), 1u) << "two flushes may end in either order";
  kept_->settle();
  EXPECT_EQ(kept_->unkept_bytes(), 0u);
  write(0, "dd");
  EXPECT_EQ(kept_->unkept_bytes(), 2u);
}

TEST_F(KeptWritesTest, RequestsOverlapWhereTheyHaveAByteInCommon) {
  const auto at = [](std::uint64_t offset, std::uint64_t length) {
    return request(Command::kWrite, offset, length, 0);
  };
  EXPECT_TRUE(overlap(at(0, 4), at(3, 4)));
  EXPECT_TRUE(overlap(at(3, 4), at(0, 4)));
  EXPECT_TRUE(overlap(at(0, 8), at(2, 2)));
  EXPECT_TRUE(overlap(at(2, 2), at(0, 8)));
  EXPECT_FALSE(overlap(at(0, 4), at(4, 4)));
  EXPECT_FALSE(overlap(at(4, 4), at(0, 4)));
}

// A server with a cache, of which a crash keeps any part, and a client that keeps what it may.
//
// Invariants: after each piece that is sent again, each byte is what the crash left or what was
// written last; after all of them, it is what was written last, unless something was not kept. So
// on a server that has lost nothing they change nothing.
TEST_F(KeptWritesTest, WhateverACrashLeavesIsMadeGoodAndNothingGoesBack) {
  constexpr std::size_t kBytes = 24;
  int in_full = 0, with_losses = 0, split = 0;
  for (std::uint64_t seed = 0; seed < 3000; ++seed) {
    Random random(seed);
    make(random.one_in(2) ? 1 << 20 : 4 * kOverhead + 20);
    std::string cache(kBytes, '.'), disk(kBytes, '.');
    char next = 'a';
    const std::uint64_t steps = 1 + random.below(12);
    for (std::uint64_t step = 0; step < steps; ++step) {
      const std::size_t offset = random.below(kBytes);
      const std::size_t length = 1 + random.below(std::min<std::uint64_t>(kBytes - offset, 10));
      const std::uint16_t flags = random.one_in(4) ? kCommandFua : 0;
      if (random.one_in(8)) {
        disk = cache;
        kept_->flushed(kept_->mark());
        continue;
      }
      if (random.one_in(5)) {
        cache.replace(offset, length, length, '0');
        zero(offset, length, flags);
      } else {
        cache.replace(offset, length, length, next);
        write(offset, std::string(length, next++), flags);
      }
      if (flags) disk.replace(offset, length, cache.substr(offset, length));
    }
    std::string left = disk;
    const std::uint64_t losing = random.below(3);
    for (std::size_t i = 0; i < kBytes; ++i) {
      if (losing == 0 || (losing == 1 && random.one_in(2))) left[i] = cache[i];
    }
    const std::string lost = left;
    const std::vector<KeptWrites::Piece> pieces = kept_->pieces();
    for (const KeptWrites::Piece& piece : pieces) {
      left.replace(piece.offset, piece.length,
                   piece.of->what.command == Command::kWrite ? text_of(piece.data())
                                                             : std::string(piece.length, '0'));
      split += piece.length < piece.of->what.length;
      for (std::size_t i = 0; i < kBytes; ++i) {
        ASSERT_TRUE(left[i] == lost[i] || left[i] == cache[i])
            << "byte " << i << ", seed " << seed << ": " << lost << ", " << left << ", " << cache;
      }
    }
    if (kept_->unkept_bytes() == 0) {
      ++in_full;
      ASSERT_EQ(left, cache) << "seed " << seed;
    } else {
      ++with_losses;
    }
  }
  // Each was reached often enough to say something.
  EXPECT_GT(in_full, 500);
  EXPECT_GT(with_losses, 300);
  EXPECT_GT(split, 500);
}

}  // namespace
}  // namespace roost::nbd
