// Event files, parsed back by a small reader of the same formats.
#include "sarissa/train/tensorboard.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <map>
#include <optional>

#include "tests/support/files.h"

namespace sarissa::train {
namespace {

namespace fs = std::filesystem;

template <class T>
T take(const std::string& bytes, size_t& at) {
  T value{};
  if (at + sizeof value > bytes.size()) throw std::runtime_error("the file ends early");
  std::memcpy(&value, bytes.data() + at, sizeof value);
  at += sizeof value;
  return value;
}

uint64_t take_varint(const std::string& bytes, size_t& at) {
  uint64_t value = 0;
  for (int shift = 0;; shift += 7) {
    const auto byte = take<uint8_t>(bytes, at);
    value |= uint64_t{byte & 0x7Fu} << shift;
    if (byte < 0x80) return value;
  }
}

// One message: field number to raw values; fixed-size values keep their bytes.
std::multimap<uint64_t, std::string> parse_message(const std::string& bytes) {
  std::multimap<uint64_t, std::string> fields;
  for (size_t at = 0; at < bytes.size();) {
    const uint64_t tag = take_varint(bytes, at);
    size_t count = 0;
    if (tag % 8 == 0) {
      fields.emplace(tag / 8, std::to_string(take_varint(bytes, at)));
      continue;
    }
    if (tag % 8 == 1) count = 8;
    if (tag % 8 == 2) count = take_varint(bytes, at);
    if (tag % 8 == 5) count = 4;
    if (count == 0 || at + count > bytes.size()) throw std::runtime_error("bad field");
    fields.emplace(tag / 8, bytes.substr(at, count));
    at += count;
  }
  return fields;
}

uint32_t unmask(uint32_t masked) {
  const uint32_t rotated = masked - 0xA282EAD8u;
  return rotated >> 17 | rotated << 15;
}

// The messages of a TFRecord file, with both CRCs checked.
std::vector<std::string> read_records(const std::string& file) {
  std::vector<std::string> records;
  for (size_t at = 0; at < file.size();) {
    const std::string length_bytes = file.substr(at, 8);
    const auto length = take<uint64_t>(file, at);
    EXPECT_EQ(unmask(take<uint32_t>(file, at)), crc32c(length_bytes));
    records.push_back(file.substr(at, length));
    at += length;
    EXPECT_EQ(unmask(take<uint32_t>(file, at)), crc32c(records.back()));
  }
  return records;
}

template <class T>
T as(const std::string& bytes) {
  size_t at = 0;
  return take<T>(bytes, at);
}

std::string only_file(const test::TemporaryFolder& folder) {
  std::string found;
  for (const auto& entry : fs::directory_iterator(folder / "")) found = entry.path().string();
  return found;
}

TEST(TensorBoard, Crc32cMatchesPublishedValues) {
  // RFC 3720, appendix B.4.
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8A9136AAu);
  EXPECT_EQ(crc32c(std::string(32, '\xFF')), 0x62A8AB43u);
  EXPECT_EQ(crc32c("123456789"), 0xE3069283u);
}

TEST(TensorBoard, WritesVersionThenScalars) {
  const test::TemporaryFolder folder;
  {
    EventWriter writer(folder / "", 0);
    writer.scalars(300, {{"train/loss", 1.5}, {"train/lr", 1e-3}});
  }
  const std::string path = only_file(folder);
  EXPECT_NE(path.find("events.out.tfevents."), std::string::npos);
  const auto records = read_records(test::contents_of(path));
  ASSERT_EQ(records.size(), 2u);
  EXPECT_EQ(parse_message(records[0]).find(3)->second, "brain.Event:2");
  const auto event = parse_message(records[1]);
  EXPECT_GT(as<double>(event.find(1)->second), 1.6e9);  // wall time, seconds since 1970
  EXPECT_EQ(event.find(2)->second, "300");
  const auto summary = parse_message(event.find(5)->second);
  ASSERT_EQ(summary.count(1), 2u);
  std::map<std::string, float> values;
  for (const auto& [number, bytes] : summary) {
    const auto value = parse_message(bytes);
    values[value.find(1)->second] = as<float>(value.find(2)->second);
  }
  EXPECT_EQ(values["train/loss"], 1.5f);
  EXPECT_EQ(values["train/lr"], 1e-3f);
}

TEST(TensorBoard, ResumeTellsFromWhichStepToForget) {
  const test::TemporaryFolder folder;
  { EventWriter writer(folder / "", 41); }
  const auto records = read_records(test::contents_of(only_file(folder)));
  ASSERT_EQ(records.size(), 2u);
  const auto event = parse_message(records[1]);
  EXPECT_EQ(event.find(2)->second, "41");
  EXPECT_EQ(parse_message(event.find(7)->second).find(1)->second, "1");  // SessionLog START
}

TEST(TensorBoard, UnwritableFolderIsNamed) {
  EXPECT_REFUSED(EventWriter("/nonexistent/folder", 0), "/nonexistent/folder");
}

}  // namespace
}  // namespace sarissa::train
