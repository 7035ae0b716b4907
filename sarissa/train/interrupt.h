// Ctrl-C and SIGTERM as a wish to stop after the current step.
#pragma once

namespace sarissa::train {

/// While alive, the first SIGINT or SIGTERM is only remembered; a second one ends the process at
/// once with exit code 128 + signal. At most one at a time.
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

  /// The signal that came, 0 when none did.
  int signal() const;
};

}  // namespace sarissa::train
