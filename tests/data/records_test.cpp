#include "sarissa/data/records.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "sarissa/base/error.h"
#include "tests/support/files.h"

namespace sarissa::data {
namespace {

using test::gzip;
using test::TemporaryFolder;
using Records = std::vector<std::pair<std::string, std::string>>;

Records read_records(const std::string& path, size_t limit = 1 << 16,
                     const std::string& format = "auto") {
  Records records;
  const auto reader = open_records(path, format);
  for (std::string id; reader->next(id);) {
    std::string text;
    for (auto piece = reader->read(limit); !piece.empty(); piece = reader->read(limit)) {
      EXPECT_LE(piece.size(), limit);
      text += piece;
    }
    EXPECT_EQ(reader->read(limit), "");
    records.emplace_back(id, text);
  }
  std::string id;
  EXPECT_FALSE(reader->next(id));
  return records;
}

// Every way of cutting the reads gives the same records.
void expect_records(const std::string& path, const Records& want) {
  for (const size_t limit : {1, 2, 3, 7, 1 << 16}) {
    EXPECT_EQ(read_records(path, limit), want) << "pieces of " << limit;
  }
}

void expect_records(const TemporaryFolder& folder, const std::string& name,
                    const std::string& contents, const Records& want) {
  expect_records(folder.write(name, contents), want);
  expect_records(folder.write(name + ".gz", gzip(contents)), want);
}

TEST(Fasta, Records) {
  const TemporaryFolder folder;
  expect_records(folder, "a.fasta", ">chr1 first one\nACGT\nNNac\n>chr2\tx\nGG\n",
                 {{"chr1", "ACGTNNac"}, {"chr2", "GG"}});
  expect_records(folder, "no-newline.fa", ">x\nAC\nGT", {{"x", "ACGT"}});
  expect_records(folder, "crlf.fna", ">x y\r\nAC\r\nGT\r\n>z\r\nA\r\n",
                 {{"x", "ACGT"}, {"z", "A"}});
  expect_records(folder, "blank.fa", "\n\r\n>x\n\nAC\n \nGT\n\n\n>y\n\nA\n\n",
                 {{"x", "ACGT"}, {"y", "A"}});
  expect_records(folder, "iupac.fa", ">x\nRYSWKMBDHVN\nryswkmbdhvn\nU-.*\n",
                 {{"x", "RYSWKMBDHVNryswkmbdhvnU-.*"}});
  expect_records(folder, "spaced.fa", ">x\nACGT ACGT\tAC  \n", {{"x", "ACGTACGTAC"}});
  expect_records(folder, "comments.fa", ";old style\n>x\n;more\nAC\n;and >more\nGT\n",
                 {{"x", "ACGT"}});
  expect_records(folder, "mark.fa", "\xEF\xBB\xBF>x\nAC\n", {{"x", "AC"}});
}

TEST(Fasta, ACommentMayEndTheFile) {
  const TemporaryFolder folder;
  expect_records(folder, "a.fa", ">x\nAC\n;no newline", {{"x", "AC"}});
}

TEST(Fasta, EmptyRecordsAndEmptyHeaders) {
  const TemporaryFolder folder;
  expect_records(folder, "empty.fa", ">a\n>b\n\n>c\nAC\n>d\n",
                 {{"a", ""}, {"b", ""}, {"c", "AC"}, {"d", ""}});
  expect_records(folder, "nameless.fa", ">\nAC\n> text\nGT\n>x\nA\n>",
                 {{"1", "AC"}, {"2", "GT"}, {"x", "A"}, {"4", ""}});
}

TEST(Fasta, AnUnreadRecordIsSkipped) {
  const TemporaryFolder folder;
  const std::string text = ">a\n" + std::string(1000000, 'A') + "\n>b\nCC\nGG\n>c\nT\n";
  const auto reader = open_records(folder.write("a.fa", text));
  std::string id;
  ASSERT_TRUE(reader->next(id));
  ASSERT_TRUE(reader->next(id));
  EXPECT_EQ(id, "b");
  EXPECT_EQ(reader->read(3), "CCG");
  ASSERT_TRUE(reader->next(id));
  EXPECT_EQ(id, "c");
  EXPECT_EQ(reader->read(9), "T");
  EXPECT_FALSE(reader->next(id));
}

TEST(Fasta, MalformedInputNamesFileAndLine) {
  const TemporaryFolder folder;
  const auto read = [&](const std::string& contents) {
    return read_records(folder.write("a.fa", contents));
  };
  EXPECT_REFUSED(read("ACGT\n>x\nAC\n"), "a.fa:1: sequence before the first '>' header");
  EXPECT_REFUSED(read("\n\nACGT\n"), "a.fa:3: sequence before the first");
  EXPECT_REFUSED(read(">x\nAC\nA1\n"), "a.fa:3: '1' is not a sequence character");
  EXPECT_REFUSED(read(">x\nAC\n\n>y\n;c\nA>z\n"), "a.fa:6: '>' is not a sequence character");
  EXPECT_REFUSED(read("\x89PNG\r\n\x1a\n"), "a.fa:1: 0x89 is not a sequence character");
  EXPECT_REFUSED(read(std::string(">x\nAC\n\0\0", 8)), "a.fa:3: 0x00 is not a sequence character");
  EXPECT_REFUSED(read(">x\x01y\nAC\n"), "a.fa:1: byte 0x01 in a header");
  EXPECT_REFUSED(read(">" + std::string(70000, 'x') + "\nAC\n"), "a.fa:1: the name is longer");
  EXPECT_REFUSED(read(""), "the file is empty");
  // A record that nobody reads is checked all the same.
  const auto reader = open_records(folder.write("a.fa", ">x\nAC\nA1\n>y\nAC\n"));
  std::string id;
  EXPECT_TRUE(reader->next(id));
  EXPECT_REFUSED(reader->next(id), "a.fa:3: '1'");
}

TEST(Fasta, ATruncatedGzipFileIsRefused) {
  const TemporaryFolder folder;
  std::string sequence;
  for (int i = 0; i < 200000; ++i) sequence += "ACGT"[(i * i / 7) % 4];
  const std::string packed = gzip(">x\n" + sequence + "\n");
  EXPECT_REFUSED(read_records(folder.write("a.fa.gz", packed.substr(0, packed.size() / 2))),
                 "a.fa.gz: gzip data are truncated");
}

int64_t peak_memory_kib() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss;
}

// Ten million bases on a single line: neither the record nor its line is held.
TEST(Fasta, StreamsALongRecordInConstantMemory) {
  const TemporaryFolder folder;
  constexpr size_t kBases = 10000000;
  const std::string path = folder / "long.fa.gz";
  {
    // Written in blocks, so that the peak of memory before reading is low.
    const gzFile file = gzopen(path.c_str(), "wb1");
    gzputs(file, ">long\n");
    uint32_t state = 1;
    std::string block(50000, ' ');
    for (size_t done = 0; done < kBases; done += block.size()) {
      for (char& c : block) c = "ACGT"[(state = state * 1664525 + 1013904223) >> 30];
      gzwrite(file, block.data(), static_cast<unsigned>(block.size()));
    }
    gzputs(file, "\n>next\nAC\n");
    gzclose(file);
  }
  size_t counts[256] = {};
  const auto reader = open_records(path);
  std::string id;
  ASSERT_TRUE(reader->next(id));
  const int64_t before = peak_memory_kib();
  size_t bases = 0;
  for (auto piece = reader->read(1 << 16); !piece.empty(); piece = reader->read(1 << 16)) {
    for (const unsigned char c : piece) ++counts[c];
    bases += piece.size();
  }
  EXPECT_EQ(bases, kBases);
  EXPECT_EQ(counts['A'] + counts['C'] + counts['G'] + counts['T'], kBases);
  EXPECT_LT(peak_memory_kib() - before, 2048);
  ASSERT_TRUE(reader->next(id));
  EXPECT_EQ(id, "next");
  EXPECT_EQ(reader->position(), reader->file_size());
}

TEST(Jsonl, Records) {
  const TemporaryFolder folder;
  expect_records(folder, "a.jsonl",
                 "{\"id\": \"one\", \"text\": \"hello\"}\n"
                 "\n"
                 "{\"text\": \"two\\nlines \\u00e9\", \"other\": [1, {}]}\r\n"
                 "{\"id\": 7, \"text\": \"\"}\n"
                 "{\"id\": null, \"text\": \"x\"}",
                 {{"one", "hello"}, {"3", "two\nlines \xc3\xa9"}, {"7", ""}, {"5", "x"}});
  expect_records(folder, "mark.ndjson", "\xEF\xBB\xBF{\"text\": \"x\"}\n", {{"1", "x"}});
}

TEST(Jsonl, MalformedInputNamesFileAndLine) {
  const TemporaryFolder folder;
  const auto read = [&](const std::string& line) {
    return read_records(folder.write("a.jsonl", "{\"text\": \"x\"}\n" + line + "\n"));
  };
  EXPECT_REFUSED(read("{\"text\": \"x\""), "a.jsonl:2: invalid JSON at column 13");
  EXPECT_REFUSED(read("{'text': 'x'}"), "a.jsonl:2: invalid JSON at column 2");
  EXPECT_REFUSED(read("{\"text\": \"\xff\"}"), "a.jsonl:2: invalid JSON");
  EXPECT_REFUSED(read("{\"text\": 1e999}"), "a.jsonl:2: invalid JSON: a number is out of range");
  EXPECT_REFUSED(read("[1]"), "a.jsonl:2: expected an object");
  EXPECT_REFUSED(read("{\"txt\": \"x\"}"), "a.jsonl:2: the object has no \"text\"");
  EXPECT_REFUSED(read("{\"text\": 3}"), "a.jsonl:2: \"text\" is a number, expected a string");
  EXPECT_REFUSED(read("{\"text\": \"x\", \"id\": [1]}"), "a.jsonl:2: \"id\" is a");
  EXPECT_REFUSED(read(std::string(100000, '[')), "a.jsonl:2: invalid JSON");
  EXPECT_REFUSED(read_records(folder.write("b.jsonl", "")), "b.jsonl: the file is empty");
}

TEST(Lines, Records) {
  const TemporaryFolder folder;
  expect_records(folder, "a.txt", "one\ntwo\r\n\nfour",
                 {{"1", "one"}, {"2", "two"}, {"3", ""}, {"4", "four"}});
  expect_records(folder, "b.txt", "a\rb\r\r\n\r\n", {{"1", "a\rb\r"}, {"2", ""}});
  expect_records(folder, "c.txt", "end\r", {{"1", "end"}});
  expect_records(folder, "d", "no ending\n", {{"1", "no ending"}});
  const auto reader = open_records(folder.write("e.txt", "skipped\nread\n"));
  std::string id;
  EXPECT_TRUE(reader->next(id));
  EXPECT_TRUE(reader->next(id));
  EXPECT_EQ(id, "2");
  EXPECT_EQ(reader->read(100), "read");
}

TEST(WholeFile, TextAndBytes) {
  const TemporaryFolder folder;
  const std::string text = "one\r\ntwo\n";
  const std::string plain = folder.write("a.txt", text);
  const std::string packed = folder.write("a.txt.gz", gzip(text));
  for (const size_t limit : {1, 4, 100}) {
    EXPECT_EQ(read_records(plain, limit, "text"), (Records{{"1", text}}));
    EXPECT_EQ(read_records(packed, limit, "text"), (Records{{"1", text}}));
    EXPECT_EQ(read_records(plain, limit, "bytes"), (Records{{"1", text}}));
    EXPECT_EQ(read_records(packed, limit, "bytes"), (Records{{"1", gzip(text)}}));
  }
  const std::string binary = folder.write("b", std::string("ab\0c", 4));
  EXPECT_EQ(read_records(binary, 3, "bytes"), (Records{{"1", std::string("ab\0c", 4)}}));
  EXPECT_REFUSED(read_records(binary, 2, "text"), "byte 0 at offset 2");
  EXPECT_REFUSED(read_records(folder.write("c", ""), 9, "text"), "the file is empty");
  EXPECT_REFUSED(read_records(folder.write("c", ""), 9, "bytes"), "the file is empty");
}

TEST(OpenRecords, RefusesMissingFilesFoldersAndFormats) {
  const TemporaryFolder folder;
  folder.write("genes.fasta", ">x\nA\n");
  EXPECT_REFUSED(open_records(folder / "gene.fasta"), "did you mean 'genes.fasta'?");
  EXPECT_REFUSED(open_records(folder / ""), "is a folder, expected a file");
  EXPECT_THROW(open_records(folder / "genes.fasta", "fast"), UsageError);
  EXPECT_REFUSED(open_records(folder / "genes.fasta", "fast"), "did you mean 'fasta'?");
}

TEST(FormatOfName, GoesByTheEnding) {
  for (const char* name : {"a.fasta", "a.fa", "x/a.b.fna", "a.FASTA", "a.faa.gz"}) {
    EXPECT_EQ(format_of_name(name), "fasta") << name;
  }
  EXPECT_EQ(format_of_name("a.jsonl"), "jsonl");
  EXPECT_EQ(format_of_name("a.ndjson.gz"), "jsonl");
  EXPECT_EQ(format_of_name("a.bin"), "megatron");
  EXPECT_EQ(format_of_name("a.idx"), "megatron");
  EXPECT_EQ(format_of_name("a.txt"), "text");
  EXPECT_EQ(format_of_name("a.gz"), "text");
  EXPECT_EQ(format_of_name("fasta"), "bytes");
  EXPECT_EQ(format_of_name("a.dat"), "bytes");
}

TEST(ReverseComplement, KnowsIupacAndKeepsCase) {
  EXPECT_EQ(reverse_complement("AACGTTn"), "nAACGTT");
  EXPECT_EQ(reverse_complement("acgtACGT"), "ACGTacgt");
  EXPECT_EQ(reverse_complement("ARYKMBVDHSWN"), "NWSDHBVKMRYT");
  EXPECT_EQ(reverse_complement("Uu-X"), "X-aA");
  EXPECT_EQ(reverse_complement(""), "");
  // All but RNA's U comes back when done twice.
  std::string all;
  for (int c = 0; c < 256; ++c) {
    if (c != 'U' && c != 'u') all += static_cast<char>(c);
  }
  EXPECT_EQ(reverse_complement(reverse_complement(all)), all);
}

}  // namespace
}  // namespace sarissa::data
