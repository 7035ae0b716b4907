// What a run would do, from its configuration alone: nothing is allocated and no data is read.
#pragma once

#include <cstdint>
#include <string>

#include "sarissa/train/config.h"

namespace sarissa::train {

/// Bytes that a run holds on its device.
struct MemoryEstimate {
  int64_t weights = 0;
  int64_t masters = 0;      // fp32 copies of bf16 weights
  int64_t gradients = 0;    // fp32; for bf16 weights also the bf16 gradients of a micro-batch
  int64_t moments = 0;      // two fp32 tensors of AdamW
  int64_t activations = 0;  // what a micro-batch keeps for its backward pass: an estimate
  int64_t total() const { return weights + masters + gradients + moments + activations; }
};

/// For weights of `weight_bytes` bytes each (4: float32, 2: bfloat16). The activations are
/// estimated from what a block must keep: per token 8 D for norms, mixer input, packed projection
/// and mixer output, 3 F for the MLP, and 3 D more for attention; plus one chunk of logits.
MemoryEstimate estimate_memory(const RunConfig& config, int64_t weight_bytes);

/// The report of `sarissa train --dry-run`: layers, parameters, memory, tokens, device, dtype, and
/// the resolved configuration.
std::string describe_run(const RunConfig& config);

}  // namespace sarissa::train
