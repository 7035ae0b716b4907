#include "sarissa/kernels/common/cuda_rows.cuh"
#include "sarissa/kernels/loss/loss.h"

namespace sarissa::kernels {
namespace {

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }

/// Sum of exponentials relative to the highest logit so far.
template <class C>
struct Partial {
  C highest, sum;
};

template <class C>
__device__ Partial<C> combine(Partial<C> a, Partial<C> b) {
  if (a.sum == C(0)) return b;  // nothing seen yet: highest is -inf
  if (b.sum == C(0)) return a;
  const C highest = a.highest > b.highest ? a.highest : b.highest;
  return {highest, a.sum * exp_of(a.highest - highest) + b.sum * exp_of(b.highest - highest)};
}

template <class C>
__device__ Partial<C> block_combine(Partial<C> x, Partial<C>* shared) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const Partial<C> other{__shfl_down_sync(0xffffffffu, x.highest, offset),
                           __shfl_down_sync(0xffffffffu, x.sum, offset)};
    x = combine(x, other);
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  Partial<C> total = shared[0];
  for (unsigned w = 1; w < blockDim.x / 32; ++w) total = combine(total, shared[w]);
  return total;
}

/// One block per row, one pass over it.
template <class T, int V>
__global__ void cross_entropy_fwd_kernel(CrossEntropyParams p) {
  using C = compute_t<T>;
  __shared__ Partial<C> shared[32];
  for (int64_t n = blockIdx.x; n < p.rows; n += gridDim.x) {
    const T* logits = static_cast<const T*>(p.logits) + n * p.logits_row;
    const int64_t target = p.targets[n];
    C* loss = static_cast<C*>(p.loss) + n;
    if (target < 0 || target >= p.classes) {  // the same for the whole block
      if (threadIdx.x == 0) *loss = target == kIgnoreTarget ? C(0) : C(NAN);
      continue;
    }
    Partial<C> mine{C(-INFINITY), C(0)};
    for (int64_t v = int64_t{threadIdx.x} * V; v < p.classes; v += int64_t{blockDim.x} * V) {
      const auto pack = load_pack<V>(logits + v);
      C highest = load(&pack.values[0]);
      for (int k = 1; k < V; ++k) {
        const C x = load(&pack.values[k]);
        highest = x > highest ? x : highest;
      }
      // Logits of -inf add nothing; -inf - -inf would be NaN.
      if (highest == C(-INFINITY)) continue;
      C sum = 0;
      for (int k = 0; k < V; ++k) sum += exp_of(load(&pack.values[k]) - highest);
      mine = combine(mine, {highest, sum});
    }
    const Partial<C> row = block_combine(mine, shared);
    if (threadIdx.x == 0) *loss = row.highest + log_of(row.sum) - load(logits + target);
    __syncthreads();  // shared is used again by the next row
  }
}

template <class T, int V>
__global__ void cross_entropy_bwd_kernel(CrossEntropyParams p) {
  using C = compute_t<T>;
  for (int64_t n = blockIdx.x; n < p.rows; n += gridDim.x) {
    const T* logits = static_cast<const T*>(p.logits) + n * p.logits_row;
    T* dlogits = static_cast<T*>(p.dlogits) + n * p.classes;
    const int64_t target = p.targets[n];
    const bool valid = target >= 0 && target < p.classes;
    const C dloss = static_cast<const C*>(p.dloss)[n];
    const C log_sum = valid ? static_cast<const C*>(p.loss)[n] + load(logits + target) : C(0);
    const C fill = target == kIgnoreTarget ? C(0) : C(NAN);
    for (int64_t v = int64_t{threadIdx.x} * V; v < p.classes; v += int64_t{blockDim.x} * V) {
      auto pack = load_pack<V>(logits + v);
      for (int k = 0; k < V; ++k) {
        const C softmax = exp_of(load(&pack.values[k]) - log_sum);
        store(&pack.values[k], valid ? dloss * (v + k == target ? softmax - C(1) : softmax) : fill);
      }
      store_pack(dlogits + v, pack);
    }
  }
}

inline int threads_for(const CrossEntropyParams& p, int pack) {
  return p.classes <= 256 * pack ? 64 : p.classes <= 2048 * pack ? 256 : 512;
}

inline unsigned blocks_for(const CrossEntropyParams& p) {
  return static_cast<unsigned>(p.rows < 0x7fffffff ? p.rows : 0x7fffffff);
}

template <class T, int V>
Status launch_fwd(const CrossEntropyParams& p, cudaStream_t stream) {
  cross_entropy_fwd_kernel<T, V><<<blocks_for(p), threads_for(p, V), 0, stream>>>(p);
  return launch_status();
}

template <class T, int V>
Status launch_bwd(const CrossEntropyParams& p, cudaStream_t stream) {
  cross_entropy_bwd_kernel<T, V><<<blocks_for(p), threads_for(p, V), 0, stream>>>(p);
  return launch_status();
}

template <class T>
Status fwd(const CrossEntropyParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return packs_fit<T>({p.logits}, {p.classes, p.logits_row}) ? launch_fwd<T, kPackWidth<T>>(p, s)
                                                             : launch_fwd<T, 1>(p, s);
}

template <class T>
Status bwd(const CrossEntropyParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return packs_fit<T>({p.logits, p.dlogits}, {p.classes, p.logits_row})
             ? launch_bwd<T, kPackWidth<T>>(p, s)
             : launch_bwd<T, 1>(p, s);
}

}  // namespace

Status cross_entropy_fwd_cuda(const CrossEntropyParams& params, DType dtype, void* stream) {
  if (params.rows == 0) return {};
  return with_dtype(dtype, [&]<class T>() { return fwd<T>(params, stream); });
}

Status cross_entropy_bwd_cuda(const CrossEntropyParams& params, DType dtype, void* stream) {
  if (params.rows == 0) return {};
  return with_dtype(dtype, [&]<class T>() { return bwd<T>(params, stream); });
}

}  // namespace sarissa::kernels
