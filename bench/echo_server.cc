// SPDX-License-Identifier: MIT
//
// nbd_echo_server: the floor for depth 1. One thread blocks in recv for a request of 28 bytes and
// answers it from memory with one send of a reply header and the payload; it looks at no disk,
// starts no coroutine and keeps no books. Whatever a real server takes longer than this is its own
// cost; the rest is the kernel's sockets and scheduler. It speaks just enough of the NBD handshake
// for nbd_load to drive it, serves one connection after the other, and answers reads only.
#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr size_t kMaxPayloadBytes = 32u << 20;

char socket_path[sizeof(sockaddr_un::sun_path)];

void end(int) {
  ::unlink(socket_path);
  ::_exit(0);
}

template <typename T>
T get(const uint8_t* in) {
  T value;
  std::memcpy(&value, in, sizeof(T));
  return std::byteswap(value);
}

template <typename T>
uint8_t* put(uint8_t* out, T value) {
  value = std::byteswap(value);
  std::memcpy(out, &value, sizeof(T));
  return out + sizeof(T);
}

bool receive_all(int fd, uint8_t* data, size_t size) {
  return ::recv(fd, data, size, MSG_WAITALL) == static_cast<ssize_t>(size);
}

bool send_all(int fd, const uint8_t* data, size_t size) {
  while (size > 0) {
    const ssize_t sent = ::send(fd, data, size, MSG_NOSIGNAL);
    if (sent < 0) return false;
    data += sent;
    size -= static_cast<size_t>(sent);
  }
  return true;
}

// The greeting, then NBD_OPT_GO for whatever name; any other option ends the connection.
bool negotiate(int fd, uint64_t size_bytes) {
  uint8_t out[64];
  uint8_t* at = put<uint64_t>(out, 0x4e42444d41474943);
  at = put<uint64_t>(at, 0x49484156454f5054);
  at = put<uint16_t>(at, 3);
  if (!send_all(fd, out, at - out)) return false;
  uint8_t in[4096];
  if (!receive_all(fd, in, 20)) return false;  // client flags, option header
  const uint32_t length = get<uint32_t>(in + 16);
  if (get<uint32_t>(in + 12) != 7 || length > sizeof(in) || !receive_all(fd, in, length)) {
    return false;
  }
  at = put<uint64_t>(out, 0x0003e889045565a9);  // information: size and flags
  at = put<uint32_t>(at, 7);
  at = put<uint32_t>(at, 3);
  at = put<uint32_t>(at, 12);
  at = put<uint16_t>(at, 0);
  at = put<uint64_t>(at, size_bytes);
  at = put<uint16_t>(at, 3);                   // has flags, read-only
  at = put<uint64_t>(at, 0x0003e889045565a9);  // acknowledged
  at = put<uint32_t>(at, 7);
  at = put<uint32_t>(at, 1);
  at = put<uint32_t>(at, 0);
  return send_all(fd, out, at - out);
}

void serve(int fd, std::vector<uint8_t>& reply) {
  uint8_t request[28];
  while (receive_all(fd, request, sizeof(request))) {
    const uint32_t length = get<uint32_t>(request + 24);
    if (get<uint32_t>(request) != 0x25609513 || get<uint16_t>(request + 6) != 0 ||
        length > kMaxPayloadBytes) {
      return;  // a disconnect, or nothing for this server
    }
    if (reply.size() < 16 + length) reply.resize(16 + length);
    put<uint32_t>(reply.data(), 0x67446698);
    put<uint32_t>(reply.data() + 4, 0);
    std::memcpy(reply.data() + 8, request + 8, 8);
    if (!send_all(fd, reply.data(), 16 + length)) return;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || std::strlen(argv[1]) >= sizeof(socket_path)) {
    std::fputs("usage: nbd_echo_server SOCKET\n", stderr);
    return 2;
  }
  std::strcpy(socket_path, argv[1]);
  const int listener = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::strcpy(name.sun_path, socket_path);
  if (listener < 0 || ::bind(listener, reinterpret_cast<sockaddr*>(&name), sizeof(name)) != 0 ||
      ::listen(listener, 16) != 0) {
    std::fprintf(stderr, "nbd_echo_server: %s: %s\n", socket_path, std::strerror(errno));
    return 1;
  }
  ::signal(SIGINT, end);
  ::signal(SIGTERM, end);
  std::vector<uint8_t> reply(16 + 4096);
  for (;;) {
    const int fd = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd < 0) continue;
    if (negotiate(fd, uint64_t{1} << 30)) serve(fd, reply);
    ::close(fd);
  }
}
