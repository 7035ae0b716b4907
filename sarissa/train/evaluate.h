// The loss of a model on a corpus.
#pragma once

#include <cstdint>
#include <memory>

#include "sarissa/data/corpus.h"
#include "sarissa/model/decoder.h"

namespace sarissa::train {

struct EvalResult {
  double loss = 0;           // mean negative log-likelihood per token, nats
  double bits_per_byte = 0;  // loss / ln 2: the byte tokenizer has one token per byte
  double perplexity = 0;     // exp(loss)
  int64_t tokens = 0;        // scored tokens
};

/// Runs the model over consecutive windows of `context` + 1 tokens, of which each scores every
/// token after its first; masked tokens are left out. `batch` windows go through the model at a
/// time. The first windows that make up `max_tokens` are used (0: all). Throws sarissa::Error when
/// nothing can be scored.
EvalResult evaluate(const model::Decoder& decoder,
                    const std::shared_ptr<const data::Corpus>& corpus, int64_t context,
                    int64_t batch, int64_t max_tokens);

}  // namespace sarissa::train
