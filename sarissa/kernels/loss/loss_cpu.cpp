#include <limits>

#include "sarissa/kernels/common/cpu.h"
#include "sarissa/kernels/common/cpu_math.h"
#include "sarissa/kernels/loss/loss.h"

namespace sarissa::kernels {
namespace {

template <class T>
SARISSA_INLINE compute_t<T> log_sum_exp(const T* __restrict logits, int64_t classes) {
  using C = compute_t<T>;
  const C highest = reduce_lanes(
      classes, -std::numeric_limits<C>::infinity(),
      [&](int64_t v) __attribute__((always_inline)) { return static_cast<C>(logits[v]); },
      [](C a, C b) __attribute__((always_inline)) { return a > b ? a : b; });
  const C sum = sum_lanes<C>(
      classes, [&](int64_t v) __attribute__((always_inline)) {
        return exp_of(static_cast<C>(logits[v]) - highest);
      });
  return highest + std::log(sum);
}

template <class T>
SARISSA_INLINE void fwd(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  for (int64_t n = begin; n < end; ++n) {
    const T* logits = static_cast<const T*>(p.logits) + n * p.logits_row;
    const int64_t target = p.targets[n];
    C loss = 0;
    if (target < 0 || target >= p.classes) {
      if (target != kIgnoreTarget) loss = std::numeric_limits<C>::quiet_NaN();
    } else {
      loss = log_sum_exp(logits, p.classes) - static_cast<C>(logits[target]);
    }
    static_cast<C*>(p.loss)[n] = loss;
  }
}

/// dlogits = dloss * (softmax(logits) - onehot(target)).
template <class T>
SARISSA_INLINE void bwd_row(const T* __restrict logits, T* __restrict dlogits, int64_t classes,
                            int64_t target, compute_t<T> loss, compute_t<T> dloss) {
  using C = compute_t<T>;
  const C log_sum = loss + static_cast<C>(logits[target]);
  for (int64_t v = 0; v < classes; ++v) {
    dlogits[v] = static_cast<T>(dloss * exp_of(static_cast<C>(logits[v]) - log_sum));
  }
  const C p = exp_of(static_cast<C>(logits[target]) - log_sum);
  dlogits[target] = static_cast<T>(dloss * (p - C(1)));
}

template <class T>
SARISSA_INLINE void bwd(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  for (int64_t n = begin; n < end; ++n) {
    T* dlogits = static_cast<T*>(p.dlogits) + n * p.classes;
    const int64_t target = p.targets[n];
    if (target < 0 || target >= p.classes) {
      const C fill = target == kIgnoreTarget ? C(0) : std::numeric_limits<C>::quiet_NaN();
      for (int64_t v = 0; v < p.classes; ++v) dlogits[v] = static_cast<T>(fill);
    } else {
      bwd_row(static_cast<const T*>(p.logits) + n * p.logits_row, dlogits, p.classes, target,
              static_cast<const C*>(p.loss)[n], static_cast<const C*>(p.dloss)[n]);
    }
  }
}

SARISSA_CPU_CLONES void fwd_f64(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  fwd<double>(p, begin, end);
}
SARISSA_CPU_CLONES void fwd_f32(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  fwd<float>(p, begin, end);
}
SARISSA_CPU_CLONES void fwd_bf16(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  fwd<BFloat16>(p, begin, end);
}
SARISSA_CPU_CLONES void bwd_f64(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  bwd<double>(p, begin, end);
}
SARISSA_CPU_CLONES void bwd_f32(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  bwd<float>(p, begin, end);
}
SARISSA_CPU_CLONES void bwd_bf16(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  bwd<BFloat16>(p, begin, end);
}

}  // namespace

Status cross_entropy_fwd_cpu(const CrossEntropyParams& params, DType dtype, int64_t begin,
                             int64_t end) {
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

Status cross_entropy_bwd_cpu(const CrossEntropyParams& params, DType dtype, int64_t begin,
                             int64_t end) {
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
