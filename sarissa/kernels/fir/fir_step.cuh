// One step of hyena_fir (L = 1), as decoding takes it, with any number of taps.
#pragma once

#include "sarissa/kernels/common/cuda.cuh"
#include "sarissa/kernels/fir/fir.h"
#include "sarissa/kernels/fir/fir_plan.h"

namespace sarissa::kernels {

Status fir_step(const FirParams& p, const FirStep& plan, DType dtype, cudaStream_t stream);

}  // namespace sarissa::kernels
