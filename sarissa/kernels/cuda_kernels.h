// The table of CUDA launch functions. libsarissa_cuda exports it, libsarissa loads that library
// when the machine has a GPU: neither links the other, and the kernels know nothing of torch.
#pragma once

#include "sarissa/kernels/common/status.h"
// One include per family.
#include "sarissa/kernels/fir/fir.h"
#include "sarissa/kernels/glu/glu.h"
#include "sarissa/kernels/loss/loss.h"
#include "sarissa/kernels/modal/modal.h"
#include "sarissa/kernels/norm/norm.h"
#include "sarissa/kernels/rope/rope.h"
#include "sarissa/kernels/swr/swr.h"

namespace sarissa::kernels {

/// A member per launch function, same name. `stream` is a cudaStream_t.
struct CudaKernels {
  decltype(&cross_entropy_fwd_cuda) cross_entropy_fwd = nullptr;
  decltype(&cross_entropy_bwd_cuda) cross_entropy_bwd = nullptr;
  decltype(&fir_fwd_cuda) fir_fwd = nullptr;
  decltype(&fir_bwd_is_native_cuda) fir_bwd_is_native = nullptr;
  decltype(&fir_bwd_workspace_cuda) fir_bwd_workspace = nullptr;
  decltype(&fir_bwd_cuda) fir_bwd = nullptr;
  decltype(&glu_fwd_cuda) glu_fwd = nullptr;
  decltype(&glu_bwd_cuda) glu_bwd = nullptr;
  decltype(&modal_fwd_is_native_cuda) modal_fwd_is_native = nullptr;
  decltype(&modal_bwd_is_native_cuda) modal_bwd_is_native = nullptr;
  decltype(&modal_fwd_workspace_cuda) modal_fwd_workspace = nullptr;
  decltype(&modal_bwd_workspace_cuda) modal_bwd_workspace = nullptr;
  decltype(&modal_fwd_cuda) modal_fwd = nullptr;
  decltype(&modal_bwd_cuda) modal_bwd = nullptr;
  decltype(&rms_norm_fwd_cuda) rms_norm_fwd = nullptr;
  decltype(&rms_norm_bwd_cuda) rms_norm_bwd = nullptr;
  decltype(&rms_norm_bwd_weight_cuda) rms_norm_bwd_weight = nullptr;
  decltype(&rope_cuda) rope = nullptr;
  decltype(&swr_fwd_cuda) swr_fwd = nullptr;
  decltype(&swr_bwd_cuda) swr_bwd = nullptr;
};

}  // namespace sarissa::kernels

/// Exported by libsarissa_cuda; the table lives as long as the library.
extern "C" const sarissa::kernels::CudaKernels* sarissa_cuda_kernels();
