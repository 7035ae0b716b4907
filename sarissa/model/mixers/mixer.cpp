#include "sarissa/model/mixers/mixer.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>

#include "sarissa/base/error.h"

namespace sarissa::model {

Mixer::Mixer(const ModelConfig& config, int64_t block, ParameterMaker& maker, const Projection& in)
    : block_(block), options_(at::TensorOptions().device(maker.device()).dtype(maker.dtype())) {
  const int64_t dim = config.dim;
  in_weight_ = maker.matrix("in_proj.weight", {in.rows, dim}, small_init(dim));
  if (in.biased_rows > 0) in_bias_ = maker.vector("in_proj.bias", {in.biased_rows}, in.bias);
  out_weight_ = maker.matrix("out_proj.weight", {dim, dim},
                             wang_init(dim, static_cast<int64_t>(config.layers().size())));
  if (config.output_bias) out_bias_ = maker.vector("out_proj.bias", {dim}, constant(0));
}

at::TensorOptions Mixer::precise_options() const {
  return options_.dtype() == at::kDouble ? options_ : options_.dtype(at::kFloat);
}

at::Tensor Mixer::forward(const at::Tensor& x_BLD, LayerState* state, int64_t position,
                          SequenceContext& context) const {
  at::Tensor in_bias = in_bias_;
  const int64_t rows = in_weight_.size(0);
  if (in_bias.defined() && in_bias.size(0) < rows) {
    in_bias = at::cat({in_bias, at::zeros({rows - in_bias.size(0)}, in_bias.options())});
  }
  const at::Tensor projected = at::linear(x_BLD, in_weight_, in_bias);
  LayerState own;
  if (context.split()) {
    if (state == nullptr) {
      own = initial_state(x_BLD.size(0));
      state = &own;
    }
    context.receive(block_, *state);
  }
  const at::Tensor mixed = mix(projected, state, position);
  if (context.split()) context.send(block_, *state);
  return at::linear(mixed, out_weight_, out_bias_);
}

std::unique_ptr<Mixer> make_mixer(MixerKind kind, const ModelConfig& config, int64_t block,
                                  ParameterMaker& maker) {
  switch (kind) {
    case MixerKind::kPhalanx:
      return make_phalanx(config, block, maker);
    case MixerKind::kHyenaSE:
    case MixerKind::kHyenaMR:
    case MixerKind::kHyenaLI:
      return make_hyena(kind, config, block, maker);
    case MixerKind::kAttention:
      return make_attention(0, config, block, maker);
    case MixerKind::kWindowedAttention:
      return make_attention(config.swa_window, config, block, maker);
  }
  throw Error(str("no mixer of kind ", static_cast<int>(kind)));
}

}  // namespace sarissa::model
