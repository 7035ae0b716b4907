#include "sarissa/data/prepare.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "sarissa/base/error.h"
#include "sarissa/data/corpus.h"
#include "tests/support/files.h"

namespace sarissa::data {
namespace {

using test::gzip;
using test::TemporaryFolder;

constexpr const char* kFasta = ">a\nACGTNNacgt\n>empty\n>b\nGG\n";
constexpr const char* kJsonl = "{\"text\": \"one\"}\n{\"text\": \"\"}\n{\"text\": \"three\"}\n";

std::vector<int32_t> tokens_of(const Corpus& corpus) {
  std::vector<int32_t> tokens(static_cast<size_t>(corpus.size()));
  std::vector<uint8_t> mask(tokens.size());
  corpus.read(0, corpus.size(), tokens.data(), mask.data());
  return tokens;
}

TEST(Prepare, GivesTheTokensAndDocumentsOfTheInput) {
  const TemporaryFolder folder;
  const std::vector<std::string> inputs = {
      folder.write("a.fa", kFasta),          folder.write("b.fa.gz", gzip(kFasta)),
      folder.write("c.jsonl", kJsonl),       folder.write("d.txt", "some text\r\n"),
      folder.write("e.txt.gz", gzip("zip")), folder.write("f.dat", std::string("a\0b", 3))};
  for (const auto& input : inputs) {
    for (const char* dtype : {"uint8", "uint16"}) {
      const Prepared prepared = prepare({.input = input, .output = folder / "out", .dtype = dtype});
      const auto want = open_corpus(input, {}), got = open_corpus(folder / "out", {});
      EXPECT_EQ(tokens_of(*got), tokens_of(*want)) << input;
      EXPECT_EQ(got->document_starts(), want->document_starts()) << input;
      EXPECT_EQ(prepared.tokens, want->size());
      EXPECT_EQ(prepared.documents, static_cast<int64_t>(want->document_starts().size()));
      const size_t width = dtype == std::string("uint8") ? 1 : 2;
      EXPECT_EQ(std::filesystem::file_size(folder / "out.bin"),
                width * static_cast<size_t>(want->size()));
      EXPECT_EQ(inspect(folder / "out").checksum, inspect(input).checksum) << input;
    }
  }
  EXPECT_EQ(folder.files(), inputs.size() + 2);
}

TEST(Prepare, KeepsCaseWhenAsked) {
  const TemporaryFolder folder;
  prepare({.input = folder.write("a.fa", kFasta), .output = folder / "out", .keep_case = true});
  DataConfig raw;
  raw.uppercase = false;
  EXPECT_EQ(tokens_of(*open_corpus(folder / "out", {})),
            tokens_of(*open_corpus(folder / "a.fa", raw)));
}

TEST(Prepare, FailuresLeaveNothingBehind) {
  const TemporaryFolder folder;
  const std::string bad = folder.write("bad.fa", ">x\nACGT\nA1\n");
  EXPECT_REFUSED(prepare({.input = bad, .output = folder / "out"}), "bad.fa:3: '1'");
  EXPECT_EQ(folder.files(), 1u);
  EXPECT_REFUSED(prepare({.input = bad, .output = folder / "no/out"}), "create it first");
  EXPECT_REFUSED(prepare({.input = folder / "bad.f", .output = folder / "out"}),
                 "did you mean 'bad.fa'?");
  EXPECT_THROW(prepare({.input = bad, .output = folder / "out", .dtype = "int32"}), UsageError);
  EXPECT_EQ(folder.files(), 1u);
  // The input is never replaced.
  const std::string bin = folder.write("a.bin", "bytes");
  EXPECT_REFUSED(prepare({.input = bin, .output = folder / "a", .format = "bytes"}),
                 "would replace the input");
  EXPECT_EQ(test::contents_of(bin), "bytes");
  EXPECT_REFUSED(prepare({.input = bin, .output = folder / "b"}), "a Megatron data set already");
}

TEST(Inspect, Fasta) {
  const TemporaryFolder folder;
  const Inspection a = inspect(folder.write("a.fa", kFasta));
  EXPECT_EQ(a.format, "fasta");
  EXPECT_EQ(a.documents, 3);
  EXPECT_EQ(a.empty_documents, 1);
  EXPECT_EQ(a.tokens, 14);
  EXPECT_EQ(a.shortest, 0);
  EXPECT_EQ(a.longest, 10);
  EXPECT_EQ(a.counts['G'], 3);
  EXPECT_EQ(a.counts['g'], 1);
  const auto json = nlohmann::json::parse(to_json(a));
  EXPECT_EQ(json["documents"], 3);
  EXPECT_EQ(json["tokens"], 14);
  EXPECT_EQ(json["letters"]["N"], 2);
  EXPECT_EQ(json["letters"].size(), 9u);
  EXPECT_NEAR(json["n_fraction"].get<double>(), 2.0 / 12, 1e-12);
  EXPECT_NEAR(json["lowercase_fraction"].get<double>(), 4.0 / 12, 1e-12);
  const std::string text = to_text(a);
  EXPECT_NE(text.find("documents           3, of which 1 empty\n"), std::string::npos) << text;
  EXPECT_NE(text.find("N                   16.67%\n"), std::string::npos) << text;
  EXPECT_NE(text.find("most frequent       'G' 25.00%"), std::string::npos) << text;
}

// zlib.crc32(struct.pack('<7I', *b'hi\0you\0')) of Python's standard library: the
// seven tokens h i 0 y o u 0.
TEST(Inspect, ChecksumIsTheCrcOfTheTokens) {
  const TemporaryFolder folder;
  const std::string jsonl = "{\"text\": \"hi\"}\n{\"text\": \"you\"}\n";
  EXPECT_EQ(inspect(folder.write("a.jsonl", jsonl)).checksum, "crc32:e156f7fd");
  EXPECT_EQ(inspect(folder.write("b.jsonl.gz", gzip(jsonl))).checksum, "crc32:e156f7fd");
  EXPECT_NE(inspect(folder.write("c.jsonl", "{\"text\": \"hi\"}\n{\"text\": \"yoU\"}\n")).checksum,
            "crc32:e156f7fd");
}

TEST(Inspect, TextAndMegatron) {
  const TemporaryFolder folder;
  const Inspection text = inspect(folder.write("a.txt", "aab\n"));
  EXPECT_EQ(text.documents, 1);
  EXPECT_EQ(text.tokens, 4);
  EXPECT_EQ(text.shortest, 4);
  EXPECT_EQ(nlohmann::json::parse(to_json(text))["counts"],
            (nlohmann::json{{"10", 1}, {"97", 2}, {"98", 1}}));
  prepare(
      {.input = folder.write("b.jsonl", kJsonl), .output = folder / "b.bin", .dtype = "uint16"});
  const Inspection pair = inspect(folder / "b.idx");
  EXPECT_EQ(pair.format, "megatron");
  EXPECT_EQ(pair.dtype, "uint16");
  EXPECT_EQ(pair.documents, 2);
  EXPECT_EQ(pair.tokens, 10);
  EXPECT_EQ(pair.shortest, 3);  // without the end-of-document token
  EXPECT_EQ(pair.longest, 5);
  EXPECT_EQ(pair.counts[0], 2);
  EXPECT_REFUSED(inspect(folder.write("c.fa", ">x\n")), "c.fa: holds no sequence");
  EXPECT_REFUSED(inspect(folder / "b", "jsnol"), "did you mean 'jsonl'?");
}

}  // namespace
}  // namespace sarissa::data
