// SPDX-License-Identifier: MIT
// What is particular about TLS; channel_test.cc has what it shares with other channels.
#include "roost/io/tls.h"

#include <cerrno>
#include <stdexcept>

#include "io/test_certificates.h"
#include "io/test_channel.h"
#include "roost/io/memory_channel.h"

namespace roost {
namespace {

using Done = Result<void>;
using Secured = Result<std::unique_ptr<TlsChannel>>;

class Tls : public ChannelTest {
 protected:
  std::shared_ptr<const TlsCredentials> load(TlsOptions options) {
    auto loaded = TlsCredentials::load(std::move(options));
    if (!loaded) throw std::runtime_error(loaded.error().message());
    return *loaded;
  }

  /// Both handshakes, over memory.
  void shake(TlsOptions server, TlsOptions client, const std::string& hostname = "localhost") {
    server.role = TlsRole::kServer;
    client.role = TlsRole::kClient;
    auto below = make_memory_channels();
    start(TlsChannel::handshake(std::move(below.first), load(server)), server_, "server");
    start(TlsChannel::handshake(std::move(below.second), load(client), hostname), client_,
          "client");
    finish(server_);
    finish(client_);
  }

  const TestCertificates certificates_;
  std::optional<Secured> server_;
  std::optional<Secured> client_;
};

TEST_F(Tls, TellsEachWhoTheOtherIs) {
  shake({.directory = certificates_.folder()}, {.directory = certificates_.folder()});
  ASSERT_TRUE(*server_) << server_->error().message();
  ASSERT_TRUE(*client_) << client_->error().message();
  EXPECT_EQ((**server_)->peer_name(), "CN=client.example");
  EXPECT_EQ((**client_)->peer_name(), "CN=localhost");
  EXPECT_TRUE((**client_)->protocol().starts_with("TLS1.3 ")) << (**client_)->protocol();
}

TEST_F(Tls, KnowsWhoHasWhichPreSharedKey) {
  shake({.psk_file = certificates_.psk()},
        {.psk_file = certificates_.psk(), .psk_username = "bob"});
  ASSERT_TRUE(*server_) << server_->error().message();
  ASSERT_TRUE(*client_) << client_->error().message();
  EXPECT_EQ((**server_)->peer_name(), "bob");
}

TEST_F(Tls, APreSharedKeyDoesForTls12Too) {
  const std::string old = "NORMAL:-VERS-ALL:+VERS-TLS1.2";
  shake({.psk_file = certificates_.psk(), .priority = old},
        {.psk_file = certificates_.psk(), .psk_username = "bob", .priority = old});
  ASSERT_TRUE(*server_) << server_->error().message();
  ASSERT_TRUE(*client_) << client_->error().message();
  EXPECT_EQ((**server_)->peer_name(), "bob");
  EXPECT_EQ((**client_)->peer_name(), "");
  EXPECT_TRUE((**client_)->protocol().starts_with("TLS1.2 ")) << (**client_)->protocol();
}

TEST_F(Tls, AWrongPreSharedKeyIsRefused) {
  const TestCertificates others;
  std::ofstream(others.psk()) << "bob:0123456789abcdef0123456789abcdef\n";
  shake({.psk_file = certificates_.psk()}, {.psk_file = others.psk()});
  ASSERT_FALSE(*server_);
  ASSERT_FALSE(*client_);
  EXPECT_EQ(client_->error().code(), EPROTO);
}

TEST_F(Tls, ACertificateForAnotherHostIsRefusedWithWords) {
  shake({.directory = certificates_.folder()}, {.directory = certificates_.folder()},
        "other.example");
  ASSERT_FALSE(*client_);
  EXPECT_EQ(client_->error().code(), EACCES);
  EXPECT_NE(client_->error().message().find("does not match"), std::string::npos)
      << client_->error().message();
  EXPECT_FALSE(*server_);
}

TEST_F(Tls, AnAuthorityThatIsNotTrustedIsRefusedUnlessNobodyAsks) {
  const TestCertificates others;
  shake({.directory = certificates_.folder(), .verify_peer = false},
        {.directory = others.folder()});
  ASSERT_FALSE(*client_);
  EXPECT_EQ(client_->error().code(), EACCES);

  server_.reset();
  client_.reset();
  shake({.directory = certificates_.folder(), .verify_peer = false},
        {.directory = others.folder(), .verify_peer = false});
  EXPECT_TRUE(*client_);
  ASSERT_TRUE(*server_);
  EXPECT_EQ((**server_)->peer_name(), "");
}

TEST_F(Tls, AClientWithoutACertificateIsRefusedByWhoWantsOne) {
  const TestCertificates without;
  std::filesystem::remove(without.folder() + "/client-cert.pem");
  std::filesystem::copy_file(certificates_.folder() + "/ca-cert.pem",
                             without.folder() + "/ca-cert.pem",
                             std::filesystem::copy_options::overwrite_existing);
  shake({.directory = certificates_.folder()}, {.directory = without.folder()});
  EXPECT_FALSE(*server_);

  server_.reset();
  client_.reset();
  shake({.directory = certificates_.folder(), .verify_peer = false},
        {.directory = without.folder()});
  EXPECT_TRUE(*server_) << server_->error().message();
  EXPECT_TRUE(*client_) << client_->error().message();
}

TEST_F(Tls, MissingFilesAreNamed) {
  const auto missing = TlsCredentials::load({.directory = "/nonexistent"});
  ASSERT_FALSE(missing);
  EXPECT_NE(missing.error().message().find("/nonexistent/ca-cert.pem"), std::string::npos);
  const auto nobody = TlsCredentials::load(
      {.role = TlsRole::kClient, .psk_file = certificates_.psk(), .psk_username = "carol"});
  ASSERT_FALSE(nobody);
  EXPECT_NE(nobody.error().message().find("no key of 'carol'"), std::string::npos);
  EXPECT_FALSE(TlsCredentials::load({}));
}

TEST_F(Tls, APeerThatClosesWithoutEndingTlsHasTruncatedTheStream) {
  auto below = make_memory_channels();
  Channel* const raw = below.second.get();
  start(TlsChannel::handshake(std::move(below.first), load({.directory = certificates_.folder()})),
        server_);
  run(TlsChannel::handshake(std::move(below.second),
                            load({.role = TlsRole::kClient, .directory = certificates_.folder()}),
                            "localhost"),
      client_);
  finish(server_);
  std::optional<Done> ended;
  run(raw->shutdown(StreamEnd::kWrite), ended);
  std::string got(8, '\0');
  std::optional<Result<std::size_t>> read;
  run((**server_)->read(room_of(got)), read);
  ASSERT_FALSE(*read);
  EXPECT_EQ(read->error().code(), ECONNRESET);
}

TEST_F(Tls, GarbageInPlaceOfAHandshakeIsAnError) {
  auto below = make_memory_channels();
  std::optional<Done> sent;
  run(below.second->write_full(bytes_of("NBDMAGICIHAVEOPT, or so one would think")), sent);
  run(TlsChannel::handshake(std::move(below.first), load({.directory = certificates_.folder()})),
      server_);
  ASSERT_FALSE(*server_);
  EXPECT_EQ(server_->error().code(), EPROTO);
}

TEST_F(Tls, APeerThatHungUpIsHeardAllTheSame) {
  const std::string alert("\x15\x03\x03\x00\x02\x02\x28", 7);  // handshake_failure
  for (const std::string& said : {std::string(), alert}) {
    auto below = make_memory_channels();
    std::optional<Done> sent;
    if (!said.empty()) run(below.second->write_full(bytes_of(said)), sent);
    below.second.reset();  // so that our first words break the pipe
    client_.reset();
    run(TlsChannel::handshake(std::move(below.first),
                              load({.role = TlsRole::kClient, .directory = certificates_.folder()}),
                              "localhost"),
        client_);
    ASSERT_FALSE(*client_);
    const std::string words = client_->error().message();
    EXPECT_TRUE(words.starts_with("TLS handshake")) << words;
    EXPECT_EQ(words.find("Handshake failed") != std::string::npos, !said.empty()) << words;
  }
}

TEST_F(Tls, AHandshakeInPiecesOfNonsenseIsAnError) {
  // GnuTLS takes the first record, a part of a message, and does not look at the rest at once.
  const std::string start("\x16\x03\x01\x00\x05", 5);
  for (const std::string& rest : {std::string("hello and goodbye"), "hello" + start + "world",
                                  std::string("hello"), std::string("hel")}) {
    auto below = make_memory_channels();
    std::optional<Done> sent;
    run(below.second->write_full(bytes_of(start + rest)), sent);
    below.second.reset();
    server_.reset();
    run(TlsChannel::handshake(std::move(below.first), load({.directory = certificates_.folder()})),
        server_);
    EXPECT_FALSE(*server_);
  }
}

TEST_F(Tls, AHandshakeThatNobodyAnswersEndsWhenItIsStopped) {
  auto below = make_memory_channels();
  std::stop_source stop;
  start(TlsChannel::handshake(std::move(below.first), load({.directory = certificates_.folder()}),
                              "", stop.get_token()),
        server_);
  settle();
  EXPECT_FALSE(server_);
  stop.request_stop();
  finish(server_);
  ASSERT_FALSE(*server_);
  EXPECT_EQ(server_->error().code(), ECANCELED);
}

// A peer that does not read: the channel below is full, and a write that was stopped has left
// something to be sent, which a reader then waits to send first.
class TlsTurn : public Tls {
 protected:
  void SetUp() override {
    shake({.directory = certificates_.folder()}, {.directory = certificates_.folder()});
    ASSERT_TRUE(*server_ && *client_);
    std::stop_source stop;
    std::optional<Done> filled;
    start(mine().write_full(std::as_bytes(std::span(plenty_)), stop.get_token()), filled);
    settle();
    ASSERT_FALSE(filled);
    stop.request_stop();
    finish(filled);
    start(mine().read(room_of(got_), reader_.get_token()), read_, "reader");
    start(mine().write(bytes_of("more"), writer_.get_token()), written_, "writer");
    settle();
    ASSERT_FALSE(read_);
    ASSERT_FALSE(written_);
  }
  void TearDown() override {
    reader_.request_stop();
    writer_.request_stop();
    if (!read_) finish(read_);
    if (!written_) finish(written_);
  }

  Channel& mine() { return **server_.value(); }
  Channel& peer() { return **client_.value(); }

  const std::vector<char> plenty_ = std::vector<char>(8 << 20, 'x');
  std::string got_ = std::string(8, '\0');
  std::stop_source reader_;
  std::stop_source writer_;
  std::optional<Result<std::size_t>> read_;
  std::optional<Result<std::size_t>> written_;
};

TEST_F(TlsTurn, AWriterThatWaitsForTheReadersTurnCanBeStopped) {
  writer_.request_stop();
  finish(written_);
  // It was encrypted, and is sent before anything else.
  EXPECT_TRUE(*written_);
  EXPECT_FALSE(read_);
}

TEST_F(TlsTurn, AMoveTakesAWriterAlongThatWaitsForTheReadersTurn) {
  std::optional<Done> moved;
  run(mine().move_to(b()), moved);
  EXPECT_TRUE(*moved);
  EXPECT_EQ(mine().context(), &b());
  EXPECT_FALSE(read_);
  EXPECT_FALSE(written_);
  // And they go on there: the peer reads after all, and says something.
  std::string all(64 << 10, '\0');
  while (!written_) {
    std::optional<Result<std::size_t>> some;
    run(peer().read(room_of(all)), some);
    ASSERT_TRUE(*some);
  }
  EXPECT_TRUE(*written_);
  std::optional<Done> said;
  run(peer().write_full(bytes_of("hear me!")), said);
  finish(read_);
  EXPECT_EQ(got_, "hear me!");
}

}  // namespace
}  // namespace roost
