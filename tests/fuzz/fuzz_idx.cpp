// A Megatron index against a .bin of 4096 bytes: what is accepted points inside the .bin.
#include "sarissa/base/error.h"
#include "sarissa/data/megatron.h"
#include "tests/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr int64_t kBinBytes = 4096;
  try {
    const auto index = sarissa::data::parse_megatron_index(data, size, kBinBytes, "fuzz.idx");
    const auto width = static_cast<int64_t>(sarissa::data::size_of(index.type));
    REQUIRE(index.sequence_starts.size() == index.byte_offsets.size() + 1);
    for (size_t i = 0; i < index.byte_offsets.size(); ++i) {
      const int64_t length = index.sequence_starts[i + 1] - index.sequence_starts[i];
      REQUIRE(length >= 0 && index.byte_offsets[i] >= 0);
      REQUIRE(index.byte_offsets[i] + length * width <= kBinBytes);
    }
    int64_t before = -1;
    for (const int64_t start : index.document_starts) {
      REQUIRE(start > before && start < index.tokens());
      before = start;
    }
    REQUIRE(static_cast<int64_t>(index.document_starts.size()) <= index.documents);
    REQUIRE(index.tokens() == 0 || index.document_starts.at(0) == 0);
  } catch (const sarissa::Error&) {
  }
  return 0;
}
