#include "sarissa/infer/score.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>

#include "tests/support/compare.h"

namespace sarissa::infer {
namespace {

model::Decoder small_decoder(const std::string& pattern, int64_t dim, at::ScalarType dtype) {
  model::ModelConfig config;
  config.pattern = pattern;
  config.dim = dim;
  config.heads = 2;
  config.swa_window = 6;
  config.mr_taps = 16;
  config.phx_window = 8;
  model::Decoder decoder(config, 11, at::kCPU, dtype);
  decoder.requires_grad(false);
  return decoder;
}

// A text that does not repeat with a short period.
std::string dna(size_t length) {
  std::string text;
  uint32_t x = 1;
  for (size_t i = 0; i < length; ++i) {
    x = x * 1664525 + 1013904223;
    text += "ACGT"[x >> 30];
  }
  return text;
}

// log p of every token of `text` after the first from one forward pass; with BOS of every token.
std::vector<double> reference(const model::Decoder& decoder, const std::string& text, bool bos) {
  std::vector<int64_t> tokens;
  if (bos) tokens.push_back(0);
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  const at::Tensor logprobs =
      at::log_softmax(decoder.forward(at::tensor(tokens, at::kLong).unsqueeze(0)).squeeze(0), 1);
  std::vector<double> result;
  for (size_t t = 1; t < tokens.size(); ++t) {
    result.push_back(logprobs[t - 1][tokens[t]].item<double>());
  }
  return result;
}

TEST(Score, EqualsOneForwardPassForAnyChunk) {
  const model::Decoder decoder = small_decoder("SE MR LI PHX SWA ATT", 32, at::kDouble);
  const std::string text = dna(41);
  for (const bool bos : {false, true}) {
    const std::vector<double> want = reference(decoder, text, bos);
    for (const int64_t chunk : {1, 2, 7, 40, 41, 42, 4096}) {
      SCOPED_TRACE(testing::Message()
                   << "chunk " << chunk << (bos ? " with" : " without") << " BOS");
      std::vector<float> got;
      const Score score = score_record(decoder, read_string(text), {.chunk = chunk, .bos = bos},
                                       [&](const float* values, int64_t count) {
                                         got.insert(got.end(), values, values + count);
                                       });
      EXPECT_EQ(score.tokens, 41);
      ASSERT_EQ(score.terms, bos ? 41 : 40);
      ASSERT_EQ(got.size(), want.size());
      double sum = 0;
      for (size_t t = 0; t < want.size(); ++t) {
        EXPECT_NEAR(got[t], want[t], 1e-5);
        sum += want[t];
      }
      EXPECT_NEAR(score.sum, sum, 1e-4);
      EXPECT_DOUBLE_EQ(score.mean(), score.sum / score.terms);
    }
  }
}

TEST(Score, CountsBytesOfUtf8) {
  const model::Decoder decoder = small_decoder("SE", 32, at::kFloat);
  const Score score = score_record(decoder, read_string("g\u00e9n\u00e9"), {});
  EXPECT_EQ(score.tokens, 6);
  EXPECT_EQ(score.terms, 5);
}

TEST(Score, ShortRecordsHaveNoTermsWithoutBos) {
  const model::Decoder decoder = small_decoder("SE", 32, at::kFloat);
  for (const std::string text : {"", "A"}) {
    const Score score = score_record(decoder, read_string(text), {});
    EXPECT_EQ(score.terms, 0);
    EXPECT_EQ(score.sum, 0);
    EXPECT_TRUE(std::isnan(score.mean()));
  }
  EXPECT_EQ(score_record(decoder, read_string("A"), {.bos = true}).terms, 1);
  EXPECT_EQ(score_record(decoder, read_string(""), {.bos = true}).terms, 0);
}

TEST(Score, Bfloat16StaysNearFloat32) {
  const Score want =
      score_record(small_decoder("SE MR LI PHX", 32, at::kFloat), read_string(dna(300)), {});
  const Score got =
      score_record(small_decoder("SE MR LI PHX", 32, at::kBFloat16), read_string(dna(300)), {});
  EXPECT_NEAR(got.mean(), want.mean(), 0.01);
}

// Largest resident memory of this process so far, in KiB.
int64_t peak_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stoll(line.substr(6));
  }
  return -1;
}

TEST(Score, MemoryDoesNotGrowWithTheRecord) {
  const model::Decoder decoder = small_decoder("SE MR LI PHX SWA", 16, at::kFloat);
  const auto score_bases = [&](int64_t bases) {
    int64_t left = bases;
    const std::string piece = dna(1 << 12);
    const ReadPiece read = [&](size_t limit) {
      const int64_t count = std::min<int64_t>(left, std::min(limit, piece.size()));
      left -= count;
      return piece.substr(0, count);
    };
    EXPECT_EQ(score_record(decoder, read, {.chunk = 512}).terms, bases - 1);
    return peak_memory();
  };
  const int64_t short_record = score_bases(100'000);
  const int64_t long_record = score_bases(300'000);
  ASSERT_GT(short_record, 0);
  // Keeping one float per channel of the 200,000 more bases would take 12,500 KiB; the allocator's
  // own ups and downs take less than half of that.
  EXPECT_LE(long_record - short_record, 6'000) << "KiB";
}

}  // namespace
}  // namespace sarissa::infer
