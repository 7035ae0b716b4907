// Deterministic training batches: a function of (corpus, seed, step) alone, so any number of ranks
// that share out the rows sees the same data. No torch.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "sarissa/data/corpus.h"

namespace sarissa::data {

/// Rows of `length` inputs with their next-token targets. All arrays are [rows, length], row-major.
struct Batch {
  int64_t rows = 0, length = 0;
  std::vector<int64_t> inputs, targets;
  std::vector<float> weights;  // 1: counts in the loss, 0: masked (N, padding)
};

class Batches {
 public:
  /// Windows of length + 1 tokens that overlap by one token, so that each token is one window's
  /// target. Each epoch visits every window of the corpus once, in an order permuted by (seed,
  /// epoch), at an offset drawn per epoch. Corpora shorter than one window are padded and masked.
  /// With `reverse_complement` each row is, with probability 1/2, read from the other strand: its
  /// length + 1 tokens complemented and reversed, their masks reversed with them.
  Batches(std::shared_ptr<const Corpus> corpus, int64_t length, uint64_t seed,
          bool reverse_complement = false);

  /// Rows [first_row, first_row + rows) of the global batch of `global_rows` rows at `step`. Throws
  /// for a corpus of fewer than two tokens, which has nothing to predict.
  Batch draw(int64_t step, int64_t global_rows, int64_t first_row, int64_t rows) const;

  /// Windows per epoch: as many as fit at any offset, so up to two windows' worth of tokens sit out
  /// an epoch, other ones in each. Row r of step s is window number (s * global_rows + r) of all
  /// epochs in a row.
  int64_t windows() const;

  /// Consecutive windows without overlap, in order, for evaluation: from window number `index`, at
  /// most `rows` of them; the last window is padded and masked. Rows past the end are left out.
  Batch sequential(int64_t index, int64_t rows) const;
  int64_t sequential_windows() const;

 private:
  void read_row(int64_t begin, bool reversed, int64_t row, Batch& batch) const;

  std::shared_ptr<const Corpus> corpus_;
  int64_t length_;
  uint64_t seed_;
  bool reverse_complement_;
};

/// A pseudo-random permutation of [0, size) that is computed one value at a time: a Feistel network
/// over the next even power of two, walked until it lands inside (Black and Rogaway, "Ciphers with
/// arbitrary finite domains", CT-RSA 2002).
class Permutation {
 public:
  Permutation(uint64_t size, uint64_t seed, uint64_t stream);
  uint64_t operator()(uint64_t index) const;

 private:
  uint64_t size_, seed_, stream_;
  int half_bits_;
};

}  // namespace sarissa::data
