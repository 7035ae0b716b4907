#include "sarissa/model/config.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "sarissa/base/json.h"
#include "sarissa/base/toml.h"
#include "tests/support/files.h"

namespace sarissa::model {
namespace {

TEST(ModelConfig, Evo2PresetsHaveTheReleasedModelsParameterCounts) {
  // Unique parameters of the released checkpoints.
  const std::map<std::string, int64_t> released = {
      {"evo2-1b-base", 1'107'989'760}, {"evo2-7b-base", 6'481'059'584},
      {"evo2-7b-262k", 6'481'059'584}, {"evo2-7b", 6'581'722'880},
      {"evo2-20b", 19'738'780'160},    {"evo2-40b-base", 40'331'142'144},
      {"evo2-40b", 41'117'574'144},
  };
  for (const auto& [name, count] : released) {
    EXPECT_EQ(parameter_count(preset(name)), count) << name;
  }
}

std::vector<int64_t> blocks_of(const ModelConfig& config, MixerKind kind) {
  std::vector<int64_t> blocks;
  const auto kinds = config.layers();
  for (size_t i = 0; i < kinds.size(); ++i) {
    if (kinds[i] == kind) blocks.push_back(static_cast<int64_t>(i));
  }
  return blocks;
}

TEST(ModelConfig, Evo2PresetsHaveTheReleasedModelsLayers) {
  using Blocks = std::vector<int64_t>;
  EXPECT_EQ(blocks_of(preset("evo2-1b-base"), MixerKind::kAttention), (Blocks{3, 10, 17, 24}));
  EXPECT_EQ(blocks_of(preset("evo2-7b"), MixerKind::kAttention), (Blocks{3, 10, 17, 24, 31}));
  EXPECT_EQ(blocks_of(preset("evo2-7b"), MixerKind::kHyenaLI),
            (Blocks{2, 6, 9, 13, 16, 20, 23, 27, 30}));
  EXPECT_EQ(blocks_of(preset("evo2-20b"), MixerKind::kAttention), (Blocks{3, 10, 17}));
  const ModelConfig large = preset("evo2-40b");
  EXPECT_EQ(blocks_of(large, MixerKind::kAttention), (Blocks{3, 10, 17, 24, 31, 35, 42, 49}));
  EXPECT_EQ(blocks_of(large, MixerKind::kHyenaLI),
            (Blocks{2, 6, 9, 13, 16, 20, 23, 27, 30, 34, 38, 41, 45, 48}));
  EXPECT_EQ(blocks_of(large, MixerKind::kHyenaMR),
            (Blocks{1, 5, 8, 12, 15, 19, 22, 26, 29, 33, 37, 40, 44, 47}));
  EXPECT_EQ(blocks_of(large, MixerKind::kHyenaSE),
            (Blocks{0, 4, 7, 11, 14, 18, 21, 25, 28, 32, 36, 39, 43, 46}));
}

TEST(ModelConfig, FamiliesAreMatchedWithinOnePercent) {
  const std::map<std::string, double> sizes = {{"1m", 1e6}, {"130m", 130e6}, {"1.3b", 1.37e9}};
  for (const auto& [suffix, size] : sizes) {
    const auto reference = static_cast<double>(parameter_count(preset("transformer-" + suffix)));
    EXPECT_NEAR(reference / size, 1.0, 0.15) << suffix;
    for (const char* family : {"sh2-", "phalanx-", "swa-"}) {
      const auto count = static_cast<double>(parameter_count(preset(family + suffix)));
      EXPECT_NEAR(count / reference, 1.0, 0.01) << family << suffix;
      EXPECT_EQ(preset(family + suffix).layers().size(),
                preset("transformer-" + suffix).layers().size());
    }
  }
}

TEST(ModelConfig, EveryPresetIsValidAndSurvivesTomlAndJson) {
  EXPECT_GE(preset_names().size(), 20u);
  for (const auto& name : preset_names()) {
    const ModelConfig config = preset(name);
    EXPECT_NO_THROW(config.validate()) << name;
    ModelConfig read;
    const std::string text = format_toml("model", list_fields(config));
    set_fields(read, parse_toml(text, "t").at(0), "t");
    EXPECT_EQ(format_toml("model", list_fields(read)), text) << name;
    ModelConfig from_json;
    fields_from_json(from_json, fields_to_json(config), "t");
    EXPECT_EQ(format_toml("model", list_fields(from_json)), text) << name;
  }
}

TEST(ModelConfig, EveryMemberIsAField) {
  // A member without a field would be lost in files. All members are 8 bytes, strings 32, bools
  // padded into 8: count what the fields cover.
  size_t bytes = 0;
  size_t bools = 0;
  for (const auto& field : list_fields(ModelConfig{})) {
    if (std::holds_alternative<bool>(field.value)) {
      ++bools;
    } else {
      bytes += std::holds_alternative<std::string>(field.value) ? sizeof(std::string) : 8;
    }
  }
  EXPECT_EQ(bools, 3u);
  EXPECT_EQ(sizeof(ModelConfig), bytes + 8 * 2);  // two neighbours share 8 bytes, one stands alone
}

TEST(ModelConfig, UnknownPresetsSuggestTheNearest) {
  EXPECT_REFUSED(preset("evo2-7B"), "did you mean 'evo2-7b'?");
  EXPECT_REFUSED(preset("zzzzzzzzzzzz"), "quickstart");
}

TEST(ModelConfig, PatternsRepeat) {
  ModelConfig config;
  config.pattern = " SE  PHX SWA ";
  config.repeat = 2;
  EXPECT_EQ(config.layers(),
            (std::vector<MixerKind>{MixerKind::kHyenaSE, MixerKind::kPhalanx,
                                    MixerKind::kWindowedAttention, MixerKind::kHyenaSE,
                                    MixerKind::kPhalanx, MixerKind::kWindowedAttention}));
}

TEST(ModelConfig, ErrorsNameKeyValueAndFix) {
  const auto refused = [](auto change, const char* part) {
    ModelConfig config;
    config.pattern = "SE MR LI ATT SWA PHX";
    EXPECT_NO_THROW(config.validate());
    change(config);
    EXPECT_REFUSED(config.validate(), part);
    EXPECT_THROW(config.validate(), UsageError);
  };
  using C = ModelConfig&;
  refused([](C c) { c.pattern = "SE AT"; }, "unknown mixer 'AT'");
  refused([](C c) { c.pattern = " "; }, "model.pattern");
  refused([](C c) { c.repeat = 0; }, "model.repeat = 0");
  refused([](C c) { c.repeat = 1000; }, "model.repeat = 1000");
  refused([](C c) { c.dim = 0; }, "model.dim = 0");
  refused([](C c) { c.dim = INT64_MAX; }, "model.dim");
  refused([](C c) { c.vocab_size = -1; }, "model.vocab_size = -1");
  refused([](C c) { c.mlp_dim = -8; }, "model.mlp_dim = -8");
  refused([](C c) { c.mlp = "swiglo"; }, "did you mean 'swiglu'?");
  refused([](C c) { c.first_mlp = "relu"; }, "model.first_mlp");
  refused([](C c) { c.norm_eps = 0; }, "model.norm_eps = 0");
  refused([](C c) { c.heads = 3; }, "model.heads = 3 does not divide model.dim = 256");
  refused([](C c) { c.heads = 3; }, "nearest that does is 2");
  refused([](C c) { c.heads = 0; }, "model.heads = 0");
  refused([](C c) { c.heads = 256; }, "odd width 1");
  refused([](C c) { c.kv_heads = 3; }, "model.kv_heads = 3");
  refused([](C c) { c.rope_base = -1; }, "model.rope_base = -1");
  refused([](C c) { c.rope_scale = 0; }, "model.rope_scale = 0");
  refused([](C c) { c.swa_window = 0; }, "model.swa_window = 0");
  refused([](C c) { c.phx_head_width = 48; }, "model.phx_head_width = 48");
  refused([](C c) { c.phx_kv_heads = 5; }, "model.phx_kv_heads = 5");
  refused([](C c) { c.phx_window = -1; }, "model.phx_window = -1");
  refused([](C c) { c.phx_decay_max = 1.5; }, "model.phx_decay_max = 1.5");
  refused([](C c) { c.se_taps = 0; }, "model.se_taps = 0");
  refused([](C c) { c.se_groups = 3; }, "model.se_groups = 3");
  refused([](C c) { c.mr_taps = 0; }, "model.mr_taps = 0");
  refused([](C c) { c.mr_groups = 257; }, "model.mr_groups = 257");
  refused([](C c) { c.mr_decay = "fast"; }, "model.mr_decay = \"fast\"");
  refused([](C c) { c.mr_decay_length = 64; }, "model.mr_decay_length = 64");
  refused([](C c) { c.li_modes = 0; }, "model.li_modes = 0");
  refused([](C c) { c.li_groups = 7; }, "model.li_groups = 7");
  refused([](C c) { c.dim = 8, c.heads = 4, c.phx_head_width = 8; }, "model.se_groups = 0");
}

TEST(ModelConfig, SettingsOfAbsentMixersDoNotMatter) {
  ModelConfig config;
  config.pattern = "ATT";
  config.dim = 60;  // not a multiple of 16
  config.heads = 3;
  config.se_taps = 0;
  config.phx_head_width = 7;
  EXPECT_NO_THROW(config.validate());
  EXPECT_GT(parameter_count(config), 0);
}

}  // namespace
}  // namespace sarissa::model
