// Progress of long work: one line redrawn on a terminal, a plain line now and then elsewhere.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace sarissa {

/// "reading genome.fa  42%  12.3M bytes/s  ETA 0:07". `total` 0 means unknown: no percentage, no
/// time to go.
std::string progress_line(const std::string& label, int64_t done, int64_t total, double seconds,
                          const std::string& unit);

/// 950 -> "950", 12345 -> "12.3k", 4639675 -> "4.64M"; k, M, G, T are powers of 1000.
std::string short_count(double value);

/// 7 -> "0:07", 3725 -> "1:02:05".
std::string short_duration(double seconds);

/// Shows how far a piece of work has come. Nothing is shown when the log level is below kInfo. On a
/// terminal the line is redrawn at most ten times a second and removed at the end; elsewhere a line
/// is written at most once per `plain_interval`, so work shorter than that writes nothing.
class Progress {
 public:
  using Clock = std::chrono::steady_clock;

  Progress(std::string label, int64_t total, std::string unit,
           Clock::duration plain_interval = std::chrono::seconds(5));
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// Work done since the start, not since the last call. Cheap enough for an inner loop over blocks
  /// of data.
  void update(int64_t done);

 private:
  const std::string label_, unit_;
  const int64_t total_;
  const bool shown_, terminal_;
  const Clock::time_point start_;
  const Clock::duration interval_;
  Clock::time_point next_;
  int64_t done_ = 0;
  bool wrote_plain_ = false;
};

}  // namespace sarissa
