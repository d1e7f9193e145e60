// SPDX-License-Identifier: MIT
// The commands that end by themselves. Each adds its own options to the command line.
//
// Threads: the main thread.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>

namespace roost::cli {

/// What the command line asks for: set when it was read, returns the exit status.
using Action = std::function<int()>;

// The application and the action outlive the reading of the command line.
void add_copy(CLI::App& app, Action& action);
void add_bench(CLI::App& app, Action& action);
void add_info(CLI::App& app, Action& action);
void add_proxy(CLI::App& app, Action& action);

}  // namespace roost::cli
