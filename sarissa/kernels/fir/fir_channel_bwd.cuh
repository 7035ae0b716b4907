// The backward of hyena_fir with many taps where few channels share them, on tensor cores.
#pragma once

#include "sarissa/kernels/common/cuda.cuh"
#include "sarissa/kernels/fir/fir.h"
#include "sarissa/kernels/fir/fir_channel_bwd_plan.h"

namespace sarissa::kernels {

Status fir_channel_bwd(const FirBwdParams& p, const FirChannelBwd& plan, cudaStream_t stream);

}  // namespace sarissa::kernels
