// SPDX-License-Identifier: MIT
#include "nbd/words.h"

#include <fmt/format.h>

#include <utility>

namespace roost::nbd {

std::string printable(std::string_view text) {
  constexpr std::size_t kLongest = 128;  // of the result; what is escaped takes four
  std::string result = "\"";
  for (const unsigned char c : text) {
    if (result.size() > kLongest) return result + "\"...";
    if (c < 0x20 || c > 0x7e || c == '"' || c == '\\') {
      result += fmt::format("\\x{:02x}", c);
    } else {
      result += static_cast<char>(c);
    }
  }
  return result + "\"";
}

std::string option_words(Option option) {
  switch (option) {
    case Option::kExportName:
      return "EXPORT_NAME";
    case Option::kAbort:
      return "ABORT";
    case Option::kList:
      return "LIST";
    case Option::kPeekExport:
      return "PEEK_EXPORT";
    case Option::kStartTls:
      return "STARTTLS";
    case Option::kInfo:
      return "INFO";
    case Option::kGo:
      return "GO";
    case Option::kStructuredReply:
      return "STRUCTURED_REPLY";
    case Option::kListMetaContext:
      return "LIST_META_CONTEXT";
    case Option::kSetMetaContext:
      return "SET_META_CONTEXT";
    case Option::kExtendedHeaders:
      return "EXTENDED_HEADERS";
  }
  return fmt::format("{}", std::to_underlying(option));
}

std::string reply_type_words(std::uint32_t type) {
  switch (ReplyType{type}) {
    case ReplyType::kAck:
      return "ACK";
    case ReplyType::kServer:
      return "SERVER";
    case ReplyType::kInfo:
      return "INFO";
    case ReplyType::kMetaContext:
      return "META_CONTEXT";
    case ReplyType::kErrUnsup:
      return "ERR_UNSUP";
    case ReplyType::kErrPolicy:
      return "ERR_POLICY";
    case ReplyType::kErrInvalid:
      return "ERR_INVALID";
    case ReplyType::kErrPlatform:
      return "ERR_PLATFORM";
    case ReplyType::kErrTlsReqd:
      return "ERR_TLS_REQD";
    case ReplyType::kErrUnknown:
      return "ERR_UNKNOWN";
    case ReplyType::kErrShutdown:
      return "ERR_SHUTDOWN";
    case ReplyType::kErrBlockSizeReqd:
      return "ERR_BLOCK_SIZE_REQD";
    case ReplyType::kErrTooBig:
      return "ERR_TOO_BIG";
    case ReplyType::kErrExtHeaderReqd:
      return "ERR_EXT_HEADER_REQD";
  }
  return fmt::format("type {:#x}", type);
}

std::string command_words(Command command) {
  switch (command) {
    case Command::kRead:
      return "READ";
    case Command::kWrite:
      return "WRITE";
    case Command::kDisc:
      return "DISC";
    case Command::kFlush:
      return "FLUSH";
    case Command::kTrim:
      return "TRIM";
    case Command::kCache:
      return "CACHE";
    case Command::kWriteZeroes:
      return "WRITE_ZEROES";
    case Command::kBlockStatus:
      return "BLOCK_STATUS";
    case Command::kResize:
      return "RESIZE";
  }
  return fmt::format("command {}", std::to_underlying(command));
}

std::string chunk_type_words(ChunkType type) {
  switch (type) {
    case ChunkType::kNone:
      return "NONE";
    case ChunkType::kOffsetData:
      return "OFFSET_DATA";
    case ChunkType::kOffsetHole:
      return "OFFSET_HOLE";
    case ChunkType::kBlockStatus:
      return "BLOCK_STATUS";
    case ChunkType::kBlockStatusExt:
      return "BLOCK_STATUS_EXT";
    case ChunkType::kError:
      return "ERROR";
    case ChunkType::kErrorOffset:
      return "ERROR_OFFSET";
  }
  return fmt::format("type {:#x}", std::to_underlying(type));
}

}  // namespace roost::nbd
