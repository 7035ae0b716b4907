#include "sarissa/data/batches.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "sarissa/base/error.h"
#include "sarissa/base/rng.h"
#include "sarissa/data/records.h"

namespace sarissa::data {
namespace {

// Streams of random numbers under one seed. The permutation of epoch e is stream kOrder + e.
enum Stream : uint64_t { kOffsets = 0, kStrands = 1, kOrder = 2 };

int32_t complement_token(int32_t token) {
  if (token < 0 || token > 255) return token;
  return static_cast<unsigned char>(complement(static_cast<char>(token)));
}

}  // namespace

Permutation::Permutation(uint64_t size, uint64_t seed, uint64_t stream)
    : size_(size),
      seed_(seed),
      stream_(stream),
      half_bits_(std::max<int>(1, (std::bit_width(size - 1) + 1) / 2)) {}

uint64_t Permutation::operator()(uint64_t index) const {
  constexpr uint64_t kRounds = 6;  // four give a strong pseudo-random permutation; two to spare
  const Rng rng(seed_, stream_);
  const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
  uint64_t value = index;
  do {
    uint64_t left = value >> half_bits_, right = value & mask;
    for (uint64_t round = 0; round < kRounds; ++round) {
      // half_bits_ is at most 32, so the round number has the upper bits to itself.
      const uint64_t mixed = left ^ (rng.bits(round << 32 | right) & mask);
      left = right;
      right = mixed;
    }
    value = left << half_bits_ | right;
  } while (value >= size_);
  return value;
}

Batches::Batches(std::shared_ptr<const Corpus> corpus, int64_t length, uint64_t seed,
                 bool reverse_complement)
    : corpus_(std::move(corpus)),
      length_(length),
      seed_(seed),
      reverse_complement_(reverse_complement) {
  SARISSA_CHECK(corpus_ != nullptr, "Batches: the corpus is null");
  SARISSA_CHECK(length_ >= 1, "Batches: the length is ", length_, ", expected at least 1");
}

int64_t Batches::windows() const {
  return std::max<int64_t>(1, (corpus_->size() - length_) / length_);
}

Batch Batches::draw(int64_t step, int64_t global_rows, int64_t first_row, int64_t rows) const {
  const int64_t size = corpus_->size();
  SARISSA_CHECK(size >= 2, "Batches: the corpus has ", size, " tokens, expected at least 2");
  SARISSA_CHECK(step >= 0, "Batches: the step is ", step, ", expected at least 0");
  SARISSA_CHECK(first_row >= 0 && rows >= 0 && first_row <= global_rows - rows, "Batches: rows [",
                first_row, ", ", first_row + rows, ") are outside the global batch of ",
                global_rows);
  const int64_t count = windows();
  // All offsets at which the last window still ends inside the corpus, so that no token is left out
  // for good.
  const int64_t offsets = std::max<int64_t>(1, size - count * length_);
  Batch batch{rows, length_, {}, {}, {}};
  const size_t elements = static_cast<size_t>(rows * length_);
  batch.inputs.resize(elements);
  batch.targets.resize(elements);
  batch.weights.resize(elements);
  for (int64_t row = 0; row < rows; ++row) {
    const uint64_t number = static_cast<uint64_t>(step * global_rows + first_row + row);
    const uint64_t epoch = number / static_cast<uint64_t>(count);
    const Permutation order(static_cast<uint64_t>(count), seed_, kOrder + epoch);
    const auto window = static_cast<int64_t>(order(number % static_cast<uint64_t>(count)));
    const auto offset =
        static_cast<int64_t>(Rng(seed_, kOffsets).below(epoch, static_cast<uint64_t>(offsets)));
    const bool reversed = reverse_complement_ && Rng(seed_, kStrands).below(number, 2) == 1;
    read_row(offset + window * length_, reversed, row, batch);
  }
  return batch;
}

int64_t Batches::sequential_windows() const {
  const int64_t predicted = std::max<int64_t>(0, corpus_->size() - 1);
  return (predicted + length_ - 1) / length_;
}

Batch Batches::sequential(int64_t index, int64_t rows) const {
  SARISSA_CHECK(index >= 0 && rows >= 0, "Batches: window ", index, " and ", rows,
                " rows, expected neither to be negative");
  const int64_t count = std::clamp<int64_t>(sequential_windows() - index, 0, rows);
  Batch batch{count, length_, {}, {}, {}};
  const size_t elements = static_cast<size_t>(count * length_);
  batch.inputs.resize(elements);
  batch.targets.resize(elements);
  batch.weights.resize(elements);
  for (int64_t row = 0; row < count; ++row) read_row((index + row) * length_, false, row, batch);
  return batch;
}

void Batches::read_row(int64_t begin, bool reversed, int64_t row, Batch& batch) const {
  const int64_t valid = std::min(length_ + 1, corpus_->size() - begin);
  std::vector<int32_t> tokens(static_cast<size_t>(length_ + 1), static_cast<int32_t>(kPadding));
  std::vector<uint8_t> mask(static_cast<size_t>(length_ + 1), 0);
  corpus_->read(begin, valid, tokens.data(), mask.data());
  if (reversed) {
    std::reverse(tokens.begin(), tokens.begin() + valid);
    std::reverse(mask.begin(), mask.begin() + valid);
    std::transform(tokens.begin(), tokens.begin() + valid, tokens.begin(), complement_token);
  }
  const int64_t at = row * length_;
  std::copy_n(tokens.begin(), length_, batch.inputs.begin() + at);
  std::copy_n(tokens.begin() + 1, length_, batch.targets.begin() + at);
  std::copy_n(mask.begin() + 1, length_, batch.weights.begin() + at);
}

}  // namespace sarissa::data
