#include "sarissa/train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "sarissa/base/error.h"

namespace sarissa::train {

double learning_rate(const OptimConfig& optim, int64_t steps, int64_t step) {
  if (step < optim.warmup) return optim.lr * double(step + 1) / double(optim.warmup);
  const double lowest = optim.lr * optim.min_lr_ratio;
  if (optim.schedule == "constant") return optim.lr;
  if (optim.schedule == "cosine") {
    // The first update after the warm-up still has the full lr, the last one has the lowest.
    const int64_t span = std::max<int64_t>(1, steps - 1 - optim.warmup);
    const double progress = std::min(1.0, double(step - optim.warmup) / double(span));
    return lowest + (optim.lr - lowest) * 0.5 * (1.0 + std::cos(std::numbers::pi * progress));
  }
  if (optim.schedule == "wsd") {
    const int64_t wanted = std::llround(optim.decay_fraction * double(steps));
    const int64_t decay = std::min(wanted, steps - optim.warmup);
    const int64_t into = std::min(step, steps - 1) - (steps - decay) + 1;  // 1 .. decay
    if (into <= 0) return optim.lr;
    return optim.lr + (lowest - optim.lr) * double(into) / double(decay);
  }
  throw UsageError(
      str("optim.schedule = \"", optim.schedule, "\": expected cosine, wsd or constant"));
}

}  // namespace sarissa::train
