// The backward of hyena_fir with 130 to 1024 taps on tensor cores.
#pragma once

#include "sarissa/kernels/common/cuda.cuh"
#include "sarissa/kernels/fir/fir.h"
#include "sarissa/kernels/fir/fir_tensor_long_bwd_plan.h"

namespace sarissa::kernels {

Status fir_tensor_long_bwd(const FirBwdParams& p, const FirTensorLongBwd& plan,
                           cudaStream_t stream);

}  // namespace sarissa::kernels
