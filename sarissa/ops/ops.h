// The operators as C++ functions. Each calls torch.ops.sarissa.* through the dispatcher, so
// autograd, CPU, CUDA and Meta tensors all work; element types are double, float and bfloat16.
//
// Shapes: B batch, L length, D width, H heads, P head width, C packed channels, G groups, W taps,
// N modes, V vocabulary. Everything is time-major with channels innermost; strided views are
// accepted. tap k of a FIR multiplies u[t - k]. Group g covers the D/G neighbouring channels
// g*D/G .. (g+1)*D/G - 1.
//
// State: where a function takes an optional state, none means "the sequence starts here" (zeros).
// Every such function also returns the state after its last step; feeding it back continues the
// sequence exactly: any split equals the unsplit run, and L = 1 is one decode step. Gradients flow
// through states.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace sarissa::ops {

/// State of a (sliding window) recurrence inside a block (spec: Phalanx paper, section on
/// decoding). One step is w <- a w + u, r <- a r, x = w + r v, i <- i + 1, and when i reaches the
/// window: v <- w, w <- 0, r <- 1, i <- 0. A full recurrence keeps w = 0, r = 1, i = 0 and v = x
/// between calls.
struct SwrState {
  at::Tensor w;      // [B, H, P] local accumulator; fp32 (fp64 for double inputs)
  at::Tensor r;      // [B, H]    product of the block's coefficients so far
  at::Tensor v;      // [B, H, P] end state of the previous block
  at::Tensor index;  // [B] int32, steps done in the block
};

/// Window of swr() and phalanx() that keeps the whole past: the ordinary linear recurrence.
constexpr int64_t kFullRecurrence = 0;

/// x_t = a_t x_(t-1) + u_t under a jagged window of `window` steps (window 0: full recurrence).
/// a [B, L, H] in [0, 1], u [B, L, H, P]; returns x [B, L, H, P]. Source: Sliding Window
/// Recurrences (arXiv 2512.13921), sections on the hierarchical decomposition and Block Two-Pass.
std::tuple<at::Tensor, SwrState> swr(const at::Tensor& a_BLH, const at::Tensor& u_BLHP,
                                     int64_t window,
                                     const std::optional<SwrState>& state = std::nullopt);

/// The Phalanx inner operator with its gates fused: abcv [B, L, C] packs the projection's
/// [a: H | b: Hkv*P | c: Hkv*P | v: H*P] with P = (C - H) / (2 Hkv + H).
///   a' = decay_max * sigmoid(a)   u = sigmoid(b) * v   s = swr(a', u)   y = c * s + v
/// Head h uses kv head h / (H / Hkv). Returns y [B, L, H*P].
std::tuple<at::Tensor, SwrState> phalanx(const at::Tensor& abcv_BLC, int64_t heads,
                                         int64_t kv_heads, int64_t window, double decay_max,
                                         const std::optional<SwrState>& state = std::nullopt);

/// Causal FIR: y[t] = sum_k taps[g, k] u[t - k]. u [B, L, D], taps [G, W] (1 <= W <= 1024 on fast
/// paths, any W works). State [B, W-1, D]: the last inputs, oldest first, in u's dtype.
std::tuple<at::Tensor, at::Tensor> fir(const at::Tensor& u_BLD, const at::Tensor& taps_GW,
                                       const std::optional<at::Tensor>& state = std::nullopt);

/// State of a gated Hyena operator.
struct HyenaState {
  at::Tensor featurizer;  // [B, 2, 3D] the last two z, oldest first, in z's dtype
  at::Tensor inner;       // hyena_fir: [B, W-1, D] the last u; hyena_modal: [B, D, N] modal states
};

/// Hyena-SE / Hyena-MR (StripedHyena 2, arXiv 2503.01868, section 2). z [B, L, 3D] holds the thirds
/// [post-gate | pre-gate | value]; featurizer [3D, 3]; taps [G, W]; skip [D] or none.
///   c = featurizer * z (depthwise)   u = c_pre c_value   q = taps * u + skip u   y = c_post q
/// The inner state holds u in fp32 (fp64 for double inputs).
std::tuple<at::Tensor, HyenaState> hyena_fir(const at::Tensor& z_BLC, const at::Tensor& featurizer,
                                             const at::Tensor& taps_GW,
                                             const std::optional<at::Tensor>& skip_D,
                                             const std::optional<HyenaState>& state = std::nullopt);

/// Modal convolution: s_n <- exp(log_poles_n) s_n + u, y = sum_n residues_n s_n + skip u.
/// u [B, L, D], log_poles and residues [G, N] in fp32 (fp64), log_poles <= 0, skip [D] or none.
/// State [B, D, N] in fp32 (fp64).
std::tuple<at::Tensor, at::Tensor> modal(const at::Tensor& u_BLD, const at::Tensor& log_poles_GN,
                                         const at::Tensor& residues_GN,
                                         const std::optional<at::Tensor>& skip_D,
                                         const std::optional<at::Tensor>& state = std::nullopt);

/// Hyena-LI: hyena_fir with the modal filter in place of the taps.
std::tuple<at::Tensor, HyenaState> hyena_modal(
    const at::Tensor& z_BLC, const at::Tensor& featurizer, const at::Tensor& log_poles_GN,
    const at::Tensor& residues_GN, const std::optional<at::Tensor>& skip_D,
    const std::optional<HyenaState>& state = std::nullopt);

/// sum = x + residual (x when there is none), y = weight * sum / sqrt(mean(sum^2) + eps) with fp32
/// arithmetic. x, residual [..., D], weight [D]. Returns {y, sum}.
std::tuple<at::Tensor, at::Tensor> residual_rms_norm(const at::Tensor& x,
                                                     const std::optional<at::Tensor>& residual,
                                                     const at::Tensor& weight_D, double eps);

/// Activation of a gated MLP's gate half.
enum class Gate { kSilu, kGelu, kIdentity };  // SwiGLU, GEGLU (exact erf), bilinear
Gate parse_gate(const std::string& name);     // "swiglu" "gelu" "bilinear"; throws UsageError

/// act(gate) * up for packed [gate | up]: [..., 2F] -> [..., F].
at::Tensor glu(const at::Tensor& gate_up, Gate gate);

/// Rotary embedding in half-split pairing (d, d + P/2): x [B, L, H, P], inverse frequencies [P/2]
/// in fp32; the angle of step t is (position + t) / scale * inv_freq. scale > 1 is linear position
/// interpolation.
at::Tensor rope(const at::Tensor& x_BLHP, const at::Tensor& inv_freq, int64_t position,
                double scale);

/// base^(-2d/P) for d in 0..P/2-1, fp32.
at::Tensor rope_inverse_frequencies(int64_t head_width, double base, at::Device device);

/// Causal attention with grouped kv heads: q [B, L, H, P]; k, v [B, S, Hkv, P] with S >= L, the
/// last L of which are q's own steps. window 0: all of the past; else each step sees itself and the
/// window - 1 steps before it. Returns [B, L, H, P]. Uses torch's SDPA / flash attention.
at::Tensor attention(const at::Tensor& q_BLHP, const at::Tensor& k_BSHP, const at::Tensor& v_BSHP,
                     int64_t window);

/// Per-token negative log-likelihood in fp32: logits [N, V], targets [N] int64 -> [N]. Accumulates
/// in fp32 whatever the logits' dtype. A target of -100 gives 0 and no gradient.
at::Tensor cross_entropy(const at::Tensor& logits_NV, const at::Tensor& targets_N);

/// Weighted sum of the negative log-likelihoods of hidden @ head^T without ever holding all logits:
/// hidden [N, D], head [V, D], targets [N] int64, weights [N] fp32 (0 masks a token). Works in
/// chunks of tokens; where gradients are wanted, each chunk's are formed while its logits are
/// there. Returns a fp32 scalar. fp64 throughout for double hidden.
at::Tensor linear_cross_entropy(const at::Tensor& hidden_ND, const at::Tensor& head_VD,
                                const at::Tensor& targets_N, const at::Tensor& weights_N);

}  // namespace sarissa::ops
