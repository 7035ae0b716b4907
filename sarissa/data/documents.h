// The documents of a text, FASTA, JSONL or byte file, streamed in constant memory: what becomes of
// a file when it is trained on, prepared or inspected is decided here once. No torch.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace sarissa::data {

struct DocumentVisitor {
  /// The next bytes of a document, in pieces of bounded size; free to change them.
  std::function<void(std::string& piece)> piece;
  /// The end of a document of this many bytes, 0 for an empty one.
  std::function<void(int64_t bytes)> end;
};

/// Reads a file of `format` text, bytes, fasta or jsonl to its end, with a progress line. Throws
/// sarissa::Error for malformed input, for byte 0 inside a document of a format that ends documents
/// with it, and for a file in which every document is empty.
void visit_documents(const std::string& path, const std::string& format,
                     const DocumentVisitor& visitor);

/// Whether each document that is not empty is followed by kEndOfDocument: FASTA and JSONL. Text and
/// bytes are one document with nothing added.
bool ends_documents(const std::string& format);

/// Upper-cases ASCII letters.
void to_upper(std::string& text);

}  // namespace sarissa::data
