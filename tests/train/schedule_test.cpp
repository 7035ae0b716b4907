#include "sarissa/train/schedule.h"

#include <gtest/gtest.h>

#include <cmath>

namespace sarissa::train {
namespace {

OptimConfig optim(const std::string& schedule, int64_t warmup) {
  OptimConfig config;
  config.lr = 1.0;
  config.min_lr_ratio = 0.1;
  config.schedule = schedule;
  config.warmup = warmup;
  config.decay_fraction = 0.25;
  return config;
}

TEST(Schedule, WarmUpIsLinearAndReachesThePeak) {
  for (const char* schedule : {"cosine", "wsd", "constant"}) {
    const OptimConfig config = optim(schedule, 10);
    EXPECT_DOUBLE_EQ(learning_rate(config, 100, 0), 0.1) << schedule;
    EXPECT_DOUBLE_EQ(learning_rate(config, 100, 4), 0.5) << schedule;
    EXPECT_DOUBLE_EQ(learning_rate(config, 100, 9), 1.0) << schedule;
    EXPECT_DOUBLE_EQ(learning_rate(config, 100, 10), 1.0) << schedule;
  }
}

TEST(Schedule, CosineFallsToTheMinimumAtTheLastUpdate) {
  const OptimConfig config = optim("cosine", 10);
  EXPECT_NEAR(learning_rate(config, 111, 60), 0.55, 1e-12);  // half way from update 10 to 110
  EXPECT_NEAR(learning_rate(config, 111, 35), 0.1 + 0.45 * (1 + std::sqrt(0.5)), 1e-12);
  EXPECT_NEAR(learning_rate(config, 111, 110), 0.1, 1e-12);
  for (int64_t step = 11; step < 111; ++step) {
    EXPECT_LT(learning_rate(config, 111, step), learning_rate(config, 111, step - 1)) << step;
  }
}

TEST(Schedule, WsdStaysAndThenFallsLinearly) {
  const OptimConfig config = optim("wsd", 10);
  EXPECT_DOUBLE_EQ(learning_rate(config, 100, 50), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate(config, 100, 74), 1.0);
  EXPECT_NEAR(learning_rate(config, 100, 75), 1.0 - 0.9 / 25, 1e-12);
  EXPECT_NEAR(learning_rate(config, 100, 99), 0.1, 1e-12);
  EXPECT_NEAR(learning_rate(config, 100, 86) - learning_rate(config, 100, 87), 0.9 / 25, 1e-12);
}

TEST(Schedule, WsdDecayNeverReachesIntoTheWarmUp) {
  OptimConfig config = optim("wsd", 90);
  EXPECT_DOUBLE_EQ(learning_rate(config, 100, 89), 1.0);
  EXPECT_NEAR(learning_rate(config, 100, 90), 1.0 - 0.9 / 10, 1e-12);
  EXPECT_NEAR(learning_rate(config, 100, 99), 0.1, 1e-12);
  config.decay_fraction = 0;
  EXPECT_DOUBLE_EQ(learning_rate(config, 100, 99), 1.0);
}

TEST(Schedule, ConstantStays) {
  EXPECT_DOUBLE_EQ(learning_rate(optim("constant", 0), 100, 0), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate(optim("constant", 0), 100, 99), 1.0);
}

TEST(Schedule, ShortRunsAreWellDefined) {
  for (const char* schedule : {"cosine", "wsd", "constant"}) {
    EXPECT_DOUBLE_EQ(learning_rate(optim(schedule, 100), 10, 9), 0.1) << schedule;
    const double only = learning_rate(optim(schedule, 0), 1, 0);
    EXPECT_GE(only, 0.1) << schedule;
    EXPECT_LE(only, 1.0) << schedule;
  }
}

}  // namespace
}  // namespace sarissa::train
