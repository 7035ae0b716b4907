// Hyena-SE, -MR and -LI of StripedHyena 2 (arXiv 2503.01868, section 2): gated convolutions with
// short explicit, medium explicit and long modal filters.
#include <ATen/ops/exp.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/logspace.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "sarissa/base/error.h"
#include "sarissa/model/mixers/mixer.h"
#include "sarissa/ops/ops.h"

namespace sarissa::model {
namespace {

constexpr int64_t kFeaturizerTaps = 3;

// The paper's code draws the featurizer and the SE taps from U(-b, b), b = sqrt(1 / featurizer
// taps).
Init short_filter_init() {
  const double bound = std::sqrt(1.0 / kFeaturizerTaps);
  return uniform(-bound, bound);
}

class Hyena : public Mixer {
 public:
  Hyena(const ModelConfig& config, int64_t block, ParameterMaker& maker)
      : Mixer(config, block, maker, {.rows = 3 * config.dim}),
        dim_(config.dim),
        featurizer_(maker.vector("featurizer", {3 * dim_, kFeaturizerTaps}, short_filter_init())) {}

  LayerState initial_state(int64_t batch) const override {
    return {
        {{"featurizer", at::zeros({batch, kFeaturizerTaps - 1, 3 * dim_}, activation_options())},
         {"inner", initial_inner(batch)}}};
  }

 protected:
  at::Tensor mix(const at::Tensor& projected_BLC, LayerState* state, int64_t) const override {
    std::optional<ops::HyenaState> before;
    if (state != nullptr) {
      before = {.featurizer = state->tensors[0].second, .inner = state->tensors[1].second};
    }
    auto [y, after] = convolve(projected_BLC, before);
    if (state != nullptr) {
      state->tensors[0].second = after.featurizer;
      state->tensors[1].second = after.inner;
    }
    return y;
  }

  virtual at::Tensor initial_inner(int64_t batch) const = 0;
  virtual std::tuple<at::Tensor, ops::HyenaState> convolve(
      const at::Tensor& z_BLC, const std::optional<ops::HyenaState>& state) const = 0;

  int64_t dim_;
  at::Tensor featurizer_;  // [3D, 3]
};

class HyenaSE final : public Hyena {
 public:
  HyenaSE(const ModelConfig& config, int64_t block, ParameterMaker& maker)
      : Hyena(config, block, maker),
        taps_(maker.vector("taps", {config.resolved_se_groups(), config.se_taps},
                           short_filter_init())) {}

 protected:
  at::Tensor initial_inner(int64_t batch) const override {
    return at::zeros({batch, taps_.size(1) - 1, dim_}, precise_options());
  }
  std::tuple<at::Tensor, ops::HyenaState> convolve(
      const at::Tensor& z_BLC, const std::optional<ops::HyenaState>& state) const override {
    return ops::hyena_fir(z_BLC, featurizer_, taps_, std::nullopt, state);
  }

 private:
  at::Tensor taps_;  // [G, W]
};

/// The fixed decay of MR taps, [G, W]: exp(-a_g tau_t) with a from 10^low to 10^2 in G steps even
/// in the logarithm and tau from 0 to 1 over `length` steps, of which the taps are the first W.
at::Tensor decay_table(const ModelConfig& config) {
  const double low = config.mr_decay == "strong" ? 0 : config.mr_decay == "normal" ? -1 : -2;
  const auto options = at::TensorOptions().dtype(at::kDouble);
  const at::Tensor a_G = at::logspace(low, 2, config.resolved_mr_groups(), 10.0, options);
  const double step = 1.0 / static_cast<double>(std::max<int64_t>(config.mr_decay_length - 1, 1));
  const at::Tensor tau_W =
      at::linspace(0, step * static_cast<double>(config.mr_taps - 1), config.mr_taps, options);
  return at::exp(at::mul(a_G.unsqueeze(1), tau_W).neg());
}

class HyenaMR final : public Hyena {
 public:
  // Taps start at N(0, 1e-10 / mr_decay_length), as in the paper's code: the layer is silent at
  // first (a forward pass adds next to nothing to the residual stream) but its taps get gradients
  // of ordinary size.
  HyenaMR(const ModelConfig& config, int64_t block, ParameterMaker& maker)
      : Hyena(config, block, maker),
        taps_(maker.vector("taps", {config.resolved_mr_groups(), config.mr_taps},
                           normal(1e-5 / std::sqrt(static_cast<double>(config.mr_decay_length))))),
        skip_(maker.vector("skip", {dim_}, constant(0))) {
    if (config.mr_decay != "none") decay_ = decay_table(config).to(precise_options());
  }

 protected:
  at::Tensor initial_inner(int64_t batch) const override {
    return at::zeros({batch, taps_.size(1) - 1, dim_}, precise_options());
  }
  std::tuple<at::Tensor, ops::HyenaState> convolve(
      const at::Tensor& z_BLC, const std::optional<ops::HyenaState>& state) const override {
    const at::Tensor taps =
        decay_.defined() ? at::mul(taps_, decay_).to(taps_.scalar_type()) : taps_;
    return ops::hyena_fir(z_BLC, featurizer_, taps, skip_, state);
  }

 private:
  at::Tensor taps_;   // [G, W]
  at::Tensor skip_;   // [D]
  at::Tensor decay_;  // [G, W], fixed; undefined: none
};

class HyenaLI final : public Hyena {
 public:
  // As in the paper's code: rates e^-1 U(0.01, 0.1), that is memories of 27 to 272 steps, and
  // residues 0.1 N(0, 1) / sqrt(modes).
  HyenaLI(const ModelConfig& config, int64_t block, ParameterMaker& maker)
      : Hyena(config, block, maker),
        log_rate_(maker.precise("log_rate", {config.resolved_li_groups(), config.li_modes},
                                [rate = uniform(0.01, 0.1)](const Rng& rng, int64_t index) {
                                  return std::log(rate(rng, index)) - 1;
                                })),
        residues_(maker.precise("residues", {config.resolved_li_groups(), config.li_modes},
                                normal(0.1 / std::sqrt(static_cast<double>(config.li_modes))))),
        skip_(maker.vector("skip", {dim_}, constant(0))) {}

 protected:
  at::Tensor initial_inner(int64_t batch) const override {
    return at::zeros({batch, dim_, log_rate_.size(1)}, precise_options());
  }
  std::tuple<at::Tensor, ops::HyenaState> convolve(
      const at::Tensor& z_BLC, const std::optional<ops::HyenaState>& state) const override {
    return ops::hyena_modal(z_BLC, featurizer_, at::exp(log_rate_).neg(), residues_, skip_, state);
  }

 private:
  at::Tensor log_rate_;  // [G, N] log of the poles' decay rates: pole = exp(-exp(log_rate))
  at::Tensor residues_;  // [G, N]
  at::Tensor skip_;      // [D]
};

}  // namespace

std::unique_ptr<Mixer> make_hyena(MixerKind kind, const ModelConfig& config, int64_t block,
                                  ParameterMaker& maker) {
  switch (kind) {
    case MixerKind::kHyenaSE:
      return std::make_unique<HyenaSE>(config, block, maker);
    case MixerKind::kHyenaMR:
      return std::make_unique<HyenaMR>(config, block, maker);
    case MixerKind::kHyenaLI:
      return std::make_unique<HyenaLI>(config, block, maker);
    default:
      throw Error(str(to_string(kind), " is not a Hyena mixer"));
  }
}

}  // namespace sarissa::model
