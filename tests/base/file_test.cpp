#include "sarissa/base/file.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>

#include "tests/support/files.h"

namespace sarissa {
namespace {

using test::contents_of;
using test::gzip;
using test::TemporaryFolder;

std::string read_all(const std::string& path) {
  InputStream input(path);
  std::string all;
  for (auto bytes = input.peek(); !bytes.empty(); bytes = input.peek()) {
    all += bytes;
    input.consume(bytes.size());
  }
  return all;
}

std::vector<std::string> lines_of(const std::string& path) {
  LineReader reader(path);
  std::vector<std::string> lines;
  for (std::string line; reader.next(line);) lines.push_back(line);
  EXPECT_EQ(reader.line_number(), static_cast<int64_t>(lines.size()));
  return lines;
}

// Bytes that gzip cannot shrink to nothing, so that blocks matter.
std::string noise(size_t bytes) {
  std::string text(bytes, '\0');
  uint32_t state = 1;
  for (char& c : text) c = static_cast<char>((state = state * 1664525 + 1013904223) >> 24);
  return text;
}

TEST(File, MissingFileSuggestsTheNearestName) {
  const TemporaryFolder folder;
  folder.write("genome.fasta", "x");
  EXPECT_REFUSED(check_is_file(folder / "genom.fasta"), "did you mean 'genome.fasta'?");
  EXPECT_REFUSED(check_is_file(folder / "genom.fasta"), "no such file");
  EXPECT_REFUSED(check_is_file(folder / "nowhere/x"), "no such file");
  EXPECT_REFUSED(read_file(folder / ""), "is a folder, expected a file");
  EXPECT_REFUSED(MappedFile(folder / "missing"), "no such file");
  EXPECT_REFUSED(InputStream(folder / "missing"), "no such file");
}

TEST(File, ReadsWholeFiles) {
  const TemporaryFolder folder;
  const std::string text = noise(1000003);
  EXPECT_EQ(read_file(folder.write("a", text)), text);
  EXPECT_EQ(read_file(folder.write("empty", "")), "");
}

TEST(MappedFile, MapsAndMoves) {
  const TemporaryFolder folder;
  MappedFile file(folder.write("a", "hello"));
  MappedFile moved(std::move(file));
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(moved.data()), moved.size()), "hello");
  EXPECT_EQ(file.data(), nullptr);
  EXPECT_EQ(MappedFile(folder.write("empty", "")).size(), 0u);
}

TEST(AtomicFile, ReplacesOnlyOnCommit) {
  const TemporaryFolder folder;
  const std::string path = folder.write("config", "old");
  {
    AtomicFile file(path);
    file.write("half", 4);
    EXPECT_EQ(contents_of(path), "old");
  }
  EXPECT_EQ(contents_of(path), "old");
  EXPECT_EQ(folder.files(), 1u) << "the temporary file was left behind";
  replace_file(path, "new");
  EXPECT_EQ(contents_of(path), "new");
  EXPECT_EQ(folder.files(), 1u);
}

TEST(AtomicFile, RefusesFoldersAndMissingFolders) {
  const TemporaryFolder folder;
  EXPECT_REFUSED(AtomicFile(folder / "no/such/file"), "does not exist; create it first");
  std::filesystem::create_directory(folder / "sub");
  EXPECT_REFUSED(AtomicFile(folder / "sub"), "is a folder, expected a file name");
}

TEST(AtomicFile, AFullDiskLeavesTheOldFile) {
  const TemporaryFolder folder;
  const std::string path = folder.write("config", "old");
  // A limit on file size stands in for a full disk: write() fails half way.
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit small = before;
  small.rlim_cur = 100000;
  setrlimit(RLIMIT_FSIZE, &small);
  EXPECT_REFUSED(replace_file(path, noise(1 << 20)), "cannot be written: File too large");
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(contents_of(path), "old");
  EXPECT_EQ(folder.files(), 1u);
}

TEST(InputStream, SeesThroughGzip) {
  const TemporaryFolder folder;
  const std::string text = noise(700001);
  EXPECT_EQ(read_all(folder.write("plain", text)), text);
  EXPECT_EQ(read_all(folder.write("a.gz", gzip(text))), text);
  EXPECT_EQ(read_all(folder.write("no-ending", gzip(text))), text);
  // bgzip and `cat a.gz b.gz` make several members.
  EXPECT_EQ(read_all(folder.write("two.gz", gzip("first ") + gzip("second"))), "first second");
  EXPECT_EQ(read_all(folder.write("empty.gz", gzip(""))), "");
  EXPECT_EQ(read_all(folder.write("empty", "")), "");
}

TEST(InputStream, ReportsPositionInTheFile) {
  const TemporaryFolder folder;
  const std::string path = folder.write("a.gz", gzip(noise(700001)));
  InputStream input(path);
  const auto bytes = static_cast<int64_t>(std::filesystem::file_size(path));
  EXPECT_EQ(input.file_size(), bytes);
  int64_t last = 0;
  while (!input.peek().empty()) {
    input.consume(input.peek().size());
    EXPECT_GE(input.position(), last);
    last = input.position();
  }
  EXPECT_EQ(last, bytes);
}

TEST(InputStream, RefusesBadGzip) {
  const TemporaryFolder folder;
  const std::string packed = gzip(noise(700001));
  for (const size_t kept : {size_t{5}, size_t{18}, packed.size() / 2, packed.size() - 1}) {
    EXPECT_REFUSED(read_all(folder.write("cut.gz", packed.substr(0, kept))), "are truncated");
  }
  std::string flipped = packed;
  flipped[packed.size() - 6] ^= 1;  // in the CRC
  EXPECT_REFUSED(read_all(folder.write("flipped.gz", flipped)), "gzip data are damaged");
  EXPECT_REFUSED(read_all(folder.write("plain.gz", "no gzip")), "the content is not gzip");
}

TEST(LineReader, KnowsLineEnds) {
  const TemporaryFolder folder;
  using Lines = std::vector<std::string>;
  EXPECT_EQ(lines_of(folder.write("a", "one\ntwo\r\n\nfour")), (Lines{"one", "two", "", "four"}));
  EXPECT_EQ(lines_of(folder.write("b", "one\n")), (Lines{"one"}));
  EXPECT_EQ(lines_of(folder.write("c", "\n")), (Lines{""}));
  EXPECT_EQ(lines_of(folder.write("d", "")), (Lines{}));
  EXPECT_EQ(lines_of(folder.write("e", "a\rb\n")), (Lines{"a\rb"}));
  // Lines longer than a block, with a line end that falls on its edge.
  const std::string long_line((1 << 18) - 1, 'x');
  EXPECT_EQ(lines_of(folder.write("f", long_line + "\r\n" + long_line + long_line + "\nend\n")),
            (Lines{long_line, long_line + long_line, "end"}));
}

}  // namespace
}  // namespace sarissa
