// Phalanx: sliding window recurrence with gates (arXiv 2512.13921).
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "sarissa/model/mixers/mixer.h"
#include "sarissa/ops/ops.h"

namespace sarissa::model {
namespace {

/// Memory, in steps, of the slowest head of a full recurrence at the start of training.
constexpr double kLongestMemory = 1024;

/// Biases of the coefficients a = decay_max sigmoid(.) of H heads, then zeros for the gates b and
/// c. With a zero bias every head would forget within two steps. Ours spread the heads' memories 1
/// / (1 - sigmoid) evenly in the logarithm from 2 steps to twice the window, the farthest that a
/// jagged window sees; the bias of memory m is logit(1 - 1/m) = log(m - 1).
Init coefficient_biases(int64_t heads, int64_t window) {
  const double longest =
      window == ops::kFullRecurrence ? kLongestMemory : 2.0 * static_cast<double>(window);
  return [heads, longest](const Rng&, int64_t row) {
    if (row >= heads) return 0.0;
    const double part = heads == 1 ? 0 : static_cast<double>(row) / static_cast<double>(heads - 1);
    return std::log(2 * std::pow(longest / 2, part) - 1);
  };
}

class Phalanx final : public Mixer {
 public:
  Phalanx(const ModelConfig& config, int64_t block, ParameterMaker& maker)
      : Mixer(config, block, maker, projection(config)),
        heads_(config.phx_heads()),
        kv_heads_(config.resolved_phx_kv_heads()),
        head_width_(config.phx_head_width),
        window_(config.phx_window),
        decay_max_(config.phx_decay_max) {}

  LayerState initial_state(int64_t batch) const override {
    const auto options = precise_options();
    return {{{"w", at::zeros({batch, heads_, head_width_}, options)},
             {"r", at::ones({batch, heads_}, options)},
             {"v", at::zeros({batch, heads_, head_width_}, options)},
             {"index", at::zeros({batch}, options.dtype(at::kInt))}}};
  }

 protected:
  at::Tensor mix(const at::Tensor& projected_BLC, LayerState* state, int64_t) const override {
    std::optional<ops::SwrState> before;
    if (state != nullptr) {
      const auto& t = state->tensors;
      before = {.w = t[0].second, .r = t[1].second, .v = t[2].second, .index = t[3].second};
    }
    auto [y, after] = ops::phalanx(projected_BLC, heads_, kv_heads_, window_, decay_max_, before);
    if (state != nullptr) {
      auto& t = state->tensors;
      t[0].second = after.w, t[1].second = after.r, t[2].second = after.v;
      t[3].second = after.index;
    }
    return y;
  }

 private:
  // Rows [a: H | b: Hkv P | c: Hkv P | v: H P]; all but v have a bias.
  static Projection projection(const ModelConfig& config) {
    const int64_t heads = config.phx_heads();
    const int64_t gates = heads + 2 * config.resolved_phx_kv_heads() * config.phx_head_width;
    return {.rows = gates + config.dim,
            .biased_rows = gates,
            .bias = coefficient_biases(heads, config.phx_window)};
  }

  int64_t heads_, kv_heads_, head_width_, window_;
  double decay_max_;
};

}  // namespace

std::unique_ptr<Mixer> make_phalanx(const ModelConfig& config, int64_t block,
                                    ParameterMaker& maker) {
  return std::make_unique<Phalanx>(config, block, maker);
}

}  // namespace sarissa::model
