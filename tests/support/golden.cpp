#include "tests/support/golden.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>

#include "sarissa/base/error.h"

namespace sarissa::test {
namespace {

std::string path_of(const std::string& name, const char* extension) {
  return golden_folder() + "/" + name + extension;
}

}  // namespace

std::string source_folder() {
  const char* given = std::getenv("SARISSA_SOURCE_DIR");
  return given != nullptr && *given != '\0' ? given : SARISSA_SOURCE_DIR;
}

std::string golden_folder() {
  const char* given = std::getenv("SARISSA_GOLDEN");
  return given != nullptr && *given != '\0' ? given : source_folder() + "/tests/golden/ops";
}

std::vector<std::string> golden_cases(const std::string& prefix) {
  std::vector<std::string> names;
  for (const auto& file : std::filesystem::directory_iterator(golden_folder())) {
    const std::string stem = file.path().stem().string();
    if (file.path().extension() == ".json" && stem.starts_with(prefix)) names.push_back(stem);
  }
  SARISSA_CHECK(!names.empty(), "no golden case '", prefix, "*' in ", golden_folder());
  std::sort(names.begin(), names.end());
  return names;
}

GoldenCase::GoldenCase(const std::string& name)
    : name_(name), file_(path_of(name, ".safetensors")) {
  std::ifstream in(path_of(name, ".json"));
  json_ = nlohmann::json::parse(in);
}

const nlohmann::json& GoldenCase::entry(const std::string& tensor) const {
  for (const auto& t : json_["tensors"]) {
    if (t["name"] == tensor) return t;
  }
  throw Error(str(name_, " has no tensor '", tensor, "'"));
}

double GoldenCase::tolerance(const std::string& tensor, at::ScalarType dtype) const {
  const auto& stored = entry(tensor)["tolerance"];
  const char* key = dtype == at::kDouble ? "f64" : dtype == at::kFloat ? "f32" : "bf16";
  SARISSA_CHECK(stored.contains(key), name_, ": no ", key, " tolerance for '", tensor, "'");
  return stored[key].get<double>();
}

double golden_error(const at::Tensor& got, const at::Tensor& want) {
  SARISSA_CHECK(got.sizes() == want.sizes(), "got shape ", got.sizes(), ", want ", want.sizes());
  if (want.numel() == 0) return 0.0;
  const at::Tensor g = got.detach().to(at::kCPU, at::kDouble);
  const at::Tensor w = want.to(at::kDouble);
  const double scale = w.abs().max().item<double>();
  const double error = (g - w).abs().max().item<double>();
  if (error != error) return std::numeric_limits<double>::infinity();  // NaN never passes
  return scale == 0.0 ? error : error / scale;
}

}  // namespace sarissa::test
