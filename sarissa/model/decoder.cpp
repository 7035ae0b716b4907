#include "sarissa/model/decoder.h"

#include <ATen/ops/embedding.h>
#include <ATen/ops/linear.h>

#include "sarissa/base/error.h"
#include "sarissa/model/decoder_impl.h"
#include "sarissa/ops/ops.h"

namespace sarissa::model {

Decoder::Impl::Impl(const ModelConfig& config, std::optional<uint64_t> seed, at::Device device,
                    at::ScalarType dtype)
    : config(config), device(device), dtype(dtype) {
  config.validate();
  SARISSA_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kDouble,
                "a model cannot have dtype ", dtype, "; use float32, bfloat16 or float64");
  ParameterMaker maker(parameters, seed, device, dtype);
  const std::vector<int64_t> table = {config.vocab_size, config.dim};
  embedding = maker.matrix("embedding.weight", table, small_init(config.dim));
  const auto kinds = config.layers();
  for (size_t i = 0; i < kinds.size(); ++i) {
    const ParameterMaker::Scope scope(maker, str("blocks.", i, "."));
    blocks.emplace_back(config, kinds[i], static_cast<int64_t>(i), maker);
  }
  norm = maker.vector("norm.weight", {config.dim}, constant(1));
  head = config.tie_embeddings ? embedding
                               : maker.matrix("head.weight", table, small_init(config.dim));
}

Decoder::Decoder(const ModelConfig& config, uint64_t seed, at::Device device, at::ScalarType dtype)
    : impl_(std::make_unique<Impl>(config, seed, device, dtype)) {}
Decoder::Decoder(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Decoder::~Decoder() = default;
Decoder::Decoder(Decoder&&) noexcept = default;

const ModelConfig& Decoder::config() const { return impl_->config; }
at::Device Decoder::device() const { return impl_->device; }
at::ScalarType Decoder::dtype() const { return impl_->dtype; }
std::vector<Parameter>& Decoder::parameters() { return impl_->parameters; }
const std::vector<Parameter>& Decoder::parameters() const { return impl_->parameters; }
const at::Tensor& Decoder::head() const { return impl_->head; }

void Decoder::requires_grad(bool on) {
  for (auto& parameter : impl_->parameters) parameter.value.set_requires_grad(on);
}

at::Tensor Decoder::hidden(const at::Tensor& tokens_BL, State* state,
                           SequenceContext& context) const {
  SARISSA_CHECK(tokens_BL.dim() == 2 && tokens_BL.scalar_type() == at::kLong, "tokens are ",
                tokens_BL.scalar_type(), " ", tokens_BL.sizes(),
                ", expected int64 [batch, length]");
  const auto& blocks = impl_->blocks;
  SARISSA_CHECK(state == nullptr || state->layers.size() == blocks.size(), "the state has ",
                state == nullptr ? 0 : state->layers.size(), " layers, the model ", blocks.size(),
                "; make it with initial_state()");
  const int64_t position = (state == nullptr ? 0 : state->position) + context.offset();
  Stream stream{.update = at::embedding(impl_->embedding, tokens_BL), .residual = {}};
  for (size_t i = 0; i < blocks.size(); ++i) {
    LayerState* layer = state == nullptr ? nullptr : &state->layers[i];
    SARISSA_CHECK(layer == nullptr || layer->tensors.front().second.size(0) == tokens_BL.size(0),
                  "the state is of ", layer == nullptr ? 0 : layer->tensors.front().second.size(0),
                  " sequences, the tokens of ", tokens_BL.size(0));
    stream = blocks[i].forward(stream, layer, position, context);
  }
  if (state != nullptr) state->position += tokens_BL.size(1);
  return std::get<0>(
      ops::residual_rms_norm(stream.update, stream.residual, impl_->norm, impl_->config.norm_eps));
}

at::Tensor Decoder::forward(const at::Tensor& tokens_BL, State* state,
                            SequenceContext& context) const {
  return at::linear(hidden(tokens_BL, state, context), impl_->head);
}

State Decoder::initial_state(int64_t batch) const {
  State state;
  for (const auto& block : impl_->blocks) state.layers.push_back(block.initial_state(batch));
  return state;
}

}  // namespace sarissa::model
