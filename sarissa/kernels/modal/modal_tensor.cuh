// What the tensor core kernels of hyena_modal share: the modes of a channel as their tables are
// made of them. modal_plan.h has the layout of the states that the forward saves for the backward.
//
// Time is cut into blocks of kModalBlock steps. With u of a block as a vector, a block needs three
// products (README.md): its end state from zero, its local outputs, and the outputs of the state
// that enters it. States pass from block to block in float.
#pragma once

#include "sarissa/kernels/common/tensor.cuh"
#include "sarissa/kernels/modal/modal.cuh"
#include "sarissa/kernels/modal/modal_plan.h"

namespace sarissa::kernels {

/// Steps of a block.
constexpr int kModalBlock = 16;

/// lambda^k for k >= 0, good to a few 2^-24 (1 + |log(lambda^k)|); lambda may be 0.
__device__ inline float modal_power(float log_pole, int k) {
  constexpr float kLog2e = 1.4426950408889634f;
  return k == 0 ? 1.0f : exp2f(log_pole * kLog2e * static_cast<float>(k));
}

/// One mode of a channel.
struct ModalMode {
  float log_pole;  // natural logarithm of lambda
  float residue;
  bool there;  // false: the problem has fewer modes

  __device__ ModalMode(const ModalInputs& in, int64_t channel, int n) {
    const int64_t i = at(in, channel, n);
    there = n < in.modes;
    log_pole = there ? static_cast<const float*>(in.log_poles)[i] : 0.0f;
    residue = there ? static_cast<const float*>(in.residues)[i] : 0.0f;
  }

  /// Where it is, in the poles and residues.
  __device__ static int64_t at(const ModalInputs& in, int64_t channel, int n) {
    // The kernels' widths have 32 bits, whose division is short.
    const auto of_group = static_cast<uint32_t>(in.width) / static_cast<uint32_t>(in.groups);
    return static_cast<uint32_t>(channel) / of_group * in.modes + n;
  }

  /// lambda^k in double.
  __device__ double exact_power(int k) const {
    return k == 0 ? 1.0 : exp(static_cast<double>(log_pole) * k);
  }
};

/// Element `at` of the featurizer or the skip.
__device__ inline float modal_parameter(const void* p, bool is_bf16, int64_t at) {
  return is_bf16 ? load(static_cast<const __nv_bfloat16*>(p) + at)
                 : static_cast<const float*>(p)[at];
}

/// x = high + low up to 2^-49 of x.
struct FloatPair {
  float high, low;
  __device__ explicit FloatPair(double x)
      : high(static_cast<float>(x)), low(static_cast<float>(x - static_cast<double>(high))) {}
};

/// How many clusters of `ranks` CTAs of the forward run at once on this GPU.
int modal_tensor_fwd_clusters(int ranks);
/// Whether this GPU has the shared memory that the plan needs.
bool modal_tensor_fwd_runs(const ModalTensorFwd& plan);
Status modal_tensor_fwd(const ModalFwdParams& p, const ModalTensorFwd& plan, cudaStream_t stream);

}  // namespace sarissa::kernels
