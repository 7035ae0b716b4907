// The backward of hyena_fir with many taps on tensor cores.
#pragma once

#include "sarissa/kernels/common/cuda.cuh"
#include "sarissa/kernels/fir/fir.h"
#include "sarissa/kernels/fir/fir_tensor_bwd_plan.h"

namespace sarissa::kernels {

/// Sums the partial gradients of `partials` strips: featurizer_partial [3D, 3] and taps_partial [D
/// + (D / unit) W] of each, where `unit` channels share the partial gradient of their taps.
Status fir_tensor_sum(const FirBwdParams& p, int partials, int unit, const char* name,
                      cudaStream_t stream);

/// run<kLags>() for the lags of a plan, 3, 5 or 9: what backward kernels are compiled for.
template <class Run>
Status fir_with_bwd_lags(int lags, const Run& run) {
  switch (lags) {
    case 3:
      return run.template operator()<3>();
    case 5:
      return run.template operator()<5>();
    default:
      return run.template operator()<9>();
  }
}

Status fir_tensor_bwd(const FirBwdParams& p, const FirTensorBwd& plan, cudaStream_t stream);

}  // namespace sarissa::kernels
