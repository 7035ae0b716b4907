// Files for tests: a folder that disappears, gzip, and refusals that must name what is wrong.
#pragma once

#include <gtest/gtest.h>
#include <zlib.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>

#include "sarissa/base/error.h"

namespace sarissa::test {

/// A new folder, removed with all it holds at the end of its life.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "sarissa-test-XXXXXX").string();
    if (!::mkdtemp(name.data())) throw std::runtime_error("mkdtemp failed");
    path_ = name;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;

  std::string operator/(const std::string& name) const { return (path_ / name).string(); }

  /// Writes a file and returns its path.
  std::string write(const std::string& name, const std::string& contents) const {
    std::ofstream(path_ / name, std::ios::binary) << contents;
    return *this / name;
  }

  size_t files() const {
    return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(path_), {}));
  }

 private:
  std::filesystem::path path_;
};

/// One gzip member.
inline std::string gzip(const std::string& contents) {
  z_stream stream{};
  constexpr int kGzip = 15 + 16;  // largest window, with a gzip header
  if (deflateInit2(&stream, 6, Z_DEFLATED, kGzip, 8, Z_DEFAULT_STRATEGY) != Z_OK) {
    throw std::runtime_error("deflateInit2 failed");
  }
  std::string result(deflateBound(&stream, contents.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(contents.data()));
  stream.avail_in = static_cast<uInt>(contents.size());
  stream.next_out = reinterpret_cast<Bytef*>(result.data());
  stream.avail_out = static_cast<uInt>(result.size());
  const int code = deflate(&stream, Z_FINISH);
  result.resize(stream.total_out);
  deflateEnd(&stream);
  if (code != Z_STREAM_END) throw std::runtime_error("deflate failed");
  return result;
}

inline std::string contents_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream contents;
  contents << file.rdbuf();
  return contents.str();
}

/// The root of the source tree: where it was built, or SARISSA_SOURCE_DIR of the environment.
inline std::string source_root() {
  const char* moved = std::getenv("SARISSA_SOURCE_DIR");
  return moved ? moved : SARISSA_SOURCE_DIR;
}

}  // namespace sarissa::test

/// Checks that a statement throws sarissa::Error with one line that holds `part`.
#define EXPECT_REFUSED(statement, part)                                                 \
  do {                                                                                  \
    try {                                                                               \
      statement;                                                                        \
      ADD_FAILURE() << #statement " was not refused";                                   \
    } catch (const ::sarissa::Error& error) {                                           \
      const std::string message = error.what();                                         \
      EXPECT_NE(message.find(part), std::string::npos) << "message: " << message;       \
      EXPECT_EQ(message.find('\n'), std::string::npos) << "several lines: " << message; \
    }                                                                                   \
  } while (false)
