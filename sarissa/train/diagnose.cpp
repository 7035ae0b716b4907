#include "sarissa/train/diagnose.h"

#include <ATen/ops/isfinite.h>
#include <c10/core/GradMode.h>

#include <map>

#include "sarissa/base/error.h"

namespace sarissa::train {
namespace {

bool all_finite(const at::Tensor& tensor) { return at::isfinite(tensor).all().item<bool>(); }

// A model of the first `count` blocks of `decoder`, with the same parameters.
model::Decoder first_blocks(const model::Decoder& decoder, int64_t count) {
  model::ModelConfig config = decoder.config();
  const auto kinds = config.layers();
  config.repeat = 1;
  config.pattern.clear();
  for (int64_t i = 0; i < count; ++i) config.pattern += str(i > 0 ? " " : "", to_string(kinds[i]));
  std::map<std::string, at::Tensor> values;
  for (const auto& parameter : decoder.parameters()) values[parameter.name] = parameter.value;
  model::Decoder part(config, /*seed=*/0, decoder.device(), decoder.dtype());
  for (auto& parameter : part.parameters()) parameter.value.copy_(values.at(parameter.name));
  return part;
}

}  // namespace

std::string first_non_finite_output(const model::Decoder& decoder, const DeviceBatch& batch) {
  const c10::NoGradGuard no_grad;
  if (all_finite(decoder.hidden(batch.inputs_BL))) {
    return all_finite(loss_sum(decoder, batch)) ? "" : "head";
  }
  // What is not finite stays so along the residual stream: the first `good` blocks are well, the
  // first `bad` are not.
  int64_t good = 0;
  int64_t bad = static_cast<int64_t>(decoder.config().layers().size());
  while (bad - good > 1) {
    const int64_t middle = (good + bad) / 2;
    (all_finite(first_blocks(decoder, middle).hidden(batch.inputs_BL)) ? good : bad) = middle;
  }
  return str("blocks.", bad - 1);
}

}  // namespace sarissa::train
