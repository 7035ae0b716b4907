#include "sarissa/data/documents.h"

#include "sarissa/base/error.h"
#include "sarissa/base/progress.h"
#include "sarissa/data/records.h"

namespace sarissa::data {
namespace {

constexpr size_t kPiece = size_t{1} << 18;  // bytes

}  // namespace

void visit_documents(const std::string& path, const std::string& format,
                     const DocumentVisitor& visitor) {
  const auto records = open_records(path, format);
  const bool ended_by_zero = ends_documents(format);
  Progress progress("reading " + path, records->file_size(), "bytes");
  int64_t total = 0;
  std::string id;
  while (records->next(id)) {
    int64_t bytes = 0;
    for (auto piece = records->read(kPiece); !piece.empty(); piece = records->read(kPiece)) {
      SARISSA_CHECK(!ended_by_zero || piece.find('\0') == std::string::npos, path,
                    ": the text of '", id, "' holds byte 0, the token that ends a document");
      bytes += static_cast<int64_t>(piece.size());
      visitor.piece(piece);
      progress.update(records->position());
    }
    visitor.end(bytes);
    total += bytes;
  }
  SARISSA_CHECK(total > 0, path, ": holds no ", format == "fasta" ? "sequence" : "text");
}

bool ends_documents(const std::string& format) { return format == "fasta" || format == "jsonl"; }

void to_upper(std::string& text) {
  for (char& c : text) {
    if (c >= 'a' && c <= 'z') c = static_cast<char>(c - ('a' - 'A'));
  }
}

}  // namespace sarissa::data
