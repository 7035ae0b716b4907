// The featurizer of the Hyena operators, on CPU rows: a depthwise causal FIR of
// three taps,
//   c[t, i] = f[0, i] z[t, i] + f[1, i] z[t-1, i] + f[2, i] z[t-2, i],
// where z[-2], z[-1] are the two rows of the state, oldest first (zeros at a
// sequence's start). Source: StripedHyena 2 (arXiv 2503.01868), section 2.
// Element type T, arithmetic compute_t<T>.
//
// The kernels take the featurizer tap-major, f [3, 3D] in compute_t<T>, so that
// channels vectorise. All pointers below point at the first channel of the
// caller's channel range.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sarissa/kernels/common/cpu.h"
#include "sarissa/kernels/common/dtype.h"

namespace sarissa::kernels {

constexpr int64_t kFeaturizerTaps = 3;
constexpr int64_t kFeaturizerHistory = kFeaturizerTaps - 1;
constexpr int64_t kFeaturizerMaxChannels = 64;  // channels per call of featurizer_bwd()

/// Rows z[t] for t >= -2 of one batch element.
template <class T>
struct FeaturizerRows {
  const T* z;  // [L, n]
  int64_t z_stride;
  const T* state;  // [2, n], never null: callers pass zeros where the sequence starts
  int64_t state_stride;

  const T* row(int64_t t) const {
    return t >= 0 ? z + t * z_stride : state + (t + kFeaturizerHistory) * state_stride;
  }
};

/// out[i] = f[0, i] x0[i] + f[1, i] x1[i] + f[2, i] x2[i] for n channels. Both
/// directions are this sum: c[t] of (z[t], z[t-1], z[t-2]) and dz[t] of (dc[t],
/// dc[t+1], dc[t+2]).
template <class T, class C>
SARISSA_INLINE void three_tap_row(const T* __restrict__ x0, const T* __restrict__ x1,
                                  const T* __restrict__ x2, const C* __restrict__ f,
                                  int64_t f_stride, int64_t n, C* __restrict__ out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = f[i] * static_cast<C>(x0[i]) + f[f_stride + i] * static_cast<C>(x1[i]) +
             f[2 * f_stride + i] * static_cast<C>(x2[i]);
  }
}

/// c[t] for n channels.
template <class T>
SARISSA_INLINE void featurize_row(const FeaturizerRows<T>& rows, int64_t t, const compute_t<T>* f,
                                  int64_t f_stride, int64_t n, compute_t<T>* c) {
  three_tap_row(rows.row(t), rows.row(t - 1), rows.row(t - 2), f, f_stride, n, c);
}

/// Arguments of featurizer_bwd(): n <= kFeaturizerMaxChannels channels of one
/// batch element.
template <class T>
struct FeaturizerBwd {
  FeaturizerRows<T> rows;
  int64_t length;  // L
  int64_t n;
  const compute_t<T>* f;  // [3, n]
  int64_t f_stride;
  const T* d_state_out;  // [2, n] gradient of the output state, null for zero
  int64_t d_state_out_stride;
  T* dz;  // [L, n]
  int64_t dz_stride;
  T* d_state;  // [2, n] gradient of the input state; written by the call with
               // begin = 0
  int64_t d_state_stride;
  compute_t<T>* d_f;  // [3, n] overwritten with the sum over the steps [begin, end)
  int64_t d_f_stride;
};

/// Writes dz of the steps [begin, end), and d_f's share of them. `dc_row(t,
/// out)` must fill out[n] with dc[t]; it is asked once for each t of [begin,
/// min(end + 2, L)), in ascending order, so a caller splits time freely: the
/// two steps after `end` are its only overlap. When L = 0, one call with begin
/// = end = 0 passes d_state_out on to d_state.
template <class T, class DcRow>
SARISSA_INLINE void featurizer_bwd(const FeaturizerBwd<T>& p, int64_t begin, int64_t end,
                                   const DcRow& dc_row) {
  using C = compute_t<T>;
  // Slots of dc[t], dc[t+1], dc[t+2]; rows outside [0, L) are zero.
  alignas(64) C dc[kFeaturizerTaps][kFeaturizerMaxChannels] = {};
  alignas(64) C sums[kFeaturizerTaps][kFeaturizerMaxChannels] = {};
  alignas(64) C dz[kFeaturizerMaxChannels];
  C *dc0 = dc[0], *dc1 = dc[1], *dc2 = dc[2];
  const int64_t n = p.n;
  const auto fill = [&](int64_t t, C* out) {
    if (t >= begin && t < p.length) {
      dc_row(t, out);
    } else {
      std::fill(out, out + n, C{0});
    }
  };
  const int64_t first = begin == 0 ? -kFeaturizerHistory : begin;
  fill(first, dc0);
  fill(first + 1, dc1);
  for (int64_t t = first; t < end; ++t) {
    fill(t + 2, dc2);
    if (t >= begin) {
      for (int64_t k = 0; k < kFeaturizerTaps; ++k) {
        const T* __restrict__ z = p.rows.row(t - k);
        C* __restrict__ sum = sums[k];
        const C* __restrict__ g = dc0;
        for (int64_t i = 0; i < n; ++i) sum[i] += g[i] * static_cast<C>(z[i]);
      }
    }
    three_tap_row(dc0, dc1, dc2, p.f, p.f_stride, n, dz);
    const int64_t out_row = t - (p.length - kFeaturizerHistory);  // row of the output state
    if (out_row >= 0 && p.d_state_out != nullptr) {
      const T* g = p.d_state_out + out_row * p.d_state_out_stride;
      for (int64_t i = 0; i < n; ++i) dz[i] += static_cast<C>(g[i]);
    }
    T* __restrict__ to =
        t >= 0 ? p.dz + t * p.dz_stride : p.d_state + (t + kFeaturizerHistory) * p.d_state_stride;
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(dz[i]);
    C* oldest = dc0;
    dc0 = dc1;
    dc1 = dc2;
    dc2 = oldest;
  }
  for (int64_t k = 0; k < kFeaturizerTaps; ++k) {
    std::copy(sums[k], sums[k] + n, p.d_f + k * p.d_f_stride);
  }
}

}  // namespace sarissa::kernels
