// Megatron's indexed data sets: PREFIX.bin holds the tokens of all sequences one after the other,
// PREFIX.idx says where each begins. Byte for byte the format of Megatron-LM
// (megatron/core/datasets/indexed_dataset.py) and savanna (savanna/data/indexed_dataset.py). The
// fields of an index, all little-endian and without padding:
//
//   9 bytes  "MMIDIDX\0\0"
//   u64      version, 1
//   u8       token type
//   u64      number of sequences S
//   u64      number of document offsets D + 1
//   i32[S]   lengths in tokens
//   i64[S]   offsets in bytes into the .bin
//   i64[D+1] documents: number d is the sequences documents[d] up to documents[d + 1]
//   i8[S]    modes; optional, not used here
//
// No torch.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "sarissa/base/file.h"
#include "sarissa/data/corpus.h"

namespace sarissa::data {

/// Token types that hold integers, by their code in the index. The codes 6 and 7 are the floating
/// types, which are refused.
enum class TokenType : uint8_t {
  kUint8 = 1,
  kInt8 = 2,
  kInt16 = 3,
  kInt32 = 4,
  kInt64 = 5,
  kUint16 = 8
};
size_t size_of(TokenType type);                 // bytes
const char* name_of(TokenType type);            // "uint8" …
TokenType token_type(const std::string& name);  // throws UsageError for other names

/// What an index says, checked: every sequence lies inside the .bin.
struct MegatronIndex {
  TokenType type = TokenType::kUint8;
  std::vector<int64_t> sequence_starts;  // [S + 1] tokens before each sequence, then all of them
  std::vector<int64_t> byte_offsets;     // [S] where each begins in the .bin
  std::vector<int64_t> document_starts;  // tokens before each document that is not empty
  int64_t documents = 0;                 // empty ones included
  int64_t tokens() const { return sequence_starts.back(); }
};

/// Reads the bytes of an .idx. Throws sarissa::Error, naming `name`, when they are malformed or
/// point outside a .bin of `bin_bytes` bytes. Allocates no more than a small multiple of `bytes`.
MegatronIndex parse_megatron_index(const uint8_t* data, size_t bytes, size_t bin_bytes,
                                   const std::string& name);

/// PREFIX of "PREFIX", "PREFIX.bin" or "PREFIX.idx".
std::string megatron_prefix(const std::string& path);

MegatronIndex read_megatron_index(const std::string& path);

/// The tokens of a pair of files, sequence after sequence; no token is masked. Reading a token that
/// is negative or above 2^31 - 1 throws.
std::shared_ptr<const Corpus> open_megatron(const std::string& path);

/// Writes a pair of files. They take their names in finish(), the index last.
class MegatronWriter {
 public:
  /// Documents longer than `longest_sequence` tokens are cut into several sequences, for lengths
  /// are 32-bit in the index.
  MegatronWriter(const std::string& prefix, TokenType type,
                 int64_t longest_sequence = std::numeric_limits<int32_t>::max());

  /// Adds tokens to the current document. Throws for a token that the type cannot hold.
  void add(int64_t token);
  /// Adds bytes, each a token.
  void add(std::string_view bytes);
  void end_document();
  /// Ends the last document if it has tokens, and completes both files.
  void finish();

 private:
  void end_sequence();

  const TokenType type_;
  const int64_t longest_sequence_;
  const std::string prefix_;
  AtomicFile bin_, idx_;
  std::vector<int32_t> lengths_;
  std::vector<int64_t> offsets_;
  std::vector<int64_t> documents_{0};
  int64_t sequence_ = 0;  // tokens of the current sequence
  int64_t bytes_ = 0;     // written to the .bin
};

}  // namespace sarissa::data
