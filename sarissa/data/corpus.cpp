#include "sarissa/data/corpus.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <optional>
#include <string_view>
#include <utility>

#include "sarissa/base/error.h"
#include "sarissa/base/file.h"
#include "sarissa/base/log.h"
#include "sarissa/data/documents.h"
#include "sarissa/data/megatron.h"
#include "sarissa/data/records.h"

namespace sarissa::data {
namespace {

constexpr size_t kTextHead = size_t{1} << 20;  // bytes of a mapped text that are checked

void check_range(const std::string& name, int64_t begin, int64_t count, int64_t size) {
  SARISSA_CHECK(begin >= 0 && count >= 0 && begin <= size - count, name, ": tokens [", begin, ", ",
                begin + count, ") are outside the corpus of ", size);
}

// The loss weight of a token is a function of the token: no mask is stored.
using Weights = std::array<uint8_t, 256>;

Weights all_ones() {
  Weights weights;
  weights.fill(1);
  return weights;
}

Weights without_ambiguity_codes() {
  Weights weights = all_ones();
  for (const unsigned char code : std::string_view("NRYSWKMBDHVXnryswkmbdhvx-.")) weights[code] = 0;
  return weights;
}

// Bytes in memory or in a mapped file; a byte is its own token.
class ByteCorpus : public Corpus {
 public:
  ByteCorpus(std::string name, MappedFile file)
      : name_(std::move(name)), mapped_(std::move(file)), weights_(all_ones()), starts_{0} {
    bytes_ = {reinterpret_cast<const char*>(mapped_->data()), mapped_->size()};
  }
  ByteCorpus(std::string name, std::vector<char> bytes, Weights weights,
             std::vector<int64_t> starts)
      : name_(std::move(name)),
        owned_(std::move(bytes)),
        weights_(weights),
        starts_(std::move(starts)) {
    bytes_ = {owned_.data(), owned_.size()};
  }

  int64_t size() const override { return static_cast<int64_t>(bytes_.size()); }
  const std::vector<int64_t>& document_starts() const override { return starts_; }

  void read(int64_t begin, int64_t count, int32_t* tokens, uint8_t* mask) const override {
    check_range(name_, begin, count, size());
    const auto* from = reinterpret_cast<const unsigned char*>(bytes_.data()) + begin;
    for (int64_t i = 0; i < count; ++i) {
      tokens[i] = from[i];
      mask[i] = weights_[from[i]];
    }
  }

 private:
  const std::string name_;
  const std::optional<MappedFile> mapped_;
  const std::vector<char> owned_;
  std::string_view bytes_;
  const Weights weights_;
  const std::vector<int64_t> starts_;
};

class Slice : public Corpus {
 public:
  Slice(std::shared_ptr<const Corpus> corpus, int64_t begin, int64_t end)
      : corpus_(std::move(corpus)), begin_(begin), size_(end - begin) {
    if (size_ == 0) return;
    starts_.push_back(0);
    const auto& all = corpus_->document_starts();
    for (auto it = std::upper_bound(all.begin(), all.end(), begin); it != all.end() && *it < end;
         ++it) {
      starts_.push_back(*it - begin);
    }
  }

  int64_t size() const override { return size_; }
  const std::vector<int64_t>& document_starts() const override { return starts_; }

  void read(int64_t begin, int64_t count, int32_t* tokens, uint8_t* mask) const override {
    check_range("slice", begin, count, size_);
    corpus_->read(begin_ + begin, count, tokens, mask);
  }

 private:
  const std::shared_ptr<const Corpus> corpus_;
  const int64_t begin_, size_;
  std::vector<int64_t> starts_;
};

// A plain text file is mapped; gzip and pipes (null) have to be read.
std::shared_ptr<const Corpus> map_text(const std::string& path) {
  check_is_file(path);
  if (path.ends_with(".gz") || !std::filesystem::is_regular_file(path)) return nullptr;
  MappedFile file(path);
  const std::string_view head(reinterpret_cast<const char*>(file.data()),
                              std::min(file.size(), kTextHead));
  SARISSA_CHECK(!head.empty(), path, ": the file is empty");
  if (head.starts_with("\x1f\x8b")) return nullptr;
  const size_t zero = head.find('\0');
  SARISSA_CHECK(zero == std::string_view::npos, path, ": byte 0 at offset ", zero,
                ", so this is not text; use format \"bytes\"");
  return std::make_shared<ByteCorpus>(path, std::move(file));
}

// Letters that stand for amino acids but for no nucleotide.
std::string protein_letters(std::string_view bytes) {
  std::string found;
  for (const char c : std::string_view("EFIJLOPQZefijlopqz*")) {
    if (bytes.find(c) != std::string_view::npos) found += c;
  }
  return found;
}

// FASTA, JSONL and compressed text: parsed into memory.
std::shared_ptr<const Corpus> read_corpus(const std::string& path, const std::string& format,
                                          const DataConfig& config) {
  const bool is_fasta = format == "fasta";
  std::vector<char> bytes;
  std::vector<int64_t> starts;
  DocumentVisitor visitor;
  visitor.piece = [&](std::string& piece) {
    if (is_fasta && config.uppercase) to_upper(piece);
    bytes.insert(bytes.end(), piece.begin(), piece.end());
  };
  visitor.end = [&](int64_t length) {
    if (length == 0) return;
    starts.push_back(static_cast<int64_t>(bytes.size()) - length);
    if (ends_documents(format)) bytes.push_back(static_cast<char>(kEndOfDocument));
  };
  visit_documents(path, format, visitor);
  if (is_fasta && (config.mask_n || config.reverse_complement)) {
    const std::string letters = protein_letters({bytes.data(), bytes.size()});
    if (!letters.empty()) {
      log_warning(path, ": holds letters that are no nucleotides (", letters,
                  "); for proteins set data.mask_n and data.reverse_complement to false");
    }
  }
  const bool masked = is_fasta && config.mask_n;
  bytes.shrink_to_fit();
  return std::make_shared<ByteCorpus>(
      path, std::move(bytes), masked ? without_ambiguity_codes() : all_ones(), std::move(starts));
}

}  // namespace

std::string resolve_format(const std::string& path, const std::string& format) {
  const std::vector<std::string> formats = {"auto", "text", "bytes", "fasta", "jsonl", "megatron"};
  if (std::find(formats.begin(), formats.end(), format) == formats.end()) {
    throw UsageError(str("unknown data format '", format, "'", did_you_mean(format, formats),
                         "; expected auto, text, bytes, fasta, jsonl or megatron"));
  }
  if (format != "auto") return format;
  const bool is_prefix =
      !std::filesystem::exists(path) && std::filesystem::is_regular_file(path + ".idx");
  return is_prefix ? "megatron" : format_of_name(path);
}

std::shared_ptr<const Corpus> open_corpus(const std::string& path, const DataConfig& config) {
  const std::string format = resolve_format(path, config.format);
  if (format == "megatron") return open_megatron(path);
  if (format == "bytes") {
    MappedFile file(path);
    SARISSA_CHECK(file.size() > 0, path, ": the file is empty");
    return std::make_shared<ByteCorpus>(path, std::move(file));
  }
  if (format == "text") {
    if (auto corpus = map_text(path)) return corpus;
  }
  return read_corpus(path, format, config);
}

std::shared_ptr<const Corpus> slice(std::shared_ptr<const Corpus> corpus, int64_t begin,
                                    int64_t end) {
  check_range("slice", begin, end - begin, corpus->size());
  return std::make_shared<Slice>(std::move(corpus), begin, end);
}

Splits open_splits(const DataConfig& config) {
  if (config.train.empty()) throw UsageError("data.train is empty; name a file to train on");
  const bool has_file = !config.validation.empty();
  const double validation_fraction = has_file ? 0.0 : config.validation_fraction;
  const double test_fraction = config.test_fraction;
  if (!(validation_fraction >= 0 && test_fraction >= 0 &&
        validation_fraction + test_fraction < 1)) {
    throw UsageError(str("data.validation_fraction is ", validation_fraction,
                         " and data.test_fraction is ", test_fraction,
                         "; expected fractions from 0 whose sum is below 1"));
  }
  const auto all = open_corpus(config.train, config);
  const int64_t n = all->size();
  const auto part = [n](double fraction) {
    return static_cast<int64_t>(static_cast<double>(n) * fraction);
  };
  const int64_t test = n - part(test_fraction), validation = test - part(validation_fraction);
  Splits splits;
  splits.train = slice(all, 0, validation);
  splits.validation =
      has_file ? open_corpus(config.validation, config) : slice(all, validation, test);
  splits.test = slice(all, test, n);
  return splits;
}

}  // namespace sarissa::data
