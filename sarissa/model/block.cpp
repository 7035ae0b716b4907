#include "sarissa/model/block.h"

#include <ATen/ops/linear.h>

namespace sarissa::model {

Mlp::Mlp(const ModelConfig& config, bool first_block, ParameterMaker& maker)
    : gate_(ops::parse_gate(first_block && !config.first_mlp.empty() ? config.first_mlp
                                                                     : config.mlp)) {
  const int64_t dim = config.dim, inner = config.resolved_mlp_dim();
  gate_up_ = maker.matrix("gate_up.weight", {2 * inner, dim}, small_init(dim));
  down_ = maker.matrix("down.weight", {dim, inner},
                       wang_init(dim, static_cast<int64_t>(config.layers().size())));
}

at::Tensor Mlp::forward(const at::Tensor& x_BLD) const {
  return at::linear(ops::glu(at::linear(x_BLD, gate_up_), gate_), down_);
}

Block::Block(const ModelConfig& config, MixerKind kind, int64_t index, ParameterMaker& maker)
    : norm_eps_(config.norm_eps) {
  mixer_norm_ = maker.vector("mixer_norm.weight", {config.dim}, constant(1));
  {
    const ParameterMaker::Scope scope(maker, "mixer.");
    mixer_ = make_mixer(kind, config, index, maker);
  }
  mlp_norm_ = maker.vector("mlp_norm.weight", {config.dim}, constant(1));
  const ParameterMaker::Scope scope(maker, "mlp.");
  mlp_ = std::make_unique<Mlp>(config, index == 0, maker);
}

Stream Block::forward(const Stream& stream, LayerState* state, int64_t position,
                      SequenceContext& context) const {
  const auto [mixer_input, before] =
      ops::residual_rms_norm(stream.update, stream.residual, mixer_norm_, norm_eps_);
  const at::Tensor mixed = mixer_->forward(mixer_input, state, position, context);
  const auto [mlp_input, after] = ops::residual_rms_norm(mixed, before, mlp_norm_, norm_eps_);
  return {.update = mlp_->forward(mlp_input), .residual = after};
}

}  // namespace sarissa::model
