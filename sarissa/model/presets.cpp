// Named models. Families with the same suffix have the same width, depth and MLP and within 1% the
// same number of parameters, so their speed and loss can be compared.
#include <functional>
#include <string>
#include <utility>

#include "sarissa/base/error.h"
#include "sarissa/model/config.h"

namespace sarissa::model {
namespace {

// Evo 2's stripe (arXiv 2503.01868, section 3.2): attention at block 3 and every 7 blocks after it.
// Whole stripes make 7 blocks each; the last may be cut short.
std::string stripe(int64_t blocks) {
  static constexpr const char* kStripe[] = {"SE", "MR", "LI", "ATT", "SE", "MR", "LI"};
  std::string pattern;
  for (int64_t i = 0; i < blocks; ++i) pattern += (i > 0 ? " " : "") + std::string(kStripe[i % 7]);
  return pattern;
}

// Byte models to try on a CPU.
ModelConfig small(const std::string& pattern, int64_t repeat) {
  ModelConfig config;
  config.pattern = pattern;
  config.repeat = repeat;
  config.dim = 128;
  config.heads = 4;
  config.swa_window = 128;
  return config;
}

// Byte models of about 130M parameters.
ModelConfig medium(const std::string& pattern, int64_t repeat) {
  ModelConfig config;
  config.pattern = pattern;
  config.repeat = repeat;
  config.dim = 768;
  config.heads = 12;
  return config;
}

// The size of the Transformer++ of 1.37B parameters in the Sliding Window Recurrences paper
// (arXiv 2512.13921): 24 blocks of width 2048 with an untied vocabulary of 32,768.
ModelConfig large(const std::string& pattern, int64_t repeat) {
  ModelConfig config;
  config.pattern = pattern;
  config.repeat = repeat;
  config.dim = 2048;
  config.heads = 16;
  config.mlp_dim = 5632;
  config.vocab_size = 32768;
  config.tie_embeddings = false;
  return config;
}

struct Evo2Size {
  int64_t dim, blocks, mlp_dim, groups;
  double rope_base, rope_scale;
};

// The released Evo 2 models. Their MR taps are stored with the decay multiplied in (mr_decay none),
// their rotary frequencies were rounded to bf16, block 0 has a GELU MLP and the others none.
ModelConfig evo2(const Evo2Size& size) {
  ModelConfig config;
  config.pattern = stripe(size.blocks);
  config.dim = size.dim;
  config.heads = size.dim / 128;
  config.mlp_dim = size.mlp_dim;
  config.mlp = "bilinear";
  config.first_mlp = "gelu";
  config.output_bias = true;
  config.rope_base = size.rope_base;
  config.rope_scale = size.rope_scale;
  config.rope_bf16 = true;
  config.se_groups = size.groups;
  config.mr_groups = size.groups;
  config.mr_decay = "none";
  return config;
}

// 50 blocks: the stripe of the 7-block period up to block 34, then attention at 35, 42 and 49.
ModelConfig evo2_40b(int64_t mlp_dim, double rope_scale) {
  ModelConfig config = evo2({8192, 50, mlp_dim, 512, 1e6, rope_scale});
  config.pattern =
      "SE MR LI ATT SE MR LI SE MR LI ATT SE MR LI SE MR LI ATT SE MR LI SE MR LI ATT SE MR LI "
      "SE MR LI ATT SE MR LI ATT SE MR LI SE MR LI ATT SE MR LI SE MR LI ATT";
  return config;
}

using Preset = std::pair<const char*, std::function<ModelConfig()>>;

const std::vector<Preset>& presets() {
  static const std::vector<Preset> all = {
      {"quickstart",
       [] {
         ModelConfig config = small("SE MR LI ATT", 1);
         config.dim = 96;  // a run of two minutes on two cores
         return config;
       }},
      {"sh2-7layer", [] { return small(stripe(7), 1); }},
      {"sh2-1m", [] { return small("SE MR LI ATT", 1); }},
      {"phalanx-1m", [] { return small("PHX ATT", 2); }},
      {"swa-1m", [] { return small("SWA ATT", 2); }},
      {"transformer-1m", [] { return small("ATT", 4); }},
      {"sh2-130m", [] { return medium(stripe(18), 1); }},
      {"phalanx-130m", [] { return medium("PHX ATT", 9); }},
      {"swa-130m", [] { return medium("SWA ATT", 9); }},
      {"transformer-130m", [] { return medium("ATT", 18); }},
      {"sh2-1.3b", [] { return large(stripe(24), 1); }},
      {"phalanx-1.3b", [] { return large("PHX ATT", 12); }},
      {"swa-1.3b", [] { return large("SWA ATT", 12); }},
      {"transformer-1.3b", [] { return large("ATT", 24); }},
      {"evo2-1b-base",
       [] {
         return evo2({1920, 25, 5120, 128, 1e4, 1});
       }},
      {"evo2-7b-base",
       [] {
         return evo2({4096, 32, 11008, 256, 1e4, 1});
       }},
      {"evo2-7b-262k",
       [] {
         return evo2({4096, 32, 11008, 256, 1e4, 32});
       }},
      {"evo2-7b",
       [] {
         return evo2({4096, 32, 11264, 256, 1e4, 128});
       }},
      {"evo2-20b",
       [] {
         return evo2({8192, 24, 22528, 512, 1e6, 128});
       }},
      {"evo2-40b-base", [] { return evo2_40b(21888, 1); }},
      {"evo2-40b", [] { return evo2_40b(22528, 128); }},
  };
  return all;
}

}  // namespace

std::vector<std::string> preset_names() {
  std::vector<std::string> names;
  for (const auto& [name, make] : presets()) names.push_back(name);
  return names;
}

ModelConfig preset(const std::string& name) {
  for (const auto& [known, make] : presets()) {
    if (name == known) return make();
  }
  std::string list;
  for (const auto& known : preset_names()) list += " " + known;
  throw UsageError(str("preset '", name, "': unknown", did_you_mean(name, preset_names()),
                       "; the presets are", list));
}

}  // namespace sarissa::model
