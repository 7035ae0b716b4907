// What the forward and the backward of the CUDA kernels share: the gate that makes u, and the
// indexing. One thread per channel, neighbouring threads on neighbouring channels.
#pragma once

#include "sarissa/kernels/common/cuda.cuh"
#include "sarissa/kernels/common/featurizer.cuh"
#include "sarissa/kernels/fir/fir.h"
#include "sarissa/kernels/fir/fir_plan.h"

namespace sarissa::kernels {

/// Time steps per thread of the FIR loops: each tap loaded serves this many sums.
constexpr int kFirCudaTile = 8;

/// FirParams with its pointers typed.
template <class T>
struct FirDevice {
  using C = device_compute_t<T>;
  int64_t B, L, D, G, W;
  const T* x;
  int64_t x_stride_b, x_stride_l;
  const C* featurizer;
  const T* featurizer_state;
  const C* taps;
  const C* skip;
  const C* state;
  T* y;
  C* state_out;
  C* u;  // [B, W-1+L, D]

  explicit FirDevice(const FirParams& p)
      : B(p.batch),
        L(p.length),
        D(p.width),
        G(p.groups),
        W(p.num_taps),
        x(static_cast<const T*>(p.x)),
        x_stride_b(p.x_stride_b),
        x_stride_l(p.x_stride_l),
        featurizer(static_cast<const C*>(p.featurizer)),
        featurizer_state(static_cast<const T*>(p.featurizer_state)),
        taps(static_cast<const C*>(p.taps)),
        skip(static_cast<const C*>(p.skip)),
        state(static_cast<const C*>(p.state)),
        y(static_cast<T*>(p.y)),
        state_out(static_cast<C*>(p.state_out)),
        u(static_cast<C*>(p.u)) {}

  /// The featurizer's output; `third` 0 is post, 1 pre, 2 value.
  __device__ C featurized(int64_t b, int64_t t, int third, int64_t d) const {
    const int64_t channel = third * D + d;
    const FeaturizerColumn<T> column{x + b * x_stride_b + channel, x_stride_l,
                                     featurizer_state + b * 2 * 3 * D + channel, 3 * D};
    return featurize(column, t, featurizer + channel, 3 * D);
  }
  /// The taps of channel d.
  __device__ const C* taps_of(int64_t d) const { return taps + d / (D / G) * W; }

  /// q of kFirCudaTile steps from t on; steps beyond L come out as 0.
  __device__ void filter(int64_t b, int64_t t, int64_t d, C* q) const {
    const C* column = u + (b * (L + W - 1) + t + W - 1) * D + d;
    const C* h = taps_of(d);
    const int steps = static_cast<int>(L - t < kFirCudaTile ? L - t : kFirCudaTile);
    for (int i = 0; i < kFirCudaTile; ++i) q[i] = 0;
    for (int64_t k = W - 1; k >= 0; --k) {
      const C tap = h[k] + (k == 0 && skip != nullptr ? skip[d] : C(0));
#pragma unroll
      for (int i = 0; i < kFirCudaTile; ++i) {
        if (i < steps) q[i] += tap * column[(i - k) * D];
      }
    }
  }
};

/// u[r] for the history and the sequence, and the last W-1 of it into state_out.
template <class T>
__global__ void fir_gate_kernel(FirDevice<T> p) {
  using C = device_compute_t<T>;
  const int64_t rows = p.L + p.W - 1;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.B * rows * p.D;
       i += step) {
    const int64_t d = i % p.D;
    const int64_t r = i / p.D % rows;
    const int64_t b = i / p.D / rows;
    const int64_t t = r - (p.W - 1);
    C u = 0;
    if (t < 0) {
      if (p.state != nullptr) u = p.state[(b * (p.W - 1) + r) * p.D + d];
    } else if (p.featurizer != nullptr) {
      u = p.featurized(b, t, 1, d) * p.featurized(b, t, 2, d);
    } else {
      u = load(p.x + b * p.x_stride_b + t * p.x_stride_l + d);
    }
    p.u[i] = u;
    if (p.state_out != nullptr && r >= p.L) {
      p.state_out[(b * (p.W - 1) + r - p.L) * p.D + d] = u;
    }
  }
}

template <class T>
void fir_gate_launch(const FirDevice<T>& p, cudaStream_t stream) {
  const int64_t items = p.B * (p.L + p.W - 1) * p.D;
  if (items > 0) fir_gate_kernel<T><<<grid_of(items), 256, 0, stream>>>(p);
}

}  // namespace sarissa::kernels
