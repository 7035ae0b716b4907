// The decoder's parts, shared by decoder.cpp and directory.cpp.
#pragma once

#include <optional>
#include <vector>

#include "sarissa/model/block.h"
#include "sarissa/model/decoder.h"

namespace sarissa::model {

struct Decoder::Impl {
  /// No seed: parameters are left uninitialised.
  Impl(const ModelConfig& config, std::optional<uint64_t> seed, at::Device device,
       at::ScalarType dtype);

  ModelConfig config;
  at::Device device;
  at::ScalarType dtype;
  std::vector<Parameter> parameters;
  at::Tensor embedding;  // [V, D]
  std::vector<Block> blocks;
  at::Tensor norm;  // [D]
  at::Tensor head;  // [V, D], the embedding when tied
};

}  // namespace sarissa::model
