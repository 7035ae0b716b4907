// What a model is: everything that decides its parameters and its arithmetic. No torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sarissa::model {

/// The mixers of a stack, as written in pattern strings.
enum class MixerKind { kPhalanx, kHyenaSE, kHyenaMR, kHyenaLI, kAttention, kWindowedAttention };

/// "PHX" "SE" "MR" "LI" "ATT" "SWA".
const char* to_string(MixerKind kind);

struct ModelConfig {
  // The stack.
  std::string pattern = "SE MR LI ATT";  // letters SE MR LI PHX ATT SWA, separated by spaces
  int64_t repeat = 1;                    // the pattern is repeated this many times
  int64_t dim = 256;
  int64_t vocab_size = 512;
  int64_t mlp_dim = 0;         // inner width; 0: 8/3 dim rounded up to a multiple of 64
  std::string mlp = "swiglu";  // swiglu | gelu | bilinear
  std::string first_mlp;       // of block 0 when it differs (Evo 2: "gelu"); "": as mlp
  double norm_eps = 1e-6;
  bool tie_embeddings = true;
  bool output_bias = false;  // bias on every mixer's output projection (Evo 2: true)
  // Attention (ATT, SWA).
  int64_t heads = 4;
  int64_t kv_heads = 0;  // 0: as heads
  double rope_base = 10000.0;
  double rope_scale = 1.0;  // linear position interpolation factor
  bool rope_bf16 = false;   // rotary frequencies rounded to bf16 (Evo 2: true)
  int64_t swa_window = 512;
  // Phalanx (PHX).
  int64_t phx_head_width = 16;
  int64_t phx_kv_heads = 0;  // 0: as heads (dim / phx_head_width)
  int64_t phx_window = 16;   // 0: full recurrence
  double phx_decay_max = 1.0;
  // Hyena (SE, MR, LI). Groups 0: dim / 16 for SE and MR, dim for LI.
  int64_t se_taps = 7;
  int64_t se_groups = 0;
  int64_t mr_taps = 128;
  int64_t mr_groups = 0;
  std::string mr_decay = "weak";   // none | weak | normal | strong: fixed decay of the taps
  int64_t mr_decay_length = 8192;  // length over which the decay is laid (L_cache)
  int64_t li_modes = 16;
  int64_t li_groups = 0;

  template <class Visitor>
  static void fields(Visitor& visit, auto& self) {
    visit("pattern", self.pattern, "mixers in order: SE MR LI (Hyena), PHX, ATT, SWA");
    visit("repeat", self.repeat, "times the pattern is repeated");
    visit("dim", self.dim, "model width");
    visit("vocab_size", self.vocab_size, "tokens; 512 for the byte tokenizer");
    visit("mlp_dim", self.mlp_dim, "inner MLP width; 0: 8/3 dim up to a multiple of 64");
    visit("mlp", self.mlp, "swiglu | gelu | bilinear");
    visit("first_mlp", self.first_mlp, "the same for block 0; empty: as mlp");
    visit("norm_eps", self.norm_eps, "added to the mean square in RMSNorm");
    visit("tie_embeddings", self.tie_embeddings, "use the embedding as output matrix");
    visit("output_bias", self.output_bias, "bias on the mixers' output projections");
    visit("heads", self.heads, "attention heads (ATT, SWA)");
    visit("kv_heads", self.kv_heads, "key and value heads; 0: as heads");
    visit("rope_base", self.rope_base, "base of the rotary frequencies");
    visit("rope_scale", self.rope_scale, "positions are divided by this");
    visit("rope_bf16", self.rope_bf16, "round the rotary frequencies to bf16 (Evo 2)");
    visit("swa_window", self.swa_window, "steps a SWA layer sees, itself included");
    visit("phx_head_width", self.phx_head_width, "width of a Phalanx head");
    visit("phx_kv_heads", self.phx_kv_heads, "gate heads of Phalanx; 0: as heads");
    visit("phx_window", self.phx_window, "window of the recurrence; 0: full");
    visit("phx_decay_max", self.phx_decay_max, "largest coefficient of the recurrence");
    visit("se_taps", self.se_taps, "filter length of Hyena-SE");
    visit("se_groups", self.se_groups, "filters of Hyena-SE; 0: dim / 16");
    visit("mr_taps", self.mr_taps, "filter length of Hyena-MR");
    visit("mr_groups", self.mr_groups, "filters of Hyena-MR; 0: dim / 16");
    visit("mr_decay", self.mr_decay, "fixed decay of the MR taps: none | weak | normal | strong");
    visit("mr_decay_length", self.mr_decay_length, "steps over which the decay is laid");
    visit("li_modes", self.li_modes, "modes of each Hyena-LI filter");
    visit("li_groups", self.li_groups, "filters of Hyena-LI; 0: dim");
  }

  /// One entry per block. Throws UsageError naming the letter that is unknown.
  std::vector<MixerKind> layers() const;
  /// Throws UsageError that names the key, the value and the fix (divisibility, ranges).
  void validate() const;

  // Sizes with the 0s filled in.
  int64_t resolved_mlp_dim() const;
  int64_t resolved_kv_heads() const { return kv_heads == 0 ? heads : kv_heads; }
  int64_t phx_heads() const { return dim / phx_head_width; }
  int64_t resolved_phx_kv_heads() const { return phx_kv_heads == 0 ? phx_heads() : phx_kv_heads; }
  int64_t resolved_se_groups() const { return se_groups == 0 ? dim / 16 : se_groups; }
  int64_t resolved_mr_groups() const { return mr_groups == 0 ? dim / 16 : mr_groups; }
  int64_t resolved_li_groups() const { return li_groups == 0 ? dim : li_groups; }
};

/// Unique parameters of the model, without building it.
int64_t parameter_count(const ModelConfig& config);

/// A named preset ("quickstart", "evo2-7b", ...). Throws UsageError with the nearest name.
ModelConfig preset(const std::string& name);
std::vector<std::string> preset_names();

}  // namespace sarissa::model
