// What a model weighs and what it must remember of a sequence, from its configuration alone.
#pragma once

#include <cstdint>
#include <vector>

#include "sarissa/model/config.h"

namespace sarissa::infer {

/// The blocks of one kind of mixer.
struct MixerSummary {
  model::MixerKind kind;
  int64_t layers = 0;
  int64_t parameters_per_mixer = 0;  // the mixer with its projections, without norms and MLP
};

/// In order of first appearance in the stack.
std::vector<MixerSummary> mixer_summaries(const model::ModelConfig& config);

/// Bytes of all parameters, with elements of `element_bytes` except those kept in fp32.
int64_t weight_bytes(const model::ModelConfig& config, int64_t element_bytes);

/// Bytes of state for one sequence of `tokens` tokens, with model elements of `element_bytes`.
int64_t state_bytes(const model::ModelConfig& config, int64_t tokens, int64_t element_bytes);

/// The part of it that does not grow: everything but the full attention layers, with windows full.
int64_t fixed_state_bytes(const model::ModelConfig& config, int64_t element_bytes);

/// Bytes that each further token adds to the state once every window is full: the keys and values
/// of the full attention layers.
int64_t kv_bytes_per_token(const model::ModelConfig& config, int64_t element_bytes);

}  // namespace sarissa::infer
