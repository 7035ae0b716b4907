// The activations on the device and the launch shared by forward and backward.
#pragma once

#include "sarissa/kernels/common/cuda_rows.cuh"
#include "sarissa/kernels/glu/glu.h"

namespace sarissa::kernels {

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float erf_of(float x) { return erff(x); }
__device__ inline double erf_of(double x) { return erf(x); }

/// The activation's value and slope.
template <class C>
struct Activated {
  C value, slope;
};

template <Activation kActivation, class C>
__device__ Activated<C> activate(C g) {
  if constexpr (kActivation == Activation::kSilu) {
    const C s = C(1) / (C(1) + exp_of(-g));
    return {g * s, s * (C(1) + g * (C(1) - s))};
  } else if constexpr (kActivation == Activation::kGelu) {
    constexpr double kInverseSqrt2 = 0.70710678118654752440;
    constexpr double kInverseSqrt2Pi = 0.39894228040143267794;
    const C cumulative = C(0.5) * (C(1) + erf_of(g * C(kInverseSqrt2)));
    return {g * cumulative, cumulative + g * C(kInverseSqrt2Pi) * exp_of(C(-0.5) * g * g)};
  } else {
    return {g, C(1)};
  }
}

constexpr int kGluThreads = 256;

/// Blocks for one pack of `width` elements per thread; the kernels stride over what is left.
inline unsigned glu_blocks(const GluParams& p, int pack) {
  const int64_t blocks = ceil_div<int64_t>(p.rows * (p.width / pack), kGluThreads);
  return static_cast<unsigned>(blocks < (1 << 20) ? blocks : (1 << 20));
}

}  // namespace sarissa::kernels
