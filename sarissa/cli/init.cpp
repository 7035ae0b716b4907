// sarissa init: a model directory with random weights.
#include <filesystem>
#include <memory>

#include "sarissa/base/error.h"
#include "sarissa/base/log.h"
#include "sarissa/cli/model_options.h"
#include "sarissa/model/config.h"

namespace sarissa::cli {
namespace {

struct InitOptions {
  std::string preset;
  std::string directory;
  uint64_t seed = 0;
  std::string dtype = "float32";
  bool force = false;
};

void init(const InitOptions& options) {
  const model::ModelConfig config = model::preset(options.preset);
  const at::ScalarType dtype = parse_dtype(options.dtype, at::kCPU);
  if (std::filesystem::exists(options.directory) && !std::filesystem::is_empty(options.directory) &&
      !options.force) {
    throw UsageError(str("DIR '", options.directory,
                         "' is not empty; give another one, or --force to overwrite the model"));
  }
  const model::Decoder decoder(config, options.seed, at::kCPU, dtype);
  std::filesystem::create_directories(options.directory);
  model::save_model(options.directory, decoder);
  log_info(options.directory, ": ", options.preset, ", ", model::parameter_count(config),
           " parameters from seed ", options.seed);
}

}  // namespace

void add_init(CLI::App& program) {
  auto options = std::make_shared<InitOptions>();
  CLI::App* command =
      program.add_subcommand("init", "Write a model with random weights; nothing is downloaded");
  std::string names;
  for (const auto& name : model::preset_names()) names += (names.empty() ? "" : ", ") + name;
  command->add_option("--preset", options->preset, "One of: " + names)
      ->required()
      ->type_name("NAME");
  command->add_option("dir", options->directory, "Directory to write")
      ->required()
      ->type_name("DIR");
  command->add_option("--seed", options->seed, "Same seed, same weights")->capture_default_str();
  command->add_option("--dtype", options->dtype, "float32 or bfloat16 on disk")
      ->capture_default_str();
  command->add_flag("--force", options->force, "Write into a directory that is not empty");
  command->footer("Example:\n  sarissa init --preset quickstart models/random --seed 1");
  command->callback([options] { init(*options); });
}

}  // namespace sarissa::cli
