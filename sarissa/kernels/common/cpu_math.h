// Arithmetic of the CPU kernels that the compiler can vectorise without -ffast-math: elementary
// functions of float by polynomials (of double: the C library's), and reductions in a fixed order.
// The selects below become branches, 6 times slower, unless compiled with -fno-trapping-math.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "sarissa/kernels/common/cpu.h"
#include "sarissa/kernels/common/dtype.h"

namespace sarissa::kernels {

/// e^x. The float version errs by at most 2 ulp; results below 1.8e-38 are flushed to 0.
SARISSA_INLINE double exp_of(double x) { return std::exp(x); }
SARISSA_INLINE float exp_of(float x) {
  // x = n ln 2 + r with |r| <= ln(2)/2; ln 2 is split so that n times its first part is exact.
  // Polynomial: Cephes expf. Adding 1.5 * 2^23 rounds to an integer held in the low mantissa bits.
  constexpr float kRound = 12582912.0f;
  float in_range = x < -86.9f ? -86.9f : x;
  in_range = in_range > 88.73f ? 88.73f : in_range;
  const float shifted = in_range * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (in_range - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^(n-1), then times 2: n = 128 has no float of its own.
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound) + 126;
  const float y = p * std::bit_cast<float>(exponent << 23) * 2.0f;
  return x < -86.9f ? 0.0f : y;
}

/// 1 / (1 + e^-x).
template <class C>
SARISSA_INLINE C sigmoid(C x) {
  return C(1) / (C(1) + exp_of(-x));
}

/// The error function. The float version is a rational approximation on [-4, 4] (the one of Eigen
/// 3.4), absolute error below 3.2e-7.
SARISSA_INLINE double erf_of(double x) { return std::erf(x); }
SARISSA_INLINE float erf_of(float x) {
  float z = x < -4.0f ? -4.0f : x;
  z = z > 4.0f ? 4.0f : z;
  const float s = z * z;
  float p = -2.72614225801306e-10f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s + -2.10102402082508e-06f;
  p = p * s + -5.69250639462346e-05f;
  p = p * s + -7.34990630326855e-04f;
  p = p * s + -2.95459980854025e-03f;
  p = p * s + -1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * s + -2.13374055278905e-04f;
  q = q * s + -1.68282697438203e-03f;
  q = q * s + -7.37332916720468e-03f;
  q = q * s + -1.42647390514189e-02f;
  return z * p / q;
}

/// Partial results that a reduction keeps side by side: enough for two AVX-512 registers.
constexpr int kLanes = 32;

/// Combines term(0) .. term(n - 1) with `combine`, starting from `identity`. Term i goes to lane
/// i % kLanes and the lanes are combined pairwise, so the order depends on n alone and the main
/// loop vectorises. `term` and `combine` should be always_inline.
template <class C, class Term, class Combine>
SARISSA_INLINE C reduce_lanes(int64_t n, C identity, Term term, Combine combine) {
  C lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = identity;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] = combine(lanes[l], term(i + l));
  }
  for (int l = 0; i < n; ++i, ++l) lanes[l] = combine(lanes[l], term(i));
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lanes[l] = combine(lanes[l], lanes[l + width]);
  }
  return lanes[0];
}

template <class C, class Term>
SARISSA_INLINE C sum_lanes(int64_t n, Term term) {
  return reduce_lanes(n, C(0), term, [](C a, C b) [[gnu::always_inline]] { return a + b; });
}

}  // namespace sarissa::kernels
