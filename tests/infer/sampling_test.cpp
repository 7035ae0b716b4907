#include "sarissa/infer/sampling.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "sarissa/base/error.h"

namespace sarissa::infer {
namespace {

// softmax(log p) = p.
std::vector<float> logits_of(const std::vector<double>& probabilities) {
  std::vector<float> logits;
  for (const double p : probabilities) logits.push_back(static_cast<float>(std::log(p)));
  return logits;
}

const std::vector<float> kLogits = logits_of({0.1, 0.4, 0.2, 0.3});

void expect_probabilities(const SamplingOptions& options, const std::vector<double>& want) {
  const auto got = sampling_probabilities(kLogits, options);
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], 1e-6) << "token " << i;
}

TEST(Sampling, KeepsTheModelsProbabilitiesByDefault) {
  expect_probabilities({}, {0.1, 0.4, 0.2, 0.3});
}

TEST(Sampling, TemperatureRaisesProbabilitiesToAPower) {
  const double sum = 0.01 + 0.16 + 0.04 + 0.09;
  expect_probabilities({.temperature = 0.5}, {0.01 / sum, 0.16 / sum, 0.04 / sum, 0.09 / sum});
}

TEST(Sampling, TinyTemperatureDoesNotOverflow) {
  expect_probabilities({.temperature = 1e-300}, {0, 1, 0, 0});
}

TEST(Sampling, TopKKeepsTheMostLikely) {
  expect_probabilities({.top_k = 2}, {0, 4.0 / 7, 0, 3.0 / 7});
  expect_probabilities({.top_k = 100}, {0.1, 0.4, 0.2, 0.3});
}

TEST(Sampling, TopPKeepsTheTokenThatReachesTheThreshold) {
  expect_probabilities({.top_p = 0.5}, {0, 4.0 / 7, 0, 3.0 / 7});
  expect_probabilities({.top_p = 0.75}, {0, 4.0 / 9, 2.0 / 9, 3.0 / 9});
  expect_probabilities({.top_p = 1e-9}, {0, 1, 0, 0});
}

TEST(Sampling, TopPCountsWhatTopKLeft) {
  // Of the kept {0.4, 0.3, 0.2}, 0.4 and 0.3 are 78 %.
  expect_probabilities({.top_k = 3, .top_p = 0.75}, {0, 4.0 / 7, 0, 3.0 / 7});
}

TEST(Sampling, VocabularyExcludesHigherIds) {
  expect_probabilities({.vocabulary = 2}, {0.2, 0.8, 0, 0});
  EXPECT_EQ(sample({0, 1, 5}, {.temperature = 0, .vocabulary = 2}, 0), 1);
}

TEST(Sampling, GreedyTakesTheLowerIdOfEqualLogits) {
  for (uint64_t step = 0; step < 5; ++step) {
    EXPECT_EQ(sample({1, 3, 3, 2}, {.temperature = 0, .seed = step}, step), 1);
  }
}

TEST(Sampling, IsAFunctionOfSeedAndStep) {
  const auto draw = [](uint64_t seed) {
    std::vector<int64_t> tokens;
    for (uint64_t step = 0; step < 64; ++step) {
      tokens.push_back(sample(kLogits, {.seed = seed}, step));
    }
    return tokens;
  };
  EXPECT_EQ(draw(3), draw(3));
  EXPECT_NE(draw(3), draw(4));
}

TEST(Sampling, DrawsWithTheGivenFrequencies) {
  constexpr int kDraws = 20000;
  std::vector<int> counts(4, 0);
  for (int step = 0; step < kDraws; ++step) ++counts[sample(kLogits, {.seed = 5}, step)];
  const std::vector<double> want = {0.1, 0.4, 0.2, 0.3};
  for (size_t i = 0; i < want.size(); ++i) {
    const double sigma = std::sqrt(kDraws * want[i] * (1 - want[i]));
    EXPECT_NEAR(counts[i], kDraws * want[i], 5 * sigma) << "token " << i;
  }
}

TEST(Sampling, RefusesLogitsThatAreNotFinite) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  try {
    sample({0, nan}, {}, 0);
    FAIL() << "no error for NaN";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("token 1"), std::string::npos) << error.what();
  }
}

TEST(Sampling, RefusesOptionsOutOfRange) {
  EXPECT_THROW(SamplingOptions{.temperature = -1}.validate(), UsageError);
  EXPECT_THROW(SamplingOptions{.temperature = std::nan("")}.validate(), UsageError);
  EXPECT_THROW(SamplingOptions{.top_k = -1}.validate(), UsageError);
  EXPECT_THROW(SamplingOptions{.top_p = 0}.validate(), UsageError);
  EXPECT_THROW(SamplingOptions{.top_p = 1.5}.validate(), UsageError);
  EXPECT_NO_THROW((SamplingOptions{.temperature = 0, .top_k = 1, .top_p = 1}.validate()));
}

}  // namespace
}  // namespace sarissa::infer
