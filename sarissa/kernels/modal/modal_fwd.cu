#include "sarissa/kernels/modal/modal.cuh"
#include "sarissa/kernels/modal/modal_plan.h"
#include "sarissa/kernels/modal/modal_step.cuh"
#include "sarissa/kernels/modal/modal_tensor.cuh"

namespace sarissa::kernels {
namespace {

constexpr int kModesTogether = 4;
constexpr int kSteps = 16;  // in registers

/// y of steps t .. t + kCount - 1; the states [N] (distance D) move on.
template <int kCount, class T>
__device__ void fwd_steps(const ModalChannel<T>& channel, int64_t t, device_compute_t<T>* states,
                          T* y) {
  using C = device_compute_t<T>;
  C u[kCount], q[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    u[i] = channel.u(t + i);
    q[i] = channel.skip * u[i];
  }
  for_modes<kModesTogether>(channel.modes, [&]<int M>(int64_t n) {
    Modes<M, T> modes(channel, n, states);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        modes.s[m] = recur(modes.high[m], modes.low[m], modes.s[m], u[i]);
        q[i] = fused(modes.residue[m], modes.s[m], q[i]);
      }
    }
    modes.store(channel, n, states);
  });
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const C gate = channel.gated ? channel.c(kPost, t + i) : C{1};
    store(y + (t + i) * channel.width, gate * q[i]);
  }
}

/// Saves the states before step t for a tensor core backward.
template <class T>
__device__ void save_states(const ModalFwdParams& p, const ModalChannel<T>& channel, int64_t t,
                            const device_compute_t<T>* states) {
  const int64_t entries = ceil_div<int64_t>(p.in.length, kModalSavedSteps);
  auto* const to =
      static_cast<float*>(p.saved) +
      ((channel.b * entries + t / kModalSavedSteps) * channel.width + channel.channel) *
          kModalTensorModes;
  for (int64_t n = 0; n < kModalTensorModes; ++n) {
    to[n] = n < channel.modes ? static_cast<float>(states[n * channel.width]) : 0.0f;
  }
}

template <class T>
__global__ void __launch_bounds__(kModalThreads, 1)
    modal_fwd_kernel(ModalFwdParams p, ModalTables<device_compute_t<T>> tables,
                     device_compute_t<T>* states_BND) {
  using C = device_compute_t<T>;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       index < p.in.batch * p.in.width; index += step) {
    const ModalChannel<T> channel(p.in, tables, index);
    const C* state_in = static_cast<const C*>(p.in.state);
    C* states = states_BND + channel.at_BND();
    for (int64_t n = 0; n < channel.modes; ++n) {
      states[n * channel.width] = state_in ? state_in[channel.at_BDN() + n] : C{0};
    }
    T* y = static_cast<T*>(p.y) + channel.b * p.in.length * channel.width + channel.channel;
    int64_t t = 0;
    for (; t + kSteps <= p.in.length; t += kSteps) {
      if (p.saved != nullptr && t % kModalSavedSteps == 0) save_states(p, channel, t, states);
      fwd_steps<kSteps>(channel, t, states, y);
    }
    if (p.saved != nullptr && t % kModalSavedSteps == 0 && t < p.in.length) {
      save_states(p, channel, t, states);
    }
    for (; t < p.in.length; ++t) fwd_steps<1>(channel, t, states, y);
    C* state_out = static_cast<C*>(p.state_out) + channel.at_BDN();
    for (int64_t n = 0; n < channel.modes; ++n) state_out[n] = states[n * channel.width];
    if (!channel.gated) continue;
    for (int third = 0; third < 3; ++third) {
      for (int64_t r = 0; r < 2; ++r) {
        store(static_cast<T*>(p.featurizer_state_out) +
                  ((channel.b * 2 + r) * 3 + third) * channel.width + channel.channel,
              channel.columns[third].at(p.in.length - 2 + r));
      }
    }
  }
}

template <class T>
Status launch(const ModalFwdParams& p, cudaStream_t stream) {
  using C = device_compute_t<T>;
  C* workspace = static_cast<C*>(p.workspace);
  const ModalTables<C> tables = make_modal_tables(p.in, workspace, stream);
  modal_fwd_kernel<T><<<modal_grid(p.in), kModalThreads, 0, stream>>>(p, tables, workspace);
  return launch_status();
}

/// The plan of the tensor core kernel, where it takes the problem and this GPU can run it.
ModalTensorFwd tensor_plan(const ModalInputs& in, DType dtype) {
  const ModalTensorFwd plan =
      modal_tensor_fwd_plan(in, dtype, multiprocessors(), modal_tensor_fwd_clusters);
  return plan && modal_tensor_fwd_runs(plan) ? plan : ModalTensorFwd{};
}

}  // namespace

bool modal_fwd_is_native_cuda(const ModalInputs& in, DType dtype) {
  return modal_step_takes(in, dtype) || tensor_plan(in, dtype);
}

int64_t modal_fwd_workspace_cuda(const ModalInputs& in, DType dtype) {
  if (modal_step_takes(in, dtype) || tensor_plan(in, dtype)) return 0;
  const int64_t states = in.batch * in.modes * in.width;
  return dtype == DType::kFloat64
             ? modal_tables_bytes<double>(in) + states * int64_t{sizeof(double)}
             : modal_tables_bytes<float>(in) + states * int64_t{sizeof(float)};
}

Status modal_fwd_cuda(const ModalFwdParams& params, DType dtype, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (modal_step_takes(params.in, dtype)) return modal_step(params, dtype, s);
  if (const ModalTensorFwd plan = tensor_plan(params.in, dtype)) {
    return modal_tensor_fwd(params, plan, s);
  }
  return with_dtype(dtype, [&]<class T>() { return launch<T>(params, s); });
}

}  // namespace sarissa::kernels
