#include "sarissa/base/log.h"

#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <mutex>

namespace sarissa {
namespace {

constexpr std::string_view kClearLine = "\r\033[K";

std::atomic<LogLevel> level_shown{LogLevel::kInfo};
std::atomic<int> this_rank{0};
std::atomic<int> rank_count{1};

std::mutex stderr_mutex;  // guards stderr and status_line
std::string status_line;

// One write per line: the kernel keeps short writes to a terminal or pipe in one piece. Errors are
// ignored: there is nowhere left to report them.
void write_to_stderr(std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = ::write(STDERR_FILENO, text.data(), text.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return;
    text.remove_prefix(static_cast<size_t>(written));
  }
}

}  // namespace

void set_log_level(LogLevel level) { level_shown = level; }
LogLevel log_level() { return level_shown; }

void set_log_rank(int rank, int ranks) {
  this_rank = rank;
  rank_count = ranks;
}

bool log_shows(LogLevel level) {
  if (level > level_shown) return false;
  return this_rank == 0 || level <= LogLevel::kWarning || level_shown == LogLevel::kDebug;
}

void log(LogLevel level, std::string_view message) {
  if (!log_shows(level)) return;
  std::string line;
  if (rank_count > 1) line += str("[rank ", this_rank.load(), "] ");
  if (level == LogLevel::kError) line += "error: ";
  if (level == LogLevel::kWarning) line += "warning: ";
  if (level == LogLevel::kDebug) line += "debug: ";
  line += message;
  line += '\n';
  std::lock_guard lock(stderr_mutex);
  if (!status_line.empty()) line = std::string(kClearLine) + line + status_line;
  write_to_stderr(line);
}

bool stderr_is_terminal() { return ::isatty(STDERR_FILENO) == 1; }

void draw_status_line(std::string_view line) {
  std::lock_guard lock(stderr_mutex);
  if (line.empty() && status_line.empty()) return;
  status_line = line;
  write_to_stderr(std::string(kClearLine) + status_line);
}

}  // namespace sarissa
