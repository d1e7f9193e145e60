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

}  // namespace
}  // namespace roost
