// SPDX-License-Identifier: MIT
// What the bytes of an NBD connection are in: a chunk that receives fill, the data of a write, a
// reply.
//
// Threads: the connection's context.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <utility>

#include "export/buffer_cache.h"
#include "export/nbd_connection.h"
#include "roost/nbd/transmission.h"

namespace roost {

// What a receive filled. Writes whose data is in it keep it until they are done.
struct NbdConnection::Chunk {
  // One receive: a full queue of small requests, and of small writes with their data.
  static constexpr std::size_t kSize = 128 << 10;

  std::size_t filled;
  std::byte bytes[kSize];

  std::span<std::byte> room() { return std::span(bytes).subspan(filled); }
};

// A reply, or a chunk of one, as it goes out: header and payload in one piece of memory. The header
// ends on a cache line, since copying to the payload is quicker where that starts on one.
struct alignas(BufferCache::kAlignment) NbdConnection::Reply {
  Reply* next = nullptr;
  std::uint32_t size;         // header and payload to send
  std::uint32_t bytes_held;   // of the connection's limit
  std::uint32_t memory_size;  // of all of it
  std::uint8_t header_size;   // at the end of `header`
  bool last;                  // chunk of its request, which is answered then
  bool from_file;             // what follows it is a part of a file, in place of a payload
  std::byte unused;
  std::byte header[nbd::kMaxDataHeader];

  static Reply* make(BufferCache& cache, std::size_t header_size, std::size_t payload,
                     std::size_t held, bool last = true) {
    const std::size_t memory_size = sizeof(Reply) + payload;
    void* const memory = cache.take(memory_size);
    if (!memory) return nullptr;
    auto* const reply = ::new (memory) Reply;
    // A payload is at most kMaxPayload and a few bytes.
    reply->size = static_cast<std::uint32_t>(header_size + payload);
    reply->bytes_held = static_cast<std::uint32_t>(held);
    reply->memory_size = static_cast<std::uint32_t>(memory_size);
    reply->header_size = static_cast<std::uint8_t>(header_size);
    reply->last = last;
    reply->from_file = false;
    return reply;
  }
  // A header, behind which a part of a file is sent.
  static Reply* make(BufferCache& cache, std::size_t header_size, FilePart part, std::size_t held,
                     bool last) {
    Reply* const reply = make(cache, header_size, sizeof part, held, last);
    if (!reply) return nullptr;
    reply->size = static_cast<std::uint32_t>(header_size);
    reply->from_file = true;
    ::new (reply + 1) FilePart(part);
    return reply;
  }
  static void free(BufferCache& cache, Reply* reply) noexcept {
    cache.give_back(reply, reply->memory_size);
  }

  const FilePart& file_part() const noexcept {
    return *std::launder(reinterpret_cast<const FilePart*>(this + 1));
  }
  std::byte* bytes() noexcept { return header + sizeof header - header_size; }
  std::span<std::byte> payload() noexcept {
    return {reinterpret_cast<std::byte*>(this + 1), std::size_t{size} - header_size};
  }
};

// The data of a WRITE, where the socket put it: the part that came with the request in the chunk,
// the rest in memory of its own; or all of it there.
struct NbdConnection::WritePayload {
  explicit WritePayload(BufferCache& c) noexcept : cache(&c) {}
  WritePayload(WritePayload&& other) noexcept
      : chunk(std::move(other.chunk)),
        front(other.front),
        rest(std::exchange(other.rest, {})),
        cache(other.cache) {}
  WritePayload& operator=(WritePayload&&) = delete;
  ~WritePayload() {
    if (!rest.empty()) cache->give_back(rest.data(), rest.size());
  }

  // False: there is no memory. REQUIRES: `size` is above 0; only once.
  bool take_rest(std::size_t size) noexcept {
    auto* const memory = static_cast<std::byte*>(cache->take(size));
    if (memory) rest = {memory, size};
    return memory;
  }

  std::shared_ptr<Chunk> chunk;
  std::span<const std::byte> front;
  std::span<std::byte> rest;
  BufferCache* cache;
};

}  // namespace roost
