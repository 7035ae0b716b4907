// sarissa inspect: what a model consists of and needs, without running it.
#include <algorithm>
#include <filesystem>
#include <iomanip>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>

#include "sarissa/base/error.h"
#include "sarissa/base/json.h"
#include "sarissa/cli/commands.h"
#include "sarissa/infer/footprint.h"
#include "sarissa/model/config.h"
#include "sarissa/model/decoder.h"

namespace sarissa::cli {
namespace {

constexpr int64_t kFloat32 = 4, kBFloat16 = 2;  // bytes per element

struct InspectOptions {
  std::string model;
  bool json = false;
};

model::ModelConfig find_config(const std::string& name) {
  if (std::filesystem::is_directory(name)) return model::load_model_config(name);
  const auto presets = model::preset_names();
  if (std::find(presets.begin(), presets.end(), name) != presets.end()) return model::preset(name);
  throw UsageError(
      str("'", name, "': neither a model directory nor a preset", did_you_mean(name, presets)));
}

std::string grouped(int64_t number) {
  std::string text = std::to_string(number);
  for (auto at = static_cast<int64_t>(text.size()) - 3; at > 0; at -= 3) text.insert(at, ",");
  return text;
}

nlohmann::ordered_json describe(const model::ModelConfig& config) {
  nlohmann::ordered_json result;
  result["parameters"] = model::parameter_count(config);
  result["layers"] = config.layers().size();
  for (const auto& summary : infer::mixer_summaries(config)) {
    result["mixers"][model::to_string(summary.kind)] = {
        {"layers", summary.layers}, {"parameters_per_layer", summary.parameters_per_mixer}};
  }
  result["mlp_parameters_per_layer"] = 3 * config.dim * config.resolved_mlp_dim();
  result["bytes"] = {{"float32", infer::weight_bytes(config, kFloat32)},
                     {"bfloat16", infer::weight_bytes(config, kBFloat16)}};
  result["state_bytes"] = {{"float32", infer::fixed_state_bytes(config, kFloat32)},
                           {"bfloat16", infer::fixed_state_bytes(config, kBFloat16)}};
  result["kv_bytes_per_token"] = {{"float32", infer::kv_bytes_per_token(config, kFloat32)},
                                  {"bfloat16", infer::kv_bytes_per_token(config, kBFloat16)}};
  result["config"] = fields_to_json(config);
  return result;
}

void print(const nlohmann::ordered_json& model) {
  const auto line = [](const std::string& name, const std::string& value) {
    std::cout << std::left << std::setw(34) << name << value << "\n";
  };
  const auto both = [](const nlohmann::ordered_json& bytes) {
    return grouped(bytes["float32"]) + " in float32, " + grouped(bytes["bfloat16"]) +
           " in bfloat16";
  };
  line("parameters", grouped(model["parameters"]));
  line("layers", std::to_string(model["layers"].get<int64_t>()));
  for (const auto& [kind, mixer] : model["mixers"].items()) {
    line("  " + kind, std::to_string(mixer["layers"].get<int64_t>()) + " x " +
                          grouped(mixer["parameters_per_layer"]) + " parameters");
  }
  line("  MLP", std::to_string(model["layers"].get<int64_t>()) + " x " +
                    grouped(model["mlp_parameters_per_layer"]) + " parameters");
  line("weights, bytes", both(model["bytes"]));
  line("fixed state per sequence, bytes", both(model["state_bytes"]));
  line("keys and values per token, bytes", both(model["kv_bytes_per_token"]));
  std::cout << "\nconfig\n";
  for (const auto& [key, value] : model["config"].items()) line("  " + key, value.dump());
}

void inspect(const InspectOptions& options) {
  const nlohmann::ordered_json model = describe(find_config(options.model));
  if (options.json) {
    std::cout << model.dump() << "\n";
  } else {
    print(model);
  }
}

}  // namespace

void add_inspect(CLI::App& program) {
  auto options = std::make_shared<InspectOptions>();
  CLI::App* command =
      program.add_subcommand("inspect", "Show a model's layers, sizes and settings");
  command->add_option("model", options->model, "Model directory, or the name of a preset")
      ->required()
      ->type_name("DIR|PRESET");
  command->add_flag("--json", options->json, "One object: parameters, layers, mixers, bytes, ...");
  command->footer("Example:\n  sarissa inspect evo2-7b --json");
  command->callback([options] { inspect(*options); });
}

}  // namespace sarissa::cli
