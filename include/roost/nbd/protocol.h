// SPDX-License-Identifier: MIT
// The numbers of the NBD protocol under names: the fixed newstyle handshake; simple, structured and
// extended replies; the extensions EXTENDED_HEADERS and RESIZE.
//
// Fields on the wire are big-endian and unaligned: load_be and store_be of roost/base/bytes.h.
// The enumerations have fixed underlying types, so that any value a peer sends can be held in one.
//
// Threads: constants and pure functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace roost::nbd {

// Magic numbers.
inline constexpr std::uint64_t kInitMagic = 0x4e42444d41474943;    // "NBDMAGIC"
inline constexpr std::uint64_t kOptionMagic = 0x49484156454f5054;  // "IHAVEOPT"
inline constexpr std::uint64_t kOptionReplyMagic = 0x0003e889045565a9;
inline constexpr std::uint32_t kRequestMagic = 0x25609513;
inline constexpr std::uint32_t kSimpleReplyMagic = 0x67446698;
inline constexpr std::uint32_t kStructuredReplyMagic = 0x668e33ef;
inline constexpr std::uint32_t kExtendedRequestMagic = 0x21e41c71;
inline constexpr std::uint32_t kExtendedReplyMagic = 0x6e8a278c;

// Sizes of messages, in bytes.
inline constexpr std::size_t kGreetingSize = 18;
inline constexpr std::size_t kClientFlagsSize = 4;
inline constexpr std::size_t kOptionHeaderSize = 16;
inline constexpr std::size_t kOptionReplyHeaderSize = 20;
inline constexpr std::size_t kExportNameZeroes = 124;  // behind the reply to kExportName
inline constexpr std::size_t kRequestSize = 28;
inline constexpr std::size_t kExtendedRequestSize = 32;
inline constexpr std::size_t kSimpleReplySize = 16;
inline constexpr std::size_t kStructuredReplySize = 20;  // the header of each chunk
inline constexpr std::size_t kExtendedReplySize = 32;    // likewise

/// The longest string (export name, description, message) either side may send.
inline constexpr std::size_t kMaxString = 4096;

/// The most data one read or write may carry. The protocol asks every server for at least this
/// much and lets it treat more as an attack.
inline constexpr std::uint32_t kMaxPayload = 32u << 20;

// Size constraints that hold where none were advertised.
inline constexpr std::uint32_t kDefaultMinBlock = 1;
inline constexpr std::uint32_t kDefaultPreferredBlock = 4096;

// Handshake flags, sent by the server (16 bits).
inline constexpr std::uint16_t kHandshakeFixedNewstyle = 1u << 0;
inline constexpr std::uint16_t kHandshakeNoZeroes = 1u << 1;

// Client flags, the answer to them (32 bits).
inline constexpr std::uint32_t kClientFixedNewstyle = 1u << 0;
inline constexpr std::uint32_t kClientNoZeroes = 1u << 1;

// Transmission flags: what an export is and can do (16 bits).
inline constexpr std::uint16_t kTransmissionHasFlags = 1u << 0;  // always set
inline constexpr std::uint16_t kTransmissionReadOnly = 1u << 1;
inline constexpr std::uint16_t kTransmissionSendFlush = 1u << 2;
inline constexpr std::uint16_t kTransmissionSendFua = 1u << 3;
inline constexpr std::uint16_t kTransmissionRotational = 1u << 4;
inline constexpr std::uint16_t kTransmissionSendTrim = 1u << 5;
inline constexpr std::uint16_t kTransmissionSendWriteZeroes = 1u << 6;
inline constexpr std::uint16_t kTransmissionSendDf = 1u << 7;
inline constexpr std::uint16_t kTransmissionCanMultiConn = 1u << 8;
inline constexpr std::uint16_t kTransmissionSendResize = 1u << 9;
inline constexpr std::uint16_t kTransmissionSendCache = 1u << 10;
inline constexpr std::uint16_t kTransmissionSendFastZero = 1u << 11;
inline constexpr std::uint16_t kTransmissionBlockStatusPayload = 1u << 12;

// Command flags, sent with a request (16 bits).
inline constexpr std::uint16_t kCommandFua = 1u << 0;
inline constexpr std::uint16_t kCommandNoHole = 1u << 1;
inline constexpr std::uint16_t kCommandDf = 1u << 2;
inline constexpr std::uint16_t kCommandReqOne = 1u << 3;
inline constexpr std::uint16_t kCommandFastZero = 1u << 4;
inline constexpr std::uint16_t kCommandPayloadLen = 1u << 5;  // with extended headers

// Flags of a chunk of a structured or extended reply (16 bits).
inline constexpr std::uint16_t kReplyDone = 1u << 0;

/// How requests are framed and answered, as client and server agreed.
enum class ReplyStyle : std::uint8_t {
  kSimple,      // no chunks
  kStructured,  // chunks for what has data or a message, otherwise simple
  kExtended,    // chunks only, and longer requests
};

/// What a chunk holds. Errors have bit 15 set.
enum class ChunkType : std::uint16_t {
  kNone = 0,
  kOffsetData = 1,
  kOffsetHole = 2,
  kBlockStatus = 5,
  kBlockStatusExt = 6,
  kError = 0x8001,
  kErrorOffset = 0x8002,
};
inline constexpr std::uint16_t kChunkErrorBit = 1u << 15;

/// The metadata context that says what is allocated, and its flags.
inline constexpr std::string_view kBaseAllocation = "base:allocation";
inline constexpr std::uint32_t kStateHole = 1u << 0;
inline constexpr std::uint32_t kStateZero = 1u << 1;

enum class Option : std::uint32_t {
  kExportName = 1,
  kAbort = 2,
  kList = 3,
  kPeekExport = 4,  // withdrawn
  kStartTls = 5,
  kInfo = 6,
  kGo = 7,
  kStructuredReply = 8,
  kListMetaContext = 9,
  kSetMetaContext = 10,
  kExtendedHeaders = 11,
};

/// What an option reply says; errors have bit 31 set and may carry a message for a human.
enum class ReplyType : std::uint32_t {
  kAck = 1,
  kServer = 2,
  kInfo = 3,
  kMetaContext = 4,
  kErrUnsup = 0x80000001,
  kErrPolicy = 0x80000002,
  kErrInvalid = 0x80000003,
  kErrPlatform = 0x80000004,
  kErrTlsReqd = 0x80000005,
  kErrUnknown = 0x80000006,
  kErrShutdown = 0x80000007,
  kErrBlockSizeReqd = 0x80000008,
  kErrTooBig = 0x80000009,
  kErrExtHeaderReqd = 0x8000000a,
};

enum class InfoType : std::uint16_t {
  kExport = 0,
  kName = 1,
  kDescription = 2,
  kBlockSize = 3,
};

enum class Command : std::uint16_t {
  kRead = 0,
  kWrite = 1,
  kDisc = 2,
  kFlush = 3,
  kTrim = 4,
  kCache = 5,
  kWriteZeroes = 6,
  kBlockStatus = 7,
  kResize = 8,
};

// The only values the error field of a reply may take besides 0. They look like Linux's errno
// values but belong to the protocol.
inline constexpr std::uint32_t kErrorPerm = 1;
inline constexpr std::uint32_t kErrorIo = 5;
inline constexpr std::uint32_t kErrorNoMem = 12;
inline constexpr std::uint32_t kErrorInval = 22;
inline constexpr std::uint32_t kErrorNoSpc = 28;
inline constexpr std::uint32_t kErrorOverflow = 75;
inline constexpr std::uint32_t kErrorNotSup = 95;
inline constexpr std::uint32_t kErrorShutdown = 108;

/// The protocol's word for an errno value: 0 stays 0; a full quota and a file too large are a
/// lack of space; a read-only file system is a lack of permission; what the protocol has no word
/// for is an I/O error.
std::uint32_t to_nbd_error(int errno_value) noexcept;

}  // namespace roost::nbd
