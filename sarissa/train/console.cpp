#include "sarissa/train/console.h"

#include <iomanip>
#include <sstream>

#include "sarissa/base/log.h"
#include "sarissa/base/progress.h"

namespace sarissa::train {

std::string training_line(int64_t step, int64_t steps, double loss, double tokens_per_second,
                          double seconds_left) {
  std::ostringstream line;
  line << "step " << step << "/" << steps << "  loss " << std::fixed << std::setprecision(3) << loss
       << "  " << short_count(tokens_per_second) << " tokens/s  ETA "
       << short_duration(seconds_left);
  return line.str();
}

Console::Console(int64_t first_step, int64_t steps)
    : first_step_(first_step),
      steps_(steps),
      terminal_(stderr_is_terminal()),
      start_(Clock::now()),
      next_(start_) {}

Console::~Console() {
  if (terminal_) draw_status_line("");
}

void Console::update(int64_t step, double loss, double tokens_per_second) {
  const auto now = Clock::now();
  if ((now < next_ && step < steps_) || !log_shows(LogLevel::kInfo)) return;
  // All the time since the start counts, evaluations and checkpoints too: they come again.
  const double seconds = std::chrono::duration<double>(now - start_).count();
  const double per_step = seconds / static_cast<double>(step - first_step_);
  const std::string line = training_line(step, steps_, loss, tokens_per_second,
                                         per_step * static_cast<double>(steps_ - step));
  if (terminal_) {
    draw_status_line(line);
    next_ = now + std::chrono::milliseconds(100);
  } else {
    log(LogLevel::kInfo, line);
    next_ = now + std::chrono::seconds(5);
  }
}

}  // namespace sarissa::train
