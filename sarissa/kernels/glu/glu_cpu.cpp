#include <numbers>

#include "sarissa/kernels/common/cpu.h"
#include "sarissa/kernels/common/cpu_math.h"
#include "sarissa/kernels/glu/glu.h"

namespace sarissa::kernels {
namespace {

/// The activation's value and slope.
template <class C>
struct Activated {
  C value, slope;
};

template <Activation kActivation, class C>
SARISSA_INLINE Activated<C> activate(C g) {
  if constexpr (kActivation == Activation::kSilu) {
    const C s = sigmoid(g);
    return {g * s, s * (C(1) + g * (C(1) - s))};
  } else if constexpr (kActivation == Activation::kGelu) {
    // g Phi(g) and Phi(g) + g phi(g), with the normal distribution Phi and its density phi
    const C phi_cumulative = C(0.5) * (C(1) + erf_of(g * C(1 / std::numbers::sqrt2)));
    const C density = C(std::numbers::inv_sqrtpi / std::numbers::sqrt2) * exp_of(C(-0.5) * g * g);
    return {g * phi_cumulative, phi_cumulative + g * density};
  } else {
    return {g, C(1)};
  }
}

template <Activation kActivation, class T>
SARISSA_INLINE void fwd_row(const T* __restrict gate, const T* __restrict up, T* __restrict y,
                            int64_t width) {
  using C = compute_t<T>;
  for (int64_t f = 0; f < width; ++f) {
    y[f] = static_cast<T>(activate<kActivation>(static_cast<C>(gate[f])).value *
                          static_cast<C>(up[f]));
  }
}

template <Activation kActivation, class T>
SARISSA_INLINE void bwd_row(const T* __restrict gate, const T* __restrict up,
                            const T* __restrict dy, T* __restrict dgate, T* __restrict dup,
                            int64_t width) {
  using C = compute_t<T>;
#pragma GCC ivdep  // five pointers are too many for gcc's own alias checks
  for (int64_t f = 0; f < width; ++f) {
    const C g = static_cast<C>(dy[f]);
    const Activated<C> a = activate<kActivation>(static_cast<C>(gate[f]));
    dgate[f] = static_cast<T>(g * static_cast<C>(up[f]) * a.slope);
    dup[f] = static_cast<T>(g * a.value);
  }
}

template <Activation kActivation, class T>
SARISSA_INLINE void fwd_rows(const GluParams& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const T* row = static_cast<const T*>(p.gate_up) + n * p.gate_up_row;
    fwd_row<kActivation>(row, row + p.width, static_cast<T*>(p.y) + n * p.width, p.width);
  }
}

template <Activation kActivation, class T>
SARISSA_INLINE void bwd_rows(const GluParams& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const T* row = static_cast<const T*>(p.gate_up) + n * p.gate_up_row;
    T* out = static_cast<T*>(p.dgate_up) + 2 * n * p.width;
    bwd_row<kActivation>(row, row + p.width, static_cast<const T*>(p.dy) + n * p.dy_row, out,
                         out + p.width, p.width);
  }
}

template <class T>
SARISSA_INLINE void fwd(const GluParams& p, int64_t begin, int64_t end) {
  switch (p.activation) {
    case Activation::kSilu:
      return fwd_rows<Activation::kSilu, T>(p, begin, end);
    case Activation::kGelu:
      return fwd_rows<Activation::kGelu, T>(p, begin, end);
    case Activation::kIdentity:
      return fwd_rows<Activation::kIdentity, T>(p, begin, end);
  }
}

template <class T>
SARISSA_INLINE void bwd(const GluParams& p, int64_t begin, int64_t end) {
  switch (p.activation) {
    case Activation::kSilu:
      return bwd_rows<Activation::kSilu, T>(p, begin, end);
    case Activation::kGelu:
      return bwd_rows<Activation::kGelu, T>(p, begin, end);
    case Activation::kIdentity:
      return bwd_rows<Activation::kIdentity, T>(p, begin, end);
  }
}

SARISSA_CPU_CLONES void fwd_f64(const GluParams& p, int64_t begin, int64_t end) {
  fwd<double>(p, begin, end);
}
SARISSA_CPU_CLONES void fwd_f32(const GluParams& p, int64_t begin, int64_t end) {
  fwd<float>(p, begin, end);
}
SARISSA_CPU_CLONES void fwd_bf16(const GluParams& p, int64_t begin, int64_t end) {
  fwd<BFloat16>(p, begin, end);
}
SARISSA_CPU_CLONES void bwd_f64(const GluParams& p, int64_t begin, int64_t end) {
  bwd<double>(p, begin, end);
}
SARISSA_CPU_CLONES void bwd_f32(const GluParams& p, int64_t begin, int64_t end) {
  bwd<float>(p, begin, end);
}
SARISSA_CPU_CLONES void bwd_bf16(const GluParams& p, int64_t begin, int64_t end) {
  bwd<BFloat16>(p, begin, end);
}

}  // namespace

Status glu_fwd_cpu(const GluParams& params, DType dtype, int64_t begin, int64_t end) {
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

Status glu_bwd_cpu(const GluParams& params, DType dtype, int64_t begin, int64_t end) {
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

}  // namespace sarissa::kernels
