#include "sarissa/kernels/cuda_kernels.h"

extern "C" const sarissa::kernels::CudaKernels* sarissa_cuda_kernels() {
  static const sarissa::kernels::CudaKernels table{
  };
  return &table;
}
