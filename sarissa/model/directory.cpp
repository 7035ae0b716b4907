// Model directories: config.json and model.safetensors, or shards with an index in the form that
// Hugging Face's tools write and read.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "sarissa/base/error.h"
#include "sarissa/base/file.h"
#include "sarissa/base/json.h"
#include "sarissa/checkpoint/safetensors.h"
#include "sarissa/model/decoder_impl.h"

namespace sarissa::model {
namespace {

namespace fs = std::filesystem;
using checkpoint::NamedTensors;
using checkpoint::SafetensorsFile;

constexpr const char* kConfig = "config.json";
constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

std::vector<NamedTensors> split_into_shards(const std::vector<Parameter>& parameters,
                                            int64_t max_bytes) {
  std::vector<NamedTensors> shards(1);
  int64_t bytes = 0;
  for (const auto& parameter : parameters) {
    const auto size = static_cast<int64_t>(parameter.value.nbytes());
    if (!shards.back().empty() && bytes + size > max_bytes) {
      shards.emplace_back();
      bytes = 0;
    }
    shards.back().emplace_back(parameter.name, parameter.value);
    bytes += size;
  }
  return shards;
}

std::string shard_name(size_t index, size_t count) {
  char name[64];
  std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", index + 1, count);
  return name;
}

void save_shards(const fs::path& directory, const std::vector<NamedTensors>& shards) {
  nlohmann::ordered_json weight_map = nlohmann::ordered_json::object();
  int64_t total = 0;
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name = shard_name(i, shards.size());
    checkpoint::write_safetensors(directory / name, shards[i], {{"format", "pt"}});
    for (const auto& [tensor_name, tensor] : shards[i]) {
      weight_map[tensor_name] = name;
      total += static_cast<int64_t>(tensor.nbytes());
    }
  }
  const nlohmann::ordered_json index = {{"metadata", {{"total_size", total}}},
                                        {"weight_map", weight_map}};
  replace_file(directory / kIndex, index.dump(2) + "\n");
}

/// The tensor files of a model directory: those that the index names, or the single one.
std::vector<fs::path> tensor_files(const fs::path& directory) {
  const fs::path index_path = directory / kIndex;
  if (!fs::exists(index_path)) return {directory / kSingleFile};
  const auto index = parse_json_object(read_file(index_path), index_path.string());
  SARISSA_CHECK(index.contains("weight_map") && index["weight_map"].is_object(),
                index_path.string(), ": no weight_map object");
  std::vector<fs::path> files;
  for (const auto& [tensor, file] : index["weight_map"].items()) {
    SARISSA_CHECK(file.is_string(), index_path.string(), ": weight_map '", tensor,
                  "' is not a string");
    const fs::path name(file.get<std::string>());
    SARISSA_CHECK(name.has_filename() && name == name.filename() && name != "." && name != "..",
                  index_path.string(), ": weight_map '", tensor,
                  "' leaves the folder: ", name.string());
    const fs::path path = directory / name;
    if (std::find(files.begin(), files.end(), path) == files.end()) files.push_back(path);
  }
  return files;
}

/// Where each of the model's tensors is; refuses tensors that the model has not, and duplicates.
std::map<std::string, const SafetensorsFile*> locate(const std::vector<fs::path>& paths,
                                                     const std::vector<SafetensorsFile>& files,
                                                     const std::vector<Parameter>& parameters) {
  std::vector<std::string> expected;
  for (const auto& parameter : parameters) expected.push_back(parameter.name);
  const std::set<std::string> known(expected.begin(), expected.end());
  std::map<std::string, const SafetensorsFile*> where;
  for (size_t i = 0; i < files.size(); ++i) {
    for (const auto& name : files[i].names()) {
      SARISSA_CHECK(known.contains(name), paths[i].string(), ": tensor '", name,
                    "' is not part of the model in ", kConfig, did_you_mean(name, expected));
      SARISSA_CHECK(where.emplace(name, &files[i]).second, paths[i].string(), ": tensor '", name,
                    "' is also in another file");
    }
  }
  return where;
}

}  // namespace

void save_model(const std::string& directory, const Decoder& decoder, int64_t max_shard_bytes) {
  const fs::path path(directory);
  std::error_code error;
  fs::create_directories(path, error);
  SARISSA_CHECK(!error, "cannot make the folder ", directory, ": ", error.message());
  replace_file(path / kConfig, fields_to_json(decoder.config()).dump(2) + "\n");
  const auto shards = split_into_shards(decoder.parameters(), max_shard_bytes);
  if (shards.size() > 1) {
    save_shards(path, shards);
    fs::remove(path / kSingleFile, error);  // of a model saved here before
  } else {
    checkpoint::write_safetensors(path / kSingleFile, shards.front(), {{"format", "pt"}});
    fs::remove(path / kIndex, error);
  }
}

ModelConfig load_model_config(const std::string& directory) {
  const fs::path path = fs::path(directory) / kConfig;
  SARISSA_CHECK(fs::is_directory(directory), "model directory ", directory, ": no such folder");
  ModelConfig config;
  fields_from_json(config, parse_json_object(read_file(path), path.string()), path.string());
  try {
    config.validate();
  } catch (const UsageError& e) {
    throw UsageError(str(path.string(), ": ", e.what()));
  }
  return config;
}

Decoder load_model(const std::string& directory, at::Device device, at::ScalarType dtype) {
  auto impl =
      std::make_unique<Decoder::Impl>(load_model_config(directory), std::nullopt, device, dtype);
  const auto paths = tensor_files(directory);
  std::vector<SafetensorsFile> files;
  for (const auto& path : paths) files.emplace_back(path);
  const auto where = locate(paths, files, impl->parameters);
  for (auto& parameter : impl->parameters) {
    const auto found = where.find(parameter.name);
    SARISSA_CHECK(found != where.end(), directory, ": tensor '", parameter.name, "' is missing; ",
                  kConfig, " says the model has it");
    const auto shape = found->second->shape(parameter.name);
    SARISSA_CHECK(parameter.value.sizes() == at::IntArrayRef(shape), directory, ": tensor '",
                  parameter.name, "' is ", at::IntArrayRef(shape), ", expected ",
                  parameter.value.sizes(), " from ", kConfig);
    SARISSA_CHECK(at::isFloatingType(found->second->dtype(parameter.name)), directory, ": tensor '",
                  parameter.name, "' has dtype ", found->second->dtype(parameter.name),
                  ", expected floating point");
    parameter.value.copy_(found->second->tensor(parameter.name));
  }
  return Decoder(std::move(impl));
}

}  // namespace sarissa::model
