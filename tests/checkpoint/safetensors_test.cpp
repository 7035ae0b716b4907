#include "sarissa/checkpoint/safetensors.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstring>

#include "tests/support/compare.h"
#include "tests/support/files.h"

namespace sarissa::checkpoint {
namespace {

using test::bit_equal;
using test::TemporaryFolder;

/// A file of this header and these data bytes.
std::string file_of(const std::string& header, const std::string& data,
                    std::optional<uint64_t> claimed_length = std::nullopt) {
  const uint64_t length = claimed_length.value_or(header.size());
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes + header + data;
}

const char* kTwoTensors = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                          R"("b":{"dtype":"U8","shape":[4],"data_offsets":[8,12]}})";

void expect_refused(const std::string& bytes, const std::string& part) {
  const TemporaryFolder folder;
  const std::string path = folder.write("x.safetensors", bytes);
  EXPECT_REFUSED(SafetensorsFile{path}, part);
  EXPECT_REFUSED(SafetensorsFile{path}, "x.safetensors");
}

TEST(Safetensors, RoundTripKeepsEveryDtypeShapeAndBit) {
  const TemporaryFolder folder;
  NamedTensors tensors;
  const at::Tensor values = test::randn({3, 5, 2}, 1) * 100;
  for (const auto dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt,
                           at::kShort, at::kChar, at::kByte, at::kBool, at::kFloat8_e4m3fn}) {
    tensors.emplace_back(c10::toString(dtype), values.to(at::kLong).abs().to(dtype));
  }
  tensors.emplace_back("scalar", at::scalar_tensor(3.5));
  tensors.emplace_back("empty", at::empty({0, 7}));
  tensors.emplace_back("nan", at::full({3}, std::nan("7")));
  tensors.emplace_back("strided", values.transpose(0, 2));
  tensors.emplace_back("expanded", at::ones({1}).expand({4}));
  tensors.emplace_back("name with \"quotes\", / and é", at::ones({1}));
  const std::string path = folder / "x.safetensors";
  write_safetensors(path, tensors, {{"key", "value"}, {"empty", ""}});

  const SafetensorsFile file(path);
  EXPECT_EQ(file.names().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    EXPECT_TRUE(file.contains(name)) << name;
    EXPECT_TRUE(bit_equal(file.tensor(name), tensor)) << name;
    EXPECT_EQ(at::IntArrayRef(file.shape(name)), tensor.sizes()) << name;
    EXPECT_EQ(file.dtype(name), tensor.scalar_type()) << name;
  }
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"key", "value"}, {"empty", ""}}));
}

TEST(Safetensors, NamesKeepTheOrderOfWriting) {
  const TemporaryFolder folder;
  write_safetensors(folder / "x",
                    {{"z", at::ones({1})}, {"a", at::ones({2})}, {"m", at::ones({3})}});
  EXPECT_EQ(SafetensorsFile(folder / "x").names(), (std::vector<std::string>{"z", "a", "m"}));
}

TEST(Safetensors, EmptyFileOfTensorsRoundTrips) {
  const TemporaryFolder folder;
  write_safetensors(folder / "x", {});
  EXPECT_TRUE(SafetensorsFile(folder / "x").names().empty());
}

TEST(Safetensors, TensorsOutliveTheFile) {
  const TemporaryFolder folder;
  const at::Tensor want = test::randn({1000}, 2);
  write_safetensors(folder / "x", {{"a", want}});
  at::Tensor got;
  {
    SafetensorsFile file(folder / "x");
    const SafetensorsFile moved(std::move(file));
    got = moved.tensor("a");
  }
  std::filesystem::remove(folder / "x");
  EXPECT_TRUE(bit_equal(got, want));
}

TEST(Safetensors, UnknownNamesSuggestTheNearest) {
  const TemporaryFolder folder;
  write_safetensors(folder / "x", {{"weight", at::ones({1})}});
  const SafetensorsFile file(folder / "x");
  EXPECT_REFUSED(file.tensor("wieght"), "did you mean 'weight'?");
  EXPECT_REFUSED(file.shape("none"), "has no tensor 'none'");
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const std::string whole = file_of(kTwoTensors, std::string(12, 'x'));
  {
    const TemporaryFolder folder;
    EXPECT_NO_THROW(SafetensorsFile{folder.write("x", whole)});
  }
  for (size_t length = 0; length < whole.size(); ++length) {
    expect_refused(whole.substr(0, length), "");
  }
  expect_refused(whole + "x", "1 bytes after the last tensor");
}

TEST(Safetensors, FlippedBitsOfTheHeaderAreRefusedOrHarmless) {
  const std::string whole = file_of(kTwoTensors, std::string(12, 'x'));
  const TemporaryFolder folder;
  int refused = 0, accepted = 0;
  for (size_t bit = 0; bit < 8 * (8 + std::strlen(kTwoTensors)); bit += 3) {
    std::string damaged = whole;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    try {
      const SafetensorsFile file(folder.write("x", damaged));
      size_t bytes = 0;
      for (const auto& name : file.names()) bytes += file.tensor(name).nbytes();
      EXPECT_EQ(bytes, 12u) << "bit " << bit;  // a renamed tensor or another dtype of the same size
      ++accepted;
    } catch (const Error&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 5 * accepted);
}

TEST(Safetensors, HostileHeadersAreRefused) {
  const std::string data(12, 'x');
  const auto entry = [&](const std::string& text) { return file_of("{\"a\":" + text + "}", data); };
  expect_refused(file_of(kTwoTensors, data, UINT64_MAX), "not a safetensors file");
  expect_refused(file_of(kTwoTensors, data, 1000), "not a safetensors file");
  expect_refused(file_of("", ""), "not valid JSON");
  expect_refused(file_of("[]", ""), "expected a JSON object");
  expect_refused(file_of("{\"a\":", ""), "not valid JSON");
  expect_refused(file_of("{\"\xff\":1}", ""), "not valid JSON");
  expect_refused(entry("1"), "tensor 'a'");
  expect_refused(entry(R"({"dtype":"F32","shape":[3]})"), "data_offsets");
  expect_refused(entry(R"({"dtype":"F33","shape":[3],"data_offsets":[0,12]})"), "unknown dtype");
  expect_refused(entry(R"({"dtype":7,"shape":[3],"data_offsets":[0,12]})"), "malformed");
  expect_refused(entry(R"({"dtype":"F32","shape":[-3],"data_offsets":[0,12]})"), "shape");
  expect_refused(entry(R"({"dtype":"F32","shape":[3.0],"data_offsets":[0,12]})"), "shape");
  expect_refused(entry(R"({"dtype":"F32","shape":[3],"data_offsets":[0,12,12]})"), "malformed");
  expect_refused(entry(R"({"dtype":"F32","shape":[3],"data_offsets":[-12,0]})"), "malformed");
  expect_refused(entry(R"({"dtype":"F32","shape":[3],"data_offsets":[12,0]})"), "outside");
  expect_refused(entry(R"({"dtype":"F32","shape":[4],"data_offsets":[0,16]})"), "outside");
  expect_refused(entry(R"({"dtype":"F32","shape":[2],"data_offsets":[0,12]})"),
                 "size that differs");
  expect_refused(entry(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})"), "4 bytes after");
  expect_refused(entry(R"({"dtype":"F32","shape":[2],"data_offsets":[4,12]})"), "no tensor");
  expect_refused(entry(R"({"dtype":"F32","shape":[4611686018427387905,4],"data_offsets":[0,12]})"),
                 "overflows");
  expect_refused(entry(R"({"dtype":"F32","shape":[0,4611686018427387904,4611686018427387904],)"
                       R"("data_offsets":[0,0]})"),
                 "overflows");
  expect_refused(entry(R"({"dtype":"F32","shape":[[[[3]]]],"data_offsets":[0,12]})"), "nested");
  expect_refused(file_of(R"({"__metadata__":{"a":1}})", ""), "not a string");
  expect_refused(file_of(R"({"__metadata__":[]})", ""), "__metadata__");
  std::string many = R"({"a":{"dtype":"U8","shape":[1)";
  for (int i = 0; i < 64; ++i) many += ",1";
  expect_refused(file_of(many + R"(],"data_offsets":[0,1]}})", "x"), "more than 64");
  std::string deep;
  for (int i = 0; i < 1'000'000; ++i) deep += "[";
  expect_refused(file_of("{\"a\":" + deep, ""), "nested too deeply");
}

TEST(Safetensors, OverlapsAndDuplicatesAreRefused) {
  const std::string data(12, 'x');
  expect_refused(file_of(R"({"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},)"
                         R"("b":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}})",
                         data),
                 "overlap");
  expect_refused(file_of(R"({"a":{"dtype":"U8","shape":[12],"data_offsets":[0,12]},)"
                         R"("b":{"dtype":"U8","shape":[12],"data_offsets":[0,12]}})",
                         data),
                 "overlap");
  // The JSON parser alone would keep the last of the two.
  expect_refused(file_of(R"({"a":{"dtype":"U8","shape":[12],"data_offsets":[0,12]},)"
                         R"("a":{"dtype":"I8","shape":[12],"data_offsets":[0,12]}})",
                         data),
                 "two keys 'a'");
}

TEST(Safetensors, ManyTensorsAreReadInReasonableTime) {
  std::string header = "{";
  constexpr int kCount = 50'000;
  for (int i = 0; i < kCount; ++i) {
    header += str(i == 0 ? "" : ",", "\"", i,
                  "\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[", i, ",", i + 1, "]}");
  }
  const TemporaryFolder folder;
  const std::string path = folder.write("x", file_of(header + "}", std::string(kCount, 'x')));
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(SafetensorsFile(path).names().size(), size_t{kCount});
  // A search through all earlier names for each would take minutes.
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
}

TEST(Safetensors, WritingSaysWhatIsWrong) {
  const TemporaryFolder folder;
  EXPECT_REFUSED(write_safetensors(folder / "none/x", {{"a", at::ones({1})}}), "none/x");
  EXPECT_REFUSED(write_safetensors(folder / "x", {{"a", at::ones({1})}, {"a", at::ones({1})}}),
                 "two tensors named 'a'");
  EXPECT_REFUSED(write_safetensors(folder / "x", {{"__metadata__", at::ones({1})}}),
                 "__metadata__");
  EXPECT_REFUSED(write_safetensors(folder / "x", {{"a", at::ones({1}, at::kComplexFloat)}}),
                 "dtype");
  if (std::filesystem::exists("/dev/full")) {
    EXPECT_REFUSED(write_safetensors("/dev/full", {{"a", at::ones({1})}}), "No space left");
  }
}

TEST(Safetensors, OpeningSaysWhatIsWrong) {
  const TemporaryFolder folder;
  EXPECT_REFUSED(SafetensorsFile{folder / "none"}, "cannot open");
  EXPECT_REFUSED(SafetensorsFile{folder / ""}, "not a regular file");
  EXPECT_REFUSED(SafetensorsFile{folder.write("x", "")}, "too short");
}

}  // namespace
}  // namespace sarissa::checkpoint
