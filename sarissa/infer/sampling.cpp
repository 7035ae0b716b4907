#include "sarissa/infer/sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "sarissa/base/error.h"
#include "sarissa/base/rng.h"

namespace sarissa::infer {
namespace {

// Ids that may be drawn, the most likely first, equal ones by id.
std::vector<int64_t> ranked(const std::vector<float>& logits, int64_t count) {
  std::vector<int64_t> ids(count);
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(),
                   [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
  return ids;
}

int64_t drawable(const std::vector<float>& logits, const SamplingOptions& options) {
  const auto size = static_cast<int64_t>(logits.size());
  return options.vocabulary > 0 ? std::min(options.vocabulary, size) : size;
}

void check_finite(const std::vector<float>& logits) {
  for (size_t id = 0; id < logits.size(); ++id) {
    SARISSA_CHECK(std::isfinite(logits[id]), "the model's logit of token ", id, " is ", logits[id],
                  "; its weights may hold NaN, or overflow in bfloat16: try --dtype float32");
  }
}

}  // namespace

void SamplingOptions::validate() const {
  if (!(temperature >= 0) || !std::isfinite(temperature)) {
    throw UsageError(str("temperature is ", temperature, "; it must be 0 or more"));
  }
  if (top_k < 0) {
    throw UsageError(str("top-k is ", top_k, "; it must be at least 1, or 0 for all tokens"));
  }
  if (!(top_p > 0 && top_p <= 1)) {
    throw UsageError(str("top-p is ", top_p, "; it must be above 0 and at most 1"));
  }
}

std::vector<double> sampling_probabilities(const std::vector<float>& logits,
                                           const SamplingOptions& options) {
  std::vector<double> probabilities(logits.size(), 0.0);
  std::vector<int64_t> ids = ranked(logits, drawable(logits, options));
  if (ids.empty()) return probabilities;
  if (options.temperature == 0) {
    probabilities[ids[0]] = 1.0;
    return probabilities;
  }
  if (options.top_k > 0 && options.top_k < static_cast<int64_t>(ids.size())) {
    ids.resize(options.top_k);
  }
  double sum = 0;
  for (const int64_t id : ids) {
    // Relative to the largest logit, so that small temperatures do not overflow.
    probabilities[id] = std::exp((double{logits[id]} - logits[ids[0]]) / options.temperature);
    sum += probabilities[id];
  }
  double kept = 0;
  for (const int64_t id : ids) {
    // top-p: the token that reaches the threshold is the last one kept; the first always is.
    if (kept >= options.top_p * sum) {
      probabilities[id] = 0;
    } else {
      kept += probabilities[id];
    }
  }
  for (double& probability : probabilities) probability /= kept;
  return probabilities;
}

int64_t sample(const std::vector<float>& logits, const SamplingOptions& options, uint64_t step) {
  check_finite(logits);
  const std::vector<double> probabilities = sampling_probabilities(logits, options);
  const double uniform = Rng(options.seed).uniform(step);
  double cumulative = 0;
  int64_t last = 0;
  for (size_t id = 0; id < probabilities.size(); ++id) {
    if (probabilities[id] == 0) continue;
    last = static_cast<int64_t>(id);
    cumulative += probabilities[id];
    if (uniform < cumulative) return last;
  }
  return last;  // the sum fell short of `uniform` by rounding
}

}  // namespace sarissa::infer
