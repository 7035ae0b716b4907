#include "sarissa/data/records.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "sarissa/base/error.h"
#include "sarissa/base/file.h"

namespace sarissa::data {
namespace {

constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";
constexpr size_t kLongestFastaName = size_t{1} << 16;  // bytes; far above any real name

// A byte for an error message: 'x' or 0x7f.
std::string shown(char c) {
  if (c > ' ' && c < 0x7f) return str("'", c, "'");
  char text[8];
  std::snprintf(text, sizeof text, "0x%02x", static_cast<unsigned char>(c));
  return text;
}

bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\r'; }

// Letters of either case, the gaps '-' and '.', and '*', the stop of a protein.
constexpr std::array<bool, 256> make_sequence_characters() {
  std::array<bool, 256> table{};
  for (int c = 'A'; c <= 'Z'; ++c) table[c] = table[c + ('a' - 'A')] = true;
  table['-'] = table['.'] = table['*'] = true;
  return table;
}
constexpr auto kIsSequence = make_sequence_characters();

// A state machine over the bytes: a line may be as long as a chromosome, so lines are never held.
class FastaReader : public RecordReader {
 public:
  explicit FastaReader(const std::string& path) : input_(path) {
    if (input_.peek().starts_with(kByteOrderMark)) input_.consume(kByteOrderMark.size());
    SARISSA_CHECK(!input_.peek().empty(), path, ": the file is empty");
  }

  bool next(std::string& id) override {
    while (read_sequence(kSkip, nullptr) > 0) {
    }
    if (input_.peek().empty()) return false;
    ++records_;
    read_header(id);
    if (id.empty()) id = std::to_string(records_);
    return true;
  }

  std::string read(size_t limit) override {
    std::string piece;
    if (records_ > 0) read_sequence(limit, &piece);
    return piece;
  }

  int64_t position() const override { return input_.position(); }
  int64_t file_size() const override { return input_.file_size(); }

 private:
  static constexpr size_t kSkip = size_t{1} << 16;

  [[noreturn]] void fail(const std::string& reason) const {
    throw Error(str(input_.name(), ":", line_, ": ", reason));
  }

  // Appends up to `limit` characters of sequence to `piece` (null: checks and drops them), and
  // returns how many; stops before a header and at the end.
  size_t read_sequence(size_t limit, std::string* piece) {
    size_t taken = 0;
    while (taken < limit) {
      const std::string_view bytes = input_.peek();
      if (bytes.empty()) break;
      if (at_line_start_ && bytes.front() == '>') break;
      if (at_line_start_ && bytes.front() == ';') {  // a comment line of old FASTA files
        skip_line();
        continue;
      }
      const size_t end = std::min(bytes.find('\n'), bytes.size());
      size_t i = 0;
      for (; i < end && taken < limit; ++i) {
        const char c = bytes[i];
        if (kIsSequence[static_cast<unsigned char>(c)]) {
          if (records_ == 0) fail("sequence before the first '>' header");
          if (piece) piece->push_back(c);
          ++taken;
        } else if (!is_blank(c)) {
          fail(str(shown(c), " is not a sequence character; is this a FASTA file?"));
        }
      }
      at_line_start_ = at_line_start_ && i == 0;
      if (i == end && end < bytes.size()) {
        ++i;
        ++line_;
        at_line_start_ = true;
      }
      input_.consume(i);
    }
    return taken;
  }

  // Reads the line at '>' and takes its first word.
  void read_header(std::string& id) {
    id.clear();
    input_.consume(1);
    bool in_name = true;
    for (auto bytes = input_.peek(); !bytes.empty(); bytes = input_.peek()) {
      size_t i = 0;
      for (; i < bytes.size() && bytes[i] != '\n'; ++i) {
        const char c = bytes[i];
        if (static_cast<unsigned char>(c) < ' ' && !is_blank(c)) {
          fail(str("byte ", shown(c), " in a header; is this a FASTA file?"));
        }
        in_name = in_name && !is_blank(c);
        if (in_name) id.push_back(c);
      }
      if (id.size() > kLongestFastaName) {
        fail(str("the name is longer than ", kLongestFastaName, " bytes"));
      }
      const bool ended = i < bytes.size();
      input_.consume(i + (ended ? 1 : 0));
      if (ended) break;
    }
    ++line_;
    at_line_start_ = true;
  }

  void skip_line() {
    for (auto bytes = input_.peek(); !bytes.empty(); bytes = input_.peek()) {
      const size_t newline = bytes.find('\n');
      const bool ended = newline != std::string_view::npos;
      input_.consume(ended ? newline + 1 : bytes.size());
      if (ended) break;
    }
    ++line_;
  }

  InputStream input_;
  int64_t line_ = 1, records_ = 0;
  bool at_line_start_ = true;
};

// {"id": ..., "text": "..."} per line.
class JsonlReader : public RecordReader {
 public:
  explicit JsonlReader(const std::string& path) : lines_(path), path_(path) {}

  bool next(std::string& id) override {
    taken_ = 0;
    text_.clear();
    std::string line;
    do {
      if (!lines_.next(line)) {
        SARISSA_CHECK(lines_.line_number() > 0, path_, ": the file is empty");
        return false;
      }
      if (lines_.line_number() == 1 && line.starts_with(kByteOrderMark)) {
        line.erase(0, kByteOrderMark.size());
      }
    } while (line.find_first_not_of(" \t\r") == std::string::npos);
    parse(line, id);
    return true;
  }

  std::string read(size_t limit) override {
    std::string piece = text_.substr(taken_, limit);
    taken_ += piece.size();
    return piece;
  }

  int64_t position() const override { return lines_.input().position(); }
  int64_t file_size() const override { return lines_.input().file_size(); }

 private:
  [[noreturn]] void fail(const std::string& reason) const {
    throw Error(str(path_, ":", lines_.line_number(), ": ", reason));
  }

  void parse(const std::string& line, std::string& id) {
    nlohmann::json record;
    try {
      record = nlohmann::json::parse(line);
    } catch (const nlohmann::json::parse_error& error) {
      fail(str("invalid JSON at column ", error.byte));
    } catch (const nlohmann::json::exception&) {  // a number that fits no type
      fail("invalid JSON: a number is out of range");
    }
    if (!record.is_object()) fail("expected an object {\"id\": ..., \"text\": \"...\"}");
    const auto text = record.find("text");
    if (text == record.end()) fail("the object has no \"text\"");
    if (!text->is_string()) fail(str("\"text\" is a ", text->type_name(), ", expected a string"));
    text_ = std::move(text->get_ref<std::string&>());
    const auto given = record.find("id");
    if (given == record.end() || given->is_null()) {
      id = std::to_string(lines_.line_number());
    } else if (given->is_string()) {
      id = given->get<std::string>();
    } else if (given->is_number()) {
      id = given->dump();
    } else {
      fail(str("\"id\" is a ", given->type_name(), ", expected a string or a number"));
    }
  }

  LineReader lines_;
  const std::string path_;
  std::string text_;
  size_t taken_ = 0;
};

// One record per line, in pieces: a line may be longer than memory.
class LinesReader : public RecordReader {
 public:
  explicit LinesReader(const std::string& path) : input_(path) {
    SARISSA_CHECK(!input_.peek().empty(), path, ": the file is empty");
  }

  bool next(std::string& id) override {
    while (in_line_) read(size_t{1} << 16);
    if (input_.peek().empty()) return false;
    id = std::to_string(++line_);
    in_line_ = true;
    return true;
  }

  std::string read(size_t limit) override {
    std::string piece;
    while (in_line_ && piece.size() < limit) {
      const std::string_view bytes = input_.peek();
      if (bytes.empty()) {
        in_line_ = held_return_ = false;
      } else if (bytes.front() == '\n') {
        input_.consume(1);
        in_line_ = held_return_ = false;
      } else if (held_return_) {  // "\r" inside a line is text; only "\r\n" ends it
        piece.push_back('\r');
        held_return_ = false;
      } else if (bytes.front() == '\r') {
        input_.consume(1);
        held_return_ = true;
      } else {
        const size_t end = std::min(bytes.find_first_of("\r\n"), bytes.size());
        const size_t taken = std::min(end, limit - piece.size());
        piece.append(bytes.substr(0, taken));
        input_.consume(taken);
      }
    }
    return piece;
  }

  int64_t position() const override { return input_.position(); }
  int64_t file_size() const override { return input_.file_size(); }

 private:
  InputStream input_;
  int64_t line_ = 0;
  bool in_line_ = false, held_return_ = false;
};

// The whole file as one record.
class TextReader : public RecordReader {
 public:
  explicit TextReader(const std::string& path) : input_(path) {
    SARISSA_CHECK(!input_.peek().empty(), path, ": the file is empty");
  }

  bool next(std::string& id) override {
    if (std::exchange(started_, true)) return false;
    id = "1";
    return true;
  }

  std::string read(size_t limit) override {
    std::string piece;
    while (started_ && piece.size() < limit) {
      const std::string_view bytes = input_.peek().substr(0, limit - piece.size());
      if (bytes.empty()) break;
      const size_t zero = bytes.find('\0');
      SARISSA_CHECK(zero == std::string_view::npos, input_.name(), ": byte 0 at offset ",
                    offset_ + zero, ", so this is not text; use format \"bytes\"");
      piece.append(bytes);
      offset_ += bytes.size();
      input_.consume(bytes.size());
    }
    return piece;
  }

  int64_t position() const override { return input_.position(); }
  int64_t file_size() const override { return input_.file_size(); }

 private:
  InputStream input_;
  size_t offset_ = 0;
  bool started_ = false;
};

// The whole file as one record, as it is.
class BytesReader : public RecordReader {
 public:
  explicit BytesReader(const std::string& path) : file_(path) {
    SARISSA_CHECK(file_.size() > 0, path, ": the file is empty");
  }

  bool next(std::string& id) override {
    if (std::exchange(started_, true)) return false;
    id = "1";
    return true;
  }

  std::string read(size_t limit) override {
    if (!started_) return "";
    const size_t taken = std::min(limit, file_.size() - offset_);
    const char* begin = reinterpret_cast<const char*>(file_.data()) + offset_;
    offset_ += taken;
    return std::string(begin, taken);
  }

  int64_t position() const override { return static_cast<int64_t>(offset_); }
  int64_t file_size() const override { return static_cast<int64_t>(file_.size()); }

 private:
  MappedFile file_;
  size_t offset_ = 0;
  bool started_ = false;
};

constexpr std::array<char, 256> make_complements() {
  std::array<char, 256> table{};
  for (int c = 0; c < 256; ++c) table[c] = static_cast<char>(c);
  const char pairs[][2] = {{'A', 'T'}, {'C', 'G'}, {'R', 'Y'}, {'K', 'M'}, {'B', 'V'}, {'D', 'H'}};
  constexpr int kLower = 'a' - 'A';
  for (const auto& [x, y] : pairs) {
    table[x] = y;
    table[y] = x;
    table[x + kLower] = static_cast<char>(y + kLower);
    table[y + kLower] = static_cast<char>(x + kLower);
  }
  table['U'] = 'A';
  table['u'] = 'a';
  return table;
}
constexpr auto kComplements = make_complements();

}  // namespace

std::unique_ptr<RecordReader> open_records(const std::string& path, const std::string& format) {
  check_is_file(path);
  std::string chosen = format;
  if (chosen == "auto") {
    chosen = format_of_name(path);
    if (chosen != "fasta" && chosen != "jsonl") chosen = "lines";
  }
  if (chosen == "fasta") return std::make_unique<FastaReader>(path);
  if (chosen == "jsonl") return std::make_unique<JsonlReader>(path);
  if (chosen == "lines") return std::make_unique<LinesReader>(path);
  if (chosen == "text") return std::make_unique<TextReader>(path);
  if (chosen == "bytes") return std::make_unique<BytesReader>(path);
  throw UsageError(str("unknown format '", format, "'",
                       did_you_mean(format, {"fasta", "jsonl", "lines", "text", "bytes", "auto"}),
                       "; expected auto, fasta, jsonl, lines, text or bytes"));
}

std::string format_of_name(const std::string& path) {
  std::filesystem::path name = path;
  const bool compressed = name.extension() == ".gz";
  if (compressed) name.replace_extension();
  std::string ending = name.extension().string();
  std::transform(ending.begin(), ending.end(), ending.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  const auto is_one_of = [&](std::initializer_list<std::string_view> endings) {
    return std::find(endings.begin(), endings.end(), ending) != endings.end();
  };
  if (is_one_of({".fasta", ".fa", ".fna", ".ffn", ".faa", ".frn", ".fas"})) return "fasta";
  if (is_one_of({".jsonl", ".ndjson"})) return "jsonl";
  if (is_one_of({".bin", ".idx"}) && !compressed) return "megatron";
  if (is_one_of({".txt", ".text", ".md"}) || compressed) return "text";
  return "bytes";
}

char complement(char base) { return kComplements[static_cast<unsigned char>(base)]; }

std::string reverse_complement(const std::string& sequence) {
  std::string result(sequence.rbegin(), sequence.rend());
  std::transform(result.begin(), result.end(), result.begin(), complement);
  return result;
}

}  // namespace sarissa::data
