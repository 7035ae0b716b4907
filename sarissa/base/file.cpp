#include "sarissa/base/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "sarissa/base/error.h"

namespace sarissa {
namespace {

namespace fs = std::filesystem;

constexpr size_t kBlock = size_t{1} << 18;  // bytes handed out by InputStream at a time

std::string reason() { return std::strerror(errno); }

// Names in the folder of a file that is not there, for a suggestion. Large folders are cut short.
std::vector<std::string> names_beside(const fs::path& path) {
  std::vector<std::string> names;
  std::error_code ignored;
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  for (fs::directory_iterator it(folder, ignored), end; it != end && names.size() < 1000;
       it.increment(ignored)) {
    if (ignored) break;
    names.push_back(it->path().filename().string());
  }
  return names;
}

class Descriptor {
 public:
  Descriptor(const fs::path& path, int flags) : fd_(::open(path.c_str(), flags | O_CLOEXEC)) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

}  // namespace

void check_is_file(const fs::path& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) {
    if (errno == ENOENT || errno == ENOTDIR) {
      throw Error(str(path.string(), ": no such file",
                      did_you_mean(path.filename().string(), names_beside(path))));
    }
    throw Error(str(path.string(), ": cannot be read: ", reason()));
  }
  SARISSA_CHECK(!S_ISDIR(info.st_mode), path.string(), ": is a folder, expected a file");
}

std::string read_file(const fs::path& path) {
  check_is_file(path);
  Descriptor file(path, O_RDONLY);
  SARISSA_CHECK(file.get() >= 0, path.string(), ": cannot be opened: ", reason());
  std::string contents;
  std::vector<char> block(kBlock);
  while (true) {
    const ssize_t got = ::read(file.get(), block.data(), block.size());
    if (got < 0 && errno == EINTR) continue;
    SARISSA_CHECK(got >= 0, path.string(), ": cannot be read: ", reason());
    if (got == 0) return contents;
    contents.append(block.data(), static_cast<size_t>(got));
  }
}

void replace_file(const fs::path& path, std::string_view contents) {
  AtomicFile file(path);
  file.write(contents.data(), contents.size());
  file.commit();
}

void sync_folder(const fs::path& folder) {
  const fs::path name = folder.empty() ? fs::path(".") : folder;
  Descriptor directory(name, O_RDONLY | O_DIRECTORY);
  SARISSA_CHECK(directory.get() >= 0, name.string(), ": cannot be opened: ", reason());
  // Some network file systems cannot sync a folder and say EINVAL; there is nothing more to do.
  SARISSA_CHECK(::fsync(directory.get()) == 0 || errno == EINVAL, name.string(),
                ": cannot be synced: ", reason());
}

MappedFile::MappedFile(const fs::path& path) {
  check_is_file(path);
  Descriptor file(path, O_RDONLY);
  struct stat info {};
  SARISSA_CHECK(file.get() >= 0 && ::fstat(file.get(), &info) == 0, path.string(),
                ": cannot be opened: ", reason());
  SARISSA_CHECK(S_ISREG(info.st_mode), path.string(),
                ": is a pipe or device, expected a regular file");
  size_ = static_cast<size_t>(info.st_size);
  if (size_ == 0) return;  // mmap refuses an empty range
  void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.get(), 0);
  SARISSA_CHECK(mapped != MAP_FAILED, path.string(), ": cannot be mapped: ", reason());
  data_ = static_cast<const uint8_t*>(mapped);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<uint8_t*>(data_), size_);
}

AtomicFile::AtomicFile(const fs::path& path) : path_(path) {
  static std::atomic<int> files{0};
  SARISSA_CHECK(path.has_filename(), path.string(), ": is not the name of a file");
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  SARISSA_CHECK(fs::is_directory(folder), path.string(), ": the folder ", folder.string(),
                " does not exist; create it first");
  SARISSA_CHECK(!fs::is_directory(path), path.string(), ": is a folder, expected a file name");
  temporary_ = folder / str(".", path.filename().string(), ".", ::getpid(), "-", files++, ".tmp");
  file_ = std::fopen(temporary_.c_str(), "wbxe");
  if (!file_) fail("cannot be created");
}

AtomicFile::~AtomicFile() {
  if (!file_) return;
  std::fclose(file_);
  ::unlink(temporary_.c_str());
}

void AtomicFile::fail(const char* what) const {
  throw Error(str(path_.string(), ": ", what, ": ", reason()));
}

void AtomicFile::write(const void* data, size_t bytes) {
  if (std::fwrite(data, 1, bytes, file_) != bytes) fail("cannot be written");
}

void AtomicFile::commit() {
  if (std::fflush(file_) != 0 || ::fsync(::fileno(file_)) != 0) fail("cannot be written");
  if (std::fclose(std::exchange(file_, nullptr)) != 0 ||
      ::rename(temporary_.c_str(), path_.c_str()) != 0) {
    const int code = errno;
    ::unlink(temporary_.c_str());
    errno = code;
    fail("cannot be written");
  }
  sync_folder(path_.parent_path());
}

struct InputStream::Gzip {
  gzFile file = nullptr;
  ~Gzip() {
    if (file) gzclose(file);
  }
};

InputStream::InputStream(const fs::path& path)
    : gzip_(std::make_unique<Gzip>()), name_(path.string()) {
  check_is_file(path);
  struct stat info {};
  if (::stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode)) file_size_ = info.st_size;
  gzip_->file = gzopen(path.c_str(), "rbe");
  SARISSA_CHECK(gzip_->file, name_, ": cannot be opened: ", reason());
  gzbuffer(gzip_->file, kBlock);
  buffer_.resize(kBlock);
}

InputStream::~InputStream() = default;

std::string_view InputStream::peek() {
  if (begin_ == end_) {
    errno = 0;
    const int got = gzread(gzip_->file, buffer_.data(), static_cast<unsigned>(buffer_.size()));
    // zlib reports a gzip stream that stops in the middle only here, after its last bytes.
    int code = Z_OK;
    const std::string message = gzerror(gzip_->file, &code);
    SARISSA_CHECK(code != Z_BUF_ERROR, name_, ": gzip data are truncated");
    SARISSA_CHECK(code != Z_ERRNO, name_, ": cannot be read: ", reason());
    SARISSA_CHECK(
        got >= 0 && code == Z_OK, name_, ": gzip data are damaged (",
        message.substr(message.rfind(": ") == std::string::npos ? 0 : message.rfind(": ") + 2),
        ")");
    if (!checked_) {
      checked_ = true;
      SARISSA_CHECK(!name_.ends_with(".gz") || got == 0 || !gzdirect(gzip_->file), name_,
                    ": the name ends in .gz but the content is not gzip");
    }
    begin_ = 0;
    end_ = static_cast<size_t>(got);
  }
  return {buffer_.data() + begin_, end_ - begin_};
}

int64_t InputStream::position() const { return gzoffset(gzip_->file); }

bool LineReader::next(std::string& line) {
  line.clear();
  std::string_view bytes = input_.peek();
  if (bytes.empty()) return false;
  ++line_number_;
  for (; !bytes.empty(); bytes = input_.peek()) {
    const size_t newline = bytes.find('\n');
    const size_t taken = std::min(newline, bytes.size());
    SARISSA_CHECK(line.size() + taken <= kLongestLine, input_.name(), ":", line_number_,
                  ": the line is longer than ", kLongestLine, " bytes");
    line.append(bytes.substr(0, taken));
    if (newline != std::string_view::npos) {
      input_.consume(newline + 1);
      break;
    }
    input_.consume(taken);
  }
  if (line.ends_with('\r')) line.pop_back();
  return true;
}

}  // namespace sarissa
