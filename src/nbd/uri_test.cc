// SPDX-License-Identifier: MIT
#include "roost/nbd/uri.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <string>

namespace roost::nbd {
namespace {

using Transport = NbdUri::Transport;
using TlsType = NbdUri::TlsType;
using namespace std::string_literals;

struct Case {
  std::string text;
  NbdUri uri;
  std::string printed{};  // where it is not `text`
};

TEST(NbdUri, IsParsedAndPrinted) {
  const Case cases[] = {
      {"nbd://example.com", {.host = "example.com"}, "nbd://example.com/"},
      {"nbd://example.com/", {.host = "example.com"}},
      {"nbd://example.com/disk", {.host = "example.com", .export_name = "disk"}},
      {"nbd://example.com//disk", {.host = "example.com", .export_name = "/disk"}},
      {"nbd://example.com/hello%20world", {.host = "example.com", .export_name = "hello world"}},
      {"nbd://example.com/a%2fb%3F",
       {.host = "example.com", .export_name = "a/b?"},
       "nbd://example.com/a/b%3F"},
      {"nbd://example.com/a%23%C3%A4", {.host = "example.com", .export_name = "a#\xc3\xa4"}},
      {"NBD://Example/", {.host = "Example"}, "nbd://Example/"},
      {"nbd:///disk", {.export_name = "disk"}},
      {"nbd://", {}, "nbd:///"},
      {"nbd:", {}, "nbd:///"},
      {"nbd:/disk", {.export_name = "disk"}, "nbd:///disk"},
      {"nbds://127.0.0.1:10810/x",
       {.tls_required = true, .host = "127.0.0.1", .port = 10810, .export_name = "x"}},
      {"nbd://h:10809/", {.host = "h"}, "nbd://h/"},
      {"nbd://h:/", {.host = "h"}, "nbd://h/"},
      {"nbd://[::1]:65535/", {.host = "::1", .port = 65535}},
      {"nbd://[2001:db8::1]/", {.host = "2001:db8::1"}},
      {"nbds://alice@h/", {.tls_required = true, .host = "h", .tls_username = "alice"}},
      {"nbds+unix://alice@/e?socket=/s",
       {.transport = Transport::kUnix,
        .tls_required = true,
        .socket = "/s",
        .export_name = "e",
        .tls_username = "alice"},
       "nbds+unix:///e?socket=/s&tls-username=alice"},
      {"nbds://a%40b@h/", {.tls_required = true, .host = "h", .tls_username = "a@b"}},
      {"nbds://h/?tls-username=alice",
       {.tls_required = true, .host = "h", .tls_username = "alice"},
       "nbds://alice@h/"},
      {"nbd+unix:///?socket=/run/nbd.sock",
       {.transport = Transport::kUnix, .socket = "/run/nbd.sock"}},
      {"nbd+unix:///export?socket=nbd%20sock",
       {.transport = Transport::kUnix, .socket = "nbd sock", .export_name = "export"}},
      {"nbd+unix:///?socket=%00/abstract",
       {.transport = Transport::kUnix, .socket = "\0/abstract"s}},
      {"nbds+unix:///e?socket=s&tls-username=bob",
       {.transport = Transport::kUnix,
        .tls_required = true,
        .socket = "s",
        .export_name = "e",
        .tls_username = "bob"}},
      {"nbd+vsock:///", {.transport = Transport::kVsock}, "nbd+vsock://2/"},
      {"nbd+vsock://3:99999/e",
       {.transport = Transport::kVsock, .cid = 3, .port = 99999, .export_name = "e"}},
      {"nbds+vsock://4294967295:4294967295/",
       {.transport = Transport::kVsock,
        .tls_required = true,
        .cid = 4294967295,
        .port = 4294967295}},
      {"nbds://h/?tls-type=x509&tls-certificates=/etc/pki&tls-hostname=x.y&tls-verify-peer=0",
       {.tls_required = true,
        .host = "h",
        .tls_type = TlsType::kX509,
        .tls_certificates = "/etc/pki",
        .tls_hostname = "x.y",
        .tls_verify_peer = false}},
      {"nbds://h/?tls-type=psk&tls-verify-peer=1&tls-psk-file=/k%26k",
       {.tls_required = true,
        .host = "h",
        .tls_type = TlsType::kPsk,
        .tls_psk_file = "/k&k",
        .tls_verify_peer = true}},
      {"nbds://h/?&tls-type=anon&",
       {.tls_required = true, .host = "h", .tls_type = TlsType::kAnon},
       "nbds://h/?tls-type=anon"},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.text);
    const Result<NbdUri> parsed = parse_uri(c.text);
    ASSERT_TRUE(parsed) << parsed.error().doing();
    EXPECT_EQ(*parsed, c.uri);
    const std::string printed = to_string(*parsed);
    EXPECT_EQ(printed, c.printed.empty() ? c.text : c.printed);
    EXPECT_EQ(parse_uri(printed), c.uri);
  }
}

TEST(NbdUri, SaysWhatIsWrong) {
  const std::pair<std::string, std::string> cases[] = {
      {"", "there is no scheme, such as nbd://"},
      {"host:10809",
       "the scheme \"host\" is none of nbd, nbds, nbd+unix, nbds+unix, nbd+vsock and nbds+vsock"},
      {"nbd:host", "// is missing behind the scheme"},
      {"nbd://h/a b", "a blank or control character has to be encoded"},
      {"nbd://h/#x", "a fragment (#) means nothing here"},
      {"nbd://h/%4", "the export name has a % without two hexadecimal digits behind it"},
      {"nbd://h/%zz", "the export name has a % without two hexadecimal digits behind it"},
      {"nbd://h/%00", "the export name has a NUL in it"},
      {"nbd://h/" + std::string(4097, 'x'), "the export name is longer than 4096 bytes"},
      {"nbd://h:0/", "the port is 0"},
      {"nbd://h:65536/", "the port \"65536\" is not a number up to 65535"},
      {"nbd://h:-1/", "the port \"-1\" is not a number up to 65535"},
      {"nbd://h:1x/", "the port \"1x\" is not a number up to 65535"},
      {"nbd://::1/", "an IPv6 address has to stand in brackets"},
      {"nbd://[::1/", "the ] behind the address is missing"},
      {"nbd://[h]/", "only an IPv6 address stands in brackets"},
      {"nbd://[::1]x/", "only a port may follow the address"},
      {"nbd+vsock://host/", "the context id \"host\" is not a number up to 4294967295"},
      {"nbd+vsock://4294967296/", "the context id \"4294967296\" is not a number up to 4294967295"},
      {"nbd+unix:///", "a UNIX socket needs the parameter socket=PATH"},
      {"nbd+unix:///?socket=", "the parameter socket is empty"},
      {"nbd+unix:///?socket=a%00", "the parameter socket has a NUL behind its beginning"},
      {"nbd+unix://run/x?socket=s",
       "a host means nothing to a UNIX socket: write /// before the export name"},
      {"nbd://h/?socket=s", "the parameter socket is for nbd+unix and nbds+unix"},
      {"nbd://h/?tls-type=ssl", "tls-type \"ssl\" is none of anon, x509 and psk"},
      {"nbd://h/?tls-verify-peer=yes", "tls-verify-peer \"yes\" is neither 0 nor 1"},
      {"nbd://h/?tls-hostname", "the parameter \"tls-hostname\" has no value"},
      {"nbd://h/?tls-hostname=", "the parameter tls-hostname is empty"},
      {"nbd://h/?tls-hostname=%00", "the parameter tls-hostname has a NUL in it"},
      {"nbd://h/?tls-type=psk&tls-type=psk", "the parameter \"tls-type\" is there twice"},
      {"nbds://a@h/?tls-username=b", "there are two user names"},
      {"nbd://h/?x-new=1", "the parameter \"x-new\" is not known"},
  };
  for (const auto& [text, why] : cases) {
    SCOPED_TRACE(text);
    const Result<NbdUri> parsed = parse_uri(text);
    ASSERT_FALSE(parsed);
    EXPECT_EQ(parsed.error().code(), EINVAL);
    const std::string& doing = parsed.error().doing();
    EXPECT_TRUE(doing.starts_with("NBD URI \"")) << doing;
    EXPECT_TRUE(doing.ends_with(": " + why)) << doing;
  }
}

}  // namespace
}  // namespace roost::nbd
