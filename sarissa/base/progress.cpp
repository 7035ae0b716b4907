#include "sarissa/base/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <utility>

#include "sarissa/base/log.h"

namespace sarissa {
namespace {

constexpr auto kRedrawInterval = std::chrono::milliseconds(100);

size_t terminal_columns() {
  winsize size{};
  if (::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return 80;
  return size.ws_col;
}

}  // namespace

std::string short_count(double value) {
  const char* const suffixes[] = {"", "k", "M", "G", "T"};
  size_t power = 0;
  while (power < 4 && value >= 999.5) value /= 1000, ++power;
  const int decimals = power == 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  char text[32];
  std::snprintf(text, sizeof text, "%.*f%s", decimals, value, suffixes[power]);
  return text;
}

std::string short_duration(double seconds) {
  const int64_t s = std::llround(std::clamp(seconds, 0.0, 1e9));
  char text[48];
  if (s < 3600) {
    std::snprintf(text, sizeof text, "%d:%02d", static_cast<int>(s / 60), static_cast<int>(s % 60));
  } else {
    std::snprintf(text, sizeof text, "%d:%02d:%02d", static_cast<int>(s / 3600),
                  static_cast<int>(s / 60 % 60), static_cast<int>(s % 60));
  }
  return text;
}

std::string progress_line(const std::string& label, int64_t done, int64_t total, double seconds,
                          const std::string& unit) {
  std::string line = label;
  if (total > 0) {
    const double percent = 100.0 * static_cast<double>(done) / static_cast<double>(total);
    line += str("  ", static_cast<int>(std::min(percent, 100.0)), "%");
  } else {
    line += str("  ", short_count(static_cast<double>(done)), " ", unit);
  }
  if (seconds > 0 && done > 0) {
    const double rate = static_cast<double>(done) / seconds;
    line += str("  ", short_count(rate), " ", unit, "/s");
    if (total > done) {
      line += "  ETA " + short_duration(static_cast<double>(total - done) / rate);
    }
  }
  return line;
}

Progress::Progress(std::string label, int64_t total, std::string unit,
                   Clock::duration plain_interval)
    : label_(std::move(label)),
      unit_(std::move(unit)),
      total_(total),
      shown_(log_shows(LogLevel::kInfo)),
      terminal_(stderr_is_terminal()),
      start_(Clock::now()),
      interval_(terminal_ ? Clock::duration(kRedrawInterval) : plain_interval),
      next_(start_ + interval_) {}

void Progress::update(int64_t done) {
  done_ = done;
  if (!shown_) return;
  const auto now = Clock::now();
  if (now < next_) return;
  next_ = now + interval_;
  const double seconds = std::chrono::duration<double>(now - start_).count();
  const std::string line = progress_line(label_, done, total_, seconds, unit_);
  if (terminal_) {
    // A line as wide as the terminal would wrap and could not be redrawn.
    draw_status_line(std::string_view(line).substr(0, terminal_columns() - 1));
  } else {
    log(LogLevel::kInfo, line);
    wrote_plain_ = true;
  }
}

Progress::~Progress() {
  if (!shown_) return;
  if (terminal_) {
    draw_status_line("");
  } else if (wrote_plain_) {  // a log that shows the start of long work also shows its end
    const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
    log(LogLevel::kInfo, progress_line(label_, done_, total_, seconds, unit_));
  }
}

}  // namespace sarissa
