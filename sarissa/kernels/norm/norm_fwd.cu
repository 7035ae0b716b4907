#include "sarissa/kernels/common/cuda_rows.cuh"
#include "sarissa/kernels/norm/norm.h"

namespace sarissa::kernels {
namespace {

/// One block per row; the second read of the row comes from cache.
template <class T, int V>
__global__ void rms_norm_fwd_kernel(RmsNormFwdParams p) {
  using C = compute_t<T>;
  __shared__ C shared[32];
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t step = int64_t{blockDim.x} * V;
  for (int64_t n = blockIdx.x; n < p.rows; n += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + n * p.x_row;
    const T* s = x;
    C squares = 0;
    if (p.residual == nullptr) {
      for (int64_t d = int64_t{threadIdx.x} * V; d < p.width; d += step) {
        const auto a = load_pack<V>(x + d);
        for (int i = 0; i < V; ++i) squares += load(&a.values[i]) * load(&a.values[i]);
      }
    } else {
      const T* residual = static_cast<const T*>(p.residual) + n * p.residual_row;
      T* sum = static_cast<T*>(p.sum) + n * p.width;
      for (int64_t d = int64_t{threadIdx.x} * V; d < p.width; d += step) {
        auto a = load_pack<V>(x + d);
        const auto b = load_pack<V>(residual + d);
        for (int i = 0; i < V; ++i) {
          store(&a.values[i], load(&a.values[i]) + load(&b.values[i]));
          squares += load(&a.values[i]) * load(&a.values[i]);
        }
        store_pack(sum + d, a);
      }
      s = sum;  // each thread reads back what it wrote
    }
    const C total = block_reduce(squares, shared, [](C a, C b) { return a + b; });
    const C r = C(1) / sqrt(total / C(p.width) + C(p.eps));
    T* y = static_cast<T*>(p.y) + n * p.width;
    for (int64_t d = int64_t{threadIdx.x} * V; d < p.width; d += step) {
      auto a = load_pack<V>(s + d);
      const auto w = load_pack<V>(weight + d);
      for (int i = 0; i < V; ++i) {
        store(&a.values[i], load(&a.values[i]) * r * load(&w.values[i]));
      }
      store_pack(y + d, a);
    }
    __syncthreads();  // shared is used again by the next row
  }
}

template <class T, int V>
Status launch(const RmsNormFwdParams& p, cudaStream_t stream) {
  const int threads = p.width <= 1024 * V / 4 ? 128 : p.width <= 4096 * V ? 256 : 512;
  const auto blocks = static_cast<unsigned>(p.rows < 0x7fffffff ? p.rows : 0x7fffffff);
  rms_norm_fwd_kernel<T, V><<<blocks, threads, 0, stream>>>(p);
  return launch_status();
}

template <class T>
Status dispatch(const RmsNormFwdParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const bool packs =
      packs_fit<T>({p.x, p.residual, p.weight, p.sum, p.y}, {p.width, p.x_row, p.residual_row});
  return packs ? launch<T, kPackWidth<T>>(p, s) : launch<T, 1>(p, s);
}

}  // namespace

Status rms_norm_fwd_cuda(const RmsNormFwdParams& params, DType dtype, void* stream) {
  if (params.rows == 0 || params.width == 0) return {};
  return with_dtype(dtype, [&]<class T>() { return dispatch<T>(params, stream); });
}

}  // namespace sarissa::kernels
