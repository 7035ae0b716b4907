// A corpus: one long stream of tokens with a loss mask, read from text, FASTA, JSONL, Megatron
// .bin/.idx or raw bytes. No torch.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace sarissa::data {

/// Ids of the byte tokenizer: a byte is its own id, 0 ends a document, 1 pads.
constexpr int64_t kEndOfDocument = 0;
constexpr int64_t kPadding = 1;

struct DataConfig {
  std::string train;            // file to train on
  std::string validation;       // file to evaluate on; "": the `validation_fraction` part of train
  std::string format = "auto";  // auto (by the name) | text | bytes | fasta | jsonl | megatron
  double validation_fraction = 0.05;
  double test_fraction = 0.05;      // tail after validation, left for `sarissa eval --split test`
  bool reverse_complement = false;  // DNA: each row is reverse-complemented with probability 1/2
  bool uppercase = true;            // FASTA: lower case (soft-masked) bases are upper-cased
  bool mask_n = true;               // FASTA: no loss on N, other ambiguity codes and gaps

  template <class Visitor>
  static void fields(Visitor& visit, auto& self) {
    visit("train", self.train, "file to train on");
    visit("validation", self.validation,
          "file to evaluate on; empty: a part of train, see validation_fraction");
    visit("format", self.format,
          "auto | text | bytes | fasta | jsonl | megatron; auto goes by the file's name");
    visit("validation_fraction", self.validation_fraction,
          "part of train kept for evaluation, before the test part; unused with a validation file");
    visit("test_fraction", self.test_fraction, "part of train, its tail, kept for the final test");
    visit("reverse_complement", self.reverse_complement,
          "DNA: reverse-complement each row with probability 1/2");
    visit("uppercase", self.uppercase, "FASTA: upper-case lower-case (soft-masked) bases");
    visit("mask_n", self.mask_n, "FASTA: no loss on N, other ambiguity codes and gaps");
  }
};

/// A stream of tokens, memory-mapped where the file allows it.
class Corpus {
 public:
  virtual ~Corpus() = default;
  virtual int64_t size() const = 0;
  /// Copies tokens [begin, begin + count) to `tokens` and 1/0 loss weights to `mask`. Throws for a
  /// range outside [0, size()).
  virtual void read(int64_t begin, int64_t count, int32_t* tokens, uint8_t* mask) const = 0;
  /// Starts of documents (records, lines of JSONL) that are not empty, ascending; the first is 0.
  virtual const std::vector<int64_t>& document_starts() const = 0;
};

/// Opens a file. Tokens are bytes, but for Megatron files, which hold their own. Each FASTA record
/// and JSONL text that is not empty is a document followed by kEndOfDocument; text and bytes are
/// one document with nothing added; text, FASTA and JSONL may be gzip. A Megatron pair is named by
/// its prefix or either file. Throws sarissa::Error with file, line and reason for malformed or
/// empty input, and UsageError for an unknown format.
std::shared_ptr<const Corpus> open_corpus(const std::string& path, const DataConfig& config);

/// Tokens [begin, end) of a corpus as a corpus; it may be empty. Throws for a range outside it.
std::shared_ptr<const Corpus> slice(std::shared_ptr<const Corpus> corpus, int64_t begin,
                                    int64_t end);

/// train / validation / test of a config: given files, or head and tails of one file (train = first
/// n*(1-v-t), then v, then t). With a validation file, v is 0 for the train file. Validation and
/// test are empty, never null, when their fraction is 0.
struct Splits {
  std::shared_ptr<const Corpus> train, validation, test;
};
/// Throws UsageError when no train file is named or the fractions leave nothing to train on.
Splits open_splits(const DataConfig& config);

/// The format of a file that a config asks for: `format`, or by the name when that is "auto". A
/// path that is the prefix of a Megatron pair is "megatron". Throws UsageError for an unknown
/// format.
std::string resolve_format(const std::string& path, const std::string& format);

}  // namespace sarissa::data
