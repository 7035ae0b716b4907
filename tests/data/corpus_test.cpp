#include "sarissa/data/corpus.h"

#include <gtest/gtest.h>

#include <map>

#include "sarissa/base/error.h"
#include "sarissa/base/log.h"
#include "tests/support/files.h"

namespace sarissa::data {
namespace {

using test::gzip;
using test::TemporaryFolder;
using Starts = std::vector<int64_t>;

struct Stream {
  std::string tokens, mask;  // the mask as '0' and '1'
};

Stream stream_of(const Corpus& corpus) {
  const auto size = static_cast<size_t>(corpus.size());
  std::vector<int32_t> tokens(size);
  std::vector<uint8_t> mask(size);
  corpus.read(0, corpus.size(), tokens.data(), mask.data());
  Stream stream{std::string(tokens.begin(), tokens.end()), std::string(mask.begin(), mask.end())};
  for (char& c : stream.mask) c = static_cast<char>(c + '0');
  return stream;
}

const std::string kEnd(1, '\0');

TEST(Corpus, TextIsOneDocument) {
  const TemporaryFolder folder;
  const std::string text = "To be,\r\nor not\n\nto be N";
  for (const auto& path : {folder.write("a.txt", text), folder.write("b.txt.gz", gzip(text)),
                           folder.write("c", text), folder.write("d.txt", gzip(text))}) {
    const auto corpus = open_corpus(path, {});
    EXPECT_EQ(stream_of(*corpus).tokens, text) << path;
    EXPECT_EQ(stream_of(*corpus).mask, std::string(text.size(), '1')) << path;
    EXPECT_EQ(corpus->document_starts(), Starts{0}) << path;
  }
}

TEST(Corpus, BytesAreTakenAsTheyAre) {
  const TemporaryFolder folder;
  std::string all;
  for (int c = 0; c < 256; ++c) all += static_cast<char>(c);
  EXPECT_EQ(stream_of(*open_corpus(folder.write("a.dat", all), {})).tokens, all);
  DataConfig bytes;
  bytes.format = "bytes";
  EXPECT_EQ(stream_of(*open_corpus(folder.write("a.txt", all), bytes)).tokens, all);
  const std::string packed = gzip(all);
  EXPECT_EQ(stream_of(*open_corpus(folder.write("a.gz", packed), bytes)).tokens, packed);
}

TEST(Corpus, FastaRecordsEndInZeroAndAmbiguityCodesAreMasked) {
  const TemporaryFolder folder;
  const std::string text = ">a\nACGTacgt\nNnRx-\n>empty\n>b\nUu\n";
  for (const auto& path : {folder.write("a.fa", text), folder.write("b.fasta.gz", gzip(text))}) {
    const auto corpus = open_corpus(path, {});
    const Stream stream = stream_of(*corpus);
    EXPECT_EQ(stream.tokens, "ACGTACGTNNRX-" + kEnd + "UU" + kEnd);
    EXPECT_EQ(stream.mask, "11111111000001111");
    EXPECT_EQ(corpus->document_starts(), (Starts{0, 14}));
  }
  DataConfig raw;
  raw.uppercase = false;
  EXPECT_EQ(stream_of(*open_corpus(folder / "a.fa", raw)).tokens,
            "ACGTacgtNnRx-" + kEnd + "Uu" + kEnd);
  EXPECT_EQ(stream_of(*open_corpus(folder / "a.fa", raw)).mask, "11111111000001111");
  raw.mask_n = false;
  EXPECT_EQ(stream_of(*open_corpus(folder / "a.fa", raw)).mask, std::string(17, '1'));
}

TEST(Corpus, ProteinsAreWarnedAbout) {
  const TemporaryFolder folder;
  const auto warning = [&](const std::string& text, const DataConfig& config) {
    testing::internal::CaptureStderr();
    open_corpus(folder.write("a.faa", text), config);
    return testing::internal::GetCapturedStderr();
  };
  EXPECT_NE(warning(">p\nMKLVQE*\n", {}).find("(ELQ*); for proteins set data.mask_n"),
            std::string::npos);
  EXPECT_EQ(warning(">p\nACGTNRYK\n", {}), "");
  DataConfig proteins;
  proteins.mask_n = false;
  EXPECT_EQ(warning(">p\nMKLVQE*\n", proteins), "");
}

TEST(Corpus, JsonlTextsEndInZero) {
  const TemporaryFolder folder;
  const std::string text =
      "{\"text\": \"one\"}\n{\"text\": \"\"}\n{\"id\": 3, \"text\": \"Nn \\u00e9\"}\n";
  for (const auto& path : {folder.write("a.jsonl", text), folder.write("b.jsonl.gz", gzip(text))}) {
    const auto corpus = open_corpus(path, {});
    EXPECT_EQ(stream_of(*corpus).tokens, "one" + kEnd + "Nn \xc3\xa9" + kEnd);
    EXPECT_EQ(stream_of(*corpus).mask, std::string(10, '1'));
    EXPECT_EQ(corpus->document_starts(), (Starts{0, 4}));
  }
  EXPECT_REFUSED(open_corpus(folder.write("zero.jsonl", "{\"text\": \"a\\u0000b\"}\n"), {}),
                 "the text of '1' holds byte 0");
}

TEST(Corpus, ReadsAnyRangeAndRefusesOthers) {
  const TemporaryFolder folder;
  const auto corpus = open_corpus(folder.write("a.txt", "0123456789"), {});
  std::vector<int32_t> tokens(10, -1);
  std::vector<uint8_t> mask(10, 9);
  corpus->read(3, 4, tokens.data(), mask.data());
  EXPECT_EQ(std::string(tokens.begin(), tokens.begin() + 4), "3456");
  EXPECT_EQ(tokens[4], -1);
  EXPECT_EQ(mask[4], 9);
  corpus->read(10, 0, tokens.data(), mask.data());
  EXPECT_REFUSED(corpus->read(7, 4, tokens.data(), mask.data()), "tokens [7, 11) are outside");
  EXPECT_REFUSED(corpus->read(-1, 2, tokens.data(), mask.data()), "outside the corpus of 10");
  EXPECT_REFUSED(corpus->read(0, -1, tokens.data(), mask.data()), "outside the corpus of 10");
}

TEST(Corpus, BadInputIsRefused) {
  const TemporaryFolder folder;
  const auto open = [&](const std::string& name, const std::string& contents,
                        const std::string& format = "auto") {
    DataConfig config;
    config.format = format;
    return open_corpus(folder.write(name, contents), config);
  };
  EXPECT_REFUSED(open("a.fa", ">x\n>y\n"), "a.fa: holds no sequence");
  EXPECT_REFUSED(open("a.fa", "\n\n"), "a.fa: holds no sequence");
  EXPECT_REFUSED(open("a.fa", "ACGT\n"), "a.fa:1: sequence before the first");
  EXPECT_REFUSED(open("a.jsonl", "{\"text\": \"\"}\n"), "a.jsonl: holds no text");
  EXPECT_REFUSED(open("a.jsonl", "{}\n"), "a.jsonl:1: the object has no \"text\"");
  for (const char* name : {"e.txt", "e.fa", "e.jsonl", "e.dat"}) {
    EXPECT_REFUSED(open(name, ""), "the file is empty");
  }
  EXPECT_REFUSED(open("e.txt.gz", gzip("")), "the file is empty");
  EXPECT_REFUSED(open("z.txt", std::string("ab\0", 3)), "byte 0 at offset 2");
  EXPECT_REFUSED(open("z.txt.gz", gzip(std::string("ab\0", 3))), "byte 0 at offset 2");
  EXPECT_REFUSED(open("t.txt.gz", gzip(std::string(1000, 'x')).substr(0, 20)), "are truncated");
  EXPECT_REFUSED(open("n.txt.gz", "plain"), "the content is not gzip");
  EXPECT_REFUSED(open("lonely.bin", "abc"), "lonely.idx: is missing");
  EXPECT_REFUSED(open("a.txt", "x", "fastq"), "did you mean 'fasta'?");
  EXPECT_THROW(open("a.txt", "x", "fastq"), UsageError);
  EXPECT_REFUSED(open_corpus(folder / "a.tx", {}), "did you mean 'a.txt'?");
  for (const char* format : {"auto", "text", "bytes", "fasta", "jsonl"}) {
    DataConfig config;
    config.format = format;
    EXPECT_REFUSED(open_corpus(folder / "", config), "is a folder");
  }
}

TEST(Slice, ShiftsTokensAndDocuments) {
  const TemporaryFolder folder;
  const auto all = open_corpus(folder.write("a.fa", ">a\nAC\n>b\nGNT\n>c\nA\n"), {});
  ASSERT_EQ(all->size(), 9);
  const auto part = slice(all, 1, 8);
  EXPECT_EQ(stream_of(*part).tokens, "C" + kEnd + "GNT" + kEnd + "A");
  EXPECT_EQ(stream_of(*part).mask, "1110111");
  EXPECT_EQ(part->document_starts(), (Starts{0, 2, 6}));
  EXPECT_EQ(slice(all, 3, 7)->document_starts(), (Starts{0}));
  EXPECT_EQ(stream_of(*slice(part, 2, 4)).tokens, "GN");
  EXPECT_EQ(slice(all, 4, 4)->size(), 0);
  EXPECT_EQ(slice(all, 4, 4)->document_starts(), Starts{});
  int32_t token;
  uint8_t mask;
  EXPECT_REFUSED(part->read(7, 1, &token, &mask), "outside the corpus of 7");
  EXPECT_REFUSED(slice(all, 5, 10), "outside the corpus of 9");
  EXPECT_REFUSED(slice(all, 5, 4), "outside the corpus of 9");
}

TEST(Splits, CutOneFileWithoutOverlap) {
  const TemporaryFolder folder;
  std::string text;
  for (int i = 0; i < 1003; ++i) text += static_cast<char>('!' + i % 90);
  DataConfig config;
  config.train = folder.write("a.txt", text);
  config.validation_fraction = 0.1;
  config.test_fraction = 0.2;
  const Splits splits = open_splits(config);
  EXPECT_EQ(splits.validation->size(), 100);
  EXPECT_EQ(splits.test->size(), 200);
  EXPECT_EQ(stream_of(*splits.train).tokens + stream_of(*splits.validation).tokens +
                stream_of(*splits.test).tokens,
            text);
}

TEST(Splits, TakeAValidationFile) {
  const TemporaryFolder folder;
  DataConfig config;
  config.train = folder.write("a.txt", std::string(100, 'a'));
  config.validation = folder.write("b.txt", "validation");
  const Splits splits = open_splits(config);
  EXPECT_EQ(splits.train->size(), 95);
  EXPECT_EQ(stream_of(*splits.validation).tokens, "validation");
  EXPECT_EQ(splits.test->size(), 5);
  config.test_fraction = 0;
  EXPECT_EQ(open_splits(config).train->size(), 100);
  EXPECT_EQ(open_splits(config).test->size(), 0);
}

TEST(Splits, RefuseBadSettings) {
  const TemporaryFolder folder;
  DataConfig config;
  EXPECT_THROW(open_splits(config), UsageError);
  EXPECT_REFUSED(open_splits(config), "data.train is empty");
  config.train = folder.write("a.txt", "text");
  config.validation_fraction = 0.5;
  config.test_fraction = 0.5;
  EXPECT_REFUSED(open_splits(config), "whose sum is below 1");
  config.validation_fraction = -0.1;
  EXPECT_REFUSED(open_splits(config), "data.validation_fraction is -0.1");
}

// The visitor sees every field once, by the names that a configuration file uses.
TEST(DataConfig, ListsItsFields) {
  DataConfig config;
  std::map<std::string, const void*> seen;
  auto visit = [&](const std::string& name, auto& field, const std::string& help) {
    EXPECT_TRUE(seen.emplace(name, &field).second);
    EXPECT_GT(help.size(), 10u) << name;
  };
  DataConfig::fields(visit, config);
  EXPECT_EQ(seen.size(), 8u);
  EXPECT_EQ(seen["train"], &config.train);
  EXPECT_EQ(seen["mask_n"], &config.mask_n);
  EXPECT_EQ(seen["test_fraction"], &config.test_fraction);
}

}  // namespace
}  // namespace sarissa::data
