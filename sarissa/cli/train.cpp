// sarissa train: trains a model from a configuration file.
#include <unistd.h>

#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "sarissa/base/file.h"
#include "sarissa/cli/commands.h"
#include "sarissa/train/config.h"
#include "sarissa/train/plan.h"
#include "sarissa/train/trainer.h"

namespace sarissa::cli {
namespace {

struct TrainOptions {
  std::string config;
  bool resume = false;
  bool dry_run = false;
};

// Threads that wait for each other in OpenMP spin for a while before they sleep. With other work on
// the same cores each wait then lasts a whole time slice, and a step took three times as long (on
// 2 cores of an AMD EPYC with two other busy processes); an idle machine loses 5% by short spins.
// libgomp reads the setting when it is loaded, so the program starts itself again with it.
void restart_with_short_spins() {
  if (std::getenv("GOMP_SPINCOUNT") != nullptr || std::getenv("OMP_WAIT_POLICY") != nullptr) return;
  ::setenv("GOMP_SPINCOUNT", "1000", /*overwrite=*/0);
  std::string words = read_file("/proc/self/cmdline");  // each ends in a zero byte
  std::vector<char*> arguments;
  for (size_t at = 0; at < words.size(); at += std::string(words.data() + at).size() + 1) {
    arguments.push_back(words.data() + at);
  }
  arguments.push_back(nullptr);
  ::execv("/proc/self/exe", arguments.data());  // returns only when it failed: go on as we are
}

void train_command(const CLI::App& command, const TrainOptions& options) {
  const auto overrides =
      train::parse_overrides(command.remaining(), {"--resume", "--dry-run", "--help"});
  const train::RunConfig config = train::load_run_config(options.config, overrides);
  if (options.dry_run) {
    std::cout << train::describe_run(config);
    return;
  }
  restart_with_short_spins();
  const int code = train::exit_code(train::train(config, {.resume = options.resume}));
  if (code != 0) std::exit(code);  // interrupted: 130 or 143, which main() does not know
}

}  // namespace

void add_train(CLI::App& program) {
  auto options = std::make_shared<TrainOptions>();
  CLI::App* command = program.add_subcommand("train", "Train a model from a TOML file");
  command->add_option("config", options->config, "Configuration file (see configs/)")
      ->required()
      ->type_name("CONFIG.toml");
  command->add_flag("--resume", options->resume,
                    "Go on from the latest checkpoint of train.output");
  command->add_flag("--dry-run", options->dry_run,
                    "Print layers, parameters, memory and the resolved "
                    "settings; train nothing");
  command->allow_extras();
  command->footer("Settings, with their defaults; each overrides the file:\n" +
                  train::config_help() +
                  "\nExample:\n  sarissa train configs/quickstart.toml --train.steps=100");
  command->callback([command, options] { train_command(*command, *options); });
}

}  // namespace sarissa::cli
