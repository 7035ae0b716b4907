#include "sarissa/kernels/common/cuda_rows.cuh"
#include "sarissa/kernels/norm/norm.h"

namespace sarissa::kernels {
namespace {

/// Both sums of a row travel through one reduction.
template <class C>
struct Pair {
  C squares, dot;
};

template <class C>
__device__ Pair<C> block_sum(Pair<C> x, Pair<C>* shared) {
  for (int offset = 16; offset > 0; offset /= 2) {
    x.squares += __shfl_xor_sync(0xffffffffu, x.squares, offset);
    x.dot += __shfl_xor_sync(0xffffffffu, x.dot, offset);
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  Pair<C> total = shared[0];
  for (unsigned w = 1; w < blockDim.x / 32; ++w) {
    total.squares += shared[w].squares;
    total.dot += shared[w].dot;
  }
  return total;
}

/// One block per run of rows. Channel d belongs to the same thread in every row, so that thread
/// adds up its weight gradient without atomics: in shared memory when the row fits (element i of
/// every pack side by side, so that a warp meets no bank twice), else in the workspace.
template <class T, int V>
__global__ void rms_norm_bwd_kernel(RmsNormBwdParams p, bool in_shared) {
  using C = compute_t<T>;
  __shared__ Pair<C> shared[32];
  extern __shared__ double dynamic_shared[];
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t step = int64_t{blockDim.x} * V;
  const int64_t part = blockIdx.x;
  C* partial = static_cast<C*>(p.partial) + part * p.width;
  C* dweight = in_shared ? reinterpret_cast<C*>(dynamic_shared) : partial;
  const int64_t pack_stride = in_shared ? 1 : V;
  const int64_t element_stride = in_shared ? p.width / V : 1;
  for (int64_t d = int64_t{threadIdx.x} * V; d < p.width; d += step) {
    for (int i = 0; i < V; ++i) dweight[d / V * pack_stride + i * element_stride] = 0;
  }
  const int64_t first = part * p.rows_per_part;
  const int64_t last = first + p.rows_per_part < p.rows ? first + p.rows_per_part : p.rows;
  for (int64_t n = first; n < last; ++n) {
    const T* dy = static_cast<const T*>(p.dy) + n * p.dy_row;
    const T* s = static_cast<const T*>(p.sum) + n * p.sum_row;
    Pair<C> sums{0, 0};
    for (int64_t d = int64_t{threadIdx.x} * V; d < p.width; d += step) {
      const auto g = load_pack<V>(dy + d), v = load_pack<V>(s + d), w = load_pack<V>(weight + d);
      for (int i = 0; i < V; ++i) {
        sums.squares += load(&v.values[i]) * load(&v.values[i]);
        sums.dot += load(&g.values[i]) * load(&w.values[i]) * load(&v.values[i]);
      }
    }
    sums = block_sum(sums, shared);
    const C r = C(1) / sqrt(sums.squares / C(p.width) + C(p.eps));
    const C pull = sums.dot * r * r / C(p.width);
    const T* dsum = p.dsum == nullptr ? nullptr : static_cast<const T*>(p.dsum) + n * p.dsum_row;
    T* dx = static_cast<T*>(p.dx) + n * p.width;
    for (int64_t d = int64_t{threadIdx.x} * V; d < p.width; d += step) {
      const auto g = load_pack<V>(dy + d), v = load_pack<V>(s + d), w = load_pack<V>(weight + d);
      Pack<T, V> upstream, out;
      if (dsum != nullptr) upstream = load_pack<V>(dsum + d);
      for (int i = 0; i < V; ++i) {
        const C add = dsum != nullptr ? load(&upstream.values[i]) : C(0);
        const C gi = load(&g.values[i]), vi = load(&v.values[i]);
        store(&out.values[i], add + r * (gi * load(&w.values[i]) - vi * pull));
        dweight[d / V * pack_stride + i * element_stride] += gi * vi * r;
      }
      store_pack(dx + d, out);
    }
    __syncthreads();  // shared is used again by the next row
  }
  if (in_shared) {
    for (int64_t d = int64_t{threadIdx.x} * V; d < p.width; d += step) {
      for (int i = 0; i < V; ++i) partial[d + i] = dweight[d / V + i * element_stride];
    }
  }
}

/// 32 channels a block; slice y of 32 adds the runs y, y + 32, ..., then slice 0 adds the slices.
template <class T>
__global__ void rms_norm_bwd_weight_kernel(RmsNormBwdParams p) {
  using C = compute_t<T>;
  __shared__ C slices[32][32];
  const int64_t d = int64_t{blockIdx.x} * 32 + threadIdx.x;
  C total = 0;
  if (d < p.width) {
    const C* partial = static_cast<const C*>(p.partial) + d;
    for (int64_t part = threadIdx.y; part < p.parts; part += 32) total += partial[part * p.width];
  }
  slices[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || d >= p.width) return;
  for (int y = 1; y < 32; ++y) total += slices[y][threadIdx.x];
  store(static_cast<T*>(p.dweight) + d, total);
}

template <class T, int V>
Status launch(const RmsNormBwdParams& p, cudaStream_t stream) {
  constexpr int64_t kSharedBytes = 40 * 1024;  // of the 48 KiB that need no opt-in
  const int64_t bytes = p.width * static_cast<int64_t>(sizeof(compute_t<T>));
  const bool in_shared = bytes <= kSharedBytes;
  const int threads = p.width <= 1024 * V / 4 ? 128 : p.width <= 4096 * V ? 256 : 512;
  rms_norm_bwd_kernel<T, V>
      <<<static_cast<unsigned>(p.parts), threads, in_shared ? bytes : 0, stream>>>(p, in_shared);
  return launch_status();
}

template <class T>
Status launch_weight(const RmsNormBwdParams& p, void* stream) {
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(p.width, 32));
  rms_norm_bwd_weight_kernel<T><<<blocks, dim3(32, 32), 0, static_cast<cudaStream_t>(stream)>>>(p);
  return launch_status();
}

template <class T>
Status dispatch(const RmsNormBwdParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const bool packs = packs_fit<T>({p.dy, p.dsum, p.sum, p.weight, p.dx},
                                  {p.width, p.dy_row, p.dsum_row, p.sum_row});
  return packs ? launch<T, kPackWidth<T>>(p, s) : launch<T, 1>(p, s);
}

}  // namespace

Status rms_norm_bwd_cuda(const RmsNormBwdParams& params, DType dtype, void* stream) {
  if (params.rows == 0 || params.width == 0) return {};
  return with_dtype(dtype, [&]<class T>() { return dispatch<T>(params, stream); });
}

Status rms_norm_bwd_weight_cuda(const RmsNormBwdParams& params, DType dtype, void* stream) {
  if (params.width == 0) return {};
  return with_dtype(dtype, [&]<class T>() { return launch_weight<T>(params, stream); });
}

}  // namespace sarissa::kernels
