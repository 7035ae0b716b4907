// Tiny models and helpers for the model tests.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <string>
#include <vector>

#include "sarissa/model/decoder.h"
#include "tests/support/compare.h"

namespace sarissa::test {

/// Tiny models gain nothing from a second thread, and on a busy machine waiting for one costs 10x.
inline const bool kOneThread = (at::set_num_threads(1), true);

/// Two blocks of each mixer alone, a full recurrence, and all mixers in one stack.
inline std::vector<std::string> tiny_names() {
  return {"SE", "MR", "LI", "ATT", "SWA", "PHX", "PHX full", "SE MR LI ATT PHX SWA"};
}

/// A model whose every size is odd in its own way: grouped heads, several channels per filter,
/// windows that do not divide the length.
inline model::ModelConfig tiny(const std::string& name) {
  model::ModelConfig config;
  const bool full = name == "PHX full";
  config.pattern = full ? "PHX" : name;
  config.repeat = name.size() > 8 ? 1 : 2;
  config.dim = 24;
  config.vocab_size = 40;
  config.mlp_dim = 20;
  config.mlp = "swiglu";
  config.first_mlp = "gelu";
  config.output_bias = true;
  config.tie_embeddings = name != "ATT";
  config.heads = 6;
  config.kv_heads = 3;
  config.rope_base = 100;
  config.rope_scale = 1.5;
  config.swa_window = 5;
  config.phx_head_width = 3;
  config.phx_kv_heads = 4;
  config.phx_window = full ? 0 : 6;
  config.phx_decay_max = 0.9;
  config.se_taps = 4;
  config.se_groups = 8;
  config.mr_taps = 9;
  config.mr_groups = 6;
  config.mr_decay = "normal";
  config.mr_decay_length = 20;
  config.li_modes = 3;
  config.li_groups = 12;
  return config;
}

/// A decoder whose parameters are all of ordinary size: fresh MR taps are too small, zero biases
/// and unit norms too regular, to show a mistake.
inline model::Decoder stirred(const model::ModelConfig& config, at::Device device = at::kCPU,
                              at::ScalarType dtype = at::kDouble) {
  model::Decoder decoder(config, 1, device, dtype);
  uint64_t seed = 100;
  for (auto& parameter : decoder.parameters()) {
    const at::Tensor noise = randn(parameter.value.sizes(), seed++) * 0.2;
    parameter.value.add_(noise.to(parameter.value.options()));
  }
  return decoder;
}

inline at::Tensor random_tokens(int64_t batch, int64_t length, uint64_t seed, int64_t vocabulary) {
  return rand({batch, length}, seed, 0, static_cast<double>(vocabulary)).to(at::kLong);
}

/// Logits of consecutive chunks that end at `cuts` and at the end, through one state.
inline at::Tensor forward_in_chunks(const model::Decoder& decoder, const at::Tensor& tokens,
                                    std::vector<int64_t> cuts) {
  cuts.push_back(tokens.size(1));
  model::State state = decoder.initial_state(tokens.size(0));
  std::vector<at::Tensor> parts;
  int64_t begin = 0;
  for (const int64_t end : cuts) {
    parts.push_back(decoder.forward(tokens.narrow(1, begin, end - begin), &state));
    begin = end;
  }
  return at::cat(parts, 1);
}

inline at::Tensor forward_in_steps(const model::Decoder& decoder, const at::Tensor& tokens) {
  std::vector<int64_t> cuts;
  for (int64_t t = 1; t < tokens.size(1); ++t) cuts.push_back(t);
  return forward_in_chunks(decoder, tokens, cuts);
}

}  // namespace sarissa::test
