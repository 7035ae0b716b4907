#include "sarissa/infer/footprint.h"

#include <algorithm>

namespace sarissa::infer {
namespace {

using model::MixerKind;
using model::ModelConfig;

constexpr int64_t kFloat = 4;       // bytes; recurrent states are kept in fp32
constexpr int64_t kFeaturizer = 2;  // inputs that a 3-tap featurizer remembers, of width 3 D

int64_t kv_bytes(const ModelConfig& config, int64_t tokens, int64_t element_bytes) {
  const int64_t kv_heads = config.kv_heads > 0 ? config.kv_heads : config.heads;
  return 2 * tokens * kv_heads * (config.dim / config.heads) * element_bytes;
}

int64_t layer_bytes(const ModelConfig& config, MixerKind kind, int64_t tokens,
                    int64_t element_bytes) {
  const int64_t dim = config.dim;
  const int64_t featurizer = kFeaturizer * 3 * dim * element_bytes;
  switch (kind) {
    case MixerKind::kHyenaSE:
      return featurizer + (config.se_taps - 1) * dim * kFloat;
    case MixerKind::kHyenaMR:
      return featurizer + (config.mr_taps - 1) * dim * kFloat;
    case MixerKind::kHyenaLI:
      return featurizer + config.li_modes * dim * kFloat;
    case MixerKind::kPhalanx: {
      // Two carries per channel, one product per head, one step counter.
      const int64_t heads = dim / config.phx_head_width;
      return (2 * dim + heads) * kFloat + static_cast<int64_t>(sizeof(int32_t));
    }
    case MixerKind::kAttention:
      return kv_bytes(config, tokens, element_bytes);
    case MixerKind::kWindowedAttention:
      return kv_bytes(config, std::min(tokens, config.swa_window - 1), element_bytes);
  }
  return 0;
}

// Parameters of a later block (the first may have an MLP of its own) with this mixer.
int64_t block_parameters(const ModelConfig& config, MixerKind kind) {
  ModelConfig one = config;
  one.pattern = to_string(kind);
  one.repeat = 1;
  ModelConfig two = one;
  two.repeat = 2;
  return parameter_count(two) - parameter_count(one);
}

}  // namespace

std::vector<MixerSummary> mixer_summaries(const ModelConfig& config) {
  std::vector<MixerSummary> summaries;
  for (const MixerKind kind : config.layers()) {
    auto found = std::find_if(summaries.begin(), summaries.end(),
                              [kind](const MixerSummary& summary) { return summary.kind == kind; });
    if (found == summaries.end()) {
      const int64_t norms_and_mlp = 2 * config.dim + 3 * config.dim * config.resolved_mlp_dim();
      summaries.push_back({kind, 0, block_parameters(config, kind) - norms_and_mlp});
      found = summaries.end() - 1;
    }
    ++found->layers;
  }
  return summaries;
}

int64_t weight_bytes(const ModelConfig& config, int64_t element_bytes) {
  int64_t bytes = element_bytes * parameter_count(config);
  for (const MixerKind kind : config.layers()) {
    if (kind != MixerKind::kHyenaLI) continue;
    const int64_t poles_and_residues = 2 * config.resolved_li_groups() * config.li_modes;
    bytes += (kFloat - element_bytes) * poles_and_residues;
  }
  return bytes;
}

int64_t state_bytes(const ModelConfig& config, int64_t tokens, int64_t element_bytes) {
  int64_t bytes = 0;
  for (const MixerKind kind : config.layers()) {
    bytes += layer_bytes(config, kind, tokens, element_bytes);
  }
  return bytes;
}

int64_t fixed_state_bytes(const ModelConfig& config, int64_t element_bytes) {
  const int64_t tokens = config.swa_window;
  return state_bytes(config, tokens, element_bytes) -
         tokens * kv_bytes_per_token(config, element_bytes);
}

int64_t kv_bytes_per_token(const ModelConfig& config, int64_t element_bytes) {
  int64_t bytes = 0;
  for (const MixerKind kind : config.layers()) {
    if (kind == MixerKind::kAttention) bytes += kv_bytes(config, 1, element_bytes);
  }
  return bytes;
}

}  // namespace sarissa::infer
