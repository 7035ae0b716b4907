// Messages for people, on stderr. One line per message, written whole, so that the lines of several
// threads and ranks do not mix. Results go to stdout and never through here.
#pragma once

#include <string>
#include <string_view>

#include "sarissa/base/error.h"

namespace sarissa {

enum class LogLevel { kError, kWarning, kInfo, kDebug };

/// Messages above this level are dropped; kInfo at first. kWarning is what --quiet means: no
/// information, no progress.
void set_log_level(LogLevel level);
LogLevel log_level();

/// Puts "[rank N] " before every line when there are several ranks. Ranks other than 0 drop
/// information, which would repeat what rank 0 says, unless the level is kDebug.
void set_log_rank(int rank, int ranks);

/// Writes one line: "message", "warning: message", "error: message" or "debug: message".
void log(LogLevel level, std::string_view message);

// ::sarissa::str, since an argument of one of torch's types would bring c10::str into the choice.
template <class... Args>
void log_error(const Args&... args) {
  log(LogLevel::kError, ::sarissa::str(args...));
}
template <class... Args>
void log_warning(const Args&... args) {
  log(LogLevel::kWarning, ::sarissa::str(args...));
}
template <class... Args>
void log_info(const Args&... args) {
  if (log_level() >= LogLevel::kInfo) log(LogLevel::kInfo, ::sarissa::str(args...));
}
template <class... Args>
void log_debug(const Args&... args) {
  if (log_level() >= LogLevel::kDebug) log(LogLevel::kDebug, ::sarissa::str(args...));
}

/// Whether stderr is a terminal, on which a line can be redrawn.
bool stderr_is_terminal();

/// Draws a line that stays below the messages until it is replaced, or removed by "". Only for a
/// terminal; used by Progress.
void draw_status_line(std::string_view line);

/// Whether this process would show a message of this level (see set_log_rank).
bool log_shows(LogLevel level);

}  // namespace sarissa
