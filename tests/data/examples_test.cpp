// The files of examples/data are what their README says.
#include <gtest/gtest.h>

#include "sarissa/data/prepare.h"
#include "tests/support/files.h"

namespace sarissa::data {
namespace {

const std::string kFolder = test::source_root() + "/examples/data/";

TEST(Examples, Shakespeare) {
  const Inspection text = inspect(kFolder + "shakespeare.txt");
  EXPECT_EQ(text.format, "text");
  EXPECT_EQ(text.tokens, 1036496);
  EXPECT_EQ(text.checksum, "crc32:00cd12fd");
  EXPECT_LT(text.counts.size(), 128u) << "not ASCII";
}

TEST(Examples, SarsCov2) {
  const Inspection genome = inspect(kFolder + "sars-cov-2.fasta");
  EXPECT_EQ(genome.format, "fasta");
  EXPECT_EQ(genome.documents, 1);
  EXPECT_EQ(genome.longest, 29903);
  EXPECT_EQ(genome.checksum, "crc32:49ebac04");
}

TEST(Examples, ReadmeQuotesTheChecksums) {
  const std::string readme = test::contents_of(kFolder + "README.md");
  for (const char* name : {"shakespeare.txt", "sars-cov-2.fasta"}) {
    const size_t line = readme.find(std::string("| `") + name);
    ASSERT_NE(line, std::string::npos) << name;
    const std::string row = readme.substr(line, readme.find('\n', line) - line);
    EXPECT_NE(row.find(inspect(kFolder + name).checksum), std::string::npos) << row;
  }
}

}  // namespace
}  // namespace sarissa::data
