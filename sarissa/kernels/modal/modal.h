// The modal (diagonal, real-pole) convolution and Hyena-LI, which puts gates around it. README.md
// has the mathematics with the letters used here.
//
// "Compute type" is float for float and bfloat16 elements, double for double. Every buffer is
// contiguous in the shape given, except that u (z) has strides between batch entries and steps.
// "Native" kernels (on a GPU, where modal_plan.h says so) take the featurizer and the skip, and
// give their gradients, as the operator has them.
#pragma once

#include <cstdint>

#include "sarissa/kernels/common/dtype.h"
#include "sarissa/kernels/common/status.h"

namespace sarissa::kernels {

/// What the forward and the backward read. Sizes in elements.
struct ModalInputs {
  int64_t batch = 0;   // B
  int64_t length = 0;  // L
  int64_t width = 0;   // D
  int64_t groups = 0;  // G, divides D
  int64_t modes = 0;   // N

  const void* u = nullptr;  // [B, L, D]; gated: z [B, L, 3D], thirds [post-gate | pre-gate | value]
  int64_t u_batch_stride = 0;
  int64_t u_time_stride = 0;
  const void* featurizer = nullptr;  // [3, 3D], tap-major, compute type; null: not gated;
                                     // native: [3D, 3]
  const void* log_poles = nullptr;   // [G, N] compute type
  const void* residues = nullptr;    // [G, N] compute type
  const void* skip = nullptr;        // [D] compute type; null: no skip term
  bool featurizer_is_T = false, skip_is_T = false;  // native: of the element type
  const void* featurizer_state = nullptr;  // [B, 2, 3D] element type; given when gated; native:
                                           // may be null for zeros
  const void* state = nullptr;             // [B, D, N] compute type; null: zeros

  bool gated() const { return featurizer != nullptr; }
};

struct ModalFwdParams {
  ModalInputs in;
  void* y = nullptr;                     // [B, L, D] element type
  void* featurizer_state_out = nullptr;  // [B, 2, 3D] element type; gated only
  void* state_out = nullptr;             // [B, D, N] compute type
  /// States for the backward (modal_plan.h has the layout); null: not wanted.
  void* saved = nullptr;
  /// CPU: modal_fwd_workspace_cpu() bytes for each call that runs at the same time, aligned to 64.
  /// CUDA: modal_fwd_workspace_cuda() bytes.
  void* workspace = nullptr;
};

struct ModalBwdParams {
  ModalInputs in;
  const void* dy = nullptr;  // [B, L, D] element type, channels contiguous
  int64_t dy_batch_stride = 0;
  int64_t dy_time_stride = 0;
  const void* dfeaturizer_state_out = nullptr;  // [B, 2, 3D] element type; null: zeros
  const void* dstate_out = nullptr;             // [B, D, N] compute type; null: zeros
  const void* saved = nullptr;                  // what the forward saved, or null; native: given

  void* du = nullptr;                 // [B, L, D], gated: [B, L, 3D]; element type
  void* dfeaturizer_state = nullptr;  // [B, 2, 3D] element type; gated only
  void* dstate = nullptr;             // [B, D, N] compute type
  // Parameter gradients, one partial sum per batch entry and channel, compute type.
  void* dlog_poles_BND = nullptr;   // [B, N, D]
  void* dresidues_BND = nullptr;    // [B, N, D]
  void* dskip_BD = nullptr;         // [B, D]
  void* dfeaturizer_BKC = nullptr;  // [B, 3, 3D], tap-major; gated only
  // Their sums in index order, compute type; written by modal_sum_*.
  // Native kernels need only these, and write those of skip and featurizer in their types.
  void* dlog_poles = nullptr;   // [G, N]
  void* dresidues = nullptr;    // [G, N]
  void* dskip = nullptr;        // [D]
  void* dfeaturizer = nullptr;  // [3, 3D], tap-major, native: [3D, 3]; gated only
  /// As in ModalFwdParams, from modal_bwd_workspace_*.
  void* workspace = nullptr;
};

/// Number of independent work items of a CPU call: batch entries x tiles of neighbouring channels.
int64_t modal_items_cpu(const ModalInputs& in, DType dtype);
int64_t modal_fwd_workspace_cpu(const ModalInputs& in, DType dtype);
int64_t modal_bwd_workspace_cpu(const ModalInputs& in, DType dtype);

/// Work items [begin, end) of the forward.
Status modal_fwd_cpu(const ModalFwdParams& params, DType dtype, int64_t begin, int64_t end);
/// Work items [begin, end) of the backward: everything but the sums over batch and group.
Status modal_bwd_cpu(const ModalBwdParams& params, DType dtype, int64_t begin, int64_t end);
/// The sums over batch entries and over the channels of each group, in index order.
Status modal_sum_cpu(const ModalBwdParams& params, DType dtype);

/// Whether the kernel that takes the problem on the current GPU is native: it reads the featurizer,
/// its state and the skip as the operator has them.
bool modal_fwd_is_native_cuda(const ModalInputs& in, DType dtype);
/// Likewise for a backward with what the forward saved; dy, the states of the featurizer and their
/// gradients then begin at multiples of 16 bytes, and so do the rows of dy.
bool modal_bwd_is_native_cuda(const ModalInputs& in, DType dtype);
int64_t modal_fwd_workspace_cuda(const ModalInputs& in, DType dtype);
/// `params` with everything but the workspace.
int64_t modal_bwd_workspace_cuda(const ModalBwdParams& params, DType dtype);
/// `stream` is a cudaStream_t.
Status modal_fwd_cuda(const ModalFwdParams& params, DType dtype, void* stream);
/// The backward and the sums.
Status modal_bwd_cuda(const ModalBwdParams& params, DType dtype, void* stream);

}  // namespace sarissa::kernels
