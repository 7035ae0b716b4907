#include "sarissa/infer/footprint.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "sarissa/model/decoder.h"

namespace sarissa::infer {
namespace {

model::ModelConfig mixed_config() {
  model::ModelConfig config;
  config.pattern = "SE MR LI PHX SWA ATT SE";
  config.dim = 32;
  config.heads = 4;
  config.kv_heads = 2;
  config.swa_window = 6;
  config.mr_taps = 16;
  config.phx_window = 8;
  config.first_mlp = "gelu";
  return config;
}

TEST(Footprint, StateBytesAreWhatADecoderHolds) {
  for (const std::string letter : {"SE", "MR", "LI", "PHX", "SWA", "ATT"}) {
    model::ModelConfig config = mixed_config();
    config.pattern = letter;
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      model::Decoder decoder(config, 1, at::kCPU, dtype);
      decoder.requires_grad(false);
      model::State state = decoder.initial_state(1);
      int64_t tokens = 0;
      for (const int64_t count : {1, 4, 20}) {
        decoder.hidden(at::full({1, count}, 65, at::kLong), &state);
        tokens += count;
        EXPECT_EQ(state.bytes(), state_bytes(config, tokens, c10::elementSize(dtype)))
            << letter << " after " << tokens << " tokens in " << c10::toString(dtype);
      }
    }
  }
}

TEST(Footprint, WeightBytesAreWhatADecoderHolds) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const model::Decoder decoder(mixed_config(), 1, at::kCPU, dtype);
    int64_t bytes = 0;
    for (const auto& parameter : decoder.parameters()) bytes += parameter.value.nbytes();
    EXPECT_EQ(weight_bytes(mixed_config(), c10::elementSize(dtype)), bytes);
  }
}

TEST(Footprint, StateIsAFixedPartAndKeysAndValues) {
  const model::ModelConfig config = mixed_config();
  for (const int64_t tokens : {6, 7, 1000}) {
    EXPECT_EQ(state_bytes(config, tokens, 2),
              fixed_state_bytes(config, 2) + tokens * kv_bytes_per_token(config, 2));
  }
  EXPECT_EQ(kv_bytes_per_token(config, 2), 2 * 2 * 8 * 2);  // K and V, 2 heads, width 8, 2 bytes
}

TEST(Footprint, MixersMlpsAndNormsMakeUpTheModel) {
  const model::ModelConfig config = mixed_config();
  int64_t sum = config.vocab_size * config.dim + config.dim;  // tied embedding, final norm
  for (const MixerSummary& mixer : mixer_summaries(config)) {
    const int64_t mlp_and_norms = 3 * config.dim * config.resolved_mlp_dim() + 2 * config.dim;
    sum += mixer.layers * (mixer.parameters_per_mixer + mlp_and_norms);
  }
  EXPECT_EQ(sum, model::parameter_count(config));
}

TEST(Footprint, MixersComeInOrderOfFirstAppearance) {
  const auto mixers = mixer_summaries(mixed_config());
  ASSERT_EQ(mixers.size(), 6u);
  EXPECT_EQ(mixers[0].kind, model::MixerKind::kHyenaSE);
  EXPECT_EQ(mixers[0].layers, 2);
  EXPECT_EQ(mixers[5].kind, model::MixerKind::kAttention);
}

}  // namespace
}  // namespace sarissa::infer
