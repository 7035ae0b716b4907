// One block: norm, mixer, add; norm, gated MLP, add.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>

#include "sarissa/model/config.h"
#include "sarissa/model/mixers/mixer.h"
#include "sarissa/model/parameters.h"
#include "sarissa/ops/ops.h"

namespace sarissa::model {

/// The residual stream as residual + update, added by the norm that reads it next (one pass over
/// memory). No residual: the stream is `update`.
struct Stream {
  at::Tensor update;                   // [B, L, D]
  std::optional<at::Tensor> residual;  // [B, L, D]
};

/// down(act(gate x) * up x), without biases.
class Mlp {
 public:
  Mlp(const ModelConfig& config, bool first_block, ParameterMaker& maker);
  at::Tensor forward(const at::Tensor& x_BLD) const;

 private:
  ops::Gate gate_;
  at::Tensor gate_up_;  // [2F, D]
  at::Tensor down_;     // [D, F]
};

class Block {
 public:
  Block(const ModelConfig& config, MixerKind kind, int64_t index, ParameterMaker& maker);

  Stream forward(const Stream& stream, LayerState* state, int64_t position,
                 SequenceContext& context) const;
  LayerState initial_state(int64_t batch) const { return mixer_->initial_state(batch); }

 private:
  double norm_eps_;
  at::Tensor mixer_norm_, mlp_norm_;  // [D]
  std::unique_ptr<Mixer> mixer_;
  std::unique_ptr<Mlp> mlp_;
};

}  // namespace sarissa::model
