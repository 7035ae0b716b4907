#include <algorithm>

#include "sarissa/kernels/common/cpu.h"
#include "sarissa/kernels/common/cpu_math.h"
#include "sarissa/kernels/norm/norm.h"

namespace sarissa::kernels {
namespace {

/// 1 / sqrt(mean(s^2) + eps) of one row.
template <class T>
SARISSA_INLINE compute_t<T> inverse_rms(const T* __restrict s, int64_t width, double eps) {
  using C = compute_t<T>;
  const C squares = sum_lanes<C>(
      width, [&](int64_t d) __attribute__((always_inline)) {
        const C v = static_cast<C>(s[d]);
        return v * v;
      });
  return C(1) / std::sqrt(squares / static_cast<C>(width) + static_cast<C>(eps));
}

template <class T>
SARISSA_INLINE void fwd_row(const T* __restrict x, const T* __restrict residual,
                            const T* __restrict weight, T* __restrict sum, T* __restrict y,
                            int64_t width, double eps) {
  using C = compute_t<T>;
  const T* s = x;
  if (residual != nullptr) {
    for (int64_t d = 0; d < width; ++d) {
      sum[d] = static_cast<T>(static_cast<C>(x[d]) + static_cast<C>(residual[d]));
    }
    s = sum;  // as rounded: the backward sees the same values
  }
  const C r = inverse_rms(s, width, eps);
  for (int64_t d = 0; d < width; ++d) {
    y[d] = static_cast<T>(static_cast<C>(s[d]) * r * static_cast<C>(weight[d]));
  }
}

template <class T>
SARISSA_INLINE void fwd(const RmsNormFwdParams& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const bool add = p.residual != nullptr;
    fwd_row(static_cast<const T*>(p.x) + n * p.x_row,
            add ? static_cast<const T*>(p.residual) + n * p.residual_row : nullptr,
            static_cast<const T*>(p.weight), add ? static_cast<T*>(p.sum) + n * p.width : nullptr,
            static_cast<T*>(p.y) + n * p.width, p.width, p.eps);
  }
}

template <class T>
SARISSA_INLINE void bwd_row(const T* __restrict dy, const T* __restrict dsum, const T* __restrict s,
                            const T* __restrict weight, T* __restrict dx,
                            compute_t<T>* __restrict dweight, int64_t width, double eps) {
  using C = compute_t<T>;
  const C r = inverse_rms(s, width, eps);
  const C dot = sum_lanes<C>(
      width, [&](int64_t d) __attribute__((always_inline)) {
        return static_cast<C>(dy[d]) * static_cast<C>(weight[d]) * static_cast<C>(s[d]);
      });
  const C pull = dot * r * r / static_cast<C>(width);
  if (dsum == nullptr) {
    for (int64_t d = 0; d < width; ++d) {
      const C g = static_cast<C>(dy[d]), v = static_cast<C>(s[d]);
      dx[d] = static_cast<T>(r * (g * static_cast<C>(weight[d]) - v * pull));
      dweight[d] += g * v * r;
    }
  } else {
    for (int64_t d = 0; d < width; ++d) {
      const C g = static_cast<C>(dy[d]), v = static_cast<C>(s[d]);
      dx[d] =
          static_cast<T>(static_cast<C>(dsum[d]) + r * (g * static_cast<C>(weight[d]) - v * pull));
      dweight[d] += g * v * r;
    }
  }
}

template <class T>
SARISSA_INLINE void bwd(const RmsNormBwdParams& p, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  for (int64_t part = begin; part < end; ++part) {
    C* dweight = static_cast<C*>(p.partial) + part * p.width;
    for (int64_t d = 0; d < p.width; ++d) dweight[d] = 0;
    const int64_t first = part * p.rows_per_part;
    const int64_t last = std::min(first + p.rows_per_part, p.rows);
    for (int64_t n = first; n < last; ++n) {
      bwd_row(static_cast<const T*>(p.dy) + n * p.dy_row,
              p.dsum == nullptr ? nullptr : static_cast<const T*>(p.dsum) + n * p.dsum_row,
              static_cast<const T*>(p.sum) + n * p.sum_row, static_cast<const T*>(p.weight),
              static_cast<T*>(p.dx) + n * p.width, dweight, p.width, p.eps);
    }
  }
}

template <class T>
SARISSA_INLINE void bwd_weight(const RmsNormBwdParams& p, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const C* partial = static_cast<const C*>(p.partial);
  for (int64_t d = begin; d < end; ++d) {
    C total = 0;
    for (int64_t part = 0; part < p.parts; ++part) total += partial[part * p.width + d];
    static_cast<T*>(p.dweight)[d] = static_cast<T>(total);
  }
}

SARISSA_CPU_CLONES void fwd_f64(const RmsNormFwdParams& p, int64_t begin, int64_t end) {
  fwd<double>(p, begin, end);
}
SARISSA_CPU_CLONES void fwd_f32(const RmsNormFwdParams& p, int64_t begin, int64_t end) {
  fwd<float>(p, begin, end);
}
SARISSA_CPU_CLONES void fwd_bf16(const RmsNormFwdParams& p, int64_t begin, int64_t end) {
  fwd<BFloat16>(p, begin, end);
}
SARISSA_CPU_CLONES void bwd_f64(const RmsNormBwdParams& p, int64_t begin, int64_t end) {
  bwd<double>(p, begin, end);
}
SARISSA_CPU_CLONES void bwd_f32(const RmsNormBwdParams& p, int64_t begin, int64_t end) {
  bwd<float>(p, begin, end);
}
SARISSA_CPU_CLONES void bwd_bf16(const RmsNormBwdParams& p, int64_t begin, int64_t end) {
  bwd<BFloat16>(p, begin, end);
}

}  // namespace

Status rms_norm_fwd_cpu(const RmsNormFwdParams& params, DType dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kFloat64:
      fwd_f64(params, begin, end);
      return {};
    case DType::kFloat32:
      fwd_f32(params, begin, end);
      return {};
    case DType::kBFloat16:
      fwd_bf16(params, begin, end);
      return {};
  }
  return {"unknown element type"};
}

Status rms_norm_bwd_cpu(const RmsNormBwdParams& params, DType dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kFloat64:
      bwd_f64(params, begin, end);
      return {};
    case DType::kFloat32:
      bwd_f32(params, begin, end);
      return {};
    case DType::kBFloat16:
      bwd_bf16(params, begin, end);
      return {};
  }
  return {"unknown element type"};
}

Status rms_norm_bwd_weight_cpu(const RmsNormBwdParams& params, DType dtype, int64_t begin,
                               int64_t end) {
  switch (dtype) {
    case DType::kFloat64:
      bwd_weight<double>(params, begin, end);
      return {};
    case DType::kFloat32:
      bwd_weight<float>(params, begin, end);
      return {};
    case DType::kBFloat16:
      bwd_weight<BFloat16>(params, begin, end);
      return {};
  }
  return {"unknown element type"};
}

}  // namespace sarissa::kernels
