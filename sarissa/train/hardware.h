// What the machine can do and how much of it a run uses.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <optional>
#include <string>

#include "sarissa/model/config.h"

namespace sarissa::train {

/// "NVIDIA H100 80GB HBM3" for a CUDA device as its driver says it, "cpu" for the CPU.
std::string device_name(at::Device device);

/// Dense bf16 tensor-core FLOP/s of a GPU, from its data sheet; none for names that are not known.
std::optional<double> peak_bf16_flops(const std::string& device_name);

/// Floating point operations per token that the model itself demands in training at a context of
/// `context` tokens: 6 N for the products with the N parameters (less the embedding when it is not
/// also the head: looking up costs nothing), plus 12 D S for each attention layer, where a token
/// sees S = (context + 1) / 2 tokens on average, fewer in a window. The backward counts twice the
/// forward. The recurrences and filters themselves are left out.
double training_flops_per_token(const model::ModelConfig& config, int64_t context);

/// Largest amount of memory in use so far, bytes: of the CUDA allocator, or resident on the CPU.
int64_t peak_memory_bytes(at::Device device);

}  // namespace sarissa::train
