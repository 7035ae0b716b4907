// Problems of the FIR family that its tests share.
#pragma once

#include <cstdint>
#include <ostream>

#include "sarissa/kernels/fir/fir.h"

namespace sarissa::test {

struct FirShape {
  int64_t B, L, D, G, W;
};

inline std::ostream& operator<<(std::ostream& out, const FirShape& s) {
  return out << "B" << s.B << " L" << s.L << " D" << s.D << " G" << s.G << " W" << s.W;
}

/// A problem of hyena_fir, for plans: its tensors lie at addresses that are never read.
inline kernels::FirBwdParams plan_problem(const FirShape& s) {
  const auto* aligned = reinterpret_cast<const void*>(uintptr_t{4096});
  kernels::FirBwdParams p{};
  p.batch = s.B;
  p.length = s.L;
  p.width = s.D;
  p.groups = s.G;
  p.num_taps = s.W;
  p.x = p.dy = p.featurizer = p.taps = aligned;
  p.x_stride_l = 3 * s.D;
  p.x_stride_b = s.L * p.x_stride_l;
  p.dy_stride_l = s.D;
  p.dy_stride_b = s.L * s.D;
  return p;
}

/// Shared memory of a multiprocessor, for plans.
constexpr int64_t kH100 = 228 * 1024, kA100 = 164 * 1024, kSmall = 100 * 1024;

}  // namespace sarissa::test
