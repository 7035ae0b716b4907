#include <bit>
#include <cmath>
#include <numbers>

#include "sarissa/kernels/common/cpu.h"
#include "sarissa/kernels/common/dtype.h"
#include "sarissa/kernels/rope/rope.h"

namespace sarissa::kernels {
namespace {

constexpr int64_t kTable = 128;  // pairs whose cosines and sines are kept at a time

/// Cosines and sines of step * inv_freq[0..count). The specification.
SARISSA_INLINE void fill_table(double step, const float* __restrict inv_freq, int64_t count,
                               double* __restrict cosine, double* __restrict sine) {
  for (int64_t d = 0; d < count; ++d) {
    const double angle = step * static_cast<double>(inv_freq[d]);
    cosine[d] = std::cos(angle);
    sine[d] = std::sin(angle);
  }
}

/// The same in float: the angle is formed and reduced to a quarter turn in double, so large
/// positions lose nothing; the polynomials on [-pi/4, pi/4] are Cephes sinf and cosf.
SARISSA_INLINE void fill_table(double step, const float* __restrict inv_freq, int64_t count,
                               float* __restrict cosine, float* __restrict sine) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: the sum's low bits are an integer
  const double quarters_per_radian = 2.0 * std::numbers::inv_pi;
  for (int64_t d = 0; d < count; ++d) {
    const double quarters = step * static_cast<double>(inv_freq[d]) * quarters_per_radian;
    const double shifted = quarters + kRound;
    const auto quadrant = static_cast<int32_t>(std::bit_cast<int64_t>(shifted));
    const auto r = static_cast<float>((quarters - (shifted - kRound)) * (std::numbers::pi / 2));
    const float z = r * r;
    const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
    const float c =
        ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
        0.5f * z + 1.0f;
    const bool swap = (quadrant & 1) != 0;
    const float cos_abs = swap ? s : c, sin_abs = swap ? c : s;
    cosine[d] = ((quadrant + 1) & 2) != 0 ? -cos_abs : cos_abs;
    sine[d] = (quadrant & 2) != 0 ? -sin_abs : sin_abs;
  }
}

template <class T>
SARISSA_INLINE void rotate(const T* __restrict x, T* __restrict y, int64_t pairs, int64_t count,
                           const compute_t<T>* __restrict cosine,
                           const compute_t<T>* __restrict sine) {
  using C = compute_t<T>;
  const T* __restrict x_high = x + pairs;
  T* __restrict y_high = y + pairs;
  for (int64_t d = 0; d < count; ++d) {
    const C low = static_cast<C>(x[d]), high = static_cast<C>(x_high[d]);
    y[d] = static_cast<T>(low * cosine[d] - high * sine[d]);
    y_high[d] = static_cast<T>(high * cosine[d] + low * sine[d]);
  }
}

template <class T>
SARISSA_INLINE void rope(const RopeParams& p, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  C cosine[kTable], sine[kTable];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.length, t = row % p.length;
    const double step = p.direction * (p.position + static_cast<double>(t)) / p.scale;
    const T* x = static_cast<const T*>(p.x) + b * p.x_batch + t * p.x_step;
    T* y = static_cast<T*>(p.y) + row * p.heads * 2 * p.pairs;
    for (int64_t d = 0; d < p.pairs; d += kTable) {
      const int64_t count = p.pairs - d < kTable ? p.pairs - d : kTable;
      fill_table(step, p.inv_freq + d, count, cosine, sine);
      for (int64_t h = 0; h < p.heads; ++h) {
        rotate(x + h * p.x_head + d, y + h * 2 * p.pairs + d, p.pairs, count, cosine, sine);
      }
    }
  }
}

SARISSA_CPU_CLONES void rope_f64(const RopeParams& p, int64_t begin, int64_t end) {
  rope<double>(p, begin, end);
}
SARISSA_CPU_CLONES void rope_f32(const RopeParams& p, int64_t begin, int64_t end) {
  rope<float>(p, begin, end);
}
SARISSA_CPU_CLONES void rope_bf16(const RopeParams& p, int64_t begin, int64_t end) {
  rope<BFloat16>(p, begin, end);
}

}  // namespace

Status rope_cpu(const RopeParams& params, DType dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kFloat64:
      rope_f64(params, begin, end);
      return {};
    case DType::kFloat32:
      rope_f32(params, begin, end);
      return {};
    case DType::kBFloat16:
      rope_bf16(params, begin, end);
      return {};
  }
  return {"unknown element type"};
}

}  // namespace sarissa::kernels
