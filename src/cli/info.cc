// SPDX-License-Identifier: MIT
// `roost info`: what an NBD server offers, and what an export holds.

#include <fmt/format.h>

#include <cerrno>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "cli/commands.h"
#include "cli/progress.h"
#include "cli/runtime.h"
#include "roost/nbd/target.h"

namespace roost::cli {

namespace {

constexpr const char* kExamples = R"(Examples:
  roost info 'nbd+unix:///?socket=roost.sock'
      What the default export is and can do.
  roost info nbd://server --list
      All exports.
  roost info nbd://server/disk --map --json
      Where it holds data, for other programs.
)";

constexpr std::uint64_t kMapWindow = 1ull << 31;

struct InfoCommand {
  std::string uri;
  bool list = false;
  bool map = false;
  bool json = false;
};

using nbd::NbdClient;
using nlohmann::json;

constexpr std::pair<std::uint16_t, const char*> kFlags[] = {
    {nbd::kTransmissionReadOnly, "read-only"},
    {nbd::kTransmissionSendFlush, "flush"},
    {nbd::kTransmissionSendFua, "fua"},
    {nbd::kTransmissionRotational, "rotational"},
    {nbd::kTransmissionSendTrim, "trim"},
    {nbd::kTransmissionSendWriteZeroes, "write-zeroes"},
    {nbd::kTransmissionSendFastZero, "fast-zero"},
    {nbd::kTransmissionSendDf, "df"},
    {nbd::kTransmissionCanMultiConn, "multi-conn"},
    {nbd::kTransmissionSendResize, "resize"},
    {nbd::kTransmissionSendCache, "cache"},
    {nbd::kTransmissionBlockStatusPayload, "block-status-payload"},
};

const char* headers_name(nbd::ReplyStyle style) {
  switch (style) {
    case nbd::ReplyStyle::kSimple:
      return "simple";
    case nbd::ReplyStyle::kStructured:
      return "structured";
    case nbd::ReplyStyle::kExtended:
      return "extended";
  }
  return "";
}

json describe(const std::string& name, const NbdClient::Outcome& outcome) {
  json flags = json::array();
  for (const auto& [flag, word] : kFlags) {
    if (outcome.transmission_flags & flag) flags.push_back(word);
  }
  json contexts = json::array();
  for (const nbd::MetaContext& context : outcome.contexts) contexts.push_back(context.name);
  return {{"name", name},
          {"description", outcome.description},
          {"size", outcome.size},
          {"flags", flags},
          {"replies", headers_name(outcome.headers)},
          {"tls", outcome.tls},
          {"contexts", contexts},
          {"block_size",
           {{"minimum", outcome.min_block},
            {"preferred", outcome.preferred_block},
            {"maximum_payload", outcome.max_payload},
            {"told_by_server", outcome.block_sizes_known}}}};
}

std::string joined(const json& words) {
  std::string text;
  for (const json& word : words) text += (text.empty() ? "" : " ") + word.get<std::string>();
  return text.empty() ? "none" : text;
}

// What comes from a peer may be anything: only what is printable is printed.
std::string printable(const std::string& text) {
  std::string clean;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) {
      clean += fmt::format("\\x{:02x}", byte);
    } else {
      clean += c;
    }
  }
  return clean;
}

void print(const json& one) {
  const auto size = one["size"].get<std::uint64_t>();
  fmt::print("export \"{}\"\n", printable(one["name"].get<std::string>()));
  const auto description = one["description"].get<std::string>();
  if (!description.empty()) fmt::print("  description   {}\n", printable(description));
  fmt::print("  size          {} ({})\n", size, human_size(static_cast<double>(size)));
  fmt::print("  flags         {}\n", joined(one["flags"]));
  fmt::print("  replies       {}{}\n", one["replies"].get<std::string>(),
             one["tls"].get<bool>() ? ", encrypted" : "");
  fmt::print("  contexts      {}\n", joined(one["contexts"]));
  const json& block = one["block_size"];
  fmt::print("  block sizes   minimum {}, preferred {}, largest payload {}{}\n",
             block["minimum"].get<std::uint64_t>(), block["preferred"].get<std::uint64_t>(),
             block["maximum_payload"].get<std::uint64_t>(),
             block["told_by_server"].get<bool>() ? "" : " (assumed)");
}

class Informing {
 public:
  Informing(Runtime& runtime, const InfoCommand& command) : runtime_(runtime), command_(command) {}

  Task<int> run() {
    Result<void> done;
    try {
      done = co_await work();
    } catch (const std::bad_alloc&) {
      done = fail(ENOMEM, "info");
    }
    if (!done) {
      report(done.error().message());
      co_return runtime_.interrupted() ? kInterrupted : kFailure;
    }
    if (command_.json) {
      fmt::print("{}\n", out_.dump(2, ' ', false, json::error_handler_t::replace));
    }
    co_return kSuccess;
  }

 private:
  Task<Result<void>> work() {
    const Result<nbd::NbdTarget> target = nbd::NbdTarget::parse(command_.uri);
    if (!target) co_return std::unexpected(target.error());
    if (command_.list) co_return co_await list(*target);
    if (command_.map) co_return co_await map(*target);
    nbd::ClientWishes wishes;
    wishes.mode = nbd::ClientWishes::Mode::kInfo;
    wishes.meta_contexts = {std::string(nbd::kBaseAllocation)};
    Result<NbdClient::Outcome> outcome = co_await target->query(wishes, runtime_.stop());
    if (!outcome) co_return std::unexpected(outcome.error());
    if (outcome->size == 0) {
      // nbd-server says so of every export until it is opened.
      Result<std::unique_ptr<NbdClient>> client = co_await target->connect(wishes, runtime_.stop());
      if (!client) co_return std::unexpected(client.error());
      outcome = (*client)->outcome();
      co_await (*client)->disconnect();
    }
    out_ = describe(outcome->canonical_name, *outcome);
    if (!command_.json) print(out_);
    co_return Result<void>();
  }

  Task<Result<void>> list(const nbd::NbdTarget& target) {
    nbd::ClientWishes wishes;
    wishes.mode = nbd::ClientWishes::Mode::kList;
    const Result<NbdClient::Outcome> outcome = co_await target.query(wishes, runtime_.stop());
    if (!outcome) co_return std::unexpected(outcome.error());
    out_ = json::array();
    for (const auto& entry : outcome->entries) {
      out_.push_back({{"name", entry.name}, {"description", entry.description}});
      if (command_.json) continue;
      fmt::print("\"{}\"{}{}\n", printable(entry.name), entry.description.empty() ? "" : "  ",
                 printable(entry.description));
    }
    co_return Result<void>();
  }

  Task<Result<void>> map(const nbd::NbdTarget& target) {
    nbd::ClientWishes wishes;
    wishes.meta_contexts = {std::string(nbd::kBaseAllocation)};
    Result<std::unique_ptr<NbdClient>> client = co_await target.connect(wishes, runtime_.stop());
    if (!client) co_return std::unexpected(client.error());
    const Result<void> done = co_await map(**client);
    co_await (*client)->disconnect();
    co_return done;
  }

  Task<Result<void>> map(NbdClient& client) {
    if (client.outcome().contexts.empty()) {
      co_return fail(ENOTSUP, command_.uri + ": the server does not tell where data is");
    }
    out_ = json::array();
    std::uint64_t begin = 0;
    std::uint64_t length = 0;
    std::uint64_t flags = 0;
    std::uint64_t offset = 0;
    while (offset < client.size()) {
      const std::uint64_t ask = std::min(client.size() - offset, kMapWindow);
      const Result<std::vector<nbd::ContextExtents>> status =
          co_await client.block_status(offset, ask, 0, runtime_.stop());
      if (!status) co_return std::unexpected(status.error());
      for (const nbd::StatusExtent& extent : status->front().extents) {
        if (length > 0 && extent.flags != flags) {
          emit(begin, length, flags);
          begin += length;
          length = 0;
        }
        flags = extent.flags;
        length += extent.length;
        offset += extent.length;
      }
    }
    if (length > 0) emit(begin, length, flags);
    co_return Result<void>();
  }

  void emit(std::uint64_t offset, std::uint64_t length, std::uint64_t flags) {
    const bool hole = (flags & nbd::kStateHole) != 0;
    const bool zero = (flags & nbd::kStateZero) != 0;
    const char* const what = hole ? (zero ? "hole,zero" : "hole") : zero ? "zero" : "data";
    if (command_.json) {
      out_.push_back(
          {{"offset", offset}, {"length", length}, {"flags", flags}, {"description", what}});
    } else {
      fmt::print("{:>14} {:>14} {}\n", offset, length, what);
    }
  }

  Runtime& runtime_;
  const InfoCommand& command_;
  json out_;
};

int inform(const InfoCommand& command) {
  try {
    Runtime runtime(0);
    Informing informing(runtime, command);
    return runtime.run(informing.run());
  } catch (const std::exception& e) {
    report(e.what());
    return kFailure;
  }
}

}  // namespace

void add_info(CLI::App& app, Action& action) {
  const auto command = std::make_shared<InfoCommand>();
  CLI::App* const info = app.add_subcommand("info", "Show what an NBD server offers");
  info->footer(kExamples);
  info->add_option("uri", command->uri, "An NBD URI, as `roost serve` prints it")->required();
  CLI::Option* const list = info->add_flag("--list", command->list, "Show all exports");
  info->add_flag("--map", command->map, "Show where the export holds data, and where it is zero")
      ->excludes(list);
  info->add_flag("--json", command->json, "For other programs");
  info->callback([command, &action] { action = [command] { return inform(*command); }; });
}

}  // namespace roost::cli
