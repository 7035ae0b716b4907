// Backward of the FIR family for any shape. Sums over time are partial per chunk and added up in
// order: no atomics, the same bits every run. Few gated taps go to the march, many in bfloat16 to
// the tensor cores.
#include <variant>

#include "sarissa/kernels/fir/fir_channel_bwd.cuh"
#include "sarissa/kernels/fir/fir_cuda.cuh"
#include "sarissa/kernels/fir/fir_march.cuh"
#include "sarissa/kernels/fir/fir_tensor.cuh"
#include "sarissa/kernels/fir/fir_tensor_bwd.cuh"
#include "sarissa/kernels/fir/fir_tensor_long_bwd.cuh"

namespace sarissa::kernels {
namespace {

template <class T>
struct FirBwdDevice : FirDevice<T> {
  using C = device_compute_t<T>;
  const T* dy;
  int64_t dy_stride_b, dy_stride_l;
  const C* d_state_out;
  T* dx;
  C* d_state;
  C* d_taps;
  C* d_skip;
  C* dq;            // [B, L, D]
  C* dc;            // [B, L, 3D]
  C* taps_partial;  // [B * chunks + 1, W, D]
  int64_t chunk, chunks;

  explicit FirBwdDevice(const FirBwdParams& p)
      : FirDevice<T>(p),
        dy(static_cast<const T*>(p.dy)),
        dy_stride_b(p.dy_stride_b),
        dy_stride_l(p.dy_stride_l),
        d_state_out(static_cast<const C*>(p.d_state_out)),
        dx(static_cast<T*>(p.dx)),
        d_state(static_cast<C*>(p.d_state)),
        d_taps(static_cast<C*>(p.d_taps)),
        d_skip(static_cast<C*>(p.d_skip)),
        dq(static_cast<C*>(p.dq)),
        dc(static_cast<C*>(p.dc)),
        taps_partial(static_cast<C*>(p.taps_partial)),
        chunk(fir_gradient_chunk(p)),
        chunks(fir_gradient_chunks(p)) {}

  /// Sum of the partials of d_taps per channel, [W, D].
  __host__ __device__ C* taps_sum() const {
    return taps_partial + this->B * chunks * this->W * this->D;
  }
};

/// dq = post dy and, when gated, d_post = q dy.
template <class T>
__global__ void fir_bwd_output_kernel(FirBwdDevice<T> p) {
  using C = device_compute_t<T>;
  const int64_t tiles = ceil_div<int64_t>(p.L, kFirCudaTile);
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.B * tiles * p.D;
       i += step) {
    const int64_t d = i % p.D;
    const int64_t begin = i / p.D % tiles * kFirCudaTile;
    const int64_t b = i / p.D / tiles;
    C q[kFirCudaTile];
    if (p.featurizer != nullptr) p.filter(b, begin, d, q);
#pragma unroll
    for (int s = 0; s < kFirCudaTile; ++s) {
      const int64_t t = begin + s;
      if (t >= p.L) break;
      C dq = load(p.dy + b * p.dy_stride_b + t * p.dy_stride_l + d);
      if (p.featurizer != nullptr) {
        p.dc[(b * p.L + t) * 3 * p.D + d] = q[s] * dq;
        dq *= p.featurized(b, t, 0, d);
      }
      p.dq[(b * p.L + t) * p.D + d] = dq;
    }
  }
}

/// taps_partial[b, chunk, k, d] = sum over the chunk's steps of dq[t] u[t - k].
template <class T>
__global__ void fir_bwd_taps_kernel(FirBwdDevice<T> p) {
  using C = device_compute_t<T>;
  const int64_t per_chunk = p.W * p.D;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.B * p.chunks * per_chunk;
       i += step) {
    const int64_t d = i % p.D;
    const int64_t k = i / p.D % p.W;
    const int64_t chunk = i / per_chunk % p.chunks;
    const int64_t b = i / per_chunk / p.chunks;
    const int64_t begin = chunk * p.chunk;
    const int64_t end = begin + p.chunk < p.L ? begin + p.chunk : p.L;
    const C* dq = p.dq + b * p.L * p.D + d;
    const C* u = p.u + (b * (p.L + p.W - 1) + p.W - 1 - k) * p.D + d;
    C sum = 0;
    for (int64_t t = begin; t < end; ++t) sum += dq[t * p.D] * u[t * p.D];
    p.taps_partial[i] = sum;
  }
}

/// d_taps[g, k] = sum over the group's channels, in order; d_skip is each channel's tap 0.
template <class T>
__global__ void fir_sum_groups_kernel(FirBwdDevice<T> p) {
  using C = device_compute_t<T>;
  const C* per_channel = p.taps_sum();
  const int64_t channels = p.D / p.G;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.G * p.W; i += step) {
    const int64_t g = i / p.W;
    const int64_t k = i % p.W;
    C sum = 0;
    for (int64_t d = g * channels; d < (g + 1) * channels; ++d) {
      const C channel = per_channel[k * p.D + d];
      if (k == 0 && p.d_skip != nullptr) p.d_skip[d] = channel;
      sum += channel;
    }
    p.d_taps[i] = sum;
  }
}

/// du[t] = sum over k of taps[k] dq[t + k] for t >= -(W-1): the gradient of the state, then d_pre =
/// value du and d_value = pre du, or dx = du without gates.
template <class T>
__global__ void fir_bwd_input_kernel(FirBwdDevice<T> p) {
  using C = device_compute_t<T>;
  const int64_t history = p.W - 1;
  const int64_t rows = p.L + history;
  const int64_t tiles = ceil_div<int64_t>(rows, kFirCudaTile);
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.B * tiles * p.D;
       i += step) {
    const int64_t d = i % p.D;
    const int64_t begin = i / p.D % tiles * kFirCudaTile;  // row of u
    const int64_t b = i / p.D / tiles;
    const C* h = p.taps_of(d);
    const C* dq = p.dq + b * p.L * p.D + d;
    C du[kFirCudaTile] = {};
    for (int64_t k = 0; k < p.W; ++k) {
      const C tap = h[k] + (k == 0 && p.skip != nullptr ? p.skip[d] : C(0));
#pragma unroll
      for (int s = 0; s < kFirCudaTile; ++s) {
        const int64_t t = begin + s - history + k;
        if (t >= 0 && t < p.L) du[s] += tap * dq[t * p.D];
      }
    }
#pragma unroll
    for (int s = 0; s < kFirCudaTile; ++s) {
      const int64_t row = begin + s;
      const int64_t t = row - history;
      if (row >= rows) break;
      if (p.d_state_out != nullptr && row >= p.L) {
        du[s] += p.d_state_out[(b * history + row - p.L) * p.D + d];
      }
      if (t < 0) {
        if (p.d_state != nullptr) p.d_state[(b * history + row) * p.D + d] = du[s];
      } else if (p.featurizer != nullptr) {
        C* dc = p.dc + (b * p.L + t) * 3 * p.D + d;
        dc[p.D] = p.featurized(b, t, 2, d) * du[s];
        dc[2 * p.D] = p.featurized(b, t, 1, d) * du[s];
      } else {
        store(p.dx + (b * p.L + t) * p.D + d, du[s]);
      }
    }
  }
}

template <class T>
Status run(const FirBwdParams& params, cudaStream_t stream) {
  using C = device_compute_t<T>;
  const FirBwdDevice<T> p(params);
  fir_gate_launch(static_cast<const FirDevice<T>&>(p), stream);
  if (p.L > 0) {
    const int64_t items = p.B * ceil_div<int64_t>(p.L, kFirCudaTile) * p.D;
    fir_bwd_output_kernel<T><<<grid_of(items), 256, 0, stream>>>(p);
  }
  const int64_t partials = p.B * p.chunks;
  const int64_t taps = p.W * p.D;
  fir_bwd_taps_kernel<T><<<grid_of(partials * taps), 256, 0, stream>>>(p);
  sum_rows_kernel<C>
      <<<grid_of(taps), 256, 0, stream>>>(p.taps_partial, partials, taps, p.taps_sum());
  fir_sum_groups_kernel<T><<<grid_of(p.G * p.W), 256, 0, stream>>>(p);
  const int64_t tiles = ceil_div<int64_t>(p.L + p.W - 1, kFirCudaTile);
  if (tiles > 0) fir_bwd_input_kernel<T><<<grid_of(p.B * tiles * p.D), 256, 0, stream>>>(p);
  if (p.featurizer == nullptr) return launch_status("stages");
  const Status status = featurizer_bwd_launch<T>(
      {
          .batch = p.B,
          .length = p.L,
          .channels = 3 * p.D,
          .dc = p.dc,
          .z = p.x,
          .z_stride_b = p.x_stride_b,
          .z_stride_l = p.x_stride_l,
          .state = p.featurizer_state,
          .f = p.featurizer,
          .d_state_out = static_cast<const T*>(params.d_featurizer_state_out),
          .dz = p.dx,
          .d_state = static_cast<T*>(params.d_featurizer_state),
          .chunk = p.chunk,
          .d_f_partial = static_cast<C*>(params.featurizer_partial),
      },
      static_cast<C*>(params.d_featurizer), stream);
  return {status.error, "stages"};
}

/// How the first kernel that takes a problem takes it; none of them: the stages.
using FirBwdPlan =
    std::variant<std::monostate, FirMarch, FirTensorBwd, FirTensorLongBwd, FirChannelBwd>;

FirBwdPlan plan_of(const FirBwdParams& params, DType dtype) {
  if (const FirMarch plan = fir_march_bwd_plan(params, dtype)) return plan;
  if (const FirTensorBwd plan = fir_tensor_bwd_plan(params, dtype, shared_memory())) return plan;
  if (const FirTensorLongBwd plan = fir_tensor_long_bwd_plan(params, dtype, shared_memory())) {
    return plan;
  }
  if (const FirChannelBwd plan = fir_channel_bwd_plan(params, dtype, shared_memory())) return plan;
  return std::monostate();
}

/// One function for each plan, to visit a FirBwdPlan with.
template <class... F>
struct ForEach : F... {
  using F::operator()...;
};
template <class... F>
ForEach(F...) -> ForEach<F...>;

}  // namespace

bool fir_bwd_is_native_cuda(const FirBwdParams& params, DType dtype) {
  return !std::holds_alternative<std::monostate>(plan_of(params, dtype));
}

FirWorkspace fir_bwd_workspace_cuda(const FirBwdParams& params, DType dtype) {
  return std::visit(
      ForEach{
          [&](std::monostate) { return fir_workspace_cuda(params); },
          [&](const FirMarch& plan) { return fir_march_workspace(params, plan); },
          [&](const FirTensorBwd& plan) { return fir_tensor_bwd_workspace(params, plan); },
          [&](const FirTensorLongBwd& plan) { return fir_tensor_long_bwd_workspace(params, plan); },
          [&](const FirChannelBwd& plan) { return fir_channel_bwd_workspace(params, plan); },
      },
      plan_of(params, dtype));
}

Status fir_bwd_cuda(const FirBwdParams& params, DType dtype, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return std::visit(
      ForEach{
          [&](std::monostate) {
            return with_dtype(dtype, [&]<class T>() { return run<T>(params, s); });
          },
          [&](const FirMarch& plan) { return fir_march_bwd(params, plan, dtype, s); },
          [&](const FirTensorBwd& plan) { return fir_tensor_bwd(params, plan, s); },
          [&](const FirTensorLongBwd& plan) { return fir_tensor_long_bwd(params, plan, s); },
          [&](const FirChannelBwd& plan) { return fir_channel_bwd(params, plan, s); },
      },
      plan_of(params, dtype));
}

}  // namespace sarissa::kernels
