#include "sarissa/data/megatron.h"

#include <gtest/gtest.h>

#include <cstring>

#include "sarissa/base/error.h"
#include "tests/support/files.h"

namespace sarissa::data {
namespace {

using test::contents_of;
using test::TemporaryFolder;

template <class T>
std::string little_endian(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

// An index written field by field from the format's description, not by MegatronWriter.
struct Index {
  std::string magic = std::string("MMIDIDX\0\0", 9);
  uint64_t version = 1;
  uint8_t code = 1;
  std::vector<int32_t> lengths;
  std::vector<int64_t> offsets, documents;
  std::string modes;
  int64_t sequences_off = 0, documents_off = 0;  // added to the counts in the header

  std::string bytes() const {
    return magic + little_endian<uint64_t>({version}) + static_cast<char>(code) +
           little_endian<uint64_t>({lengths.size() + static_cast<uint64_t>(sequences_off),
                                    documents.size() + static_cast<uint64_t>(documents_off)}) +
           little_endian(lengths) + little_endian(offsets) + little_endian(documents) + modes;
  }
};

std::vector<int32_t> tokens_of(const Corpus& corpus) {
  std::vector<int32_t> tokens(static_cast<size_t>(corpus.size()));
  std::vector<uint8_t> mask(tokens.size());
  corpus.read(0, corpus.size(), tokens.data(), mask.data());
  EXPECT_EQ(mask, std::vector<uint8_t>(tokens.size(), 1));
  return tokens;
}

template <class T>
void expect_reads(uint8_t code, const std::vector<T>& tokens) {
  const TemporaryFolder folder;
  folder.write("x.bin", little_endian(tokens));
  Index index;
  index.code = code;
  index.lengths = {2, static_cast<int32_t>(tokens.size()) - 2};
  index.offsets = {0, 2 * sizeof(T)};
  index.documents = {0, 1, 2};
  folder.write("x.idx", index.bytes());
  const auto corpus = open_megatron(folder / "x");
  EXPECT_EQ(tokens_of(*corpus), std::vector<int32_t>(tokens.begin(), tokens.end()));
  EXPECT_EQ(corpus->document_starts(), (std::vector<int64_t>{0, 2}));
  EXPECT_EQ(size_of(static_cast<TokenType>(code)), sizeof(T));
}

TEST(Megatron, ReadsEveryIntegerType) {
  expect_reads<uint8_t>(1, {65, 66, 255, 0});
  expect_reads<int8_t>(2, {65, 66, 127, 0});
  expect_reads<int16_t>(3, {65, 66, 32767, 0});
  expect_reads<int32_t>(4, {65, 66, 2147483647, 0});
  expect_reads<int64_t>(5, {65, 66, 2147483647, 0});
  expect_reads<uint16_t>(8, {65, 66, 65535, 0});
}

TEST(Megatron, ReadsTheModeArray) {
  const TemporaryFolder folder;
  folder.write("x.bin", "abcd");
  const Index index{
      .lengths = {2, 2}, .offsets = {0, 2}, .documents = {0, 2}, .modes = std::string(2, '\0')};
  folder.write("x.idx", index.bytes());
  const auto corpus = open_megatron(folder / "x.idx");
  EXPECT_EQ(tokens_of(*corpus), (std::vector<int32_t>{'a', 'b', 'c', 'd'}));
  EXPECT_EQ(corpus->document_starts(), (std::vector<int64_t>{0}));
}

// Sequences may lie anywhere in the .bin: in another order, with gaps, twice.
TEST(Megatron, FollowsTheOffsets) {
  const TemporaryFolder folder;
  folder.write("x.bin", "abcdefgh");
  const Index index{
      .lengths = {2, 0, 3, 1, 2}, .offsets = {6, 8, 0, 3, 0}, .documents = {0, 0, 1, 2, 4, 5}};
  folder.write("x.idx", index.bytes());
  const auto corpus = open_megatron(folder / "x.bin");
  const std::vector<int32_t> want = {'g', 'h', 'a', 'b', 'c', 'd', 'a', 'b'};
  EXPECT_EQ(tokens_of(*corpus), want);
  for (int64_t begin = 0; begin <= corpus->size(); ++begin) {
    for (int64_t count = 0; begin + count <= corpus->size(); ++count) {
      std::vector<int32_t> tokens(static_cast<size_t>(count));
      std::vector<uint8_t> mask(tokens.size());
      corpus->read(begin, count, tokens.data(), mask.data());
      EXPECT_EQ(tokens, std::vector<int32_t>(want.begin() + begin, want.begin() + begin + count));
    }
  }
  EXPECT_EQ(corpus->document_starts(), (std::vector<int64_t>{0, 2, 6}));
  EXPECT_EQ(read_megatron_index(folder / "x").documents, 5);
  int32_t token;
  uint8_t mask;
  EXPECT_REFUSED(corpus->read(8, 1, &token, &mask), "are outside the corpus of 8");
  EXPECT_REFUSED(corpus->read(-1, 1, &token, &mask), "are outside the corpus of 8");
}

TEST(Megatron, TokensOutOfRangeAreRefusedWhenRead) {
  const TemporaryFolder folder;
  const auto read = [&](uint8_t code, const std::string& bin, int32_t length) {
    folder.write("x.bin", bin);
    const Index index{.code = code, .lengths = {length}, .offsets = {0}, .documents = {0, 1}};
    folder.write("x.idx", index.bytes());
    return tokens_of(*open_megatron(folder / "x"));
  };
  EXPECT_REFUSED(read(2, "a\xff", 2), "x.bin: token 1 is -1, expected 0 up to 2147483647");
  EXPECT_REFUSED(read(5, little_endian<int64_t>({2147483648}), 1), "token 0 is 2147483648");
}

TEST(Megatron, MalformedIndexesAreRefused) {
  const auto parse = [](const std::string& bytes, size_t bin_bytes = 4) {
    return parse_megatron_index(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(),
                                bin_bytes, "x.idx");
  };
  const Index good{.lengths = {2, 2}, .offsets = {0, 2}, .documents = {0, 1, 2}};
  EXPECT_EQ(parse(good.bytes()).tokens(), 4);
  const auto with = [&](auto change) {
    Index index = good;
    change(index);
    return index.bytes();
  };
  EXPECT_REFUSED(parse(""), "x.idx: the file is empty");
  EXPECT_REFUSED(parse(with([](Index& i) { i.magic = "TNTIDX\0\0\0"; })),
                 "does not begin with MMIDIDX");
  EXPECT_REFUSED(parse("MMID"), "does not begin with MMIDIDX");
  EXPECT_REFUSED(parse(good.bytes().substr(0, 20)), "20 bytes long, the header alone takes 34");
  EXPECT_REFUSED(parse(with([](Index& i) { i.version = 2; })), "version 2, only version 1");
  EXPECT_REFUSED(parse(with([](Index& i) { i.code = 6; })), "token type 6 is a floating type");
  EXPECT_REFUSED(parse(with([](Index& i) { i.code = 9; })), "unknown token type code 9");
  EXPECT_REFUSED(parse(with([](Index& i) { i.code = 0; })), "unknown token type code 0");
  EXPECT_REFUSED(parse(good.bytes() + "x"), "does not fit its 2 sequences and 3 document offsets");
  EXPECT_REFUSED(parse(good.bytes().substr(0, 60)), "does not fit its 2 sequences");
  // Counts whose arrays overflow 64 bits.
  for (const int64_t huge : {int64_t{1} << 60, int64_t{1} << 61, int64_t{-4}, int64_t{-2}}) {
    EXPECT_REFUSED(parse(with([&](Index& i) { i.sequences_off = huge; })), "does not fit its");
    EXPECT_REFUSED(parse(with([&](Index& i) { i.documents_off = huge; })), "does not fit its");
  }
  EXPECT_REFUSED(parse(with([](Index& i) { i.lengths[1] = -1; })), "sequence 1 has the negative");
  EXPECT_REFUSED(parse(with([](Index& i) { i.lengths[1] = 3; })),
                 "sequence 1 takes 3 bytes at offset 2, but the .bin holds 4");
  EXPECT_REFUSED(parse(with([](Index& i) { i.offsets[0] = -1; })), "at offset -1");
  EXPECT_REFUSED(parse(with([](Index& i) { i.offsets[0] = INT64_MAX; })), "but the .bin holds 4");
  EXPECT_REFUSED(parse(with([](Index& i) { i.code = 4; })), "takes 8 bytes at offset 0");
  EXPECT_REFUSED(parse(good.bytes(), 3), "but the .bin holds 3");
  EXPECT_REFUSED(parse(with([](Index& i) { i.documents = {}; })), "no document offsets");
  for (const std::vector<int64_t>& documents :
       {std::vector<int64_t>{1, 2}, {0, 1}, {0, 2, 1, 2}, {0, 3}, {0, -1, 2}, {0}}) {
    EXPECT_REFUSED(parse(with([&](Index& i) { i.documents = documents; })),
                   "expected offsets that rise from 0 to 2");
  }
}

TEST(Megatron, MissingAndEmptyFilesAreRefused) {
  const TemporaryFolder folder;
  EXPECT_REFUSED(open_megatron(folder / "x"), "x.bin: no such file");
  folder.write("x.bin", "");
  EXPECT_REFUSED(open_megatron(folder / "x"), "x.idx: is missing");
  folder.write("x.idx", Index{.documents = {0}}.bytes());
  EXPECT_REFUSED(open_megatron(folder / "x"), "holds no token");
}

// The exact bytes, so that files can be read by Megatron-LM and savanna.
TEST(MegatronWriter, WritesTheFormat) {
  const TemporaryFolder folder;
  MegatronWriter writer(folder / "x", TokenType::kUint16);
  writer.add("ab");
  writer.add(300);
  writer.end_document();
  writer.end_document();  // an empty document
  writer.add("c");
  writer.finish();  // ends the last document
  EXPECT_EQ(contents_of(folder / "x.bin"), little_endian<uint16_t>({'a', 'b', 300, 'c'}));
  const Index want{
      .code = 8, .lengths = {3, 0, 1}, .offsets = {0, 6, 6}, .documents = {0, 1, 2, 3}};
  EXPECT_EQ(contents_of(folder / "x.idx"), want.bytes());
  EXPECT_EQ(folder.files(), 2u);
}

TEST(MegatronWriter, CutsLongDocumentsIntoSequences) {
  const TemporaryFolder folder;
  MegatronWriter writer(folder / "x", TokenType::kUint8, 3);
  writer.add("abcdefg");
  writer.end_document();
  writer.add("hij");
  writer.end_document();
  writer.finish();
  const Index want{.lengths = {3, 3, 1, 3}, .offsets = {0, 3, 6, 7}, .documents = {0, 3, 4}};
  EXPECT_EQ(contents_of(folder / "x.idx"), want.bytes());
  const auto corpus = open_megatron(folder / "x");
  EXPECT_EQ(corpus->document_starts(), (std::vector<int64_t>{0, 7}));
  EXPECT_EQ(corpus->size(), 10);
}

TEST(MegatronWriter, RefusesTokensThatDoNotFitAndLeavesNothing) {
  const TemporaryFolder folder;
  {
    MegatronWriter writer(folder / "x", TokenType::kUint8);
    EXPECT_REFUSED(writer.add(256), "token 256 does not fit uint8");
    EXPECT_REFUSED(writer.add(-1), "token -1 does not fit uint8");
  }
  EXPECT_EQ(folder.files(), 0u);
  EXPECT_REFUSED(token_type("uint32"), "expected uint8, int8, int16, int32");
}

}  // namespace
}  // namespace sarissa::data
