#include "sarissa/infer/generate.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "sarissa/base/error.h"
#include "tests/support/compare.h"

namespace sarissa::infer {
namespace {

const std::vector<int64_t> kPrompt = {84, 111, 32, 98, 101, 44, 32, 111, 114, 32, 110, 111, 116};

// Every kind of mixer, with windows shorter than the texts of the tests.
model::Decoder small_decoder(at::ScalarType dtype = at::kDouble) {
  model::ModelConfig config;
  config.pattern = "SE MR LI PHX SWA ATT";
  config.dim = 32;
  config.heads = 2;
  config.swa_window = 6;
  config.mr_taps = 16;
  config.phx_window = 8;
  model::Decoder decoder(config, 7, at::kCPU, dtype);
  decoder.requires_grad(false);
  return decoder;
}

at::Tensor row(std::vector<int64_t> tokens) { return at::tensor(tokens, at::kLong).unsqueeze(0); }

TEST(Generate, GreedyEqualsRunningTheWholeTextForEveryToken) {
  const model::Decoder decoder = small_decoder();
  const Generation got = generate(decoder, kPrompt, {.tokens = 12, .sampling = {.temperature = 0}});
  std::vector<int64_t> text = kPrompt;
  for (size_t step = 0; step < 12; ++step) {
    const at::Tensor logits = decoder.forward(row(text)).select(1, -1).squeeze(0);
    const int64_t want = logits.argmax().item<int64_t>();
    ASSERT_EQ(got.tokens[step], want) << "step " << step;
    EXPECT_NEAR(got.logprobs[step], at::log_softmax(logits, 0)[want].item<double>(), 1e-5);
    text.push_back(want);
  }
}

TEST(Generate, PrefillMayBeCutAnywhere) {
  const model::Decoder decoder = small_decoder();
  GenerateOptions options{.tokens = 10, .sampling = {.seed = 2}};
  const Generation whole = generate(decoder, kPrompt, options);
  for (const int64_t chunk : {1, 2, 5, 12, 13, 14}) {
    options.prefill_chunk = chunk;
    EXPECT_EQ(generate(decoder, kPrompt, options).tokens, whole.tokens) << "chunk " << chunk;
  }
}

TEST(Generate, PromptsTogetherEqualPromptsAlone) {
  const model::Decoder decoder = small_decoder(at::kFloat);
  const GenerateOptions options{.tokens = 10, .sampling = {.seed = 3}};
  const std::vector<std::vector<int64_t>> prompts = {kPrompt, {65}, {}, {66, 67, 68}};
  const auto together = generate(decoder, prompts, options);
  ASSERT_EQ(together.size(), prompts.size());
  for (size_t i = 0; i < prompts.size(); ++i) {
    const Generation alone = generate(decoder, prompts[i], options);
    EXPECT_EQ(together[i].tokens, alone.tokens) << "prompt " << i;
    EXPECT_EQ(together[i].logprobs, alone.logprobs) << "prompt " << i;
  }
}

TEST(Generate, SeedsDecide) {
  const model::Decoder decoder = small_decoder(at::kFloat);
  GenerateOptions options{.tokens = 20, .sampling = {.seed = 3}};
  const Generation first = generate(decoder, kPrompt, options);
  EXPECT_EQ(generate(decoder, kPrompt, options).tokens, first.tokens);
  options.sampling.seed = 4;
  EXPECT_NE(generate(decoder, kPrompt, options).tokens, first.tokens);
}

TEST(Generate, EmptyPromptStartsADocument) {
  const model::Decoder decoder = small_decoder(at::kFloat);
  const GenerateOptions options{.tokens = 8, .sampling = {.seed = 1}};
  EXPECT_EQ(generate(decoder, std::vector<int64_t>{}, options).tokens,
            generate(decoder, std::vector<int64_t>{0}, options).tokens);
}

TEST(Generate, TellsEachTokenAsItIsDrawn) {
  const model::Decoder decoder = small_decoder(at::kFloat);
  std::vector<int64_t> seen;
  const Generation result =
      generate(decoder, kPrompt, {.tokens = 9}, [&](int64_t token) { seen.push_back(token); });
  EXPECT_EQ(seen, result.tokens);
  EXPECT_EQ(seen.size(), 9u);
  EXPECT_EQ(result.logprobs.size(), 9u);
}

TEST(Generate, StopsAtTheEndOfTheDocumentOnlyWhenAsked) {
  const model::Decoder decoder = small_decoder(at::kFloat);
  // Only id 0 can be drawn.
  GenerateOptions options{.tokens = 5, .sampling = {.vocabulary = 1}};
  EXPECT_EQ(generate(decoder, kPrompt, options).tokens, std::vector<int64_t>(5, 0));
  options.stop_at_end = true;
  EXPECT_EQ(generate(decoder, kPrompt, options).tokens, std::vector<int64_t>{0});
}

TEST(Generate, RefusesOptionsOutOfRange) {
  const model::Decoder decoder = small_decoder(at::kFloat);
  EXPECT_TRUE(generate(decoder, kPrompt, {.tokens = 0}).tokens.empty());
  EXPECT_THROW(generate(decoder, kPrompt, {.tokens = -1}), UsageError);
  EXPECT_THROW(generate(decoder, kPrompt, {.prefill_chunk = 0}), UsageError);
  EXPECT_THROW(generate(decoder, kPrompt, {.sampling = {.top_p = 2}}), UsageError);
}

}  // namespace
}  // namespace sarissa::infer
