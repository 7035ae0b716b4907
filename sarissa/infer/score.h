// Log-likelihoods of records under a model, in pieces: a record of any length takes the memory of
// one piece plus the model's state, which grows with length for attention layers only.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "sarissa/model/decoder.h"

namespace sarissa::infer {

struct ScoreOptions {
  int64_t chunk = 4096;  // tokens per forward pass
  bool bos = false;      // put id 0 in front, so that the first token is scored too
};

/// Sum of the natural-log probabilities of a record's tokens.
struct Score {
  int64_t tokens = 0;  // tokens of the record, without BOS
  int64_t terms = 0;   // scored tokens: `tokens` with BOS, else tokens - 1 (0 for an empty record)
  double sum = 0;      // nats
  /// sum / terms; NaN without terms.
  double mean() const;
};

/// Returns up to `limit` more bytes of a record; "" when it is finished.
using ReadPiece = std::function<std::string(size_t limit)>;

/// Receives `count` consecutive log-probabilities (fp32).
using TakeLogProbs = std::function<void(const float* logprobs, int64_t count)>;

/// Scores one record whose bytes are its token ids. The log-softmax is taken in fp32 over the whole
/// vocabulary, the sum in double. `take` (may be null) sees every term in order.
Score score_record(const model::Decoder& decoder, const ReadPiece& read,
                   const ScoreOptions& options, const TakeLogProbs& take = nullptr);

/// Reads all of `text` in pieces.
ReadPiece read_string(std::string text);

}  // namespace sarissa::infer
