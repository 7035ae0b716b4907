// Choosing the next token from logits.
#pragma once

#include <cstdint>
#include <vector>

namespace sarissa::infer {

struct SamplingOptions {
  double temperature = 1.0;  // 0: always the most likely token
  int64_t top_k = 0;         // keep the k most likely tokens; 0: all
  double top_p = 1.0;        // keep the most likely tokens up to this probability; 1: all
  uint64_t seed = 0;
  int64_t vocabulary = 0;  // only ids below this are drawn; 0: all
  /// Throws UsageError naming the option that is out of range.
  void validate() const;
};

/// Probabilities after temperature, then top-k, then top-p, in that order: they sum to 1, dropped
/// tokens have 0. Ties go to the lower id. Temperature 0 gives 1 to the most likely token.
std::vector<double> sampling_probabilities(const std::vector<float>& logits,
                                           const SamplingOptions& options);

/// The token of step `step`: a function of the logits, the options and the step alone, on every
/// machine. Throws sarissa::Error when a logit is NaN or infinite.
int64_t sample(const std::vector<float>& logits, const SamplingOptions& options, uint64_t step);

}  // namespace sarissa::infer
