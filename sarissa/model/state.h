// What a decoder remembers of a batch of sequences between calls: one small struct per layer.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace sarissa::model {

/// A layer's state: named tensors in an order that its mixer fixes (e.g. "keys", "values" or
/// "featurizer", "inner"). Batch is dimension 0 of each.
struct LayerState {
  std::vector<std::pair<std::string, at::Tensor>> tensors;
};

struct State {
  int64_t position = 0;  // tokens seen so far
  std::vector<LayerState> layers;

  /// A deep copy that later calls on either do not disturb.
  State clone() const;
  /// Bytes held by all tensors.
  int64_t bytes() const;
  /// Tensors under "layers.N.name" plus "position": for safetensors.
  std::vector<std::pair<std::string, at::Tensor>> pack() const;
  /// Inverse of pack() given a state of the same model (initial_state) for shapes and devices.
  /// Throws sarissa::Error naming the tensor that is missing or misshapen.
  void unpack(const std::vector<std::pair<std::string, at::Tensor>>& packed);
};

}  // namespace sarissa::model
