// SPDX-License-Identifier: MIT
// Keys and certificates for the tests of TLS, made on the spot.
//
// Threads: the test's. Lifetime: the folder goes with the object.
#pragma once

#include <gnutls/gnutls.h>
#include <gnutls/x509.h>
#include <gtest/gtest.h>

#include <array>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <string>

namespace roost {

/// A folder as TlsOptions::directory wants it, of an authority of its own.
class TestCertificates {
 public:
  /// `host` is what the server's certificate is for.
  explicit TestCertificates(const std::string& host = "localhost") {
    std::string folder = (std::filesystem::temp_directory_path() / "roost-tls-XXXXXX").string();
    EXPECT_NE(::mkdtemp(folder.data()), nullptr);
    folder_ = folder;
    const Pair authority = make("Test Authority", "", nullptr);
    write("ca-cert.pem", authority.certificate);
    issue("server", host, authority);
    issue("client", "client.example", authority);
    free(authority);
    std::ofstream(folder_ / "keys.psk") << "# name:key\nalice:00112233445566778899aabbccddeeff\n"
                                        << "bob:ffeeddccbbaa99887766554433221100\n";
  }
  ~TestCertificates() { std::filesystem::remove_all(folder_); }
  TestCertificates(const TestCertificates&) = delete;
  TestCertificates& operator=(const TestCertificates&) = delete;

  std::string folder() const { return folder_.string(); }
  std::string psk() const { return (folder_ / "keys.psk").string(); }

 private:
  struct Pair {
    gnutls_x509_privkey_t key;
    gnutls_x509_crt_t certificate;
  };

  static void free(const Pair& pair) {
    ::gnutls_x509_crt_deinit(pair.certificate);
    ::gnutls_x509_privkey_deinit(pair.key);
  }

  static Pair make(const std::string& name, const std::string& host, const Pair* authority) {
    Pair pair{};
    ::gnutls_x509_privkey_init(&pair.key);
    EXPECT_EQ(::gnutls_x509_privkey_generate(
                  pair.key, GNUTLS_PK_ECDSA,
                  static_cast<unsigned>(GNUTLS_CURVE_TO_BITS(GNUTLS_ECC_CURVE_SECP256R1)), 0),
              0);
    ::gnutls_x509_crt_init(&pair.certificate);
    gnutls_x509_crt_t const c = pair.certificate;
    ::gnutls_x509_crt_set_version(c, 3);
    static unsigned char serial = 0;
    ++serial;
    ::gnutls_x509_crt_set_serial(c, &serial, 1);
    const std::time_t now = std::time(nullptr);
    ::gnutls_x509_crt_set_activation_time(c, now - 3600);
    ::gnutls_x509_crt_set_expiration_time(c, now + 24 * 3600);
    EXPECT_EQ(::gnutls_x509_crt_set_dn(c, ("CN=" + name).c_str(), nullptr), 0);
    ::gnutls_x509_crt_set_key(c, pair.key);
    if (authority) {
      ::gnutls_x509_crt_set_basic_constraints(c, 0, -1);
      ::gnutls_x509_crt_set_key_usage(c, GNUTLS_KEY_DIGITAL_SIGNATURE);
      if (!host.empty()) {
        ::gnutls_x509_crt_set_subject_alt_name(c, GNUTLS_SAN_DNSNAME, host.data(),
                                               static_cast<unsigned>(host.size()), 0);
      }
    } else {
      ::gnutls_x509_crt_set_basic_constraints(c, 1, -1);
      ::gnutls_x509_crt_set_key_usage(c, GNUTLS_KEY_KEY_CERT_SIGN);
    }
    const Pair& by = authority ? *authority : pair;
    EXPECT_EQ(::gnutls_x509_crt_sign2(c, by.certificate, by.key, GNUTLS_DIG_SHA256, 0), 0);
    return pair;
  }

  void issue(const std::string& role, const std::string& name, const Pair& authority) {
    const Pair pair = make(name, name, &authority);
    write(role + "-cert.pem", pair.certificate);
    gnutls_datum_t pem{};
    EXPECT_EQ(::gnutls_x509_privkey_export2(pair.key, GNUTLS_X509_FMT_PEM, &pem), 0);
    write(role + "-key.pem", pem);
    free(pair);
  }

  void write(const std::string& name, gnutls_x509_crt_t certificate) {
    gnutls_datum_t pem{};
    EXPECT_EQ(::gnutls_x509_crt_export2(certificate, GNUTLS_X509_FMT_PEM, &pem), 0);
    write(name, pem);
  }

  void write(const std::string& name, gnutls_datum_t pem) {
    std::ofstream(folder_ / name).write(reinterpret_cast<const char*>(pem.data), pem.size);
    ::gnutls_free(pem.data);
  }

  std::filesystem::path folder_;
};

}  // namespace roost
