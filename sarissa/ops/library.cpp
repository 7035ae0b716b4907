// The operators at a glance: every schema of torch.ops.sarissa. Implementations and autograd are
// in the file of each family. tap k of a FIR multiplies u[t - k]; all tensors are time-major.
//
// Shapes: B batch, L length, D width, H heads, P head width, G groups, W taps, N modes.
#include <torch/library.h>

TORCH_LIBRARY(sarissa, m) {
  m.set_python_module("sarissa.ops");

  // Causal attention of q [B, L, H, P] over k, v [B, S, Hkv, P]; window 0 is all of the past.
  m.def("attention(Tensor q, Tensor k, Tensor v, int window) -> Tensor");

  // Negative log-likelihood per row of logits [N, V]; target -100 is ignored.
  m.def("cross_entropy(Tensor logits, Tensor targets) -> Tensor");
  m.def("cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor targets, Tensor loss) -> Tensor");

  // act(gate) * up of packed [gate | up]; gate is swiglu, gelu or bilinear.
  m.def("glu(Tensor gate_up, str gate) -> Tensor");
  m.def("glu_bwd(Tensor dy, Tensor gate_up, str gate) -> Tensor");

  // Weighted sum of the cross entropies of hidden [N, D] head^T, in chunks of tokens.
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor head, Tensor targets, Tensor weights) -> "
      "Tensor");

  // Hyena-LI: featurizer, pre-gate, modal convolution, skip, post-gate; z [B, L, 3D]. Returns y,
  // both states and, with `save`, states along the way that a fast backward on a GPU wants.
  m.def(
      "hyena_modal(Tensor z, Tensor featurizer, Tensor log_poles, Tensor residues,"
      " Tensor? skip=None, Tensor? featurizer_state=None, Tensor? inner_state=None,"
      " bool save=False) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "hyena_modal_bwd(Tensor dy, Tensor? d_featurizer_state, Tensor? d_inner_state, Tensor z,"
      " Tensor featurizer, Tensor log_poles, Tensor residues, Tensor? skip,"
      " Tensor? featurizer_state, Tensor? inner_state, Tensor? saved=None)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Modal convolution: s_n <- exp(log_poles_n) s_n + u, y = sum_n residues_n s_n + skip u; u
  // [B, L, D], poles and residues [G, N], state [B, D, N]. Returns y and the state.
  m.def(
      "modal(Tensor u, Tensor log_poles, Tensor residues, Tensor? skip=None, Tensor? state=None)"
      " -> (Tensor, Tensor)");
  m.def(
      "modal_bwd(Tensor dy, Tensor? d_state, Tensor u, Tensor log_poles, Tensor residues,"
      " Tensor? skip, Tensor? state) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // RMSNorm, with the residual added before it: sum = x + residual.
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def(
      "residual_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> "
      "(Tensor y, Tensor sum)");
  m.def(
      "rms_norm_bwd(Tensor dy, Tensor? dsum, Tensor sum, Tensor weight, float eps) -> "
      "(Tensor dx, Tensor dweight)");

  // Rotary embedding of x [B, L, H, P] from `position` on, half-split pairs.
  m.def("rope(Tensor x, Tensor inv_freq, int position, float scale) -> Tensor");
  m.def("rope_bwd(Tensor dy, Tensor inv_freq, int position, float scale) -> Tensor");
  // Causal FIR: y[t] = sum_k taps[g, k] u[t - k]; u [B, L, D], taps [G, W], state [B, W-1, D].
  m.def("fir(Tensor u, Tensor taps, Tensor? state=None) -> (Tensor, Tensor)");
  m.def(
      "fir_bwd(Tensor dy, Tensor? d_state, Tensor u, Tensor taps, Tensor? state)"
      " -> (Tensor, Tensor, Tensor)");
  // Hyena-SE / MR: featurizer, pre-gate, FIR, skip, post-gate; z [B, L, 3D]. Returns y and both
  // states.
  m.def(
      "hyena_fir(Tensor z, Tensor featurizer, Tensor taps, Tensor? skip=None,"
      " Tensor? featurizer_state=None, Tensor? inner_state=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "hyena_fir_bwd(Tensor dy, Tensor? d_featurizer_state, Tensor? d_inner_state, Tensor z,"
      " Tensor featurizer, Tensor taps, Tensor? skip, Tensor? featurizer_state,"
      " Tensor? inner_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Sliding window recurrence with the gates of a Phalanx layer: abcv [B, L, C] packs the
  // projections [a: H | b: Hkv*P | c: Hkv*P | v: H*P]; window 0 is the full recurrence. Returns y,
  // the state, and what a GPU's backward wants saved (may be empty; only good as phalanx_bwd's
  // `saved`, which may be None: then it computes it again, more slowly).
  m.def(
      "phalanx(Tensor abcv, int heads, int kv_heads, int window, float decay_max=1.0,"
      " Tensor? w=None, Tensor? r=None, Tensor? v=None, Tensor? index=None)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "phalanx_bwd(Tensor abcv, int heads, int kv_heads, int window, float decay_max, Tensor? w,"
      " Tensor? r, Tensor? v, Tensor? index, Tensor? saved, Tensor dy, Tensor? dw, Tensor? dr,"
      " Tensor? dv) -> (Tensor, Tensor, Tensor, Tensor)");
  // Sliding window recurrence x_t = a_t x_(t-1) + u_t of a [B, L, H], u [B, L, H, P]. Returns x and
  // the state w, r, v, index.
  m.def(
      "swr(Tensor a, Tensor u, int window, Tensor? w=None, Tensor? r=None, Tensor? v=None,"
      " Tensor? index=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "swr_bwd(Tensor a, Tensor u, int window, Tensor? w, Tensor? r, Tensor? v, Tensor? index,"
      " Tensor dx, Tensor? dw, Tensor? dr, Tensor? dv)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
