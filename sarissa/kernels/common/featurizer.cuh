// The featurizer of the Hyena operators on CUDA; the maths is in featurizer.h. One thread per
// channel: neighbouring threads read neighbouring channels.
#pragma once

#include <algorithm>
#include <type_traits>

#include "sarissa/kernels/common/cuda.cuh"

namespace sarissa::kernels {

template <class T>
using device_compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// z[t] for t >= -2 of one batch element and channel.
template <class T>
struct FeaturizerColumn {
  const T* z;  // stride z_stride per step
  int64_t z_stride;
  const T* state;  // z[-2], z[-1] with state_stride between; never null
  int64_t state_stride;

  __device__ device_compute_t<T> at(int64_t t) const {
    return load(t >= 0 ? z + t * z_stride : state + (t + 2) * state_stride);
  }
};

/// f0 z0 + f1 z1 + f2 z2, the oldest first. The kernels that compute it one by one all do it in
/// this order, so that they agree bit for bit.
template <class C>
__device__ inline C three_taps(C f0, C f1, C f2, C z0, C z1, C z2) {
  return fma(f0, z0, fma(f1, z1, f2 * z2));
}

/// c[t] = f0 z[t] + f1 z[t-1] + f2 z[t-2] for t >= 0; f points at {f0, f1, f2} with f_stride.
template <class T>
__device__ device_compute_t<T> featurize(const FeaturizerColumn<T>& column, int64_t t,
                                         const device_compute_t<T>* f, int64_t f_stride) {
  return three_taps(f[0], f[f_stride], f[2 * f_stride], column.at(t), column.at(t - 1),
                    column.at(t - 2));
}

/// The featurizer's backward from a stored dc [B, L, N] in the arithmetic type, N channels.
template <class T>
struct FeaturizerBwdArgs {
  using C = device_compute_t<T>;
  int64_t batch, length, channels;
  const C* dc;  // [B, L, N] contiguous
  const T* z;   // [B, L, N]
  int64_t z_stride_b, z_stride_l;
  const T* state;        // [B, 2, N] contiguous, never null
  const C* f;            // [3, N]
  const T* d_state_out;  // [B, 2, N] contiguous or null for zero
  T* dz;                 // [B, L, N] contiguous
  T* d_state;            // [B, 2, N] contiguous
  int64_t chunk;         // steps per partial sum of d_f
  C* d_f_partial;        // [B, ceil(L / chunk), 3, N]
};

/// dz[t] = f0 dc[t] + f1 dc[t+1] + f2 dc[t+2] (+ d_state_out) for t >= -2; rows -2, -1 are d_state.
template <class T>
__global__ void featurizer_dz_kernel(FeaturizerBwdArgs<T> p) {
  using C = device_compute_t<T>;
  const int64_t rows = p.length + 2;
  const int64_t total = p.batch * rows * p.channels;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t n = i % p.channels;
    const int64_t t = i / p.channels % rows - 2;
    const int64_t b = i / p.channels / rows;
    C sum = 0;
    for (int k = 0; k < 3; ++k) {
      if (t + k >= 0 && t + k < p.length) {
        sum += p.f[k * p.channels + n] * p.dc[(b * p.length + t + k) * p.channels + n];
      }
    }
    const int64_t out_row = t - (p.length - 2);  // row of the output state
    if (out_row >= 0 && p.d_state_out != nullptr) {
      sum += load(p.d_state_out + (b * 2 + out_row) * p.channels + n);
    }
    store(t >= 0 ? p.dz + (b * p.length + t) * p.channels + n
                 : p.d_state + (b * 2 + t + 2) * p.channels + n,
          sum);
  }
}

/// d_f_partial[b, chunk, k, n] = sum over the chunk's steps of dc[t] z[t-k].
template <class T>
__global__ void featurizer_df_kernel(FeaturizerBwdArgs<T> p) {
  using C = device_compute_t<T>;
  const int64_t chunks = ceil_div(p.length, p.chunk);
  const int64_t total = p.batch * chunks * p.channels;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t n = i % p.channels;
    const int64_t chunk = i / p.channels % chunks;
    const int64_t b = i / p.channels / chunks;
    const FeaturizerColumn<T> column{p.z + b * p.z_stride_b + n, p.z_stride_l,
                                     p.state + b * 2 * p.channels + n, p.channels};
    const int64_t begin = chunk * p.chunk;
    const int64_t end = begin + p.chunk < p.length ? begin + p.chunk : p.length;
    C z0 = 0, z1 = column.at(begin - 1), z2 = column.at(begin - 2);
    C sum0 = 0, sum1 = 0, sum2 = 0;
    for (int64_t t = begin; t < end; ++t) {
      z0 = column.at(t);
      const C g = p.dc[(b * p.length + t) * p.channels + n];
      sum0 += g * z0;
      sum1 += g * z1;
      sum2 += g * z2;
      z2 = z1;
      z1 = z0;
    }
    C* out = p.d_f_partial + (b * chunks + chunk) * 3 * p.channels + n;
    out[0] = sum0;
    out[p.channels] = sum1;
    out[2 * p.channels] = sum2;
  }
}

/// out[i] = sum over r, in order, of partial[r, i].
template <class C>
__global__ void sum_rows_kernel(const C* partial, int64_t rows, int64_t n, C* out) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step) {
    C sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += partial[r * n + i];
    out[i] = sum;
  }
}

/// Blocks of 256 threads for a grid-stride loop over n > 0 items.
inline unsigned grid_of(int64_t n) {
  return static_cast<unsigned>(std::min<int64_t>(ceil_div<int64_t>(n, 256), 1 << 20));
}

/// dz, d_state and d_f [3, N] from dc. B, N > 0; L may be 0.
template <class T>
Status featurizer_bwd_launch(const FeaturizerBwdArgs<T>& p, device_compute_t<T>* d_f,
                             cudaStream_t stream) {
  featurizer_dz_kernel<T><<<grid_of(p.batch * (p.length + 2) * p.channels), 256, 0, stream>>>(p);
  const int64_t chunks = ceil_div(p.length, p.chunk);
  if (p.length > 0) {
    featurizer_df_kernel<T><<<grid_of(p.batch * chunks * p.channels), 256, 0, stream>>>(p);
  }
  sum_rows_kernel<<<grid_of(3 * p.channels), 256, 0, stream>>>(p.d_f_partial, p.batch * chunks,
                                                               3 * p.channels, d_f);
  return launch_status();
}

}  // namespace sarissa::kernels
