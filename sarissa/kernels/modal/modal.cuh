// What the forward and the backward CUDA kernels of the modal convolution share. One thread owns
// one channel of one batch entry for the whole sequence, so any length, width and number of modes
// works and neighbouring threads touch neighbouring channels. A thread takes kSteps steps into
// registers and runs all modes over them, a few modes at a time; what does not fill kSteps goes
// step by step.
#pragma once

#include "sarissa/kernels/common/cuda.cuh"
#include "sarissa/kernels/common/featurizer.cuh"
#include "sarissa/kernels/modal/modal.h"

namespace sarissa::kernels {

constexpr int kModalThreads = 64;  // small blocks: a layer has few channels and many SMs want one
enum Third { kPost, kPre, kValue };

/// lambda = high + low (modal_cpu.cpp says why two numbers) and the residues, [N, G] each.
template <class C>
struct ModalTables {
  C* high;
  C* low;
  C* residue;
};

template <class C>
__global__ void modal_tables_kernel(const C* log_poles, const C* residues, int64_t groups,
                                    int64_t modes, ModalTables<C> tables) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < groups * modes; i += step) {
    const int64_t n = i / groups, g = i % groups;
    const double lambda = exp(static_cast<double>(log_poles[g * modes + n]));
    tables.high[i] = static_cast<C>(lambda);
    tables.low[i] = static_cast<C>(lambda - static_cast<double>(tables.high[i]));
    tables.residue[i] = residues[g * modes + n];
  }
}

template <class C>
int64_t modal_tables_bytes(const ModalInputs& in) {
  return 3 * in.groups * in.modes * static_cast<int64_t>(sizeof(C));
}

/// Fills tables at `workspace` and moves it behind them.
template <class C>
ModalTables<C> make_modal_tables(const ModalInputs& in, C*& workspace, cudaStream_t stream) {
  const int64_t n = in.groups * in.modes;
  const ModalTables<C> tables{workspace, workspace + n, workspace + 2 * n};
  workspace += 3 * n;
  if (n > 0) {
    modal_tables_kernel<C><<<grid_of(n), 256, 0, stream>>>(static_cast<const C*>(in.log_poles),
                                                           static_cast<const C*>(in.residues),
                                                           in.groups, in.modes, tables);
  }
  return tables;
}

/// lambda s + u in one or two roundings, never contracted differently.
__device__ inline double recur(double high, double, double s, double u) { return fma(high, s, u); }
__device__ inline float recur(float high, float low, float s, float u) {
  return fmaf(high, s, fmaf(low, s, u));
}
__device__ inline double fused(double a, double b, double c) { return fma(a, b, c); }
__device__ inline float fused(float a, float b, float c) { return fmaf(a, b, c); }

/// One thread's channel.
template <class T>
struct ModalChannel {
  using C = device_compute_t<T>;

  int64_t b, channel, width, modes, groups, group;
  ModalTables<C> tables;
  bool gated;
  FeaturizerColumn<T> columns[3];  // of z's thirds; not gated: columns[0] is u
  const C* featurizer;
  C skip;

  __device__ ModalChannel(const ModalInputs& in, const ModalTables<C>& tables, int64_t index)
      : b(index / in.width),
        channel(index % in.width),
        width(in.width),
        modes(in.modes),
        groups(in.groups),
        group(channel / (in.width / in.groups)),
        tables(tables),
        gated(in.featurizer != nullptr),
        featurizer(static_cast<const C*>(in.featurizer) + channel),
        skip(in.skip ? static_cast<const C*>(in.skip)[channel] : C{0}) {
    for (int third = 0; third < 3; ++third) {
      columns[third] = {
          static_cast<const T*>(in.u) + b * in.u_batch_stride + third * width + channel,
          in.u_time_stride,
          static_cast<const T*>(in.featurizer_state) + b * 2 * 3 * width + third * width + channel,
          3 * width};
    }
  }

  __device__ const C* taps(int third) const { return featurizer + third * width; }
  /// Featurizer output.
  __device__ C c(int third, int64_t t) const {
    return featurize(columns[third], t, taps(third), 3 * width);
  }
  __device__ C u(int64_t t) const { return gated ? c(kPre, t) * c(kValue, t) : columns[0].at(t); }

  /// Position of mode 0 in a [B, N, D] buffer; the next modes follow at distance `width`.
  __device__ int64_t at_BND() const { return b * modes * width + channel; }
  /// Position of mode 0 in a [B, D, N] buffer.
  __device__ int64_t at_BDN() const { return (b * width + channel) * modes; }
};

/// M modes' filter and states in registers.
template <int M, class T>
struct Modes {
  using C = device_compute_t<T>;
  C high[M], low[M], residue[M], s[M];

  /// Modes n .. n + M - 1; `states` points at mode 0.
  __device__ Modes(const ModalChannel<T>& channel, int64_t n, const C* states) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const int64_t i = (n + m) * channel.groups + channel.group;
      high[m] = channel.tables.high[i];
      low[m] = channel.tables.low[i];
      residue[m] = channel.tables.residue[i];
      s[m] = states[(n + m) * channel.width];
    }
  }
  __device__ void store(const ModalChannel<T>& channel, int64_t n, C* states) const {
#pragma unroll
    for (int m = 0; m < M; ++m) states[(n + m) * channel.width] = s[m];
  }
};

/// Calls f<kTogether>(n) for blocks of modes and f<1>(n) for the rest, so that all of 0 .. N - 1
/// are covered. Modes together are independent chains that hide the latency of the recurrence.
template <int kTogether, class F>
__device__ void for_modes(int64_t modes, const F& f) {
  int64_t n = 0;
  for (; n + kTogether <= modes; n += kTogether) f.template operator()<kTogether>(n);
  for (; n < modes; ++n) f.template operator()<1>(n);
}

inline unsigned modal_grid(const ModalInputs& in) {
  return static_cast<unsigned>(
      std::min<int64_t>(ceil_div<int64_t>(in.batch * in.width, kModalThreads), int64_t{1} << 30));
}

}  // namespace sarissa::kernels
