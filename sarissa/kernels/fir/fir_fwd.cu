// Forward of the FIR family for any shape: u is stored with its history, then each thread sums the
// taps for a few steps of one channel. Few gated taps go to the march, many to the tensor cores.
#include "sarissa/kernels/fir/fir_channel.cuh"
#include "sarissa/kernels/fir/fir_cuda.cuh"
#include "sarissa/kernels/fir/fir_march.cuh"
#include "sarissa/kernels/fir/fir_step.cuh"
#include "sarissa/kernels/fir/fir_tensor.cuh"

namespace sarissa::kernels {
namespace {

template <class T>
__global__ void fir_fwd_kernel(FirDevice<T> p) {
  using C = device_compute_t<T>;
  const int64_t tiles = ceil_div<int64_t>(p.L, kFirCudaTile);
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.B * tiles * p.D;
       i += step) {
    const int64_t d = i % p.D;
    const int64_t begin = i / p.D % tiles * kFirCudaTile;
    const int64_t b = i / p.D / tiles;
    C q[kFirCudaTile];
    p.filter(b, begin, d, q);
#pragma unroll
    for (int s = 0; s < kFirCudaTile; ++s) {
      const int64_t t = begin + s;
      if (t >= p.L) break;
      const C post = p.featurizer != nullptr ? p.featurized(b, t, 0, d) : C(1);
      store(p.y + (b * p.L + t) * p.D + d, post * q[s]);
    }
  }
}

template <class T>
Status run(const FirParams& params, cudaStream_t stream) {
  const FirDevice<T> p(params);
  fir_gate_launch(p, stream);
  if (p.L > 0) {
    const int64_t items = p.B * ceil_div<int64_t>(p.L, kFirCudaTile) * p.D;
    fir_fwd_kernel<T><<<grid_of(items), 256, 0, stream>>>(p);
  }
  return launch_status("stages");
}

}  // namespace

Status fir_fwd_cuda(const FirParams& params, DType dtype, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (const FirStep plan = fir_step_plan(params, dtype)) return fir_step(params, plan, dtype, s);
  if (const FirMarch plan = fir_march_fwd_plan(params, dtype)) {
    return fir_march_fwd(params, plan, dtype, s);
  }
  if (fir_tensor_takes(params, dtype)) {
    return fir_tensor_fwd(params, fir_tensor_fwd_plan(params, dtype, shared_memory()), s);
  }
  if (fir_channel_takes(params, dtype)) {
    return fir_channel_fwd(params, fir_channel_fwd_plan(params, dtype, shared_memory()), s);
  }
  return with_dtype(dtype, [&]<class T>() { return run<T>(params, s); });
}

}  // namespace sarissa::kernels
