#include "sarissa/kernels/common/cuda.cuh"
#include "sarissa/kernels/rope/rope.h"

namespace sarissa::kernels {
namespace {

/// Cosine and sine of step * inv_freq. The float version reduces to half turns in double, so large
/// positions lose nothing.
__device__ void angle_of(double step, double inv_freq, double* cosine, double* sine) {
  sincos(step * inv_freq, sine, cosine);
}
__device__ void angle_of(double step, double inv_freq, float* cosine, float* sine) {
  constexpr double kInversePi = 0.31830988618379067154;
  const double half_turns = step * inv_freq * kInversePi;
  sincospif(static_cast<float>(half_turns - 2.0 * rint(0.5 * half_turns)), sine, cosine);
}

/// One thread per batch row, step and pair; it walks over the heads with the same angle.
template <class T>
__global__ void rope_kernel(RopeParams p) {
  using C = compute_t<T>;
  const int64_t total = p.batch * p.length * p.pairs;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t d = i % p.pairs, row = i / p.pairs;
    const int64_t t = row % p.length, b = row / p.length;
    C cosine, sine;
    angle_of(p.direction * (p.position + static_cast<double>(t)) / p.scale,
             static_cast<double>(p.inv_freq[d]), &cosine, &sine);
    const T* x = static_cast<const T*>(p.x) + b * p.x_batch + t * p.x_step + d;
    T* y = static_cast<T*>(p.y) + row * p.heads * 2 * p.pairs + d;
#pragma unroll 4
    for (int64_t h = 0; h < p.heads; ++h) {
      const C low = load(x + h * p.x_head), high = load(x + h * p.x_head + p.pairs);
      store(y + h * 2 * p.pairs, low * cosine - high * sine);
      store(y + h * 2 * p.pairs + p.pairs, high * cosine + low * sine);
    }
  }
}

template <class T>
Status launch(const RopeParams& p, void* stream) {
  constexpr int kThreads = 128;
  const int64_t blocks = ceil_div<int64_t>(p.batch * p.length * p.pairs, kThreads);
  rope_kernel<T><<<static_cast<unsigned>(blocks < (1 << 20) ? blocks : (1 << 20)), kThreads, 0,
                   static_cast<cudaStream_t>(stream)>>>(p);
  return launch_status();
}

}  // namespace

Status rope_cuda(const RopeParams& params, DType dtype, void* stream) {
  if (params.batch * params.length * params.heads * params.pairs == 0) return {};
  return with_dtype(dtype, [&]<class T>() { return launch<T>(params, stream); });
}

}  // namespace sarissa::kernels
