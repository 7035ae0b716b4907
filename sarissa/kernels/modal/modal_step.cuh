// One step of hyena_modal (L = 1), as decoding takes it.
#pragma once

#include "sarissa/kernels/common/cuda.cuh"
#include "sarissa/kernels/modal/modal.h"

namespace sarissa::kernels {

Status modal_step(const ModalFwdParams& p, DType dtype, cudaStream_t stream);

}  // namespace sarissa::kernels
