// What the kernels share in which a lane owns kSwrMarchBytes of neighbouring channels and a power
// of two of lanes a head: which problems they take.
#pragma once

#include "sarissa/kernels/swr/swr_cuda.cuh"

namespace sarissa::kernels {

namespace lanes_detail {
inline int64_t channels_of_lane(DType dtype) {
  return kSwrMarchBytes / (dtype == DType::kBFloat16 ? 2 : 4);
}
inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kSwrMarchBytes == 0; }
}  // namespace lanes_detail

/// Whether the inputs are gated, in heads of 4 to 32 lanes, and aligned for them.
inline bool swr_lanes_fit(const SwrInputs& in, DType dtype) {
  using lanes_detail::aligned;
  if (!in.gated || dtype == DType::kFloat64) return false;
  const int64_t V = lanes_detail::channels_of_lane(dtype);
  const int64_t lanes = in.width / V;
  return in.width % V == 0 && (lanes == 4 || lanes == 8 || lanes == 16 || lanes == 32) &&
         aligned(in.b) && aligned(in.c) && aligned(in.u) && in.gate_batch % V == 0 &&
         in.gate_step % V == 0 && in.u_batch % V == 0 && in.u_step % V == 0 && in.u_head % V == 0;
}
/// The same of the gradients, for inputs that fit.
inline bool swr_lane_gradients_fit(const SwrBwdParams& params, DType dtype) {
  using lanes_detail::aligned;
  const int64_t V = lanes_detail::channels_of_lane(dtype);
  return aligned(params.dx) && params.dx_batch % V == 0 && params.dx_step % V == 0 &&
         params.dx_head % V == 0 && aligned(params.du) && aligned(params.db) &&
         aligned(params.dc) && params.du_step % V == 0 && params.dgate_step % V == 0;
}

/// Calls run.template operator()<T, kLanes>() for inputs that fit.
template <class Run>
Status swr_with_lanes(const SwrInputs& in, DType dtype, const Run& run) {
  const auto with_type = [&]<class T>() -> Status {
    switch (in.width * static_cast<int64_t>(sizeof(T)) / kSwrMarchBytes) {
      case 4:
        return run.template operator()<T, 4>();
      case 8:
        return run.template operator()<T, 8>();
      case 16:
        return run.template operator()<T, 16>();
      case 32:
        return run.template operator()<T, 32>();
    }
    return {"no kernel for this head width"};
  };
  return dtype == DType::kBFloat16 ? with_type.template operator()<__nv_bfloat16>()
                                   : with_type.template operator()<float>();
}

}  // namespace sarissa::kernels
