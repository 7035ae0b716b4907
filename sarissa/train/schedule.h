// Learning rate schedules, as pure functions of the step.
#pragma once

#include <cstdint>

#include "sarissa/train/config.h"

namespace sarissa::train {

/// The learning rate of update `step` (0 .. steps - 1) in a run of `steps` updates.
///   warm-up:  rises linearly over the first `warmup` updates; update warmup -
///   1 has the full lr. cosine:   then falls along half a cosine to lr *
///   min_lr_ratio at the last update. wsd:      then stays, and falls linearly
///   over the last decay_fraction of the updates (at most
///             all those after the warm-up) to lr * min_lr_ratio at the last
///             one.
///   constant: then stays.
double learning_rate(const OptimConfig& optim, int64_t steps, int64_t step);

}  // namespace sarissa::train
