// What the CUDA kernels of the family share: one channel's view of the inputs.
#pragma once

#include "sarissa/kernels/common/vector.cuh"
#include "sarissa/kernels/swr/swr.h"

namespace sarissa::kernels {

constexpr int kSwrThreads = 128;

/// The inputs as channel p of head h of batch row b sees them.
template <class T, bool kGated>
struct SwrChannel {
  using C = compute_t<T>;
  const T *a, *u, *b, *c;
  int64_t a_step, u_step, gate_step;
  C decay_max;

  __device__ SwrChannel(const SwrInputs& in, int64_t row, int64_t h, int64_t p)
      : a(static_cast<const T*>(in.a) + row * in.a_batch + h),
        u(static_cast<const T*>(in.u) + row * in.u_batch + h * in.u_head + p),
        b(nullptr),
        c(nullptr),
        a_step(in.a_step),
        u_step(in.u_step),
        gate_step(in.gate_step),
        decay_max(static_cast<C>(in.decay_max)) {
    if constexpr (kGated) {
      const int64_t gate = row * in.gate_batch + h / (in.heads / in.kv_heads) * in.width + p;
      b = static_cast<const T*>(in.b) + gate;
      c = static_cast<const T*>(in.c) + gate;
    }
  }

  /// Moves the view by `steps` steps.
  __device__ void advance(int64_t steps) {
    a += steps * a_step;
    u += steps * u_step;
    if constexpr (kGated) {
      b += steps * gate_step;
      c += steps * gate_step;
    }
  }

  /// The coefficient of step t.
  __device__ C coefficient(int64_t t) const {
    const C x = load(a + t * a_step);
    return kGated ? decay_max * sigmoid<T>(x) : x;
  }
  /// The derivative of a coefficient with respect to what is stored.
  __device__ C coefficient_slope(C coefficient) const {
    return kGated ? coefficient * (C(1) - coefficient / decay_max) : C(1);
  }
  /// u as stored; phalanx: v.
  __device__ C value(int64_t t) const { return load(u + t * u_step); }
  /// sigmoid(b).
  __device__ C input_gate(int64_t t) const {
    if constexpr (kGated) return sigmoid<T>(load(b + t * gate_step));
    return C(1);
  }
  __device__ C output_gate(int64_t t) const {
    if constexpr (kGated) return load(c + t * gate_step);
    return C(1);
  }
  /// What the recurrence adds at step t.
  __device__ C input(int64_t t) const { return kGated ? input_gate(t) * value(t) : value(t); }
};

/// The state of channel (b, h, p) before the first step, as the recurrence runs: a full recurrence
/// has its complete state in w.
template <class C>
struct SwrStart {
  C w = C(0), r = C(1), v = C(0);

  __device__ SwrStart(const SwrInputs& in, int64_t row, int64_t h, int64_t p) {
    if (in.w == nullptr) return;
    const int64_t head = row * in.heads + h;
    w = static_cast<const C*>(in.w)[head * in.width + p];
    v = static_cast<const C*>(in.v)[head * in.width + p];
    r = static_cast<const C*>(in.r)[head];
    if (in.window == 0) {
      w += r * v;
      r = C(1);
      v = C(0);
    }
  }
};

__device__ inline SwrGrid swr_grid(const SwrInputs& in, int64_t row) {
  return SwrGrid(in.window, in.index != nullptr ? in.index[row] : 0, in.length);
}

/// The marching backward of phalanx, and whether it takes a problem.
bool swr_bwd_march_fits(const SwrBwdParams& params, DType dtype);
Status swr_bwd_march(const SwrBwdParams& params, DType dtype, void* stream);

/// The chained kernels of phalanx without a window, and whether they take a problem. The forward
/// writes saved.states for every problem whose inputs fit; the backward needs them.
bool swr_chained_inputs_fit(const SwrInputs& in, DType dtype);
bool swr_chained_fwd_fits(const SwrFwdParams& params, DType dtype);
Status swr_chained_fwd(const SwrFwdParams& params, DType dtype, void* stream);
bool swr_chained_bwd_fits(const SwrBwdParams& params, DType dtype);
Status swr_chained_bwd(const SwrBwdParams& params, DType dtype, void* stream);

/// Whether a thread may own V neighbouring channels: all its accesses are aligned, and the channels
/// share a head.
template <class T, int V>
bool swr_vectors_fit(const SwrFwdParams& params) {
  const SwrInputs& in = params.in;
  const bool gates = !in.gated || (vector_aligned<T, V>(in.b, {in.gate_batch, in.gate_step}) &&
                                   vector_aligned<T, V>(in.c, {}));
  return in.width % V == 0 && vector_aligned<T, V>(in.u, {in.u_batch, in.u_step, in.u_head}) &&
         gates && vector_aligned<T, V>(params.x, {});
}

/// Whether the ring of the marching forward takes a problem in vectors of V: full warps of whole
/// heads of at least 8 channels, and rows that can be copied in units of 16 bytes (a: 4).
template <class T, int V>
bool swr_ring_fits(const SwrFwdParams& params) {
  const SwrInputs& in = params.in;
  constexpr int kUnit = 16 / sizeof(T), kWord = 4 / sizeof(T);
  const int64_t channels = 32 * V;  // of a warp
  return swr_vectors_fit<T, V>(params) && in.width >= 8 && channels % in.width == 0 &&
         channels / in.width % kWord == 0 && in.heads * in.width % channels == 0 &&
         vector_aligned<T, kWord>(in.a, {in.a_batch, in.a_step}) &&
         vector_aligned<T, kUnit>(in.b, {in.gate_batch, in.gate_step}) &&
         vector_aligned<T, kUnit>(in.c, {}) &&
         vector_aligned<T, kUnit>(in.u, {in.u_batch, in.u_step, in.u_head});
}

/// A forward of one step.
Status swr_step_cuda(const SwrFwdParams& params, DType dtype, void* stream);

}  // namespace sarissa::kernels
