// The FIR family: fir (y = taps * u) and hyena_fir (Hyena-SE, Hyena-MR: featurizer, pre-gate, FIR,
// skip, post-gate). See README.md for the maths; the letters are the same.
#pragma once

#include <cstdint>

#include "sarissa/kernels/common/dtype.h"
#include "sarissa/kernels/common/status.h"

namespace sarissa::kernels {

/// One problem. T is the element type of x and y, C the arithmetic type (double for double, else
/// float). Gated when `featurizer` is not null: then x is z [B, L, 3D], thirds [post | pre |
/// value], N = 3D; else x is u [B, L, D], N = D. Strides count elements; channels are contiguous.
/// Everything without strides is contiguous. B, D > 0; L >= 0; W > 0; G divides D.
///
/// "Native" below: on a GPU, where fir_fwd_is_native or fir_bwd_is_native_cuda say so. Such kernels
/// take parameters, and give their gradients, as the operator has them.
struct FirParams {
  int64_t batch, length, width, groups, num_taps;  // B, L, D, G, W
  const void* x;                                   // T [B, L, N]
  int64_t x_stride_b, x_stride_l;
  const void* featurizer;        // C [3, 3D], native: [3D, 3]; tap 0 = current step; null for fir
  const void* featurizer_state;  // T [B, 2, 3D], the rows before z, oldest first; null for fir;
                                 // native: may be null for zeros
  const void* taps;              // C [G, W], tap k multiplies u[t - k]
  const void* skip;              // C [D] or null
  bool featurizer_is_T, taps_is_T, skip_is_T;  // native: of type T, and the gradients too
  const void* state;           // C [B, W-1, D], the u before step 0, oldest first; null: zeros
  void* y;                     // T [B, L, D]
  void* state_out;             // C [B, W-1, D], the last u; may be null
  void* featurizer_state_out;  // T [B, 2, 3D]; native only; may be null

  // Workspace in C; fir_plan.h gives the sizes and layouts.
  void* u;            // u with its history, W-1+L rows
  void* packed_taps;  // CPU only: taps per channel, skip added to tap 0
};

/// The backward: recomputes u and q from the inputs above (y, state_out are not read). Gradients of
/// the outputs come in, null for zero; gradients of the inputs go out, null where not wanted.
struct FirBwdParams : FirParams {
  const void* dy;  // T [B, L, D]
  int64_t dy_stride_b, dy_stride_l;
  const void* d_featurizer_state_out;  // T [B, 2, 3D] or null
  const void* d_state_out;             // C [B, W-1, D] or null

  void* dx;                  // T [B, L, N]
  void* d_featurizer_state;  // T [B, 2, 3D]; not null when gated; native: may be null
  void* d_state;             // C [B, W-1, D] or null
  void* d_featurizer;        // C [3, 3D], native: [3D, 3]; not null when gated
  void* d_taps;              // C [G, W]
  void* d_skip;              // C [D] or null

  // Workspace in C; fir_plan.h and the plans of the backward (fir_*_bwd_plan.h) give the sizes and
  // layouts.
  void* dq;                  // gradient of q
  void* dc;                  // gated: gradient of the featurizer's output (CPU: of its post third)
  void* taps_partial;        // d_taps per channel and time chunk; march: fir_march_workspace
  void* featurizer_partial;  // gated: d_featurizer per time chunk
};

/// CPU: each function is one stage over independent items [begin, end) of fir_plan.h's counts; a
/// stage starts after the one before it has ended. Forward: pack_taps, gate, fwd. Backward:
/// pack_taps, gate, bwd_output, bwd_taps, sum_taps, sum_groups, bwd_input, then, when gated,
/// bwd_featurizer, sum_featurizer. No result depends on how items are split among threads.
using FirStage = Status(const FirParams&, DType, int64_t begin, int64_t end);
using FirBwdStage = Status(const FirBwdParams&, DType, int64_t begin, int64_t end);
FirStage fir_pack_taps_cpu;          // packed_taps
FirStage fir_gate_cpu;               // u, state_out
FirStage fir_fwd_cpu;                // y
FirBwdStage fir_bwd_output_cpu;      // dq, dc
FirBwdStage fir_bwd_taps_cpu;        // taps_partial
FirBwdStage fir_sum_taps_cpu;        // taps_partial: its chunks summed into chunk 0
FirBwdStage fir_sum_groups_cpu;      // d_taps, d_skip
FirBwdStage fir_bwd_input_cpu;       // du (overwrites u), d_state; fir: dx
FirBwdStage fir_bwd_featurizer_cpu;  // dx, d_featurizer_state, featurizer_partial
FirBwdStage fir_sum_featurizer_cpu;  // d_featurizer

/// CUDA: all stages on `stream` (a cudaStream_t).
Status fir_fwd_cuda(const FirParams& params, DType dtype, void* stream);
Status fir_bwd_cuda(const FirBwdParams& params, DType dtype, void* stream);

/// Whether the kernel that takes a backward on the current device is native, and its workspace
/// (fir_plan.h). They look at the alignment of x and dy, and whether there are states and gradients
/// of states that go out.
struct FirWorkspace;
bool fir_bwd_is_native_cuda(const FirBwdParams& params, DType dtype);
FirWorkspace fir_bwd_workspace_cuda(const FirBwdParams& params, DType dtype);

}  // namespace sarissa::kernels
