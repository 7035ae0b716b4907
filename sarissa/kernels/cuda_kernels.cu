#include "sarissa/kernels/cuda_kernels.h"

extern "C" const sarissa::kernels::CudaKernels* sarissa_cuda_kernels() {
  static const sarissa::kernels::CudaKernels table{
      .cross_entropy_fwd = &sarissa::kernels::cross_entropy_fwd_cuda,
      .cross_entropy_bwd = &sarissa::kernels::cross_entropy_bwd_cuda,
      .fir_fwd = &sarissa::kernels::fir_fwd_cuda,
      .fir_bwd_is_native = &sarissa::kernels::fir_bwd_is_native_cuda,
      .fir_bwd_workspace = &sarissa::kernels::fir_bwd_workspace_cuda,
      .fir_bwd = &sarissa::kernels::fir_bwd_cuda,
      .glu_fwd = &sarissa::kernels::glu_fwd_cuda,
      .glu_bwd = &sarissa::kernels::glu_bwd_cuda,
      .modal_fwd_is_native = &sarissa::kernels::modal_fwd_is_native_cuda,
      .modal_bwd_is_native = &sarissa::kernels::modal_bwd_is_native_cuda,
      .modal_fwd_workspace = &sarissa::kernels::modal_fwd_workspace_cuda,
      .modal_bwd_workspace = &sarissa::kernels::modal_bwd_workspace_cuda,
      .modal_fwd = &sarissa::kernels::modal_fwd_cuda,
      .modal_bwd = &sarissa::kernels::modal_bwd_cuda,
      .rms_norm_fwd = &sarissa::kernels::rms_norm_fwd_cuda,
      .rms_norm_bwd = &sarissa::kernels::rms_norm_bwd_cuda,
      .rms_norm_bwd_weight = &sarissa::kernels::rms_norm_bwd_weight_cuda,
      .rope = &sarissa::kernels::rope_cuda,
      .swr_fwd = &sarissa::kernels::swr_fwd_cuda,
      .swr_bwd = &sarissa::kernels::swr_bwd_cuda,
  };
  return &table;
}
