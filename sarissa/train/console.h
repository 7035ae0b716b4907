// What a person sees of a running training.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace sarissa::train {

/// "step 120/1000  loss 2.315  45.2k tokens/s  ETA 1:05"
std::string training_line(int64_t step, int64_t steps, double loss, double tokens_per_second,
                          double seconds_left);

/// One line on stderr: redrawn on a terminal, written anew every few seconds elsewhere.
class Console {
 public:
  /// Steps first_step .. steps - 1 lie ahead.
  Console(int64_t first_step, int64_t steps);
  ~Console();
  Console(const Console&) = delete;
  Console& operator=(const Console&) = delete;

  /// After `step` updates in all.
  void update(int64_t step, double loss, double tokens_per_second);

 private:
  using Clock = std::chrono::steady_clock;

  const int64_t first_step_, steps_;
  const bool terminal_;
  const Clock::time_point start_;
  Clock::time_point next_;
};

}  // namespace sarissa::train
