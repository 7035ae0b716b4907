// The table of CUDA launch functions. libsarissa_cuda exports it, libsarissa loads that library
// when the machine has a GPU: neither links the other, and the kernels know nothing of torch.
#pragma once

#include "sarissa/kernels/common/status.h"
// One include per family.

namespace sarissa::kernels {

/// A member per launch function, same name. `stream` is a cudaStream_t.
struct CudaKernels {
};

}  // namespace sarissa::kernels

/// Exported by libsarissa_cuda; the table lives as long as the library.
extern "C" const sarissa::kernels::CudaKernels* sarissa_cuda_kernels();
