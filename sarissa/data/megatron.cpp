#include "sarissa/data/megatron.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <utility>

#include "sarissa/base/error.h"

namespace sarissa::data {
namespace {

constexpr std::string_view kMagic("MMIDIDX\0\0", 9);
constexpr size_t kHeaderBytes = 9 + 8 + 1 + 8 + 8;
constexpr TokenType kTypes[] = {TokenType::kUint8, TokenType::kInt8,  TokenType::kInt16,
                                TokenType::kInt32, TokenType::kInt64, TokenType::kUint16};

// The file's arrays are not aligned.
template <class T>
T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Calls f with a value of the C++ type that holds `type`.
template <class F>
auto with_type(TokenType type, F f) {
  switch (type) {
    case TokenType::kUint8:
      return f(uint8_t{});
    case TokenType::kInt8:
      return f(int8_t{});
    case TokenType::kInt16:
      return f(int16_t{});
    case TokenType::kInt32:
      return f(int32_t{});
    case TokenType::kInt64:
      return f(int64_t{});
    case TokenType::kUint16:
      return f(uint16_t{});
  }
  throw Error(str("unknown token type ", static_cast<int>(type)));
}

// Reads one field or array after the other. The sizes were checked against the file's before.
class Cursor {
 public:
  explicit Cursor(const uint8_t* at) : at_(at) {}
  template <class T>
  T take() {
    const T value = load<T>(at_);
    at_ += sizeof(T);
    return value;
  }

 private:
  const uint8_t* at_;
};

class MegatronCorpus : public Corpus {
 public:
  explicit MegatronCorpus(const std::string& prefix)
      : bin_(prefix + ".bin"), name_(prefix + ".bin") {
    const MappedFile idx(prefix + ".idx");
    MegatronIndex index =
        parse_megatron_index(idx.data(), idx.size(), bin_.size(), prefix + ".idx");
    SARISSA_CHECK(index.tokens() > 0, prefix, ".idx: the data set holds no token");
    type_ = index.type;
    size_ = index.tokens();
    document_starts_ = std::move(index.document_starts);
    // Sequences that follow each other in the file are one run; a usual file is a single run.
    const int64_t width = static_cast<int64_t>(size_of(type_));
    for (size_t i = 0; i + 1 < index.sequence_starts.size(); ++i) {
      const int64_t start = index.sequence_starts[i];
      if (index.sequence_starts[i + 1] == start) continue;
      const int64_t expected =
          runs_.empty() ? -1 : runs_.back().byte + (start - runs_.back().token) * width;
      if (index.byte_offsets[i] != expected) runs_.push_back({start, index.byte_offsets[i]});
    }
  }

  int64_t size() const override { return size_; }
  const std::vector<int64_t>& document_starts() const override { return document_starts_; }

  void read(int64_t begin, int64_t count, int32_t* tokens, uint8_t* mask) const override {
    SARISSA_CHECK(begin >= 0 && count >= 0 && begin <= size_ - count, name_, ": tokens [", begin,
                  ", ", begin + count, ") are outside the corpus of ", size_);
    std::fill_n(mask, count, uint8_t{1});
    auto run = std::upper_bound(runs_.begin(), runs_.end(), begin,
                                [](int64_t token, const Run& r) { return token < r.token; });
    for (--run; count > 0; ++run) {
      const int64_t run_end = run + 1 == runs_.end() ? size_ : run[1].token;
      const int64_t taken = std::min(count, run_end - begin);
      copy(*run, begin, taken, tokens);
      begin += taken;
      tokens += taken;
      count -= taken;
    }
  }

 private:
  struct Run {
    int64_t token;  // first token of the run
    int64_t byte;   // where it lies in the .bin
  };

  void copy(const Run& run, int64_t begin, int64_t count, int32_t* tokens) const {
    with_type(type_, [&](auto zero) {
      using T = decltype(zero);
      const uint8_t* from =
          bin_.data() + run.byte + (begin - run.token) * static_cast<int64_t>(sizeof(T));
      for (int64_t i = 0; i < count; ++i) {
        const int64_t token = load<T>(from + i * static_cast<int64_t>(sizeof(T)));
        SARISSA_CHECK(token >= 0 && token <= std::numeric_limits<int32_t>::max(), name_, ": token ",
                      begin + i, " is ", token, ", expected 0 up to 2147483647");
        tokens[i] = static_cast<int32_t>(token);
      }
    });
  }

  const MappedFile bin_;
  const std::string name_;
  TokenType type_ = TokenType::kUint8;
  int64_t size_ = 0;
  std::vector<int64_t> document_starts_;
  std::vector<Run> runs_;
};

template <class T>
void write_array(AtomicFile& file, const std::vector<T>& values) {
  file.write(values.data(), values.size() * sizeof(T));
}

}  // namespace

size_t size_of(TokenType type) {
  return with_type(type, [](auto zero) { return sizeof(zero); });
}

const char* name_of(TokenType type) {
  switch (type) {
    case TokenType::kUint8:
      return "uint8";
    case TokenType::kInt8:
      return "int8";
    case TokenType::kInt16:
      return "int16";
    case TokenType::kInt32:
      return "int32";
    case TokenType::kInt64:
      return "int64";
    case TokenType::kUint16:
      return "uint16";
  }
  throw Error(str("unknown token type ", static_cast<int>(type)));
}

TokenType token_type(const std::string& name) {
  std::vector<std::string> names;
  for (const TokenType type : kTypes) {
    if (name == name_of(type)) return type;
    names.push_back(name_of(type));
  }
  throw UsageError(str("unknown token type '", name, "'", did_you_mean(name, names),
                       "; expected uint8, int8, int16, int32, int64 or uint16"));
}

MegatronIndex parse_megatron_index(const uint8_t* data, size_t bytes, size_t bin_bytes,
                                   const std::string& name) {
  SARISSA_CHECK(bytes > 0, name, ": the file is empty");
  SARISSA_CHECK(bytes >= kMagic.size() && std::memcmp(data, kMagic.data(), kMagic.size()) == 0,
                name, ": does not begin with MMIDIDX, so this is not a Megatron index");
  SARISSA_CHECK(bytes >= kHeaderBytes, name, ": is ", bytes, " bytes long, the header alone takes ",
                kHeaderBytes);
  Cursor cursor(data + kMagic.size());
  const auto version = cursor.take<uint64_t>();
  SARISSA_CHECK(version == 1, name, ": version ", version, ", only version 1 is known");
  const auto code = cursor.take<uint8_t>();
  SARISSA_CHECK(code != 6 && code != 7, name, ": token type ", int{code},
                " is a floating type; tokens are integers");
  const TokenType type{code};
  SARISSA_CHECK(std::find(std::begin(kTypes), std::end(kTypes), type) != std::end(kTypes), name,
                ": unknown token type code ", int{code}, ", expected 1 to 5 or 8");
  const auto sequences = cursor.take<uint64_t>();
  const auto offsets = cursor.take<uint64_t>();

  // Each sequence takes at least 12 bytes and each offset 8, so with both counts below the file's
  // size nothing here overflows.
  constexpr size_t kSequenceBytes = sizeof(int32_t) + sizeof(int64_t);
  const bool plausible = sequences < bytes && offsets < bytes;
  const size_t expected =
      plausible ? kHeaderBytes + sequences * kSequenceBytes + offsets * sizeof(int64_t) : 0;
  SARISSA_CHECK(plausible && (bytes == expected || bytes == expected + sequences), name, ": is ",
                bytes, " bytes long, which does not fit its ", sequences, " sequences and ",
                offsets, " document offsets");

  MegatronIndex index;
  index.type = type;
  index.sequence_starts.reserve(sequences + 1);
  index.sequence_starts.push_back(0);
  for (uint64_t i = 0; i < sequences; ++i) {
    const auto length = cursor.take<int32_t>();
    SARISSA_CHECK(length >= 0, name, ": sequence ", i, " has the negative length ", length);
    index.sequence_starts.push_back(index.sequence_starts.back() + length);
  }
  const int64_t width = static_cast<int64_t>(size_of(type));
  index.byte_offsets.reserve(sequences);
  for (uint64_t i = 0; i < sequences; ++i) {
    const auto offset = cursor.take<int64_t>();
    const int64_t length = (index.sequence_starts[i + 1] - index.sequence_starts[i]) * width;
    SARISSA_CHECK(offset >= 0 && static_cast<uint64_t>(offset) <= bin_bytes &&
                      static_cast<uint64_t>(length) <= bin_bytes - static_cast<uint64_t>(offset),
                  name, ": sequence ", i, " takes ", length, " bytes at offset ", offset,
                  ", but the .bin holds ", bin_bytes);
    index.byte_offsets.push_back(offset);
  }
  SARISSA_CHECK(offsets > 0, name, ": there are no document offsets");
  int64_t before = 0;
  for (uint64_t i = 0; i < offsets; ++i) {
    const auto sequence = cursor.take<int64_t>();
    const bool in_order = sequence >= before && static_cast<uint64_t>(sequence) <= sequences &&
                          (i > 0 || sequence == 0) &&
                          (i + 1 < offsets || static_cast<uint64_t>(sequence) == sequences);
    SARISSA_CHECK(in_order, name, ": document offset ", i, " is ", sequence,
                  ", expected offsets that rise from 0 to ", sequences);
    // The last offset is an end, not a start. An empty document starts where the next one does.
    const int64_t start = index.sequence_starts[static_cast<size_t>(sequence)];
    const bool is_new = index.document_starts.empty() || index.document_starts.back() < start;
    if (start < index.tokens() && is_new) index.document_starts.push_back(start);
    before = sequence;
  }
  index.documents = static_cast<int64_t>(offsets) - 1;
  return index;
}

std::string megatron_prefix(const std::string& path) {
  const bool has_ending = path.ends_with(".bin") || path.ends_with(".idx");
  return has_ending ? path.substr(0, path.size() - 4) : path;
}

MegatronIndex read_megatron_index(const std::string& path) {
  const std::string prefix = megatron_prefix(path);
  const MappedFile idx(prefix + ".idx");
  const MappedFile bin(prefix + ".bin");
  return parse_megatron_index(idx.data(), idx.size(), bin.size(), prefix + ".idx");
}

std::shared_ptr<const Corpus> open_megatron(const std::string& path) {
  const std::string prefix = megatron_prefix(path);
  const bool bin_alone = std::filesystem::is_regular_file(prefix + ".bin") &&
                         !std::filesystem::exists(prefix + ".idx");
  SARISSA_CHECK(!bin_alone, prefix, ".idx: is missing; Megatron data are a pair of .bin and .idx. ",
                "For a .bin of plain bytes use format \"bytes\"");
  return std::make_shared<MegatronCorpus>(prefix);
}

MegatronWriter::MegatronWriter(const std::string& prefix, TokenType type, int64_t longest_sequence)
    : type_(type),
      longest_sequence_(longest_sequence),
      prefix_(prefix),
      bin_(prefix + ".bin"),
      idx_(prefix + ".idx") {}

void MegatronWriter::add(int64_t token) {
  with_type(type_, [&](auto zero) {
    using T = decltype(zero);
    const T value = static_cast<T>(token);
    SARISSA_CHECK(static_cast<int64_t>(value) == token, prefix_, ".bin: token ", token,
                  " does not fit ", name_of(type_));
    bin_.write(&value, sizeof value);
  });
  if (++sequence_ == longest_sequence_) end_sequence();
}

void MegatronWriter::add(std::string_view bytes) {
  const bool whole_fits = sequence_ + static_cast<int64_t>(bytes.size()) < longest_sequence_;
  if (type_ == TokenType::kUint8 && whole_fits) {
    bin_.write(bytes.data(), bytes.size());
    sequence_ += static_cast<int64_t>(bytes.size());
    return;
  }
  for (const char c : bytes) add(int64_t{static_cast<unsigned char>(c)});
}

void MegatronWriter::end_sequence() {
  lengths_.push_back(static_cast<int32_t>(sequence_));
  offsets_.push_back(bytes_);
  bytes_ += sequence_ * static_cast<int64_t>(size_of(type_));
  sequence_ = 0;
}

void MegatronWriter::end_document() {
  const bool has_sequence = documents_.back() < static_cast<int64_t>(lengths_.size());
  if (sequence_ > 0 || !has_sequence) end_sequence();
  documents_.push_back(static_cast<int64_t>(lengths_.size()));
}

void MegatronWriter::finish() {
  if (sequence_ > 0 || documents_.back() < static_cast<int64_t>(lengths_.size())) end_document();
  idx_.write(kMagic.data(), kMagic.size());
  const uint64_t version = 1, sequences = lengths_.size(), offsets = documents_.size();
  idx_.write(&version, sizeof version);
  idx_.write(&type_, sizeof type_);
  idx_.write(&sequences, sizeof sequences);
  idx_.write(&offsets, sizeof offsets);
  write_array(idx_, lengths_);
  write_array(idx_, offsets_);
  write_array(idx_, documents_);
  bin_.commit();
  idx_.commit();
}

}  // namespace sarissa::data
