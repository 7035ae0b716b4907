// The backward of hyena_fir with many taps on tensor cores.
#pragma once

#include "sarissa/kernels/common/cuda.cuh"
#include "sarissa/kernels/fir/fir.h"
#include "sarissa/kernels/fir/fir_tensor_bwd_plan.h"

namespace sarissa::kernels {

Status fir_tensor_bwd(const FirBwdParams& p, const FirTensorBwd& plan, cudaStream_t stream);

}  // namespace sarissa::kernels
