// Records for scoring: streams of (id, text) from FASTA, text lines or JSONL, plain or gzip, read
// without holding a whole record in memory. No torch.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace sarissa::data {

/// Reads records one after the other; a record's text comes in pieces of bounded size.
class RecordReader {
 public:
  virtual ~RecordReader() = default;
  /// Advances to the next record; false at the end of the file. `id` is the FASTA name up to the
  /// first blank (its number, from 1, when the header is empty), the JSONL "id" (or its line
  /// number), or the text line's number. A record may be empty.
  virtual bool next(std::string& id) = 0;
  /// Up to `limit` more bytes of the current record; empty when it is finished. Line ends and
  /// blanks inside a FASTA sequence are dropped; letters keep their case.
  virtual std::string read(size_t limit) = 0;
  /// Bytes of the file (compressed ones for gzip) read so far, and in all (0 for a pipe).
  virtual int64_t position() const = 0;
  virtual int64_t file_size() const = 0;
};

/// Opens a file as `format`: fasta, jsonl, lines (one record per line), text (the whole file as one
/// record, decompressed when it is gzip), bytes (the same, never decompressed), or auto, which goes
/// by the name: .fasta .fa .fna .ffn .faa .frn .fas, .jsonl .ndjson, or else lines, each also with
/// .gz. FASTA is streamed in constant memory; JSONL holds one line. Throws sarissa::Error naming
/// file and line for malformed input, here or while reading, and UsageError for an unknown format.
std::unique_ptr<RecordReader> open_records(const std::string& path,
                                           const std::string& format = "auto");

/// The format that a name stands for: fasta, jsonl, megatron (.bin or .idx), text (.txt .text .md),
/// or else bytes; an ending .gz is ignored, and turns bytes into text.
std::string format_of_name(const std::string& path);

/// IUPAC-aware complement of one base, keeping case: A-T (U counts as T), C-G, R-Y, K-M, B-V, D-H;
/// other bytes stay as they are.
char complement(char base);

/// The complement read backwards.
std::string reverse_complement(const std::string& sequence);

}  // namespace sarissa::data
