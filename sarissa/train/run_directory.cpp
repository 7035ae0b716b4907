#include "sarissa/train/run_directory.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <sstream>

#include "sarissa/base/error.h"
#include "sarissa/base/file.h"

namespace sarissa::train {
namespace {

namespace fs = std::filesystem;

// The lines of `text` that are records of steps up to `last_step`.
std::string kept_records(const std::string& text, int64_t last_step) {
  std::string kept;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const auto record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!record.is_object() || !record.contains("step") || !record["step"].is_number_integer()) {
      continue;
    }
    if (record["step"].get<int64_t>() <= last_step) kept += line + "\n";
  }
  return kept;
}

}  // namespace

RunDirectory::RunDirectory(fs::path path)
    : path_(std::move(path)), checkpoints_(path_ / "checkpoints") {}

RunDirectory::~RunDirectory() {
  if (lock_ >= 0) ::close(lock_);  // releases the lock
}

bool RunDirectory::has_run() const {
  return fs::exists(config()) || fs::exists(metrics()) || fs::exists(path_ / "checkpoints");
}

void RunDirectory::open() {
  std::error_code error;
  fs::create_directories(path_, error);
  SARISSA_CHECK(!error, "train.output: cannot create ", path_.string(), ": ", error.message());
  const fs::path file = path_ / ".lock";
  lock_ = ::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  SARISSA_CHECK(lock_ >= 0, "train.output: cannot write to ", path_.string(), ": ",
                std::strerror(errno));
  // File systems without locks (ENOLCK, EOPNOTSUPP) are used without.
  if (::flock(lock_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    throw UsageError(str("train.output = \"", path_.string(),
                         "\": another process trains in it; wait for it or choose another"));
  }
}

MetricsFile::MetricsFile(const fs::path& path, int64_t last_step) : path_(path) {
  if (fs::exists(path)) {
    const std::string text = read_file(path);
    const std::string kept = kept_records(text, last_step);
    if (kept != text) replace_file(path, kept);
  }
  file_ = std::fopen(path.c_str(), "abe");
  SARISSA_CHECK(file_ != nullptr, "cannot write ", path.string(), ": ", std::strerror(errno));
}

MetricsFile::~MetricsFile() {
  if (file_ != nullptr) std::fclose(file_);
}

void MetricsFile::append(const nlohmann::ordered_json& record) {
  const std::string line = record.dump() + "\n";
  const bool written =
      std::fwrite(line.data(), 1, line.size(), file_) == line.size() && std::fflush(file_) == 0;
  SARISSA_CHECK(written, "cannot write ", path_.string(), ": ", std::strerror(errno));
}

}  // namespace sarissa::train
