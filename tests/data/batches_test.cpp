#include "sarissa/data/batches.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "sarissa/base/error.h"
#include "sarissa/data/records.h"
#include "tests/support/files.h"

namespace sarissa::data {
namespace {

// Token i is `first` + i, so a window's tokens say where it came from; the mask is a function of
// the position.
class Counting : public Corpus {
 public:
  explicit Counting(int64_t size) : size_(size) {}
  int64_t size() const override { return size_; }
  const std::vector<int64_t>& document_starts() const override { return starts_; }
  static uint8_t weight(int64_t token) { return token % 5 != 0; }
  void read(int64_t begin, int64_t count, int32_t* tokens, uint8_t* mask) const override {
    if (begin < 0 || count < 0 || begin + count > size_) throw Error("outside");
    for (int64_t i = 0; i < count; ++i) {
      tokens[i] = static_cast<int32_t>(begin + i);
      mask[i] = weight(begin + i);
    }
  }

 private:
  int64_t size_;
  std::vector<int64_t> starts_{0};
};

// A text in memory; 'N' is masked.
class Text : public Counting {
 public:
  explicit Text(std::string text)
      : Counting(static_cast<int64_t>(text.size())), text_(std::move(text)) {}
  void read(int64_t begin, int64_t count, int32_t* tokens, uint8_t* mask) const override {
    for (int64_t i = 0; i < count; ++i) {
      tokens[i] = static_cast<unsigned char>(text_.at(static_cast<size_t>(begin + i)));
      mask[i] = tokens[i] != 'N';
    }
  }

 private:
  std::string text_;
};

bool equal(const Batch& a, const Batch& b) {
  return a.rows == b.rows && a.length == b.length && a.inputs == b.inputs &&
         a.targets == b.targets && a.weights == b.weights;
}

void append(Batch& to, const Batch& more) {
  to.rows += more.rows;
  to.inputs.insert(to.inputs.end(), more.inputs.begin(), more.inputs.end());
  to.targets.insert(to.targets.end(), more.targets.begin(), more.targets.end());
  to.weights.insert(to.weights.end(), more.weights.begin(), more.weights.end());
}

// First tokens of the rows.
std::vector<int64_t> row_starts(const Batch& batch) {
  std::vector<int64_t> starts;
  for (int64_t row = 0; row < batch.rows; ++row) {
    starts.push_back(batch.inputs[static_cast<size_t>(row * batch.length)]);
  }
  return starts;
}

TEST(Permutation, IsABijection) {
  for (const uint64_t size : {1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097}) {
    for (const uint64_t seed : {0, 1, 99}) {
      const Permutation order(size, seed, 2);
      std::set<uint64_t> seen;
      for (uint64_t i = 0; i < size; ++i) seen.insert(order(i));
      EXPECT_EQ(seen.size(), size);
      EXPECT_LT(*seen.rbegin(), size);
    }
  }
  const Permutation wide(uint64_t{1} << 62, 1, 1);
  EXPECT_LT(wide((uint64_t{1} << 62) - 1), uint64_t{1} << 62);
  EXPECT_NE(wide(0), wide(1));
}

TEST(Permutation, LooksRandom) {
  constexpr int kSize = 2000;
  const Permutation order(kSize, 7, 3), other_seed(kSize, 8, 3), other_stream(kSize, 7, 4);
  double product = 0;
  int fixed = 0, neighbours = 0, same_seed = 0, same_stream = 0;
  for (uint64_t i = 0; i < kSize; ++i) {
    product +=
        (static_cast<double>(i) - kSize / 2.0) * (static_cast<double>(order(i)) - kSize / 2.0);
    fixed += order(i) == i;
    neighbours += i > 0 && order(i) == order(i - 1) + 1;
    same_seed += order(i) == other_seed(i);
    same_stream += order(i) == other_stream(i);
  }
  // The correlation of a random permutation has a standard deviation of 1 / sqrt(size); the counts
  // are Poisson with mean 1.
  EXPECT_LT(std::abs(product / (kSize * double{kSize} * kSize / 12)), 4 / std::sqrt(double{kSize}));
  for (const int count : {fixed, neighbours, same_seed, same_stream}) EXPECT_LE(count, 7);
}

TEST(Batches, TargetsAreTheNextTokensWithTheirMask) {
  const Batches batches(std::make_shared<Counting>(1000), 16, 1);
  const Batch batch = batches.draw(3, 8, 0, 8);
  ASSERT_EQ(batch.inputs.size(), 8u * 16);
  for (size_t i = 0; i < batch.inputs.size(); ++i) {
    EXPECT_EQ(batch.targets[i], batch.inputs[i] + 1);
    EXPECT_EQ(batch.weights[i], Counting::weight(batch.targets[i]));
    if (i % 16 > 0) {
      EXPECT_EQ(batch.inputs[i], batch.inputs[i - 1] + 1);
    }
  }
}

TEST(Batches, EveryWindowOncePerEpoch) {
  for (const int64_t size : {100, 101, 117, 1000, 1007}) {
    for (const int64_t length : {1, 7, 10, 50}) {
      const Batches batches(std::make_shared<Counting>(size), length, 5);
      const int64_t windows = batches.windows();
      EXPECT_GE(windows * length, size - 2 * length);
      std::set<int64_t> offsets;
      for (int64_t epoch = 0; epoch < 12; ++epoch) {
        // One row per step: the windows of an epoch are `windows` steps in a row.
        std::vector<int64_t> starts;
        for (int64_t i = 0; i < windows; ++i) {
          starts.push_back(row_starts(batches.draw(epoch * windows + i, 1, 0, 1))[0]);
        }
        const std::vector<int64_t> order = starts;
        std::sort(starts.begin(), starts.end());
        const int64_t offset = starts[0];
        offsets.insert(offset);
        EXPECT_LT(offset, 2 * length);
        for (int64_t i = 0; i < windows; ++i) {
          ASSERT_EQ(starts[static_cast<size_t>(i)], offset + i * length) << size << " " << length;
        }
        if (windows > 8) {
          EXPECT_NE(order, starts) << "not shuffled";
        }
      }
      if (length >= 7) {
        EXPECT_GT(offsets.size(), 3u) << "the offset hardly changes";
      }
    }
  }
}

// With changing offsets no token is left out for good.
TEST(Batches, EveryTokenIsATargetInTheLongRun) {
  const int64_t size = 57, length = 10;
  const Batches batches(std::make_shared<Counting>(size), length, 3);
  std::set<int64_t> targets;
  for (int64_t step = 0; step < 100 * batches.windows(); ++step) {
    const Batch batch = batches.draw(step, 1, 0, 1);
    targets.insert(batch.targets.begin(), batch.targets.end());
  }
  EXPECT_EQ(targets.size(), static_cast<size_t>(size - 1));
  EXPECT_EQ(*targets.begin(), 1);
}

TEST(Batches, EpochsDifferAndSeedsDiffer) {
  const auto corpus = std::make_shared<Counting>(10000);
  const Batches batches(corpus, 10, 1), other(corpus, 10, 2);
  const int64_t windows = batches.windows();
  EXPECT_TRUE(equal(batches.draw(4, 8, 0, 8), Batches(corpus, 10, 1).draw(4, 8, 0, 8)));
  EXPECT_NE(row_starts(batches.draw(0, windows, 0, windows)),
            row_starts(batches.draw(1, windows, 0, windows)));
  EXPECT_NE(row_starts(batches.draw(0, windows, 0, windows)),
            row_starts(other.draw(0, windows, 0, windows)));
}

TEST(Batches, AnySharingOfRowsGivesTheSameBatch) {
  for (const bool strands : {false, true}) {
    const Batches batches(std::make_shared<Counting>(997), 9, 11, strands);
    for (const int64_t step : {0, 1, 50, 1000}) {
      const Batch whole = batches.draw(step, 24, 0, 24);
      for (const int64_t ranks : {1, 2, 3, 4, 6, 24}) {
        Batch gathered = batches.draw(step, 24, 0, 0);
        for (int64_t rank = 0; rank < ranks; ++rank) {
          append(gathered, batches.draw(step, 24, rank * 24 / ranks, 24 / ranks));
        }
        EXPECT_TRUE(equal(gathered, whole)) << ranks << " ranks, step " << step;
      }
    }
  }
}

TEST(Batches, RowsReadTheOtherStrandHalfTheTime) {
  std::string sequence;
  uint32_t state = 1;
  for (int i = 0; i < 3000; ++i)
    sequence += "ACGTN"[(state = state * 1664525 + 1013904223) >> 24 & 3];
  for (size_t i = 10; i < sequence.size(); i += 37) sequence[i] = 'N';
  const auto corpus = std::make_shared<Text>(sequence);
  const int64_t length = 60, rows = 400;
  const Batch forward = Batches(corpus, length, 4).draw(0, rows, 0, rows);
  const Batch mixed = Batches(corpus, length, 4, true).draw(0, rows, 0, rows);
  int reversed_rows = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const auto at = static_cast<size_t>(row * length);
    const auto window_of = [&](const Batch& batch) {  // its length + 1 tokens
      std::string window(batch.inputs.begin() + static_cast<int64_t>(at),
                         batch.inputs.begin() + static_cast<int64_t>(at) + length);
      return window + static_cast<char>(batch.targets[at + static_cast<size_t>(length) - 1]);
    };
    const std::string window = window_of(forward);
    const bool reversed = window_of(mixed) != window;
    reversed_rows += reversed;
    if (reversed) {
      EXPECT_EQ(window_of(mixed), reverse_complement(window));
    }
    for (size_t i = at; i < at + static_cast<size_t>(length); ++i) {
      EXPECT_EQ(mixed.weights[i], mixed.targets[i] != 'N');
    }
  }
  EXPECT_NEAR(reversed_rows, rows / 2, 5 * std::sqrt(rows / 4.0));
}

TEST(Batches, AReversedRowTakesItsMaskAlong) {
  // Tokens above 255 have no complement, so Counting shows the order and its mask.
  const auto corpus = std::make_shared<Counting>(5000);
  const Batches batches(corpus, 20, 4, true);
  int reversed = 0;
  for (int64_t step = 0; step < 40; ++step) {
    const Batch batch = batches.draw(step, 1, 0, 1);
    if (*std::min_element(batch.inputs.begin(), batch.inputs.end()) < 300) continue;
    const int64_t direction = batch.targets[0] - batch.inputs[0];
    reversed += direction == -1;
    for (size_t i = 0; i < 20; ++i) {
      EXPECT_EQ(batch.targets[i], batch.inputs[i] + direction);
      EXPECT_EQ(batch.weights[i], Counting::weight(batch.targets[i]));
    }
  }
  EXPECT_GT(reversed, 5);
}

TEST(Batches, ShortCorporaArePaddedAndMasked) {
  const auto corpus = std::make_shared<Counting>(6);
  const Batches batches(corpus, 8, 1);
  EXPECT_EQ(batches.windows(), 1);
  const Batch batch = batches.draw(5, 2, 1, 1);
  EXPECT_EQ(batch.inputs, (std::vector<int64_t>{0, 1, 2, 3, 4, 5, kPadding, kPadding}));
  EXPECT_EQ(batch.targets, (std::vector<int64_t>{1, 2, 3, 4, 5, kPadding, kPadding, kPadding}));
  EXPECT_EQ(batch.weights, (std::vector<float>{1, 1, 1, 1, 0, 0, 0, 0}));  // 5 % 5 == 0 is masked
  // A reversed short row keeps its padding at the end.
  const Batches strands(corpus, 8, 1, true);
  bool seen = false;
  for (int64_t step = 0; step < 20; ++step) {
    const Batch row = strands.draw(step, 1, 0, 1);
    EXPECT_EQ(row.inputs[6], kPadding);
    if (row.inputs[0] != 5) continue;
    seen = true;
    EXPECT_EQ(row.inputs, (std::vector<int64_t>{5, 4, 3, 2, 1, 0, kPadding, kPadding}));
    EXPECT_EQ(row.weights, (std::vector<float>{1, 1, 1, 1, 0, 0, 0, 0}));
  }
  EXPECT_TRUE(seen);
}

TEST(Batches, ExactFits) {
  // length + 1 tokens are one whole window; 2 * length + 1 leave room for one at any offset.
  EXPECT_EQ(row_starts(Batches(std::make_shared<Counting>(9), 8, 1).draw(0, 1, 0, 1))[0], 0);
  EXPECT_EQ(Batches(std::make_shared<Counting>(17), 8, 1).windows(), 1);
  EXPECT_EQ(Batches(std::make_shared<Counting>(24), 8, 1).windows(), 2);
}

TEST(Batches, SequentialWindowsCoverTheCorpusOnce) {
  for (const int64_t size : {2, 3, 8, 9, 10, 16, 17, 18, 100}) {
    const Batches batches(std::make_shared<Counting>(size), 8, 1, true);
    const int64_t windows = batches.sequential_windows();
    EXPECT_EQ(windows, (size - 1 + 7) / 8);
    std::vector<int64_t> targets;
    for (int64_t index = 0; index < windows; index += 3) {
      const Batch batch = batches.sequential(index, 3);
      EXPECT_EQ(batch.rows, std::min<int64_t>(3, windows - index));
      ASSERT_EQ(batch.targets.size(), static_cast<size_t>(batch.rows * 8));
      for (size_t i = 0; i < batch.targets.size(); ++i) {
        if (targets.size() + 1 < static_cast<size_t>(size)) {
          EXPECT_EQ(batch.inputs[i] + 1, batch.targets[i]);
          EXPECT_EQ(batch.weights[i], Counting::weight(batch.targets[i]));
          targets.push_back(batch.targets[i]);
        } else {
          EXPECT_EQ(batch.targets[i], kPadding);
          EXPECT_EQ(batch.weights[i], 0);
        }
      }
    }
    std::vector<int64_t> want(static_cast<size_t>(size - 1));
    std::iota(want.begin(), want.end(), 1);
    EXPECT_EQ(targets, want);
    EXPECT_EQ(batches.sequential(windows, 3).rows, 0);
    EXPECT_EQ(batches.sequential(windows + 5, 3).rows, 0);
  }
  EXPECT_EQ(Batches(std::make_shared<Counting>(1), 8, 1).sequential_windows(), 0);
  EXPECT_EQ(Batches(std::make_shared<Counting>(0), 8, 1).sequential_windows(), 0);
}

// From a file: a row crosses the end of a document, N is not learnt, the rest is.
TEST(Batches, DocumentsAndMasksOfAFastaFile) {
  const test::TemporaryFolder folder;
  const auto corpus = open_corpus(folder.write("a.fa", ">a\nACNG\n>b\nTT\n"), {});
  const Batch batch = Batches(corpus, 7, 1).sequential(0, 1);
  EXPECT_EQ(batch.inputs, (std::vector<int64_t>{'A', 'C', 'N', 'G', kEndOfDocument, 'T', 'T'}));
  EXPECT_EQ(batch.targets,
            (std::vector<int64_t>{'C', 'N', 'G', kEndOfDocument, 'T', 'T', kEndOfDocument}));
  EXPECT_EQ(batch.weights, (std::vector<float>{1, 0, 1, 1, 1, 1, 1}));
}

TEST(Batches, BadArgumentsAreRefused) {
  const auto corpus = std::make_shared<Counting>(100);
  EXPECT_REFUSED(Batches(nullptr, 8, 1), "the corpus is null");
  EXPECT_REFUSED(Batches(corpus, 0, 1), "the length is 0");
  const Batches batches(corpus, 8, 1);
  EXPECT_REFUSED(batches.draw(-1, 4, 0, 4), "the step is -1");
  EXPECT_REFUSED(batches.draw(0, 4, 1, 4), "rows [1, 5) are outside the global batch of 4");
  EXPECT_REFUSED(batches.draw(0, 4, -1, 2), "rows [-1, 1)");
  EXPECT_REFUSED(batches.sequential(-1, 2), "window -1");
  EXPECT_REFUSED(Batches(std::make_shared<Counting>(1), 8, 1).draw(0, 1, 0, 1),
                 "the corpus has 1 tokens, expected at least 2");
}

}  // namespace
}  // namespace sarissa::data
