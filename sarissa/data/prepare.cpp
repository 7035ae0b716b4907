#include "sarissa/data/prepare.h"

#include <zlib.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string_view>

#include "sarissa/base/error.h"
#include "sarissa/base/file.h"
#include "sarissa/base/progress.h"
#include "sarissa/data/corpus.h"
#include "sarissa/data/documents.h"
#include "sarissa/data/megatron.h"

namespace sarissa::data {
namespace {

constexpr int64_t kBlock = int64_t{1} << 16;      // tokens read at a time
constexpr int64_t kLargestId = int64_t{1} << 24;  // larger ids are refused: each has a counter

// Collects what an Inspection says from a stream of tokens.
class Inspector {
 public:
  explicit Inspector(Inspection& to) : to_(to), crc_(crc32(0, nullptr, 0)) {
    to_.shortest = std::numeric_limits<int64_t>::max();
  }

  void count(int64_t token) {
    SARISSA_CHECK(token < kLargestId, to_.path, ": token ", token,
                  " is too large for a vocabulary; is this a Megatron data set of tokens?");
    const auto id = static_cast<size_t>(token);
    if (id >= to_.counts.size()) to_.counts.resize(id + 1);
    ++to_.counts[id];
  }

  // A token of the training stream.
  void stream(int64_t token) {
    const auto id = static_cast<uint32_t>(token);
    const uint8_t bytes[] = {static_cast<uint8_t>(id), static_cast<uint8_t>(id >> 8),
                             static_cast<uint8_t>(id >> 16), static_cast<uint8_t>(id >> 24)};
    pending_.insert(pending_.end(), std::begin(bytes), std::end(bytes));
    if (pending_.size() >= size_t{1} << 16) flush();
    ++to_.tokens;
  }

  void document(int64_t length) {
    ++to_.documents;
    if (length == 0) ++to_.empty_documents;
    to_.shortest = std::min(to_.shortest, length);
    to_.longest = std::max(to_.longest, length);
  }

  void finish() {
    flush();
    char text[24];
    std::snprintf(text, sizeof text, "crc32:%08lx", crc_);
    to_.checksum = text;
  }

 private:
  void flush() {
    crc_ = crc32(crc_, pending_.data(), static_cast<uInt>(pending_.size()));
    pending_.clear();
  }

  Inspection& to_;
  uLong crc_;
  std::vector<uint8_t> pending_;
};

void inspect_megatron(Inspection& to) {
  const MegatronIndex index = read_megatron_index(to.path);
  const auto corpus = open_megatron(to.path);
  to.dtype = name_of(index.type);
  Inspector inspector(to);
  Progress progress("reading " + to.path, corpus->size(), "tokens");
  std::vector<int32_t> tokens(kBlock);
  std::vector<uint8_t> mask(kBlock);
  const auto& starts = corpus->document_starts();
  for (size_t d = 0; d < starts.size(); ++d) {
    const int64_t end = d + 1 < starts.size() ? starts[d + 1] : corpus->size();
    bool ended = false;
    for (int64_t begin = starts[d]; begin < end; begin += kBlock) {
      const int64_t count = std::min(kBlock, end - begin);
      corpus->read(begin, count, tokens.data(), mask.data());
      for (int64_t i = 0; i < count; ++i) {
        inspector.stream(tokens[static_cast<size_t>(i)]);
        inspector.count(tokens[static_cast<size_t>(i)]);
      }
      ended = tokens[static_cast<size_t>(count - 1)] == kEndOfDocument;
      progress.update(begin);
    }
    inspector.document(end - starts[d] - (ended ? 1 : 0));
  }
  for (int64_t i = to.documents; i < index.documents; ++i) inspector.document(0);
  inspector.finish();
}

void inspect_bytes(Inspection& to) {
  to.dtype = "uint8";
  Inspector inspector(to);
  DocumentVisitor visitor;
  visitor.piece = [&](std::string& piece) {
    for (const char c : piece) inspector.count(static_cast<unsigned char>(c));
    if (to.format == "fasta") to_upper(piece);
    for (const char c : piece) inspector.stream(static_cast<unsigned char>(c));
  };
  visitor.end = [&](int64_t length) {
    inspector.document(length);
    if (length > 0 && ends_documents(to.format)) inspector.stream(kEndOfDocument);
  };
  visit_documents(to.path, to.format, visitor);
  inspector.finish();
}

int64_t sum_of(const Inspection& inspection, std::string_view characters) {
  int64_t sum = 0;
  for (const unsigned char c : characters) {
    if (c < inspection.counts.size()) sum += inspection.counts[c];
  }
  return sum;
}

double fraction_of(const Inspection& inspection, std::string_view characters) {
  const auto& counts = inspection.counts;
  const int64_t all = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  return static_cast<double>(sum_of(inspection, characters)) / static_cast<double>(all);
}

double n_fraction(const Inspection& inspection) { return fraction_of(inspection, "Nn"); }

double lowercase_fraction(const Inspection& inspection) {
  return fraction_of(inspection, "abcdefghijklmnopqrstuvwxyz");
}

std::string percent(double fraction) {
  char text[16];
  std::snprintf(text, sizeof text, "%.2f%%", 100 * fraction);
  return text;
}

std::string grouped(int64_t number) {
  std::string text = std::to_string(number);
  for (auto at = static_cast<int64_t>(text.size()) - 3; at > 0; at -= 3) {
    text.insert(static_cast<size_t>(at), ",");
  }
  return text;
}

// 'e' for a printable byte, 10 for others.
std::string shown(size_t id) {
  return id >= ' ' && id < 0x7f ? str("'", static_cast<char>(id), "'") : std::to_string(id);
}

// The ids that occur, the most frequent first.
std::vector<size_t> by_frequency(const std::vector<int64_t>& counts) {
  std::vector<size_t> ids;
  for (size_t id = 0; id < counts.size(); ++id) {
    if (counts[id] > 0) ids.push_back(id);
  }
  std::stable_sort(ids.begin(), ids.end(),
                   [&](size_t a, size_t b) { return counts[a] > counts[b]; });
  return ids;
}

}  // namespace

Prepared prepare(const PrepareOptions& options) {
  const std::string format = resolve_format(options.input, options.format);
  if (format == "megatron") {
    throw UsageError(str(options.input, ": is a Megatron data set already, nothing to prepare"));
  }
  if (options.dtype != "uint8" && options.dtype != "uint16") {
    throw UsageError(str("--dtype is '", options.dtype, "', expected uint8 or uint16"));
  }
  check_is_file(options.input);
  const std::string prefix = megatron_prefix(options.output);
  for (const char* ending : {".bin", ".idx"}) {
    std::error_code not_there;
    if (std::filesystem::equivalent(options.input, prefix + ending, not_there)) {
      throw UsageError(str("--output '", options.output, "' would replace the input ",
                           options.input, "; name another prefix"));
    }
  }
  Prepared result{.prefix = prefix};
  MegatronWriter writer(prefix, token_type(options.dtype));
  DocumentVisitor visitor;
  visitor.piece = [&](std::string& piece) {
    if (format == "fasta" && !options.keep_case) to_upper(piece);
    writer.add(piece);
  };
  visitor.end = [&](int64_t length) {
    if (length == 0) return;  // an empty record is no document
    ++result.documents;
    result.tokens += length;
    if (ends_documents(format)) {
      writer.add(kEndOfDocument);
      ++result.tokens;
    }
    writer.end_document();
  };
  visit_documents(options.input, format, visitor);
  writer.finish();
  return result;
}

Inspection inspect(const std::string& path, const std::string& format) {
  Inspection inspection;
  inspection.path = path;
  inspection.format = resolve_format(path, format);
  if (inspection.format == "megatron") {
    inspect_megatron(inspection);
  } else {
    inspect_bytes(inspection);
  }
  return inspection;
}

std::string to_text(const Inspection& inspection) {
  std::string text;
  const auto line = [&](std::string name, const std::string& value) {
    name.resize(20, ' ');
    text += name + value + "\n";
  };
  line("file", inspection.path);
  line("format", inspection.format + ", " + inspection.dtype);
  line("documents", grouped(inspection.documents) +
                        (inspection.empty_documents > 0
                             ? str(", of which ", grouped(inspection.empty_documents), " empty")
                             : ""));
  line("tokens", grouped(inspection.tokens));
  line("shortest document", grouped(inspection.shortest));
  line("longest document", grouped(inspection.longest));
  const std::vector<size_t> ids = by_frequency(inspection.counts);
  const auto all = static_cast<double>(
      std::accumulate(inspection.counts.begin(), inspection.counts.end(), int64_t{0}));
  std::string most;
  for (size_t i = 0; i < std::min<size_t>(ids.size(), 8); ++i) {
    const double fraction = static_cast<double>(inspection.counts[ids[i]]) / all;
    most += str(i == 0 ? "" : "  ", shown(ids[i]), " ", percent(fraction));
  }
  line("distinct ids", str(ids.size(), ", from ", *std::min_element(ids.begin(), ids.end()), " to ",
                           *std::max_element(ids.begin(), ids.end())));
  line("most frequent", most);
  if (inspection.format == "fasta") {
    line("N", percent(n_fraction(inspection)));
    line("lower case", percent(lowercase_fraction(inspection)));
  }
  line("checksum", inspection.checksum);
  return text;
}

std::string to_json(const Inspection& inspection) {
  nlohmann::ordered_json json = {{"path", inspection.path},
                                 {"format", inspection.format},
                                 {"dtype", inspection.dtype},
                                 {"documents", inspection.documents},
                                 {"empty_documents", inspection.empty_documents},
                                 {"tokens", inspection.tokens},
                                 {"shortest", inspection.shortest},
                                 {"longest", inspection.longest},
                                 {"checksum", inspection.checksum}};
  const bool is_fasta = inspection.format == "fasta";
  auto& counts = json[is_fasta ? "letters" : "counts"] = nlohmann::ordered_json::object();
  for (size_t id = 0; id < inspection.counts.size(); ++id) {
    if (inspection.counts[id] == 0) continue;
    counts[is_fasta ? std::string(1, static_cast<char>(id)) : std::to_string(id)] =
        inspection.counts[id];
  }
  if (is_fasta) {
    json["n_fraction"] = n_fraction(inspection);
    json["lowercase_fraction"] = lowercase_fraction(inspection);
  }
  // A path need not be UTF-8.
  return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace sarissa::data
