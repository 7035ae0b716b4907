// The operators' cases: one description of each operator's inputs, call, backward and independent
// parts, used at small shapes by selftest and at the layers' shapes by bench.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace sarissa::cli {

using Tensors = std::vector<at::Tensor>;

/// How one input is made.
struct Input {
  std::vector<int64_t> shape;
  bool sequence = false;                             // [B, L, ...]: may be cut along time
  bool fp32 = false;                                 // kept in fp32 when the rest is bfloat16
  std::optional<std::pair<double, double>> range{};  // uniform in it; without: normal(0, 1)
};

/// An operator with everything but its tensors fixed.
struct Operator {
  /// The outputs that have cotangents. `state` is empty before the first step, replaced by the
  /// state after the last one, and null where a sequence is run in one go.
  std::function<Tensors(const Tensors& inputs, Tensors* state)> run;
  /// What a forward pass keeps for `bwd`.
  std::function<Tensors(const Tensors& inputs, const Tensors& outputs)> save{};
  /// The backward operator alone: the gradient of each input, in their order. Where two inputs have
  /// the same gradient it is one tensor twice.
  std::function<Tensors(const Tensors& saved, const Tensors& cotangents)> bwd{};
  /// The last tensor of `save` is a detail of the method: its bytes need not move.
  bool saves_detail = false;
};

/// Indices along one dimension; everything when there are none.
struct Selection {
  int64_t dim = 0;
  std::vector<int64_t> indices{};
  /// Widths of the packed fields that the selected last dimension consists of; empty: one field.
  /// Their errors are taken one by one, so that a small field can't hide behind a large one.
  std::vector<int64_t> fields{};

  bool everything() const { return indices.empty(); }
  at::Tensor of(const at::Tensor& tensor) const;
};

/// A piece of the operator that does not depend on the rest: some channels, or some rows. An input
/// of which it takes everything is a parameter that all parts share, and its gradient is the sum
/// over the parts.
struct Part {
  Operator op;
  std::vector<Selection> inputs;
  Selection output;  // of every output
};

struct Case {
  std::string op;
  std::string shape;
  std::vector<Input> inputs;
  Operator call;
  bool has_state = false;
  int64_t memory = 0;  // steps before the current one that the state holds; 0 where there is no end
  /// Independent parts that are checked in place of the whole where that is too large for the CPU
  /// loops in double precision.
  std::vector<Part> parts{};
};

/// Small shapes of every operator, chosen to reach its corners.
std::vector<Case> selftest_cases();

/// One operator as a layer of width `dim` calls it.
struct LayerCase {
  const char* name;
  bool has_step;      // carries a state, so that L = 1 is a step of decoding
  bool only_by_name;  // a point of a curve, not of the table of all operators
  Case (*make)(int64_t batch, int64_t length, int64_t dim);
};
const std::vector<LayerCase>& layer_cases();

/// What `dim` of a layer case has to be a multiple of.
constexpr int64_t kLayerWidthMultiple = 64;

/// Draws an input on the generator's device. Doubles are exact in bfloat16, so that every dtype
/// sees the same values.
at::Tensor draw(const Input& input, at::ScalarType dtype, const at::Generator& generator);

}  // namespace sarissa::cli
