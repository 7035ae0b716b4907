// What mixes along time in a block: an input projection, one sequence operator, an output
// projection.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>

#include "sarissa/model/config.h"
#include "sarissa/model/parameters.h"
#include "sarissa/model/sequence_context.h"
#include "sarissa/model/state.h"

namespace sarissa::model {

class Mixer {
 public:
  virtual ~Mixer() = default;

  /// x [B, L, D] -> [B, L, D]. `state` is advanced by L; none: the sequences start here. `position`
  /// counts the steps before x. This is the only way through a mixer, for training, prefill and
  /// decoding alike.
  at::Tensor forward(const at::Tensor& x_BLD, LayerState* state, int64_t position,
                     SequenceContext& context) const;

  /// The state before the first step.
  virtual LayerState initial_state(int64_t batch) const = 0;

 protected:
  /// Rows of the input projection, and how many of the first of them have a bias.
  struct Projection {
    int64_t rows;
    int64_t biased_rows = 0;
    Init bias = constant(0);
  };

  Mixer(const ModelConfig& config, int64_t block, ParameterMaker& maker, const Projection& in);

  /// The sequence operator: projected x [B, L, rows] -> [B, L, D].
  virtual at::Tensor mix(const at::Tensor& projected_BLC, LayerState* state,
                         int64_t position) const = 0;

  int64_t block() const { return block_; }
  /// Options of a state that is kept in the model's dtype, and of one kept in fp32 (fp64).
  at::TensorOptions activation_options() const { return options_; }
  at::TensorOptions precise_options() const;

 private:
  int64_t block_;
  at::TensorOptions options_;
  at::Tensor in_weight_, in_bias_;  // bias undefined: none
  at::Tensor out_weight_, out_bias_;
};

std::unique_ptr<Mixer> make_mixer(MixerKind kind, const ModelConfig& config, int64_t block,
                                  ParameterMaker& maker);

std::unique_ptr<Mixer> make_phalanx(const ModelConfig& config, int64_t block,
                                    ParameterMaker& maker);
std::unique_ptr<Mixer> make_hyena(MixerKind kind, const ModelConfig& config, int64_t block,
                                  ParameterMaker& maker);
/// window 0: all of the past.
std::unique_ptr<Mixer> make_attention(int64_t window, const ModelConfig& config, int64_t block,
                                      ParameterMaker& maker);

}  // namespace sarissa::model
