// Sums over the lanes of a head.
#pragma once

namespace sarissa::kernels {

/// Sums x[i] over kLanes neighbouring lanes for kRows rows i. Lane l of them is left with the sums
/// of kRows / kLanes rows (at least one) in x[0..]; returns the first of these rows.
template <int kLanes, int kRows>
__device__ int reduce_scatter(float* x, int lane) {
  if constexpr (kLanes == 1) {
    return 0;
  } else if constexpr (kRows == 1) {
    x[0] += __shfl_xor_sync(~0u, x[0], kLanes / 2);
    return reduce_scatter<kLanes / 2, 1>(x, lane);
  } else {
    constexpr int kHalf = kRows / 2;
    const bool upper = lane & (kLanes / 2);
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float sent = upper ? x[i] : x[i + kHalf];
      const float kept = upper ? x[i + kHalf] : x[i];
      x[i] = kept + __shfl_xor_sync(~0u, sent, kLanes / 2);
    }
    return (upper ? kHalf : 0) + reduce_scatter<kLanes / 2, kHalf>(x, lane);
  }
}

}  // namespace sarissa::kernels
