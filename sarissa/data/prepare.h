// `sarissa data prepare` and `sarissa data inspect`. No torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sarissa::data {

struct PrepareOptions {
  std::string input;            // text, bytes, FASTA or JSONL
  std::string output;           // PREFIX of the .bin and .idx to write
  std::string format = "auto";  // as DataConfig::format
  std::string dtype = "uint8";  // uint8 | uint16: the type of a token in the .bin
  bool keep_case = false;       // FASTA: do not upper-case
};

struct Prepared {
  std::string prefix;  // of the files, without a .bin or .idx that `output` may have ended in
  int64_t documents = 0, tokens = 0;
};

/// Writes a Megatron .bin/.idx pair with the tokens and documents that open_corpus() reads from the
/// input, in constant memory but for 20 bytes per document. Megatron files have no loss mask, so N
/// in FASTA counts in the loss afterwards. Throws sarissa::Error for malformed input or a full
/// disk; then nothing is left behind.
Prepared prepare(const PrepareOptions& options);

/// What a data file holds.
struct Inspection {
  std::string path, format;
  std::string dtype;      // of a token in the file
  int64_t documents = 0;  // empty ones included
  int64_t empty_documents = 0;
  int64_t tokens = 0;           // with the end-of-document tokens that training sees
  int64_t shortest = 0;         // document, in tokens without its end-of-document token
  int64_t longest = 0;          // the same
  std::vector<int64_t> counts;  // [largest id + 1] occurrences in the documents, in original case
  std::string checksum;         // see inspect()
};

/// Reads the whole file. The checksum is the CRC-32 of the tokens that open_corpus() gives with the
/// default settings, each as a little-endian 32-bit integer: it is the same for the same data in
/// any format, plain or gzip.
Inspection inspect(const std::string& path, const std::string& format = "auto");

/// Several lines for people.
std::string to_text(const Inspection& inspection);

/// One JSON object: path, format, dtype, documents, empty_documents, tokens, shortest, longest,
/// checksum, and counts by id; for FASTA letters by character instead, with n_fraction and
/// lowercase_fraction.
std::string to_json(const Inspection& inspection);

}  // namespace sarissa::data
