#include "sarissa/model/config.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "sarissa/base/error.h"

namespace sarissa::model {
namespace {

constexpr MixerKind kKinds[] = {MixerKind::kHyenaSE,   MixerKind::kHyenaMR,
                                MixerKind::kHyenaLI,   MixerKind::kPhalanx,
                                MixerKind::kAttention, MixerKind::kWindowedAttention};

// Far above any real model; with them no product of sizes overflows 64 bits.
constexpr int64_t kMaxWidth = int64_t{1} << 20;
constexpr int64_t kMaxVocabulary = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxSteps = int64_t{1} << 40;

void check_range(const char* key, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    throw UsageError(str("model.", key, " = ", value, ": expected ", low, " to ", high));
  }
}

void check_positive(const char* key, double value) {
  if (!(value > 0) || !std::isfinite(value)) {
    throw UsageError(str("model.", key, " = ", value, ": expected a number above 0"));
  }
}

void check_choice(const char* key, const std::string& value,
                  const std::vector<std::string>& choices) {
  if (std::find(choices.begin(), choices.end(), value) != choices.end()) return;
  std::string list;
  for (const auto& choice : choices) list += (list.empty() ? "" : ", ") + choice;
  throw UsageError(str("model.", key, " = \"", value, "\": expected one of ", list,
                       did_you_mean(value, choices)));
}

/// The nearest divisor of n to `wanted`, for messages.
int64_t nearest_divisor(int64_t n, int64_t wanted) {
  for (int64_t distance = 0; distance < n; ++distance) {
    if (wanted - distance >= 1 && n % (wanted - distance) == 0) return wanted - distance;
    if (n % (wanted + distance) == 0) return wanted + distance;
  }
  return 1;
}

/// `key` must divide n (named `whole`, e.g. "model.dim").
void check_divides(const char* key, int64_t value, const char* whole, int64_t n) {
  check_range(key, value, 1, n);
  if (n % value != 0) {
    throw UsageError(str("model.", key, " = ", value, " does not divide ", whole, " = ", n,
                         "; the nearest that does is ", nearest_divisor(n, value)));
  }
}

/// Groups of a Hyena filter, where 0 stands for `standard`.
void check_groups(const char* key, int64_t value, int64_t resolved, int64_t dim) {
  check_range(key, value, 0, dim);
  if (resolved >= 1 && dim % resolved == 0) return;
  throw UsageError(str("model.", key, " = ", value, ": ", resolved,
                       " groups do not divide dim = ", dim, "; the nearest that do are ",
                       nearest_divisor(dim, std::max<int64_t>(resolved, 1))));
}

int64_t mixer_parameters(const ModelConfig& config, MixerKind kind) {
  const int64_t dim = config.dim;
  const int64_t output = dim * dim + (config.output_bias ? dim : 0);
  const int64_t hyena = 3 * dim * dim + 3 * dim * 3 + output;  // projection, featurizer, output
  switch (kind) {
    case MixerKind::kPhalanx: {
      const int64_t gates =
          config.phx_heads() + 2 * config.resolved_phx_kv_heads() * config.phx_head_width;
      return (gates + dim) * dim + gates + output;
    }
    case MixerKind::kHyenaSE:
      return hyena + config.resolved_se_groups() * config.se_taps;
    case MixerKind::kHyenaMR:
      return hyena + config.resolved_mr_groups() * config.mr_taps + dim;
    case MixerKind::kHyenaLI:
      return hyena + 2 * config.resolved_li_groups() * config.li_modes + dim;
    case MixerKind::kAttention:
    case MixerKind::kWindowedAttention: {
      const int64_t kv = config.resolved_kv_heads() * (dim / config.heads);
      return (dim + 2 * kv) * dim + output;
    }
  }
  return 0;
}

}  // namespace

const char* to_string(MixerKind kind) {
  switch (kind) {
    case MixerKind::kPhalanx:
      return "PHX";
    case MixerKind::kHyenaSE:
      return "SE";
    case MixerKind::kHyenaMR:
      return "MR";
    case MixerKind::kHyenaLI:
      return "LI";
    case MixerKind::kAttention:
      return "ATT";
    case MixerKind::kWindowedAttention:
      return "SWA";
  }
  return "?";
}

std::vector<MixerKind> ModelConfig::layers() const {
  std::vector<std::string> letters;
  for (const MixerKind kind : kKinds) letters.push_back(to_string(kind));
  std::vector<MixerKind> once;
  std::istringstream words(pattern);
  for (std::string word; words >> word;) {
    const auto found = std::find(letters.begin(), letters.end(), word);
    if (found == letters.end()) {
      throw UsageError(str("model.pattern = \"", pattern, "\": unknown mixer '", word,
                           "'; the mixers are SE MR LI PHX ATT SWA", did_you_mean(word, letters)));
    }
    once.push_back(kKinds[found - letters.begin()]);
  }
  if (once.empty()) {
    throw UsageError("model.pattern = \"\": name at least one of SE MR LI PHX ATT SWA");
  }
  check_range("repeat", repeat, 1, kMaxLayers);
  const int64_t blocks = repeat * static_cast<int64_t>(once.size());
  if (blocks > kMaxLayers) {
    throw UsageError(str("model.repeat = ", repeat, " makes ", blocks, " blocks; at most ",
                         kMaxLayers, " are possible"));
  }
  std::vector<MixerKind> all;
  for (int64_t i = 0; i < repeat; ++i) all.insert(all.end(), once.begin(), once.end());
  return all;
}

int64_t ModelConfig::resolved_mlp_dim() const {
  if (mlp_dim != 0) return mlp_dim;
  return (8 * dim / 3 + 63) / 64 * 64;
}

void ModelConfig::validate() const {
  const auto kinds = layers();
  const auto uses = [&kinds](MixerKind kind) {
    return std::find(kinds.begin(), kinds.end(), kind) != kinds.end();
  };
  check_range("dim", dim, 1, kMaxWidth);
  check_range("vocab_size", vocab_size, 1, kMaxVocabulary);
  check_range("mlp_dim", mlp_dim, 0, 4 * kMaxWidth);
  check_choice("mlp", mlp, {"swiglu", "gelu", "bilinear"});
  if (!first_mlp.empty()) check_choice("first_mlp", first_mlp, {"swiglu", "gelu", "bilinear"});
  check_positive("norm_eps", norm_eps);
  if (uses(MixerKind::kAttention) || uses(MixerKind::kWindowedAttention)) {
    check_divides("heads", heads, "model.dim", dim);
    if (dim / heads % 2 != 0) {
      throw UsageError(str("model.heads = ", heads, " makes heads of odd width ", dim / heads,
                           ", which RoPE cannot rotate; use fewer heads or another dim"));
    }
    if (kv_heads != 0) check_divides("kv_heads", kv_heads, "model.heads", heads);
    check_positive("rope_base", rope_base);
    check_positive("rope_scale", rope_scale);
  }
  if (uses(MixerKind::kWindowedAttention)) check_range("swa_window", swa_window, 1, kMaxSteps);
  if (uses(MixerKind::kPhalanx)) {
    check_divides("phx_head_width", phx_head_width, "model.dim", dim);
    if (phx_kv_heads != 0) {
      check_divides("phx_kv_heads", phx_kv_heads, "dim / phx_head_width", phx_heads());
    }
    check_range("phx_window", phx_window, 0, kMaxSteps);
    check_positive("phx_decay_max", phx_decay_max);
    if (phx_decay_max > 1) {
      throw UsageError(str("model.phx_decay_max = ", phx_decay_max,
                           ": the recurrence grows without bound above 1"));
    }
  }
  if (uses(MixerKind::kHyenaSE)) {
    check_range("se_taps", se_taps, 1, kMaxWidth);
    check_groups("se_groups", se_groups, resolved_se_groups(), dim);
  }
  if (uses(MixerKind::kHyenaMR)) {
    check_range("mr_taps", mr_taps, 1, kMaxWidth);
    check_groups("mr_groups", mr_groups, resolved_mr_groups(), dim);
    check_choice("mr_decay", mr_decay, {"none", "weak", "normal", "strong"});
    check_range("mr_decay_length", mr_decay_length, mr_taps, kMaxSteps);
  }
  if (uses(MixerKind::kHyenaLI)) {
    check_range("li_modes", li_modes, 1, 1024);
    check_groups("li_groups", li_groups, resolved_li_groups(), dim);
  }
}

int64_t parameter_count(const ModelConfig& config) {
  config.validate();
  const auto kinds = config.layers();
  const int64_t tables = config.tie_embeddings ? 1 : 2;
  int64_t count = tables * config.vocab_size * config.dim + config.dim;
  for (const MixerKind kind : kinds) {
    count += mixer_parameters(config, kind) + 2 * config.dim +
             3 * config.dim * config.resolved_mlp_dim();
  }
  return count;
}

}  // namespace sarissa::model
