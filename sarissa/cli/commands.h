// The subcommands. Each add_NAME registers one subcommand with its options, its help (which ends in
// an example line) and a callback that does the work. A callback reports failure by throwing:
// main() turns UsageError into exit code 2 and every other exception into exit code 1, each with
// one line on stderr. Results go to stdout, progress and logs to stderr.
//
// A callback outlives add_NAME: keep a command's options in a std::shared_ptr that it captures.
#pragma once

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

namespace sarissa::cli {

void add_train(CLI::App& program);     // train.cpp
void add_eval(CLI::App& program);      // eval.cpp
void add_generate(CLI::App& program);  // generate.cpp
void add_score(CLI::App& program);     // score.cpp
void add_inspect(CLI::App& program);   // inspect.cpp
void add_init(CLI::App& program);      // init.cpp
void add_data(CLI::App& program);      // data.cpp: data prepare, data inspect
void add_bench(CLI::App& program);     // bench.cpp: bench ops
void add_selftest(CLI::App& program);  // selftest.cpp

}  // namespace sarissa::cli
