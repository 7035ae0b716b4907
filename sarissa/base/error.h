// Errors: one exception type, thrown with a message a user can act on.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace sarissa {

/// A failure that a user can understand: bad file, bad value, full disk. The program prints
/// what() on one line and exits with 1.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Bad usage: a wrong option, config key or argument. The program exits with 2.
class UsageError : public Error {
 public:
  using Error::Error;
};

/// Joins its arguments as text: str("got ", 3, " rows").
template <class... Args>
std::string str(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

/// The candidate nearest to `word` by edit distance when it is near enough to be a slip of the
/// keyboard, else "".
std::string nearest(std::string_view word, const std::vector<std::string>& candidates);

/// " (did you mean 'X'?)" for the nearest candidate, else "".
std::string did_you_mean(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace sarissa

/// Throws sarissa::Error with the joined message unless the condition holds.
#define SARISSA_CHECK(condition, ...)                                      \
  do {                                                                     \
    if (!(condition)) throw ::sarissa::Error(::sarissa::str(__VA_ARGS__)); \
  } while (false)
