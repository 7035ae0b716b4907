// Files: memory maps, streams that see through gzip, and replacement that never leaves half a file.
// Every failure is a sarissa::Error that names the path and the reason.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace sarissa {

/// Throws unless `path` exists and is not a directory. For a missing file the message suggests the
/// nearest name in its folder.
void check_is_file(const std::filesystem::path& path);

/// The whole file.
std::string read_file(const std::filesystem::path& path);

/// Replaces `path` by a file with these contents, as AtomicFile does.
void replace_file(const std::filesystem::path& path, std::string_view contents);

/// Makes the names created in, renamed in and removed from this folder durable.
void sync_folder(const std::filesystem::path& folder);

/// A file mapped read-only into memory.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;

  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

/// A new file that takes the name `path` only when it is complete: written under a temporary name
/// in the same folder, fsynced, renamed, and the folder fsynced. After a crash either the old or
/// the new file is there. Without commit() the destructor removes what was written.
class AtomicFile {
 public:
  explicit AtomicFile(const std::filesystem::path& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes);
  void commit();

 private:
  [[noreturn]] void fail(const char* what) const;

  std::filesystem::path path_, temporary_;
  std::FILE* file_ = nullptr;
};

/// Reads a file from start to end in blocks; gzip (one member or several) is recognised by its
/// content and decompressed. Memory stays constant. Throws for a truncated or damaged gzip file,
/// and for a name that ends in .gz with other content.
class InputStream {
 public:
  explicit InputStream(const std::filesystem::path& path);
  ~InputStream();
  InputStream(const InputStream&) = delete;
  InputStream& operator=(const InputStream&) = delete;

  /// The bytes at hand, read from the file when there are none; empty only at the end. Valid until
  /// the next call of peek().
  std::string_view peek();
  /// Drops the first `bytes` of what peek() returned.
  void consume(size_t bytes) { begin_ += bytes; }

  const std::string& name() const { return name_; }
  /// Bytes of the file (compressed ones for gzip) read so far, and in all; 0 in all for a pipe.
  int64_t position() const;
  int64_t file_size() const { return file_size_; }

 private:
  struct Gzip;
  std::unique_ptr<Gzip> gzip_;
  std::string name_;
  int64_t file_size_ = 0;
  std::vector<char> buffer_;
  size_t begin_ = 0, end_ = 0;
  bool checked_ = false;
};

/// Lines of an InputStream, without their "\n" or "\r\n".
class LineReader {
 public:
  /// Lines longer than this are refused: a limit on memory, far above any document.
  static constexpr size_t kLongestLine = size_t{1} << 30;

  explicit LineReader(const std::filesystem::path& path) : input_(path) {}

  /// False at the end of the file. A last line without a newline counts, an empty one does not.
  bool next(std::string& line);
  /// Number of the line that next() returned; the first is 1.
  int64_t line_number() const { return line_number_; }
  const InputStream& input() const { return input_; }

 private:
  InputStream input_;
  int64_t line_number_ = 0;
};

}  // namespace sarissa
