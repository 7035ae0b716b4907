// Reads the golden vectors of tests/golden/ops, or of another folder of the same form when
// SARISSA_GOLDEN names one. See tests/golden/README.md for what they mean.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "sarissa/checkpoint/safetensors.h"

namespace sarissa::test {

/// One golden case: NAME.json and NAME.safetensors.
class GoldenCase {
 public:
  explicit GoldenCase(const std::string& name);

  const std::string& name() const { return name_; }
  std::string op() const { return json_["op"]; }
  /// The case's configuration, e.g. config()["L"].
  const nlohmann::json& config() const { return json_["config"]; }
  bool has(const std::string& tensor) const { return file_.contains(tensor); }
  /// A tensor as stored (inputs F32, results F64, indices I64).
  at::Tensor operator[](const std::string& tensor) const { return file_.tensor(tensor); }
  /// Whether bf16 runs are meaningful: every input is exact in bf16.
  bool is_bf16() const { return name_.ends_with("_bf16"); }
  /// The stored tolerance of a result: 1e-11 for double; the file's number for "f32" and "bf16".
  /// Throws when the file has none for that dtype.
  double tolerance(const std::string& tensor, at::ScalarType dtype) const;

 private:
  const nlohmann::json& entry(const std::string& tensor) const;
  std::string name_;
  nlohmann::json json_;
  checkpoint::SafetensorsFile file_;
};

/// The root of the source tree: where it was built, or SARISSA_SOURCE_DIR of the environment when
/// the tests run elsewhere.
std::string source_folder();

/// The folder of golden vectors in use.
std::string golden_folder();

/// Names of the cases whose file name starts with `prefix`, sorted. Throws when there is none.
std::vector<std::string> golden_cases(const std::string& prefix);

/// The golden files' error: max|got - want| / max|want|; where max|want| is 0, max|got|.
double golden_error(const at::Tensor& got, const at::Tensor& want);

}  // namespace sarissa::test

/// Checks a result against the golden tensor `tensor` with the stored tolerance of `dtype`.
#define EXPECT_GOLDEN(golden, tensor, got, dtype)                   \
  EXPECT_LE(::sarissa::test::golden_error((got), (golden)[tensor]), \
            (golden).tolerance(tensor, dtype))                      \
      << (golden).name() << ": " << (tensor) << " in " << c10::toString(dtype)
