#include "sarissa/train/evaluate.h"

#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "sarissa/base/error.h"
#include "sarissa/data/batches.h"
#include "sarissa/train/loss.h"

namespace sarissa::train {

EvalResult evaluate(const model::Decoder& decoder,
                    const std::shared_ptr<const data::Corpus>& corpus, int64_t context,
                    int64_t batch, int64_t max_tokens) {
  const c10::NoGradGuard no_grad;
  const data::Batches batches(corpus, context, /*seed=*/0);
  int64_t windows = batches.sequential_windows();
  if (max_tokens > 0) windows = std::min(windows, (max_tokens + context - 1) / context);
  double sum = 0, weight = 0;
  for (int64_t first = 0; first < windows; first += batch) {
    const data::Batch rows = batches.sequential(first, std::min(batch, windows - first));
    sum += loss_sum(decoder, to_device(rows, 0, rows.rows, decoder.device())).item<double>();
    weight += total_weight(rows);
  }
  SARISSA_CHECK(weight > 0, "evaluation: no token can be scored: the data has ", corpus->size(),
                " tokens, all of them masked or only one");
  EvalResult result;
  result.loss = sum / weight;
  result.bits_per_byte = result.loss / std::numbers::ln2;
  result.perplexity = std::exp(result.loss);
  result.tokens = std::llround(weight);
  return result;
}

}  // namespace sarissa::train
