// Training a model, from a configuration to a run directory.
#pragma once

#include <cstdint>
#include <optional>

#include "sarissa/train/config.h"
#include "sarissa/train/evaluate.h"

namespace sarissa::train {

struct TrainOptions {
  bool resume = false;     // go on from the latest checkpoint of train.output
  int64_t stop_after = 0;  // stop after this many steps as if interrupted; 0: at train.steps
};

struct TrainResult {
  int64_t step = 0;                      // updates done
  int signal = 0;                        // SIGINT or SIGTERM when one ended the run early
  std::optional<EvalResult> evaluation;  // the last one
};

/// Trains. Every update is a function of the configuration, the data and the step alone, so a run
/// that is stopped and resumed on the same device with the same number of threads gives the same
/// weights, bit for bit, as one that is not.
///
/// SIGINT and SIGTERM finish the step, write a checkpoint and return. Throws UsageError for a
/// configuration that cannot run, for a run directory that has a run already (without resume), for
/// nothing to resume and for a resumed model that differs; sarissa::Error when loss or gradients
/// are not finite (the last checkpoint stays as it is) and when data or disk fail.
TrainResult train(const RunConfig& config, const TrainOptions& options = {});

/// The exit code of the program for a result: 0 when the work was done, 128 + signal otherwise.
int exit_code(const TrainResult& result);

}  // namespace sarissa::train
