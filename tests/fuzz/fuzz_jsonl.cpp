// JSONL, plain or gzip: the reader in pieces of different sizes, and the corpus made of it.
#include <string>
#include <vector>

#include "sarissa/base/error.h"
#include "sarissa/data/corpus.h"
#include "sarissa/data/records.h"
#include "tests/fuzz/fuzz.h"

namespace sarissa {
namespace {

std::string stream_of(const std::string& path, size_t limit) {
  const auto reader = data::open_records(path, "jsonl");
  std::string stream;
  for (std::string id; reader->next(id);) {
    const size_t before = stream.size();
    for (auto piece = reader->read(limit); !piece.empty(); piece = reader->read(limit)) {
      REQUIRE(piece.size() <= limit);
      stream += piece;
    }
    if (stream.size() > before) stream += '\0';
  }
  return stream;
}

}  // namespace
}  // namespace sarissa

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const sarissa::fuzz::MemoryFile file(data, size);
  try {
    const std::string stream = sarissa::stream_of(file.path(), 1 << 16);
    REQUIRE(sarissa::stream_of(file.path(), 3) == stream);
    sarissa::data::DataConfig config;
    config.format = "jsonl";
    const auto corpus = sarissa::data::open_corpus(file.path(), config);
    std::vector<int32_t> tokens(static_cast<size_t>(corpus->size()));
    std::vector<uint8_t> mask(tokens.size());
    corpus->read(0, corpus->size(), tokens.data(), mask.data());
    REQUIRE(std::string(tokens.begin(), tokens.end()) == stream);
    REQUIRE(corpus->document_starts().at(0) == 0);
  } catch (const sarissa::Error&) {
  }
  return 0;
}
