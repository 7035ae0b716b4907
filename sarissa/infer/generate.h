// Continuing prompts: prefill in chunks, then one token at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "sarissa/infer/sampling.h"
#include "sarissa/model/decoder.h"

namespace sarissa::infer {

struct GenerateOptions {
  int64_t tokens = 100;
  SamplingOptions sampling;
  int64_t prefill_chunk =
      2048;                  // prompt tokens per forward pass: bounds the memory of long prompts
  bool stop_at_end = false;  // stop after id 0 (end of document)
  /// Throws UsageError naming the option that is out of range.
  void validate() const;
};

struct Generation {
  std::vector<int64_t> tokens;  // without the prompt
  std::vector<float> logprobs;  // of each token under the unmodified model, natural log
};

/// Called with each new token as it is drawn.
using TakeToken = std::function<void(int64_t token)>;

/// Continues one prompt; an empty prompt starts after id 0 (end of document). Throws UsageError for
/// options out of range, sarissa::Error when the model's logits are not finite.
Generation generate(const model::Decoder& decoder, const std::vector<int64_t>& prompt,
                    const GenerateOptions& options, const TakeToken& take = nullptr);

/// Each prompt as generate() continues it alone: prompts are run one after the other, because the
/// rounding of a matrix product depends on how many rows it has.
std::vector<Generation> generate(const model::Decoder& decoder,
                                 const std::vector<std::vector<int64_t>>& prompts,
                                 const GenerateOptions& options);

}  // namespace sarissa::infer
