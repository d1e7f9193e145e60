// SPDX-License-Identifier: MIT
//
// nbd_load: drives an NBD server and reports IOPS and latency. The client should cost little, or
// the figures would be its own: a thread a connection, every request that can be issued after one
// receive goes out in one send, replies are parsed out of one large receive buffer, and payload is
// counted, not looked at.
//
// Threads: the main thread times the run and tells the connections, through one atomic, what they
// are in; each connection's results are its own until its thread has been joined.
#include <arpa/inet.h>
#include <getopt.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <latch>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace {

constexpr uint64_t kGreetingMagic = 0x4e42444d41474943;  // "NBDMAGIC"
constexpr uint64_t kOptionMagic = 0x49484156454f5054;    // "IHAVEOPT"
constexpr uint64_t kOptionReplyMagic = 0x0003e889045565a9;
constexpr uint32_t kRequestMagic = 0x25609513;
constexpr uint32_t kReplyMagic = 0x67446698;
constexpr uint16_t kHandshakeFixedNewstyle = 1;
constexpr uint16_t kHandshakeNoZeroes = 2;
constexpr uint32_t kOptionGo = 7;
constexpr uint32_t kRepAck = 1;
constexpr uint32_t kRepInfo = 3;
constexpr uint32_t kRepErrorBit = 1u << 31;
constexpr uint16_t kInfoExport = 0;
constexpr uint16_t kCommandRead = 0;
constexpr uint16_t kCommandWrite = 1;
constexpr uint16_t kCommandDisconnect = 2;
constexpr size_t kRequestBytes = 28;
constexpr size_t kReplyBytes = 16;

// So many requests fit into any socket's buffer: the client may block in a send without the server
// waiting for the client to read.
constexpr unsigned kMaxDepth = 1024;
constexpr unsigned kMaxConnections = 256;
constexpr unsigned kMaxIdle = 10000;
constexpr size_t kMaxBlockBytes = 32u << 20;
constexpr size_t kReceiveBytes = 256u << 10;

using Clock = std::chrono::steady_clock;

uint64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch())
      .count();
}

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }
[[noreturn]] void fail_errno(const std::string& what) { fail(what + ": " + std::strerror(errno)); }

template <typename T>
void put(uint8_t*& out, T value) {
  if constexpr (sizeof(T) > 1) value = std::byteswap(value);
  std::memcpy(out, &value, sizeof(T));
  out += sizeof(T);
}

template <typename T>
T get(const uint8_t* in) {
  T value;
  std::memcpy(&value, in, sizeof(T));
  return std::byteswap(value);
}
static_assert(std::endian::native == std::endian::little, "put and get swap");

struct Options {
  std::string uri;
  std::string pattern = "randread";
  bool write = false;
  bool random = true;
  bool fill = false;
  bool idle = false;
  size_t block_bytes = 4096;
  unsigned depth = 1;
  unsigned connections = 1;
  double seconds = 3;
  double warmup_seconds = 0.3;
  unsigned spin_us = 0;
  long server_pid = 0;
  bool json = false;
};

// Where to connect: a unix socket's path, or a host and a port; and the export's name.
struct Address {
  std::string path;
  std::string host;
  std::string port = "10809";
  std::string name;
};

std::string percent_decoded(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size() && std::isxdigit(text[i + 1]) &&
        std::isxdigit(text[i + 2])) {
      out += static_cast<char>(std::stoi(std::string(text.substr(i + 1, 2)), nullptr, 16));
      i += 2;
    } else {
      out += text[i];
    }
  }
  return out;
}

Address parse_uri(std::string_view uri) {
  constexpr std::string_view kUnix = "nbd+unix://";
  constexpr std::string_view kTcp = "nbd://";
  Address address;
  if (uri.starts_with(kUnix)) {
    uri.remove_prefix(kUnix.size());
    const size_t query = uri.find("?socket=");
    if (!uri.starts_with('/') || query == uri.npos) fail("expected nbd+unix:///NAME?socket=PATH");
    address.name = percent_decoded(uri.substr(1, query - 1));
    address.path = percent_decoded(uri.substr(query + 8));
  } else if (uri.starts_with(kTcp)) {
    uri.remove_prefix(kTcp.size());
    const size_t slash = uri.find('/');
    std::string_view authority = uri.substr(0, slash);
    if (slash != uri.npos) address.name = percent_decoded(uri.substr(slash + 1));
    const size_t bracket = authority.find(']');
    const size_t colon = authority.find(':', bracket == authority.npos ? 0 : bracket);
    if (colon != authority.npos) address.port = authority.substr(colon + 1);
    authority = authority.substr(0, colon);
    if (authority.starts_with('[') && authority.ends_with(']')) {
      authority = authority.substr(1, authority.size() - 2);
    }
    address.host = authority;
  } else {
    fail("expected an nbd:// or nbd+unix:// URI");
  }
  return address;
}

int connect_to(const Address& address) {
  if (!address.path.empty()) {
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    if (address.path.size() >= sizeof(name.sun_path)) fail(address.path + ": path too long");
    std::memcpy(name.sun_path, address.path.c_str(), address.path.size() + 1);
    const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) fail_errno("socket");
    if (::connect(fd, reinterpret_cast<sockaddr*>(&name), sizeof(name)) != 0) {
      fail_errno(address.path);
    }
    return fd;
  }
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int error = ::getaddrinfo(address.host.c_str(), address.port.c_str(), &hints, &found);
  if (error != 0) fail(address.host + ": " + ::gai_strerror(error));
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> list(found, &::freeaddrinfo);
  for (addrinfo* entry = found; entry != nullptr; entry = entry->ai_next) {
    const int fd = ::socket(entry->ai_family, SOCK_STREAM | SOCK_CLOEXEC, entry->ai_protocol);
    if (fd < 0) continue;
    if (::connect(fd, entry->ai_addr, entry->ai_addrlen) == 0) {
      const int one = 1;
      ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
      return fd;
    }
    ::close(fd);
  }
  fail_errno(address.host + ":" + address.port);
}

// Latencies, to within 1.6 %: 64 buckets for each power of two nanoseconds.
class Histogram {
 public:
  void add(uint64_t ns) {
    ++buckets_[index(ns)];
    ++count_;
    sum_ns_ += ns;
  }
  void merge(const Histogram& other) {
    for (size_t i = 0; i < buckets_.size(); ++i) buckets_[i] += other.buckets_[i];
    count_ += other.count_;
    sum_ns_ += other.sum_ns_;
  }
  uint64_t count() const { return count_; }
  double mean_us() const { return count_ == 0 ? 0 : 1e-3 * sum_ns_ / count_; }
  double percentile_us(double percent) const {
    const uint64_t wanted = static_cast<uint64_t>(count_ * percent / 100);
    uint64_t seen = 0;
    for (size_t i = 0; i < buckets_.size(); ++i) {
      seen += buckets_[i];
      if (seen > wanted) return 1e-3 * lower_bound(i);
    }
    return 0;
  }

 private:
  static constexpr unsigned kBits = 6;
  static constexpr uint64_t kLinear = 1u << kBits;

  // Below kLinear a bucket a nanosecond; above, the power of two and the next kBits bits.
  static size_t index(uint64_t ns) {
    if (ns < kLinear) return ns;
    const unsigned shift = std::bit_width(ns) - 1 - kBits;
    return std::min<size_t>((shift + 1) * kLinear + (ns >> shift) - kLinear, kBuckets - 1);
  }
  static uint64_t lower_bound(size_t index) {
    if (index < kLinear) return index;
    const unsigned shift = index / kLinear - 1;
    return (index % kLinear + kLinear) << shift;
  }

  static constexpr size_t kBuckets = 40 * kLinear;
  std::array<uint64_t, kBuckets> buckets_{};
  uint64_t count_ = 0;
  uint64_t sum_ns_ = 0;
};

enum class Phase { kWarmUp, kTimed, kOver };

class Connection {
 public:
  Connection(const Options& options, const std::atomic<Phase>& phase, unsigned index)
      : options_(options),
        phase_(phase),
        random_((index + 1) * 0x9e3779b97f4a7c15ULL),
        slots_(options.depth),
        receive_(std::max(options.idle ? 0 : kReceiveBytes, options.block_bytes + kReplyBytes)),
        requests_(options.depth * kRequestBytes) {
    if (options.write) {
      payload_.resize(options.block_bytes);
      for (size_t i = 0; i < payload_.size(); ++i) payload_[i] = static_cast<uint8_t>(i * 131 + 7);
    }
    const uint64_t start_ns = now_ns();
    fd_ = connect_to(parse_uri(options.uri));
    // A server that hangs is an error, not a client that waits for ever.
    const timeval limit{10, 0};
    ::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    ::setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
    negotiate(parse_uri(options.uri).name);
    greeting_ns_ -= start_ns;
    blocks_ = size_ / options.block_bytes;
    if (blocks_ == 0) fail("the export is smaller than one block");
    next_block_ = blocks_ / options.connections * index;
  }
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  ~Connection() {
    if (fd_ >= 0) ::close(fd_);
  }

  // Keeps `depth` requests in flight until the phase is over, then waits for the last of them.
  void run() {
    run_some();
    uint8_t request[kRequestBytes];
    fill_request(request, kCommandDisconnect, 0, 0, 0);
    send_all(request, sizeof(request));
  }

  // The same, and stays connected.
  void run_some() {
    for (unsigned slot = 0; slot < options_.depth && may_issue(); ++slot) issue(slot);
    flush();
    while (in_flight_ > 0) {
      const size_t received = receive_some();
      parse(received);
      flush();
    }
  }

  const Histogram& latencies() const { return latencies_; }

  // From the call of connect() until the server's greeting was there.
  uint64_t greeting_ns() const { return greeting_ns_; }

 private:
  struct Slot {
    uint64_t issued_ns = 0;
  };

  void send_all(const void* data, size_t size) {
    const char* at = static_cast<const char*>(data);
    while (size > 0) {
      const ssize_t sent = ::send(fd_, at, size, MSG_NOSIGNAL);
      if (sent < 0 && errno == EINTR) continue;
      if (sent < 0) fail_errno("send");
      at += sent;
      size -= sent;
    }
  }

  void receive_all(void* data, size_t size) {
    const ssize_t got = ::recv(fd_, data, size, MSG_WAITALL);
    if (got < 0) fail_errno("receive");
    if (static_cast<size_t>(got) != size) fail("the server closed the connection");
  }

  void negotiate(const std::string& name) {
    uint8_t greeting[18];
    receive_all(greeting, sizeof(greeting));
    greeting_ns_ = now_ns();
    if (get<uint64_t>(greeting) != kGreetingMagic || get<uint64_t>(greeting + 8) != kOptionMagic) {
      fail("not a newstyle NBD server");
    }
    const uint16_t flags = get<uint16_t>(greeting + 16);
    if ((flags & kHandshakeFixedNewstyle) == 0) fail("the server is not fixed newstyle");

    std::vector<uint8_t> option(4 + 16 + 6 + name.size());
    uint8_t* out = option.data();
    put<uint32_t>(out, flags & (kHandshakeFixedNewstyle | kHandshakeNoZeroes));
    put<uint64_t>(out, kOptionMagic);
    put<uint32_t>(out, kOptionGo);
    put<uint32_t>(out, 6 + name.size());
    put<uint32_t>(out, name.size());
    out = std::copy(name.begin(), name.end(), out);
    put<uint16_t>(out, 0);
    send_all(option.data(), option.size());

    for (;;) {
      uint8_t header[20];
      receive_all(header, sizeof(header));
      if (get<uint64_t>(header) != kOptionReplyMagic) fail("bad magic in an option reply");
      const uint32_t type = get<uint32_t>(header + 12);
      const uint32_t length = get<uint32_t>(header + 16);
      if (length > 65536) fail("an option reply is too long");
      std::vector<uint8_t> data(length);
      if (length > 0) receive_all(data.data(), length);
      if ((type & kRepErrorBit) != 0) {
        fail("the server refuses export \"" + name +
             "\": " + std::string(data.begin(), data.end()));
      }
      if (type == kRepInfo && length >= 12 && get<uint16_t>(data.data()) == kInfoExport) {
        size_ = get<uint64_t>(data.data() + 2);
      }
      if (type == kRepAck) return;
    }
  }

  static void fill_request(uint8_t* out, uint16_t command, uint64_t cookie, uint64_t offset,
                           uint32_t length) {
    put<uint32_t>(out, kRequestMagic);
    put<uint16_t>(out, 0);
    put<uint16_t>(out, command);
    put<uint64_t>(out, cookie);
    put<uint64_t>(out, offset);
    put<uint32_t>(out, length);
  }

  uint64_t next_offset() {
    if (!options_.random) {
      if (next_block_ >= blocks_) next_block_ = 0;
      return next_block_++ * options_.block_bytes;
    }
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    // The high half of the product is uniform over [0, blocks_).
    return static_cast<uint64_t>((static_cast<unsigned __int128>(random_) * blocks_) >> 64) *
           options_.block_bytes;
  }

  // Queues one request; flush() sends all that are queued.
  void issue(unsigned slot) {
    ++issued_;
    fill_request(requests_.data() + queued_ * kRequestBytes,
                 options_.write ? kCommandWrite : kCommandRead, slot, next_offset(),
                 static_cast<uint32_t>(options_.block_bytes));
    queued_slots_[queued_++] = slot;
    ++in_flight_;
  }

  bool may_issue() const { return !options_.fill || issued_ < blocks_; }

  void flush() {
    if (queued_ == 0) return;
    const uint64_t now = now_ns();
    for (unsigned i = 0; i < queued_; ++i) slots_[queued_slots_[i]].issued_ns = now;
    if (options_.write) {
      send_writes();
    } else {
      send_all(requests_.data(), queued_ * kRequestBytes);
    }
    queued_ = 0;
  }

  void send_writes() {
    iovecs_.clear();
    for (unsigned i = 0; i < queued_; ++i) {
      iovecs_.push_back({requests_.data() + i * kRequestBytes, kRequestBytes});
      iovecs_.push_back({payload_.data(), payload_.size()});
    }
    size_t first = 0;
    while (first < iovecs_.size()) {
      msghdr message{};
      message.msg_iov = &iovecs_[first];
      message.msg_iovlen = std::min<size_t>(iovecs_.size() - first, 1024);
      ssize_t sent = ::sendmsg(fd_, &message, MSG_NOSIGNAL);
      if (sent < 0 && errno == EINTR) continue;
      if (sent < 0) fail_errno("send");
      while (first < iovecs_.size() && static_cast<size_t>(sent) >= iovecs_[first].iov_len) {
        sent -= iovecs_[first++].iov_len;
      }
      if (first < iovecs_.size()) {
        iovecs_[first].iov_base = static_cast<char*>(iovecs_[first].iov_base) + sent;
        iovecs_[first].iov_len -= sent;
      }
    }
  }

  size_t receive_some() {
    const uint64_t deadline = options_.spin_us == 0 ? 0 : now_ns() + 1000ull * options_.spin_us;
    for (bool spinning = deadline != 0;;) {
      const ssize_t got = ::recv(fd_, receive_.data() + kept_, receive_.size() - kept_,
                                 spinning ? MSG_DONTWAIT : 0);
      if (got > 0) return got;
      if (got == 0) fail("the server closed the connection");
      if (errno == EINTR) continue;
      if (errno != EAGAIN) fail_errno("receive");
      if (!spinning) fail("no reply within ten seconds");
      spinning = now_ns() < deadline;
    }
  }

  // Takes the replies out of what has been received; only an incomplete header is kept for the next
  // time, payload is skipped as it comes.
  void parse(size_t received) {
    const uint64_t now = now_ns();
    const Phase phase = phase_.load(std::memory_order_relaxed);
    const uint8_t* at = receive_.data();
    size_t left = kept_ + received;
    for (;;) {
      const size_t skip = std::min(left, payload_left_);
      at += skip;
      left -= skip;
      payload_left_ -= skip;
      if (payload_left_ > 0) break;
      if (replying_) {
        replying_ = false;
        complete(now, phase);
      }
      if (left < kReplyBytes) break;
      if (get<uint32_t>(at) != kReplyMagic) fail("bad magic in a reply");
      if (const uint32_t error = get<uint32_t>(at + 4); error != 0) {
        fail("the server replied with error " + std::to_string(error));
      }
      const uint64_t cookie = get<uint64_t>(at + 8);
      if (cookie >= slots_.size() || slots_[cookie].issued_ns == 0)
        fail("a reply nobody asked for");
      slot_ = static_cast<unsigned>(cookie);
      replying_ = true;
      at += kReplyBytes;
      left -= kReplyBytes;
      payload_left_ = options_.write ? 0 : options_.block_bytes;
    }
    kept_ = left;
    if (left > 0) std::memmove(receive_.data(), at, left);
  }

  void complete(uint64_t now, Phase phase) {
    // Replies that come while the phase changes count for the later one: at most `depth` of them.
    if (phase == Phase::kTimed) latencies_.add(now - slots_[slot_].issued_ns);
    slots_[slot_].issued_ns = 0;
    --in_flight_;
    if (phase != Phase::kOver && may_issue()) issue(slot_);
  }

  const Options& options_;
  const std::atomic<Phase>& phase_;
  uint64_t random_;
  std::vector<Slot> slots_;
  std::vector<uint8_t> receive_;
  std::vector<uint8_t> requests_;
  std::vector<uint8_t> payload_;
  std::vector<iovec> iovecs_;
  std::array<unsigned, kMaxDepth> queued_slots_;
  unsigned queued_ = 0;
  unsigned in_flight_ = 0;
  unsigned slot_ = 0;        // whose reply is being received
  bool replying_ = false;    // its header is in, its payload may not be
  size_t payload_left_ = 0;  // of that reply
  size_t kept_ = 0;          // bytes of an incomplete header at the start of receive_
  int fd_ = -1;
  uint64_t size_ = 0;
  uint64_t blocks_ = 0;
  uint64_t next_block_ = 0;
  uint64_t issued_ = 0;
  uint64_t greeting_ns_ = 0;
  Histogram latencies_;
};

// User and system time of all threads of a process, ended ones included.
double cpu_seconds(long pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const size_t name_end = text.rfind(')');
  unsigned long user = 0;
  unsigned long system = 0;
  if (name_end == text.npos ||
      std::sscanf(text.c_str() + name_end + 1,
                  " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system) != 2) {
    fail("cannot read the CPU time of process " + std::to_string(pid));
  }
  return static_cast<double>(user + system) / static_cast<double>(::sysconf(_SC_CLK_TCK));
}

constexpr char kUsage[] =
    R"(usage: nbd_load [options] URI

  URI                 nbd+unix:///NAME?socket=PATH or nbd://HOST:PORT/NAME
  --pattern PATTERN   randread (default), randwrite, read, write, or fill: each block is written
                      once, and nothing is measured
  --bs BYTES          size of a request, K and M allowed (default 4096)
  --depth N           requests in flight on each connection (default 1)
  --connections N     connections, a thread each (default 1)
  --idle              open the connections one after the other, read once from each, and leave them
                      open: how long that takes, and what memory of the server (--server-pid)
  --seconds S         length of the timed part (default 3)
  --warmup S          before it (default 0.3)
  --spin-us US        poll the socket so long before sleeping (default 0)
  --server-pid PID    report the server's CPU time per request, from /proc/PID/stat
  --json              one JSON object instead of text
)";

double number(const char* option, const char* text, double min, double max) {
  char* end = nullptr;
  double value = std::strtod(text, &end);
  if (*end == 'K' || *end == 'k')
    value *= 1024, ++end;
  else if (*end == 'M' || *end == 'm')
    value *= 1024 * 1024, ++end;
  if (end == text || *end != '\0' || !(value >= min && value <= max)) {
    std::fprintf(stderr, "nbd_load: bad value for --%s: %s\n", option, text);
    std::exit(2);
  }
  return value;
}

Options parse_options(int argc, char** argv) {
  Options options;
  const option kLong[] = {{"pattern", required_argument, nullptr, 'p'},
                          {"bs", required_argument, nullptr, 'b'},
                          {"depth", required_argument, nullptr, 'd'},
                          {"connections", required_argument, nullptr, 'c'},
                          {"seconds", required_argument, nullptr, 's'},
                          {"warmup", required_argument, nullptr, 'w'},
                          {"spin-us", required_argument, nullptr, 'u'},
                          {"server-pid", required_argument, nullptr, 'P'},
                          {"json", no_argument, nullptr, 'j'},
                          {"idle", no_argument, nullptr, 'i'},
                          {"help", no_argument, nullptr, 'h'},
                          {nullptr, 0, nullptr, 0}};
  int which = 0;
  for (int c; (c = ::getopt_long(argc, argv, "", kLong, &which)) != -1;) {
    const auto value = [&](double min, double max) {
      return number(kLong[which].name, optarg, min, max);
    };
    switch (c) {
      case 'p':
        options.pattern = optarg;
        break;
      case 'b':
        options.block_bytes = static_cast<size_t>(value(1, kMaxBlockBytes));
        break;
      case 'd':
        options.depth = static_cast<unsigned>(value(1, kMaxDepth));
        break;
      case 'c':
        options.connections = static_cast<unsigned>(value(1, kMaxIdle));
        break;
      case 's':
        options.seconds = value(0.01, 86400);
        break;
      case 'w':
        options.warmup_seconds = value(0, 3600);
        break;
      case 'u':
        options.spin_us = static_cast<unsigned>(value(0, 1e6));
        break;
      case 'P':
        options.server_pid = static_cast<long>(value(1, 1e9));
        break;
      case 'j':
        options.json = true;
        break;
      case 'i':
        options.idle = true;
        break;
      case 'h':
        std::fputs(kUsage, stdout);
        std::exit(0);
      default:
        std::fputs(kUsage, stderr);
        std::exit(2);
    }
  }
  if (optind + 1 != argc) {
    std::fputs(kUsage, stderr);
    std::exit(2);
  }
  options.uri = argv[optind];
  options.random = options.pattern.starts_with("rand");
  options.fill = options.pattern == "fill";
  options.write = options.fill || options.pattern.ends_with("write");
  constexpr std::array kPatterns = {"randread", "randwrite", "read", "write", "fill"};
  if (std::ranges::find(kPatterns, options.pattern) == kPatterns.end()) {
    std::fprintf(stderr, "nbd_load: unknown pattern %s\n", options.pattern.c_str());
    std::exit(2);
  }
  if (!options.idle && options.connections > (options.fill ? 1 : kMaxConnections)) {
    std::fprintf(stderr, "nbd_load: too many connections\n");
    std::exit(2);
  }
  return options;
}

int run_fill(const Options& options) {
  const std::atomic<Phase> phase{Phase::kWarmUp};
  Connection(options, phase, 0).run();
  return 0;
}

// The memory of a process, that which it shares counted as its part of it.
double pss_kib(long pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/smaps_rollup");
  for (std::string line; std::getline(file, line);) {
    unsigned long kib = 0;
    if (std::sscanf(line.c_str(), "Pss: %lu", &kib) == 1) return static_cast<double>(kib);
  }
  fail("cannot read the memory of process " + std::to_string(pid));
}

int run_idle(const Options& options) {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
  // One request each: another would follow while the phase is not over.
  const std::atomic<Phase> phase{Phase::kOver};
  const double before = options.server_pid == 0 ? 0 : pss_kib(options.server_pid);
  Histogram greetings;
  Histogram replies;
  std::vector<std::unique_ptr<Connection>> connections;
  for (unsigned i = 0; i < options.connections; ++i) {
    const uint64_t start_ns = now_ns();
    connections.push_back(std::make_unique<Connection>(options, phase, i));
    connections.back()->run_some();
    replies.add(now_ns() - start_ns);
    greetings.add(connections.back()->greeting_ns());
  }
  double pss = 0;
  if (options.server_pid != 0) {
    pss = (pss_kib(options.server_pid) - before) / options.connections;
  }
  std::printf(options.json
                  ? "{\"connections\": %u, \"greeting_p50_us\": %.1f, \"greeting_p99_us\": %.1f, "
                    "\"reply_p50_us\": %.1f, \"reply_p99_us\": %.1f"
                  : "%u connections; greeted after p50 %.1f us, p99 %.1f us; first block read "
                    "after p50 %.1f us, p99 %.1f us\n",
              options.connections, greetings.percentile_us(50), greetings.percentile_us(99),
              replies.percentile_us(50), replies.percentile_us(99));
  if (options.server_pid != 0) {
    std::printf(options.json ? ", \"pss_kib_per_connection\": %.2f"
                             : "server: %.2f KiB of memory (PSS) a connection\n",
                pss);
  }
  if (options.json) std::printf("}\n");
  return 0;
}

int run(const Options& options) {
  std::atomic<Phase> phase{Phase::kWarmUp};
  std::vector<std::unique_ptr<Connection>> connections;
  for (unsigned i = 0; i < options.connections; ++i) {
    connections.push_back(std::make_unique<Connection>(options, phase, i));
  }
  std::atomic<bool> failed{false};
  std::vector<std::thread> threads;
  for (auto& connection : connections) {
    threads.emplace_back([&failed, connection = connection.get()] {
      try {
        connection->run();
      } catch (const std::exception& error) {
        std::fprintf(stderr, "nbd_load: %s\n", error.what());
        failed.store(true);
      }
    });
  }
  std::this_thread::sleep_for(std::chrono::duration<double>(options.warmup_seconds));
  const double cpu_before = options.server_pid == 0 ? 0 : cpu_seconds(options.server_pid);
  const uint64_t start_ns = now_ns();
  phase.store(Phase::kTimed, std::memory_order_relaxed);
  std::this_thread::sleep_for(std::chrono::duration<double>(options.seconds));
  phase.store(Phase::kOver, std::memory_order_relaxed);
  const double seconds = 1e-9 * static_cast<double>(now_ns() - start_ns);
  const double cpu = options.server_pid == 0 ? 0 : cpu_seconds(options.server_pid) - cpu_before;
  for (std::thread& thread : threads) thread.join();
  if (failed.load()) return 1;

  Histogram all;
  for (auto& connection : connections) all.merge(connection->latencies());
  const uint64_t count = all.count();
  if (count == 0) fail("not one request was completed");
  const double iops = static_cast<double>(count) / seconds;
  if (options.json) {
    std::printf(
        "{\"pattern\": \"%s\", \"block_bytes\": %zu, \"depth\": %u, \"connections\": %u, "
        "\"seconds\": %.3f, \"requests\": %lu, \"iops\": %.1f, \"mean_us\": %.2f, "
        "\"p50_us\": %.2f, \"p99_us\": %.2f, \"p999_us\": %.2f",
        options.pattern.c_str(), options.block_bytes, options.depth, options.connections, seconds,
        count, iops, all.mean_us(), all.percentile_us(50), all.percentile_us(99),
        all.percentile_us(99.9));
    if (options.server_pid != 0) {
      std::printf(", \"server_cpu_us_per_request\": %.3f", 1e6 * cpu / static_cast<double>(count));
    }
    std::printf("}\n");
  } else {
    std::printf("%s %zu bytes, depth %u, %u connection(s), %.2f s: %.0f IOPS, %.1f MiB/s\n",
                options.pattern.c_str(), options.block_bytes, options.depth, options.connections,
                seconds, iops, iops * static_cast<double>(options.block_bytes) / (1 << 20));
    std::printf("latency: mean %.1f us, p50 %.1f us, p99 %.1f us, p99.9 %.1f us\n", all.mean_us(),
                all.percentile_us(50), all.percentile_us(99), all.percentile_us(99.9));
    if (options.server_pid != 0) {
      std::printf("server: %.2f us of CPU a request\n", 1e6 * cpu / static_cast<double>(count));
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse_options(argc, argv);
  try {
    return options.fill ? run_fill(options) : options.idle ? run_idle(options) : run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "nbd_load: %s\n", error.what());
    return 1;
  }
}
