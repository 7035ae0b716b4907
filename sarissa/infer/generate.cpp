#include "sarissa/infer/generate.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>

#include "sarissa/base/error.h"
#include "sarissa/data/corpus.h"

namespace sarissa::infer {
namespace {

// Advances the state by `tokens` and returns the fp32 logits after the last of them.
std::vector<float> advance(const model::Decoder& decoder, const int64_t* tokens, int64_t count,
                           model::State& state) {
  at::Tensor tokens_BL = at::empty({1, count}, at::kLong);
  std::copy_n(tokens, count, tokens_BL.data_ptr<int64_t>());
  const at::Tensor hidden_BLD = decoder.hidden(tokens_BL.to(decoder.device()), &state);
  const at::Tensor last_BD = hidden_BLD.select(1, count - 1);
  const at::Tensor logits =
      at::matmul(last_BD, decoder.head().t()).to(at::kCPU, at::kFloat).contiguous();
  const float* data = logits.data_ptr<float>();
  return {data, data + logits.numel()};
}

float log_probability(const std::vector<float>& logits, int64_t token) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - largest);
  return static_cast<float>(logits[token] - largest - std::log(sum));
}

}  // namespace

void GenerateOptions::validate() const {
  if (tokens < 0) {
    throw UsageError(str("tokens to generate is ", tokens, "; it must be 0 or more"));
  }
  if (prefill_chunk < 1) {
    throw UsageError(str("prefill chunk is ", prefill_chunk, "; it must be at least 1"));
  }
  sampling.validate();
}

Generation generate(const model::Decoder& decoder, const std::vector<int64_t>& prompt,
                    const GenerateOptions& options, const TakeToken& take) {
  options.validate();
  c10::NoGradGuard no_grad;
  Generation result;
  if (options.tokens == 0) return result;

  const std::vector<int64_t> start = {data::kEndOfDocument};
  const std::vector<int64_t>& context = prompt.empty() ? start : prompt;
  model::State state = decoder.initial_state(1);
  std::vector<float> logits;
  const auto length = static_cast<int64_t>(context.size());
  for (int64_t begin = 0; begin < length; begin += options.prefill_chunk) {
    const int64_t count = std::min(options.prefill_chunk, length - begin);
    logits = advance(decoder, context.data() + begin, count, state);
  }
  for (int64_t step = 0; step < options.tokens; ++step) {
    const int64_t token = sample(logits, options.sampling, static_cast<uint64_t>(step));
    result.tokens.push_back(token);
    result.logprobs.push_back(log_probability(logits, token));
    if (take) take(token);
    if (options.stop_at_end && token == data::kEndOfDocument) break;
    if (step + 1 < options.tokens) logits = advance(decoder, &token, 1, state);
  }
  return result;
}

std::vector<Generation> generate(const model::Decoder& decoder,
                                 const std::vector<std::vector<int64_t>>& prompts,
                                 const GenerateOptions& options) {
  std::vector<Generation> results;
  results.reserve(prompts.size());
  for (const auto& prompt : prompts) results.push_back(generate(decoder, prompt, options));
  return results;
}

}  // namespace sarissa::infer
