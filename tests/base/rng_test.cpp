#include "sarissa/base/rng.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

namespace sarissa {
namespace {

using Words = std::array<uint32_t, 4>;

// Known answers of the Random123 library, kat_vectors, philox4x32 with 10 rounds.
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}),
            (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr uint32_t kOnes = 0xffffffff;
  EXPECT_EQ(philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Rng, IsAFunctionOfSeedStreamAndCounter) {
  EXPECT_EQ(Rng(0).bits(0), 0xe169c58d6627e8d5u);
  EXPECT_EQ(Rng(7, 3).bits(11), Rng(7, 3).bits(11));
  std::set<uint64_t> seen;
  for (uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 32}) {
    for (uint64_t stream : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 32}) {
      for (uint64_t counter : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 32}) {
        seen.insert(Rng(seed, stream).bits(counter));
      }
    }
  }
  EXPECT_EQ(seen.size(), 27u);
}

TEST(Rng, BelowIsUniform) {
  const Rng rng(1);
  constexpr int kDraws = 60000, kBound = 6;
  std::vector<int> counts(kBound);
  for (int i = 0; i < kDraws; ++i) {
    const uint64_t value = rng.below(static_cast<uint64_t>(i), kBound);
    ASSERT_LT(value, static_cast<uint64_t>(kBound));
    ++counts[value];
  }
  const double expected = double{kDraws} / kBound;
  for (const int count : counts) EXPECT_NEAR(count, expected, 5 * std::sqrt(expected));
  EXPECT_EQ(rng.below(3, 1), 0u);
}

TEST(Rng, UniformHasTheRightMoments) {
  const Rng rng(2, 5);
  constexpr int kDraws = 100000;
  double sum = 0, squares = 0, lag = 0, last = 0.5;
  for (int i = 0; i < kDraws; ++i) {
    const double x = rng.uniform(static_cast<uint64_t>(i));
    ASSERT_GE(x, 0.0);
    ASSERT_LT(x, 1.0);
    sum += x;
    squares += x * x;
    lag += (x - 0.5) * (last - 0.5);
    last = x;
  }
  EXPECT_NEAR(sum / kDraws, 0.5, 0.005);
  EXPECT_NEAR(squares / kDraws, 1.0 / 3, 0.005);
  EXPECT_NEAR(lag / kDraws, 0.0, 0.002);
}

}  // namespace
}  // namespace sarissa
