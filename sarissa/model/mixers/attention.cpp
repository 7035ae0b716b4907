// Causal attention with rotary positions and grouped key/value heads, full or windowed.
#include <ATen/ops/empty.h>

#include <algorithm>

#include "sarissa/base/error.h"
#include "sarissa/model/mixers/kv_cache.h"
#include "sarissa/model/mixers/mixer.h"
#include "sarissa/ops/ops.h"

namespace sarissa::model {
namespace {

class Attention final : public Mixer {
 public:
  Attention(int64_t window, const ModelConfig& config, int64_t block, ParameterMaker& maker)
      : Mixer(
            config, block, maker,
            {.rows = config.dim / config.heads * (config.heads + 2 * config.resolved_kv_heads())}),
        window_(window),
        heads_(config.heads),
        kv_heads_(config.resolved_kv_heads()),
        head_width_(config.dim / config.heads),
        rope_scale_(config.rope_scale),
        inv_freq_(ops::rope_inverse_frequencies(head_width_, config.rope_base, maker.device())) {
    if (config.rope_bf16) inv_freq_ = inv_freq_.to(at::kBFloat16).to(at::kFloat);
  }

  LayerState initial_state(int64_t batch) const override {
    const auto empty = [&] {
      return at::empty({batch, 0, kv_heads_, head_width_}, activation_options());
    };
    return {{{"keys", empty()}, {"values", empty()}}};
  }

 protected:
  at::Tensor mix(const at::Tensor& projected_BLC, LayerState* state,
                 int64_t position) const override {
    // Rows [q: H P | k: Hkv P | v: Hkv P]. Keys are kept with their rotation.
    const int64_t batch = projected_BLC.size(0), length = projected_BLC.size(1);
    const at::Tensor packed =
        projected_BLC.view({batch, length, heads_ + 2 * kv_heads_, head_width_});
    const at::Tensor q = ops::rope(packed.narrow(2, 0, heads_), inv_freq_, position, rope_scale_);
    const at::Tensor k =
        ops::rope(packed.narrow(2, heads_, kv_heads_), inv_freq_, position, rope_scale_);
    const at::Tensor v = packed.narrow(2, heads_ + kv_heads_, kv_heads_);
    at::Tensor y;
    if (state == nullptr) {
      y = ops::attention(q, k, v, window_);
    } else {
      at::Tensor& keys = state->tensors[0].second;
      at::Tensor& values = state->tensors[1].second;
      const int64_t expected = window_ == 0 ? position : std::min(position, window_ - 1);
      SARISSA_CHECK(keys.size(1) == expected && values.size(1) == expected, "block ", block(),
                    ": the state holds ", keys.size(1), " keys and ", values.size(1),
                    " values, expected ", expected, " at position ", position);
      append_steps(keys, k);
      append_steps(values, v);
      y = ops::attention(q, keys, values, window_);
      if (window_ != 0) {
        keep_last_steps(keys, window_ - 1);
        keep_last_steps(values, window_ - 1);
      }
    }
    return y.reshape({batch, length, heads_ * head_width_});
  }

 private:
  int64_t window_, heads_, kv_heads_, head_width_;
  double rope_scale_;
  at::Tensor inv_freq_;  // [P/2] fp32
};

}  // namespace

std::unique_ptr<Mixer> make_attention(int64_t window, const ModelConfig& config, int64_t block,
                                      ParameterMaker& maker) {
  return std::make_unique<Attention>(window, config, block, maker);
}

}  // namespace sarissa::model
