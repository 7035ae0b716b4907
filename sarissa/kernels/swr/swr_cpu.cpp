// Sliding window recurrences on the CPU: a plain loop over time, vectorised over the channels of a
// head. In double this is the specification of the family. Letters as in README.md.
#include <algorithm>
#include <type_traits>

#include "sarissa/kernels/common/cpu.h"
#include "sarissa/kernels/common/cpu_math.h"
#include "sarissa/kernels/swr/swr.h"

namespace sarissa::kernels {
namespace {

// Neighbouring heads of one batch row that march together, so that rows are read in long pieces.
constexpr int64_t kHeadTile = 64;

template <class T>
const T* offset(const void* base, int64_t elements) {
  return static_cast<const T*>(base) + elements;
}
template <class T>
T* offset(void* base, int64_t elements) {
  return static_cast<T*>(base) + elements;
}

// Adds x[0..n) in an order that depends on n alone: eight lanes, then pairs of lanes.
template <class C>
SARISSA_INLINE C sum_row(const C* __restrict__ x, int64_t n) {
  C lanes[8] = {};
  int64_t p = 0;
  for (; p + 8 <= n; p += 8) {
    for (int l = 0; l < 8; ++l) lanes[l] += x[p + l];
  }
  for (int l = 0; p < n; ++p, ++l) lanes[l] += x[p];
  for (int half = 4; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

// The coefficients of n heads (stride 1) or n steps (stride a_step), as the recurrence uses them.
template <class T, bool kGated, class C>
SARISSA_INLINE void load_coefficients(const T* __restrict__ a, int64_t stride, int64_t n,
                                      double decay_max, C* __restrict__ out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<C>(a[i * stride]);
  if constexpr (kGated) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<C>(decay_max) * sigmoid(out[i]);
  }
}

// Heads [h0, h1) of batch row `b`.
template <class T, bool kGated>
SARISSA_INLINE void fwd_heads(const SwrFwdParams& params, int64_t b, int64_t h0, int64_t h1) {
  using C = compute_t<T>;
  const SwrInputs& in = params.in;
  const int64_t P = in.width;
  const int64_t group = in.heads / in.kv_heads;
  const bool full = in.window == 0;
  const SwrGrid grid(in.window, in.index != nullptr ? in.index[b] : 0, in.length);

  // The running state lives in the output tensors.
  const int64_t state = (b * in.heads + h0) * P;
  const int64_t n = (h1 - h0) * P;
  C* const w = offset<C>(params.w, state);
  C* const v = offset<C>(params.v, state);
  C* const r = offset<C>(params.r, b * in.heads + h0);
  if (in.w == nullptr) {
    std::fill(w, w + n, C(0));
    std::fill(v, v + n, C(0));
    std::fill(r, r + h1 - h0, C(1));
  } else {
    const C* const w_in = offset<C>(in.w, state);
    const C* const v_in = offset<C>(in.v, state);
    const C* const r_in = offset<C>(in.r, b * in.heads + h0);
    std::copy(w_in, w_in + n, w);
    std::copy(v_in, v_in + n, v);
    std::copy(r_in, r_in + h1 - h0, r);
  }
  if (full) {  // a block that starts from the complete state and never ends
    for (int64_t i = 0; i < n; ++i) w[i] += r[i / P] * v[i];
    std::fill(v, v + n, C(0));
    std::fill(r, r + h1 - h0, C(1));
  }

  int64_t left = grid.window - grid.index;  // steps to the end of the block
  alignas(64) C a[kHeadTile];
  for (int64_t t = 0; t < in.length; ++t) {
    load_coefficients<T, kGated>(offset<T>(in.a, b * in.a_batch + t * in.a_step + h0), 1, h1 - h0,
                                 in.decay_max, a);
    for (int64_t h = h0; h < h1; ++h) {
      const T* __restrict__ u_row = offset<T>(in.u, b * in.u_batch + t * in.u_step + h * in.u_head);
      T* __restrict__ x_row = offset<T>(params.x, ((b * in.length + t) * in.heads + h) * P);
      C* __restrict__ w_h = w + (h - h0) * P;
      const C* __restrict__ v_h = v + (h - h0) * P;
      const C a_h = a[h - h0];
      if (!full) r[h - h0] *= a_h;
      const C r_h = r[h - h0];
      if constexpr (kGated) {
        const int64_t gate = b * in.gate_batch + t * in.gate_step + h / group * P;
        const T* __restrict__ b_row = offset<T>(in.b, gate);
        const T* __restrict__ c_row = offset<T>(in.c, gate);
        for (int64_t p = 0; p < P; ++p) {
          const C skip = static_cast<C>(u_row[p]);
          w_h[p] = a_h * w_h[p] + sigmoid(static_cast<C>(b_row[p])) * skip;
          x_row[p] = static_cast<T>(static_cast<C>(c_row[p]) * (w_h[p] + r_h * v_h[p]) + skip);
        }
      } else {
        for (int64_t p = 0; p < P; ++p) {
          w_h[p] = a_h * w_h[p] + static_cast<C>(u_row[p]);
          x_row[p] = static_cast<T>(w_h[p] + r_h * v_h[p]);
        }
      }
    }
    if (--left == 0) {
      std::copy(w, w + n, v);
      std::fill(w, w + n, C(0));
      std::fill(r, r + h1 - h0, C(1));
      left = grid.window;
    }
  }
  if (full) {
    std::copy(w, w + n, v);
    std::fill(w, w + n, C(0));
  }
  if (h0 == 0) {
    params.index[b] = full ? 0 : static_cast<int32_t>(grid.window - left);
  }
}

// The backward of heads of one batch row, chunk by chunk. kWidth is P where it is known at compile
// time, else 0: short rows gain from it.
template <class T, bool kGated, int kWidth>
struct Backward {
  using C = compute_t<T>;
  const SwrBwdParams& params;
  const SwrInputs& in = params.in;
  const int64_t b;
  C* const scratch;  // [4 kSwrChunk + 2, P]
  const int64_t P = kWidth > 0 ? kWidth : in.width;
  const bool full = in.window == 0;
  const SwrGrid grid{in.window, in.index != nullptr ? in.index[b] : 0, in.length};
  const int64_t max_chunks = swr_max_chunks(in.window, in.length);

  // Local state after chunk c and product of its block's coefficients so far.
  SARISSA_INLINE C* end_state(int64_t c, int64_t h) const {
    return offset<C>(params.workspace, ((b * max_chunks + c) * in.heads + h) * P);
  }
  SARISSA_INLINE C& product(int64_t c, int64_t h) const {
    const int64_t end_states = in.batch * max_chunks * in.heads * P;
    return *offset<C>(params.workspace, end_states + (b * max_chunks + c) * in.heads + h);
  }
  SARISSA_INLINE int64_t head_of(int64_t h) const { return b * in.heads + h; }
  SARISSA_INLINE C initial_r(int64_t h) const {
    return in.r != nullptr ? *offset<C>(in.r, head_of(h)) : C(1);
  }
  // What multiplies v before the first step of the recurrence as it runs: the full recurrence has
  // its whole state in w.
  SARISSA_INLINE C first_r(int64_t h) const { return full ? C(1) : initial_r(h); }

  // w before the first step of chunk c, into out[P].
  SARISSA_INLINE void start_state(int64_t c, int64_t h, C* __restrict__ out) const {
    if (c > 0 && grid.block_of(c) == grid.block_of(c - 1)) {
      const C* from = end_state(c - 1, h);
      std::copy(from, from + P, out);
    } else if (c > 0 || in.w == nullptr) {
      std::fill(out, out + P, C(0));
    } else {
      const C* from = offset<C>(in.w, head_of(h) * P);
      std::copy(from, from + P, out);
      if (full) {
        const C* v = offset<C>(in.v, head_of(h) * P);
        const C r = initial_r(h);
        for (int64_t p = 0; p < P; ++p) out[p] += r * v[p];
      }
    }
  }
  SARISSA_INLINE C start_product(int64_t c, int64_t h) const {
    if (c == 0) return first_r(h);
    return grid.block_of(c) == grid.block_of(c - 1) ? product(c - 1, h) : C(1);
  }

  // One step of the local state.
  SARISSA_INLINE void step(int64_t t, int64_t h, C a, const C* __restrict__ from,
                           C* __restrict__ gate, C* __restrict__ to) const {
    const T* __restrict__ u = offset<T>(in.u, b * in.u_batch + t * in.u_step + h * in.u_head);
    if constexpr (kGated) {
      const T* __restrict__ b_row = offset<T>(in.b, gate_row(t, h));
      for (int64_t p = 0; p < P; ++p) {
        gate[p] = sigmoid(static_cast<C>(b_row[p]));
        to[p] = a * from[p] + gate[p] * static_cast<C>(u[p]);
      }
    } else {
      for (int64_t p = 0; p < P; ++p) to[p] = a * from[p] + static_cast<C>(u[p]);
    }
  }
  SARISSA_INLINE int64_t gate_row(int64_t t, int64_t h) const {
    return b * in.gate_batch + t * in.gate_step + h / (in.heads / in.kv_heads) * P;
  }
  // Runs chunk c forward from its start. Fills a[i] and, with one row more than steps, r[i] and
  // w[i]: the product and the local state before step i. gate[i] is sigmoid(b) of step i.
  SARISSA_INLINE void recompute(int64_t c, int64_t h, C* __restrict__ a, C* __restrict__ r, C* w,
                                C* gate) const {
    const int64_t begin = grid.chunk_begin(c), n = grid.chunk_end(c) - begin;
    load_coefficients<T, kGated>(offset<T>(in.a, b * in.a_batch + begin * in.a_step + h), in.a_step,
                                 n, in.decay_max, a);
    start_state(c, h, w);
    r[0] = start_product(c, h);
    for (int64_t i = 0; i < n; ++i) {
      step(begin + i, h, a[i], w + i * P, gate + i * P, w + (i + 1) * P);
      r[i + 1] = r[i] * a[i];
    }
  }

  // Fills end_state and product of chunk c.
  SARISSA_INLINE void march(int64_t c, int64_t h) const {
    const int64_t n = grid.chunk_end(c) - grid.chunk_begin(c);
    C a[kSwrChunk], r[kSwrChunk + 1];
    C* const gate = scratch;
    C* const w = gate + kSwrChunk * P;
    recompute(c, h, a, r, w, gate);
    std::copy(w + n * P, w + (n + 1) * P, end_state(c, h));
    product(c, h) = r[n];
  }

  // The adjoint of the state after the last step, into dw (adjoint of w), dv (the p scan) and dr.
  SARISSA_INLINE void start_adjoint(int64_t h) const {
    const int64_t at = head_of(h) * P;
    C* const gw = offset<C>(params.dw, at);
    C* const gp = offset<C>(params.dv, at);
    // After a complete block, and in the full recurrence, the local state leaves as v.
    const void* from = full || grid.last_block_complete() ? params.dv_out : params.dw_out;
    std::fill(gp, gp + P, C(0));
    if (from != nullptr) {
      std::copy(offset<C>(from, at), offset<C>(from, at) + P, gw);
    } else {
      std::fill(gw, gw + P, C(0));
    }
    const bool has_r = !full && !grid.last_block_complete() && params.dr_out != nullptr;
    *offset<C>(params.dr, head_of(h)) = has_r ? *offset<C>(params.dr_out, head_of(h)) : C(0);
  }

  // The v of an incomplete last block leaves with the final state.
  SARISSA_INLINE bool passes_v(int64_t block) const {
    return !full && params.dv_out != nullptr && block == grid.blocks() - 1 &&
           !grid.last_block_complete();
  }

  // Chunk c of head h, backwards. dw, dv and dr hold the adjoints after the chunk and receive those
  // before it. db and dc [kSwrChunk, P] collect the gradients of the gates.
  SARISSA_INLINE void reverse(int64_t c, int64_t h, C* __restrict__ db, C* __restrict__ dc) const {
    const int64_t begin = grid.chunk_begin(c), n = grid.chunk_end(c) - begin;
    const int64_t block = grid.block_of(c);
    C* const gate = scratch;                   // [kSwrChunk, P] sigmoid(b)
    C* const w = gate + kSwrChunk * P;         // [kSwrChunk + 1, P] w before each step
    C* const share = w + (kSwrChunk + 1) * P;  // [P] what each channel adds to da
    C* const gw = offset<C>(params.dw, head_of(h) * P);
    C* const gp = offset<C>(params.dv, head_of(h) * P);
    C& gr = *offset<C>(params.dr, head_of(h));

    // v of the block; null is zero.
    const C* v = nullptr;
    if (block > 0) {
      v = end_state(grid.first_chunk(block) - 1, h);
    } else if (in.v != nullptr && !full) {
      v = offset<C>(in.v, head_of(h) * P);
    }

    C a[kSwrChunk], r[kSwrChunk + 1], da[kSwrChunk];
    recompute(c, h, a, r, w, gate);
    for (int64_t i = n - 1; i >= 0; --i) {
      const int64_t t = begin + i;
      const T* const dx =
          offset<T>(params.dx, b * params.dx_batch + t * params.dx_step + h * params.dx_head);
      T* const du = offset<T>(params.du, (b * in.length + t) * params.du_step + h * P);
      if (v != nullptr) {
        reverse_step<true>(t, h, i, a[i], r[i], r[i + 1], v, w, gate, dx, du, gw, gp, share, db,
                           dc);
      } else {
        reverse_step<false>(t, h, i, a[i], r[i], r[i + 1], v, w, gate, dx, du, gw, gp, share, db,
                            dc);
      }
      da[i] = sum_row(share, P) + gr * r[i];
      gr *= a[i];
    }
    for (int64_t i = 0; i < n; ++i) {
      const C chain = kGated ? a[i] * (C(1) - a[i] / static_cast<C>(in.decay_max)) : C(1);
      *offset<T>(params.da, (b * in.length + begin + i) * params.da_step + h) =
          static_cast<T>(da[i] * chain);
    }

    if (c > 0 && block > grid.block_of(c - 1)) {  // the carry's adjoint enters the block before
      if (passes_v(block)) {
        const C* dv_out = offset<C>(params.dv_out, head_of(h) * P);
        for (int64_t p = 0; p < P; ++p) gw[p] = gp[p] + dv_out[p];
      } else {
        std::copy(gp, gp + P, gw);
      }
      std::fill(gp, gp + P, C(0));
      gr = C(0);
    }
  }

  // kCarry: whether the block has a v.
  template <bool kCarry>
  SARISSA_INLINE void reverse_step(int64_t t, int64_t h, int64_t i, C a, C r_before, C r_after,
                                   const C* __restrict__ v, const C* __restrict__ w_rows,
                                   const C* __restrict__ gates, const T* __restrict__ dx,
                                   T* __restrict__ du, C* __restrict__ gw, C* __restrict__ gp,
                                   C* __restrict__ share, C* __restrict__ db,
                                   C* __restrict__ dc) const {
    const C* __restrict__ w = w_rows + i * P;
    const C* __restrict__ w_after = w + P;
    const C* __restrict__ gate = gates + i * P;
    const T* __restrict__ u = nullptr;
    const T* __restrict__ c_row = nullptr;
    if constexpr (kGated) {
      u = offset<T>(in.u, b * in.u_batch + t * in.u_step + h * in.u_head);
      c_row = offset<T>(in.c, gate_row(t, h));
    }
    for (int64_t p = 0; p < P; ++p) {
      const C dy = static_cast<C>(dx[p]);
      C ds = dy;
      if constexpr (kGated) {
        ds = dy * static_cast<C>(c_row[p]);
        const C s = kCarry ? w_after[p] + r_after * v[p] : w_after[p];
        dc[i * P + p] += dy * s;
      }
      const C pw = ds + gw[p];
      share[p] = pw * w[p];
      if constexpr (kCarry) {
        const C pv = ds + gp[p];
        share[p] += r_before * v[p] * pv;
        gp[p] = a * pv;
      } else {
        gp[p] = a * (ds + gp[p]);
      }
      gw[p] = a * pw;
      if constexpr (kGated) {
        du[p] = static_cast<T>(dy + pw * gate[p]);
        db[i * P + p] += pw * static_cast<C>(u[p]) * gate[p] * (C(1) - gate[p]);
      } else {
        du[p] = static_cast<T>(pw);
      }
    }
  }

  // From the adjoints before the first step to the gradients of the given state.
  SARISSA_INLINE void finish(int64_t h) const {
    const int64_t at = head_of(h) * P;
    C* const gw = offset<C>(params.dw, at);
    C* const gp = offset<C>(params.dv, at);
    C& gr = *offset<C>(params.dr, head_of(h));
    const C* const v = in.v != nullptr ? offset<C>(in.v, at) : nullptr;
    const C r = initial_r(h);
    C* const share = scratch;
    const C* const carry = full ? gw : gp;  // the adjoint of r v
    for (int64_t p = 0; p < P; ++p) share[p] = v != nullptr ? carry[p] * v[p] : C(0);
    gr = sum_row(share, P) + gr;
    for (int64_t p = 0; p < P; ++p) gp[p] = r * carry[p];
    if (passes_v(0)) {
      const C* dv_out = offset<C>(params.dv_out, at);
      for (int64_t p = 0; p < P; ++p) gp[p] += dv_out[p];
    }
  }

  // Kv heads [k0, k1) with all their heads.
  SARISSA_INLINE void run(int64_t k0, int64_t k1) const {
    const int64_t group = in.heads / in.kv_heads;
    const int64_t chunks = grid.chunks();
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t h = k0 * group; h < k1 * group; ++h) march(c, h);
    }
    for (int64_t h = k0 * group; h < k1 * group; ++h) start_adjoint(h);
    C* const db = scratch + (2 * kSwrChunk + 2) * P;
    C* const dc = db + kSwrChunk * P;
    for (int64_t c = chunks - 1; c >= 0; --c) {
      for (int64_t k = k0; k < k1; ++k) {
        if constexpr (kGated) std::fill(db, db + 2 * kSwrChunk * P, C(0));
        for (int64_t h = k * group; h < (k + 1) * group; ++h) reverse(c, h, db, dc);
        if constexpr (kGated) store_gates(c, k, db, dc);
      }
    }
    for (int64_t h = k0 * group; h < k1 * group; ++h) finish(h);
  }

  SARISSA_INLINE void store_gates(int64_t c, int64_t k, const C* __restrict__ db,
                                  const C* __restrict__ dc) const {
    const int64_t begin = grid.chunk_begin(c), n = grid.chunk_end(c) - begin;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = (b * in.length + begin + i) * params.dgate_step + k * P;
      T* __restrict__ db_row = offset<T>(params.db, at);
      T* __restrict__ dc_row = offset<T>(params.dc, at);
      for (int64_t p = 0; p < P; ++p) {
        db_row[p] = static_cast<T>(db[i * P + p]);
        dc_row[p] = static_cast<T>(dc[i * P + p]);
      }
    }
  }
};

template <class T, bool kGated>
SARISSA_INLINE void fwd_items(const SwrFwdParams& params, int64_t begin, int64_t end) {
  const int64_t heads = params.in.heads;
  while (begin < end) {
    const int64_t h0 = begin % heads;
    const int64_t h1 = std::min({heads, h0 + end - begin, h0 + kHeadTile});
    fwd_heads<T, kGated>(params, begin / heads, h0, h1);
    begin += h1 - h0;
  }
}

template <class T, bool kGated, int kWidth>
SARISSA_INLINE void bwd_items(const SwrBwdParams& params, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const SwrInputs& in = params.in;
  const SwrWorkspace ws = swr_bwd_workspace(in.batch, in.length, in.heads, in.kv_heads, in.width,
                                            in.window, kGated, /*cuda=*/false);
  C* const scratch = offset<C>(params.workspace, ws.end_states + ws.products);
  while (begin < end) {
    const int64_t k0 = begin % in.kv_heads;
    const int64_t k1 = std::min(in.kv_heads, k0 + end - begin);
    Backward<T, kGated, kWidth>{.params = params,
                                .b = begin / in.kv_heads,
                                .scratch = scratch + begin * ws.scratch_per_item}
        .run(k0, k1);
    begin += k1 - k0;
  }
}

template <class T>
SARISSA_INLINE void fwd(const SwrFwdParams& params, int64_t begin, int64_t end) {
  if (params.in.gated) {
    fwd_items<T, true>(params, begin, end);
  } else {
    fwd_items<T, false>(params, begin, end);
  }
}

template <class T>
SARISSA_INLINE void bwd(const SwrBwdParams& params, int64_t begin, int64_t end) {
  // A width known when this is compiled pays for layers, which are gated and not in double.
  constexpr int kLayerWidth = std::is_same_v<T, double> ? 0 : 16;
  if (!params.in.gated) {
    bwd_items<T, false, 0>(params, begin, end);
  } else if (params.in.width == kLayerWidth) {
    bwd_items<T, true, kLayerWidth>(params, begin, end);
  } else {
    bwd_items<T, true, 0>(params, begin, end);
  }
}

SARISSA_CPU_CLONES void fwd_f64(const SwrFwdParams& params, int64_t begin, int64_t end) {
  fwd<double>(params, begin, end);
}
SARISSA_CPU_CLONES void fwd_f32(const SwrFwdParams& params, int64_t begin, int64_t end) {
  fwd<float>(params, begin, end);
}
SARISSA_CPU_CLONES void fwd_bf16(const SwrFwdParams& params, int64_t begin, int64_t end) {
  fwd<BFloat16>(params, begin, end);
}
SARISSA_CPU_CLONES void bwd_f64(const SwrBwdParams& params, int64_t begin, int64_t end) {
  bwd<double>(params, begin, end);
}
SARISSA_CPU_CLONES void bwd_f32(const SwrBwdParams& params, int64_t begin, int64_t end) {
  bwd<float>(params, begin, end);
}
SARISSA_CPU_CLONES void bwd_bf16(const SwrBwdParams& params, int64_t begin, int64_t end) {
  bwd<BFloat16>(params, begin, end);
}

}  // namespace

Status swr_fwd_cpu(const SwrFwdParams& params, DType dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kFloat64:
      fwd_f64(params, begin, end);
      break;
    case DType::kFloat32:
      fwd_f32(params, begin, end);
      break;
    case DType::kBFloat16:
      fwd_bf16(params, begin, end);
      break;
  }
  return {};
}

Status swr_bwd_cpu(const SwrBwdParams& params, DType dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kFloat64:
      bwd_f64(params, begin, end);
      break;
    case DType::kFloat32:
      bwd_f32(params, begin, end);
      break;
    case DType::kBFloat16:
      bwd_bf16(params, begin, end);
      break;
  }
  return {};
}

}  // namespace sarissa::kernels
